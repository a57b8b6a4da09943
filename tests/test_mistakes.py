"""Every foreseeable mistake: one clear line with the remedy, exit code 2, and nothing left behind."""

from pathlib import Path

import pytest
import torch
from support.fabricate import fabricate
from support.runs import refused

import clip
import clip.download
from clip.model import CLIP, Architecture
from clip.weights import save_weights

QUICK = ("--shots", 1, "--total_iters", 3)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--dataset", "dtd"], ["--root_path"]),
        (["--dataset", "cifar"], ["cifar", "dtd", "digits"]),
        (["--dataset", "DTD"], ["meant dtd?"]),
        (["--method", "Tip-Adapter"], ["meant tip_adapter?"]),
        (["--precision", "fp23"], ["meant fp32?"]),
        (["--method", "sgd"], ["sgd", "zero_shot"]),
        (["--position", "top9"], ["top9", "half-up"]),
        (["--position", "top3"], ["top3", "2 of a tower", "--position all"]),
        (["--position", "bottom", "--encoder", "text"], ["bottom", "--position all"]),
        (["--backbone", "ViT-Z/99"], ["ViT-Z/99", "ViT-B/16", "tiny"]),
        (["--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["--shots", "0"], ["--shots", "at least 1"]),
        (["--shots", "1000000000"], ["--shots", "at most"]),
        (["--shots", "many"], ["--shots", "many"]),
        (["--lr", "nan"], ["--lr", "above 0"]),
        (["--s", "1"], ["density_ratio", "above 0 and at most 1"]),
        (["--s", "0.9", "--density_ratio", "0.1"], ["s and density_ratio"]),
        (["--save_every", "-1"], ["--save_every"]),
        (["--n_iter", "5"], ["--n_iter 5", "--n_iters"]),
        (["--totl_iters=5"], ["--total_iters"]),
        (["--learning_rate", "1"], ["unknown", "--learning_rate 1; see"]),
        (["digits"], ["digits", "--help"]),
        (["--config", "missing.yaml"], ["missing.yaml", "No such file"]),
        (["--eval_only"], ["--eval_only", "--save_path"]),
        (["--eval_only", "--save_path", "nowhere"], ["nowhere", "so.safetensors"]),
        (["--filename", "a/b"], ["--filename", "--save_path"]),
        (["--save_path", ""], ["--save_path"]),
        ([*QUICK, "--lr", "1e38"], ["nan", "--lr"]),
    ],
)
def test_bad_arguments(run_main, argv, words):
    line = refused(run_main(*argv))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rate: 1\n", ["learning_rate"]),
        ("densityratio: 1\n", ["densityratio", "density_ratio"]),
        ("shots: several\n", ["shots", "int", "several"]),
        ("flip: 3\n", ["flip", "bool"]),
        ("results_dir: null\n", ["results_dir", "str"]),
        ("lr: true\n", ["lr", "float"]),
        ("method: sgd\n", ["method", "so, ", ", zero_shot"]),
        ("shots: [\n", ["c.yaml", "YAML"]),
        ("- shots\n", ["c.yaml", "name: value"]),
        ("methods: [so]\n", ["c.yaml", "sweep.py --grid"]),
        ("seeds: [1]\n", ["c.yaml", "sweep.py --grid"]),
        ("s: 0.9\ndensity_ratio: 0.1\n", ["s and density_ratio"]),
        ("n_iters: 5\nepochs: 1\n", ["n_iters and epochs"]),
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
    return (*QUICK, "--dataset", "dtd", "--root_path", "data", "--backbone", "tiny"), images


def test_missing_data(run_main, dtd):
    flags, _ = dtd
    assert "nowhere" in refused(run_main(*flags, "--root_path", "nowhere"), ["data"])
    line = refused(run_main(*flags, "--dataset", "food101"), ["data"])
    assert "food-101" in line and "Food101" in line


@pytest.mark.parametrize("size, workers", [(None, 0), (0, 0), (200, 2)])
def test_missing_and_damaged_images_are_named(run_main, dtd, size, workers):
    flags, images = dtd
    for image in images.rglob("*.jpg"):  # whichever is read first
        image.unlink() if size is None else image.write_bytes(image.read_bytes()[:size])
    for method in ("so", "zero_shot"):
        own = flags if method == "so" else flags[:2] + flags[4:]  # it has no iterations
        assert ".jpg" in refused(run_main(*own, "--workers", workers, "--method", method), ["data"])


def test_damaged_weights(run_main):
    save_weights(clip.load("tiny")[0], "w.safetensors")
    whole = Path("w.safetensors").read_bytes()
    Path("w.safetensors").write_bytes(whole[:1000])
    Path("w.pt").write_bytes(b"not weights")
    for name in ("w.safetensors", "w.pt"):
        assert name in refused(run_main("--backbone", name), ["w.pt", "w.safetensors"])


def test_weights_that_cannot_be_downloaded(run_main, monkeypatch):
    monkeypatch.setattr(clip.download, "PREFIX", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(clip.download, "CACHE", Path("cache"))
    assert "ViT-B-16.pt" in refused(run_main("--backbone", "ViT-B/16"))


def test_a_resnet_has_no_attention_in_its_image_tower(run_main):
    arch = Architecture(
        64, 32, 16, (1, 1, 1, 1), None, context_length=77, vocab_size=49408, text_width=64, text_layers=1
    )
    save_weights(CLIP(arch), "rn.safetensors")
    flags = ("--backbone", "rn.safetensors", "--arch", "openai")
    for method in ("lora", "dora"):
        assert "--encoder text" in refused(run_main(*flags, "--method", method), ["rn.safetensors"])
    code, record, _, _ = run_main(*QUICK, *flags, "--encoder", "text")
    assert code == 0 and record["trainable_weights"] == 12 * 64**2


def test_saved_weights_of_another_backbone_are_rejected(run_main):
    run_main(*QUICK, "--save_path", "saved")
    model, _ = clip.load("tiny")
    with torch.no_grad():
        model.logit_scale += 1
    save_weights(model, "tiny.safetensors")
    words = (*QUICK, "--save_path", "saved", "--backbone", "tiny.safetensors", "--eval_only")
    line = refused(run_main(*words), ["results", "saved", "tiny.safetensors"])
    assert "so.safetensors" in line and "base weights" in line


def test_places_that_cannot_be_written(run_main):
    Path("file").write_text("in the way")
    for flag in ("--results_dir", "--save_path"):
        call = run_main(*QUICK, flag, "file/folder")
        assert "file" in refused(call, ["file"]) and "zero-shot" not in call[2], "found out only after the work"
