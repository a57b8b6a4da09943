"""Every foreseeable mistake: one clear line with the remedy, exit code 2, and nothing left behind."""

import errno
from pathlib import Path

import pytest
import torch
from support.fabricate import fabricate
from support.runs import refused

import clip
import clip.download
import run_utils
from clip.model import CLIP, Architecture
from clip.weights import save_weights

QUICK = ("--shots", 1, "--total_iters", 3, "--workers", 0)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--dataset", "dtd"], ["--root_path"]),
        (["--dataset", "cifar"], ["cifar", "dtd", "digits"]),
        (["--method", "sgd"], ["sgd", "zero_shot"]),
        (["--position", "top9"], ["top9", "half-up"]),
        (["--position", "top3"], ["top3", "2 of a tower", "--position all"]),
        (["--position", "bottom", "--encoder", "text"], ["bottom", "--position all"]),
        (["--backbone", "ViT-Z/99"], ["ViT-Z/99", "ViT-B/16", "tiny"]),
        (["--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--shots", "0"], ["--shots", "at least 1"]),
        (["--shots", "many"], ["--shots", "many"]),
        (["--lr", "nan"], ["--lr", "positive"]),
        (["--lr", "-1"], ["--lr", "positive"]),
        (["--s", "1"], ["density_ratio", "(0, 1]"]),
        (["--s", "0.9", "--density_ratio", "0.1"], ["s and density_ratio", "one of them"]),
        (["--t", "0"], ["--t", "at least 1"]),
        (["--min_area", "0"], ["--min_area"]),
        (["--batch_size", "0"], ["--batch_size"]),
        (["--n_iter", "5"], ["--n_iter 5", "meant --n_iters?"]),
        (["--totl_iters=5"], ["meant --total_iters?"]),
        (["--learning_rate", "1"], ["unknown argument --learning_rate 1; see"]),
        (["digits"], ["digits", "--help"]),
        (["--config", "missing.yaml"], ["missing.yaml", "No such file"]),
        (["--eval_only"], ["--eval_only", "--save_path"]),
        (["--eval_only", "--save_path", "nowhere"], ["nowhere", "so.safetensors"]),
        (["--filename", "a/b"], ["--filename", "plain name"]),
        (["--save_path", ""], ["--save_path", "empty"]),
        (["--shots", "1000000000"], ["--shots", "at most"]),
    ],
)
def test_bad_arguments(run_main, argv, words):
    line = refused(run_main(*argv))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rate: 1\n", ["learning_rate", "unknown setting"]),
        ("densityratio: 1\n", ["densityratio", "meant density_ratio?"]),
        ("shots: several\n", ["shots", "int", "several"]),
        ("shots: 1.5\n", ["shots", "int"]),
        ("flip: 3\n", ["flip", "bool"]),
        ("results_dir: null\n", ["results_dir", "str"]),
        ("lr: true\n", ["lr", "float"]),
        ("method: sgd\n", ["method", "so, ", ", zero_shot"]),
        ("shots: [\n", ["not valid YAML"]),
        ("- shots\n", ["name: value"]),
        ("s: 0.9\ndensity_ratio: 0.1\n", ["s and density_ratio"]),
    ],
)
def test_bad_config_files(run_main, text, words):
    Path("c.yaml").write_text(text)
    line = refused(run_main("--config", "c.yaml"), before=["c.yaml"])
    assert all(word in line for word in words), line


@pytest.fixture
def dtd(run_main):
    """Arguments of a run on a fabricated DTD, and the folder of its images."""
    images = fabricate("dtd", Path("data"))
    flags = (*QUICK, "--dataset", "dtd", "--root_path", "data", "--backbone", "tiny")
    return flags, images


def test_missing_data(run_main, dtd):
    flags, _ = dtd
    assert "nowhere" in refused(run_main(*flags, "--root_path", "nowhere"), ["data"])
    line = refused(run_main(*flags, "--dataset", "food101"), ["data"])
    assert "food-101" in line and "Food101" in line
    split = next(Path("data").rglob("split_zhou_*.json"))
    content = split.read_text()
    split.write_text(content[:100])
    assert split.name in refused(run_main(*flags), ["data"])
    split.unlink()
    assert split.name in refused(run_main(*flags), ["data"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_damaged_images_are_named(run_main, dtd, damage, workers):
    flags, images = dtd
    for image in images.rglob("*.jpg"):  # whichever is read first
        if damage == "missing":
            image.unlink()
        else:
            image.write_bytes(image.read_bytes()[: 0 if damage == "empty" else 200])
    line = refused(run_main(*flags, "--workers", workers), ["data"])
    assert ".jpg" in line
    line = refused(run_main(*flags, "--workers", workers, "--method", "zero_shot"), ["data"])
    assert ".jpg" in line


def test_damaged_weights(run_main):
    model, _ = clip.load("tiny")
    save_weights(model, "w.safetensors")
    whole = Path("w.safetensors").read_bytes()
    Path("w.safetensors").write_bytes(whole[:1000])
    assert "w.safetensors" in refused(run_main("--backbone", "w.safetensors"), ["w.safetensors"])
    Path("w.pt").write_bytes(b"not weights")
    assert "w.pt" in refused(run_main("--backbone", "w.pt"), ["w.pt", "w.safetensors"])


def test_weights_that_cannot_be_downloaded(run_main, monkeypatch):
    monkeypatch.setattr(clip.download, "PREFIX", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(clip.download, "CACHE", Path("cache"))
    line = refused(run_main("--backbone", "ViT-B/16"), ["cache"])
    assert "could not download" in line and "ViT-B-16.pt" in line
    assert not list(Path("cache").glob("*.pt"))


def test_resnet_has_no_blocks_in_its_image_tower(run_main):
    arch = Architecture(
        embed_dim=64,
        resolution=32,
        vision_width=16,
        vision_layers=(1, 1, 1, 1),
        patch_size=None,
        context_length=77,
        vocab_size=49408,
        text_width=64,
        text_layers=1,
    )
    save_weights(CLIP(arch), "rn.safetensors")
    line = refused(run_main("--backbone", "rn.safetensors"), ["rn.safetensors"])
    assert "--encoder text" in line
    code, record, _, _ = run_main(*QUICK, "--backbone", "rn.safetensors", "--encoder", "text")
    assert code == 0 and record["trainable_weights"] == 12 * 64**2


def test_delta_of_other_weights_is_refused(run_main):
    flags = (*QUICK, "--save_path", "saved")
    run_main(*flags)
    model, _ = clip.load("tiny")
    with torch.no_grad():
        model.logit_scale += 1
    save_weights(model, "tiny.safetensors")
    line = refused(
        run_main(*flags, "--backbone", "tiny.safetensors", "--eval_only", "--results_dir", "r2"),
        ["results", "saved", "tiny.safetensors"],
    )
    assert "other base weights" in line


def test_divergence_stops_the_run(run_main):
    line = refused(run_main(*QUICK, "--lr", "1e38"))
    assert "nan" in line and "--lr" in line


def test_places_that_cannot_be_written(run_main):
    Path("file").write_text("in the way")
    assert "file" in refused(run_main(*QUICK, "--results_dir", "file/results"), ["file"])
    code, _, out, err = run_main(*QUICK, "--save_path", "file/saved")
    assert code == 2 and "file" in err and "zero-shot" not in out, "found out only after the work"
    assert [p.name for p in Path(".").iterdir()] == ["file"]


def test_no_space(run_main, monkeypatch):
    def full(path, text):
        if path.name == "result.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    write = run_utils.write_atomically
    monkeypatch.setattr(run_utils, "write_atomically", full)
    assert "No space left on device" in refused(run_main(*QUICK))


def test_unforeseen_errors_keep_their_traceback_and_leave_nothing(run_main, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(clip, "weights_sha256", broken)
    with pytest.raises(ZeroDivisionError):
        run_main(*QUICK)
    assert not list(Path(".").iterdir())


@pytest.mark.parametrize(
    "argv, unused",
    [
        (["--method", "zero_shot", "--lr", "1", "--s", "0.9", "--shots", "1"], "--lr, --s"),
        (["--method", "linear_probe", "--epochs", "1", "--probe_iters", "1", "--shots", "1"], "--epochs"),
        (["--rank", "4", "--total_iters", "1", "--shots", "1"], "--rank"),
        (["--t", "4", "--total_iters", "1", "--shots", "1"], None),
    ],
)
def test_a_flag_that_the_method_has_no_use_for_is_named(run_main, argv, unused):
    code, record, _, err = run_main(*argv)
    assert code == 0
    notes = [line for line in err.splitlines() if "has no use for" in line]
    assert notes == ([] if unused is None else [f"note: the method {record['method']} has no use for {unused}"])
