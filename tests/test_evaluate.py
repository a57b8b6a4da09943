"""scripts/evaluate.py: saved weights on other folders and manifests."""

import itertools
import shutil
from pathlib import Path

import pandas as pd
import pytest
from support.fabricate import picture
from support.runs import call
from test_contracts import quick

from scripts import evaluate

CLASSES = ("house_hen", "red fox", "seal")
OWN = ("--dataset", "folder", "--root_path", "photos", "--backbone", "tiny")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights of SO and of a head trained on photos/, the records, and other data beside them."""
    folder = tmp_path_factory.mktemp("own")
    for label, name in enumerate(CLASSES):
        for number in range(12):
            path = folder / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(label, 100 * label + number).save(path)
    return folder


@pytest.fixture
def weights(trained, run_main, monkeypatch):
    def do(method: str) -> tuple[str, dict]:
        monkeypatch.chdir(trained)
        code, record, _, err = run_main(*quick(method), *OWN, "--save_path", f"w_{method}", "--results_dir", "results")
        assert code == 0, err
        (file,) = Path(f"w_{method}").rglob("*.safetensors")
        return str(file), record

    return do


def run(*flags) -> tuple[int, pd.DataFrame | None, str]:
    Path("t.csv").unlink(missing_ok=True)
    code, _, _, err = call(evaluate.main, *flags, "--out", "t.csv")
    return code, pd.read_csv("t.csv") if Path("t.csv").exists() else None, err


@pytest.mark.parametrize("method", ["so", "gda", "lora"])
def test_the_run_s_own_test_images_give_its_own_numbers(weights, method):
    file, record = weights(method)
    rows = pd.read_csv(Path("results", record["run_id"], "predictions.csv"))
    labels = sorted(CLASSES)
    table = pd.DataFrame({"path": rows["path"], "class": [labels[label] for label in rows["label"]], "part": "test"})
    table.to_csv("photos/of_test.csv", index=False)
    code, found, err = run("--weights", file, "--data", "photos/of_test.csv")
    assert code == 0, err
    for name in ("macro_accuracy", "nll", "brier", "ece", "zero_shot_accuracy"):
        assert found[name].item() == record[name], name
    assert found["accuracy"].item() == record["test_accuracy"] and found["images"].item() == len(rows)
    assert "trained on" not in err
    Path("photos/of_test.csv").unlink()
    code, found, err = run("--weights", file, "--data", "photos")
    assert code == 0 and "note: photos: the weights were trained on" in err and found["images"].item() == 36


def test_of_a_folder_with_parts_only_those_not_trained_on_are_tested_silently(run_main):
    for part, number, (label, name) in itertools.product(("Train", "val", "test"), range(4), enumerate(CLASSES)):
        path = Path("parts", part, name, f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(label, 100 * label + number).save(path)
    shutil.copytree("parts/Train", "elsewhere")
    flags = (*quick("so"), "--dataset", "folder", "--root_path", "parts", "--backbone", "tiny", "--save_path", "w")
    assert run_main(*flags)[0] == 0
    (file,) = Path("w").rglob("*.safetensors")
    for data, trained_on in (("parts", False), ("parts/test", False), ("parts/Train", True), ("elsewhere", False)):
        code, _, err = run("--weights", file, "--data", data)
        assert code == 0 and ("trained on" in err) == trained_on, (data, err)


def test_folders_of_other_shapes_at_once(weights):
    file, _ = weights("so")
    for source, target in (("Seal", "two/Seal"), ("red fox", "two/red_fox"), ("seal", "parts/test/seal")):
        shutil.copytree(Path("photos", source.lower()), target, dirs_exist_ok=True)
    shutil.copytree("photos/red fox", "parts/test/red fox", dirs_exist_ok=True)
    for name in ("seal", "red fox"):
        shutil.copytree(Path("photos", name), Path("both/test", name), dirs_exist_ok=True)
        shutil.copytree(Path("photos", name), Path("both/train", name), dirs_exist_ok=True)
    code, found, err = run("--weights", file, "--data", "two", "parts", "both", "photos")
    assert code == 0, err
    assert found["images"].tolist() == [24, 24, 24, 36] and set(found["classes"]) == {3}
    assert found["accuracy"].nunique() <= 2 and found["accuracy"][0] == found["accuracy"][1] == found["accuracy"][2]


def test_other_classes(weights):
    so, head = weights("so")[0], weights("gda")[0]
    for name in ("cat", "seal"):
        shutil.copytree("photos/seal", Path("others", name), dirs_exist_ok=True)
    code, found, err = run("--weights", so, "--data", "others")
    assert code == 2 and found is None and "'cat'" in err and "--own_classes" in err
    code, found, _ = run("--weights", so, "--data", "others", "--own_classes")
    assert code == 0 and found["classes"].item() == 2
    code, found, err = run("--weights", head, "--data", "others", "--own_classes")
    assert code == 2 and found is None and head in err


@pytest.mark.parametrize("data", ["nowhere", "empty"])
def test_data_that_are_not_there(weights, data):
    file, _ = weights("so")
    Path("empty").mkdir(exist_ok=True)
    code, found, err = run("--weights", file, "--data", data)
    assert code == 2 and found is None and data in err
