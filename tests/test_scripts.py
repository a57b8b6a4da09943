"""The scripts run: set-up in an environment that is ready, and the tiny CLIP's training."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clip
from scripts import train_tiny_clip

PROJECT = Path(__file__).parent.parent
FONTS = [family for family in train_tiny_clip.FAMILIES if family[0] in ("matplotlib", "font_caladea")][1:]


@pytest.fixture
def ready_environment(tmp_path):
    """A folder that looks to environment.sh like an environment with everything installed, and is this Python's."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    (venv / "bin" / "activate").write_text(f'PATH="{venv}/bin:$PATH"\n')
    wanted = "".join(f.read_text() for f in sorted(PROJECT.glob("requirements*.txt"))).rstrip("\n") + "\n"
    for name in ("requirements", "requirements-all"):
        (venv / f"installed-{name}.txt").write_text(wanted)
    return os.environ | {"VENV": str(venv)}


def test_quick_start_reuses_the_environment_and_runs_the_main_job(tmp_path, ready_environment):
    flags = ["--shots", "1", "--total_iters", "2", "--results_dir", tmp_path / "results", "--cache_dir", tmp_path]
    command = ["bash", PROJECT / "scripts" / "quickstart.sh", *flags]
    done = subprocess.run(command, env=ready_environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "installing" not in done.stdout and "->  so" in done.stdout
    assert (tmp_path / "results" / "results.csv").is_file()


def test_reproduce_gives_the_page_on_the_digits_in_processes_of_its_own(tmp_path, ready_environment):
    out = tmp_path / "out"
    flags = ["--quick", "--out", out, "--parts", "main", "--methods", "so_paper", "--seeds", "1"]
    command = ["bash", PROJECT / "scripts" / "reproduce.sh", *flags, "--cache_dir", tmp_path]
    done = subprocess.run(command, env=ready_environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 run: 1 done" in done.stdout and "error" not in done.stderr
    assert "quick: " in (out / "report" / "tables.md").read_text()


def test_an_old_python_is_rejected_with_the_remedy(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environment = os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": str(old)}
    command = ["bash", PROJECT / "scripts" / "quickstart.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Python 3.10" in done.stderr and not (tmp_path / "venv").exists()


def test_requirement_files_include_each_other_and_all_fonts_are_there():
    every = (PROJECT / "requirements-all.txt").read_text()
    assert (
        "-r requirements.txt\n" in every
        and "-r requirements-all.txt\n" in (PROJECT / "requirements-dev.txt").read_text()
    )
    for package, pattern in train_tiny_clip.FAMILIES:
        assert package.replace("_", "-") in every
        folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
        assert list(folder.glob(pattern)), package


def test_the_tiny_clip_is_trained_from_a_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny_clip, "FAMILIES", FONTS)  # all of them take seconds
    files = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")]
    for file, seed in zip(files, (0, 0, 1)):
        train_tiny_clip.main(["--steps", "2", "--batch_size", "8", "--seed", str(seed), "--out", str(file)])
    a, b, c = (file.read_bytes() for file in files)
    assert a == b != c
    model, _ = clip.load(files[0])
    assert model.arch == clip.load("tiny")[0].arch
    assert model.logit_scale.exp() > 14 and all(p.isfinite().all() for p in model.parameters())


def test_images_of_the_tiny_clips_training_show_what_their_captions_say(monkeypatch):
    monkeypatch.setattr(train_tiny_clip, "FAMILIES", FONTS)
    batches = train_tiny_clip.Images(torch.Generator().manual_seed(0))
    images, captions, characters = batches.batch(64)
    assert images.shape == (64, 3, 32, 32) and captions.shape == (64, 77)
    for caption, character in zip(captions, characters):
        assert any(torch.equal(caption, possible) for possible in batches.captions[character])
    share_of_digits = (batches.weight * (batches.characters < 10)).sum() / batches.weight.sum()
    assert share_of_digits == pytest.approx(0.5)
    words = clip.tokenizer.tokenizer().decode(batches.captions[7][0].tolist())
    assert "seven" in words
