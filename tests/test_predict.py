"""scripts/predict.py: the same answers as in the run that saved the weights, from that file alone."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from support.fabricate import picture
from support.runs import call
from test_contracts import SAVING, quick

import clip
from clip.weights import save_weights
from scripts import predict

CLASSES = ("red fox", "house hen", "seal")
OWN = ("--dataset", "folder", "--root_path", "photos", "--backbone", "tiny", "--image_cache_mb", 0)
TIED = (
    "zs_lp",
    "clap",
    "taskres",
    "lp_plus_plus",
    "cross_modal",
    "linear_probe",
    "tip_adapter",
    "tip_adapter_f",
    "gda",
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images, among them one that must be turned."""
    folder = tmp_path_factory.mktemp("own")
    for label, name in enumerate(CLASSES):
        for number in range(16):
            path = folder / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(label, 100 * label + number).save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, 999, (40, 20)).save(folder / "photos" / CLASSES[0] / "turned.jpg", exif=exif)
    return folder


def run_predict(*flags) -> tuple[int, str]:
    code, _, _, err = call(predict.main, *flags)
    return code, err


def saved(run_main, photos, method: str, monkeypatch) -> tuple[Path, pd.DataFrame]:
    """Do a short run of a method; return its weight file and its predictions."""
    monkeypatch.chdir(photos)
    flags = (*quick(method), *OWN, "--save_path", f"w_{method}", "--results_dir", f"r_{method}")
    code, record, _, err = run_main(*flags)
    assert code == 0, err
    (weights,) = Path(f"w_{method}").rglob("*.safetensors")
    return weights, pd.read_csv(Path(f"r_{method}", record["run_id"], "predictions.csv"), dtype=str)


@pytest.mark.parametrize("method", SAVING)
def test_a_weight_file_alone_predicts_as_its_run_did(run_main, photos, method, monkeypatch, tmp_path):
    weights, expected = saved(run_main, photos, method, monkeypatch)
    shutil.copy(weights, tmp_path / "alone.safetensors")
    images = [str(photos / "photos" / path) for path in expected["path"]]
    monkeypatch.chdir(tmp_path)
    code, err = run_predict("--weights", "alone.safetensors", "--images", *images, "--out", "out.csv")
    assert code == 0, err
    found = pd.read_csv("out.csv", dtype=str)
    assert found["path"].tolist() == images
    assert [sorted(CLASSES).index(name) for name in found["class"]] == expected["predicted"].astype(int).tolist()
    assert found["probability"].tolist() == expected["probability"].tolist()
    total = sum(found[name].astype(float) for name in ("probability", "probability_2", "probability_3"))
    assert total.to_numpy() == pytest.approx(1, abs=1e-4)

    Path("names.txt").write_text("cat\ndog\nowl\ncow\n")
    code, err = run_predict(
        "--weights", "alone.safetensors", "--images", *images, "--out", "o.csv", "--classnames", "names.txt"
    )
    assert (code, "alone.safetensors" in err) == ((2, True) if method in TIED else (0, False)), err
    if code == 0:
        assert set(pd.read_csv("o.csv")["class"]) <= {"cat", "dog", "owl", "cow"}


def test_folders_files_and_a_page(run_main, photos, monkeypatch):
    weights, _ = saved(run_main, photos, "so", monkeypatch)
    Path("photos/notes.txt").write_text("x")
    Path("photos/.hidden").mkdir(exist_ok=True)
    shutil.copy("photos/seal/1.png", "photos/.hidden/1.png")
    code, err = run_predict(
        "--weights", weights, "--images", "photos/seal", "photos", "--out", "o.csv", "--html", "p.html"
    )
    assert code == 0 and "1 file" in err
    assert len(pd.read_csv("o.csv")) == 16 + 49
    page = Path("p.html").read_text()
    assert page.count("<img") == 65 and "http" not in page and "red fox" in page


MISTAKES = {
    "no weights": (("--weights", "none.safetensors", "--images", "photos"), "none.safetensors"),
    "no images": (("--weights", "W", "--images", "nowhere"), "nowhere"),
    "empty": (("--weights", "W", "--images", "empty"), "empty"),
    "damaged": (("--weights", "W", "--images", "bad.jpg"), "bad.jpg"),
    "no run's": (("--weights", "other.safetensors", "--images", "photos"), "other.safetensors"),
    "another backbone": (
        ("--weights", "W", "--images", "photos", "--backbone", "other.safetensors", "--arch", "openai"),
        "W",
    ),
    "no output": (("--weights", "W", "--images", "photos"), "--out"),
}


@pytest.mark.parametrize(("flags", "named"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(run_main, photos, flags, named, monkeypatch):
    weights, _ = saved(run_main, photos, "lora", monkeypatch)
    Path("empty").mkdir(exist_ok=True)
    Path("bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    model, _ = clip.load("tiny")
    model.logit_scale.data += 1
    save_weights(model, "other.safetensors")
    flags = [str(weights) if flag == "W" else flag for flag in flags]
    named = str(weights) if named == "W" else named
    out = () if named == "--out" else ("--out", "never.csv")
    code, err = run_predict(*flags, *out)
    assert code == 2 and named in err and not Path("never.csv").exists()
