"""The scripts run: set-up in an environment that is ready, the tiny CLIP's training, the choice of settings."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import clip
import datasets
import run_utils
import train
from datasets.digits import split_digits

PROJECT = Path(__file__).parent.parent


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, PROJECT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ready_environment(tmp_path):
    """A folder that looks to environment.sh like an environment with everything installed, and is this Python's."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    (venv / "bin" / "activate").write_text(f'PATH="{venv}/bin:$PATH"\n')
    wanted = "".join(f.read_text() for f in sorted(PROJECT.glob("requirements*.txt"))).rstrip("\n") + "\n"
    (venv / "installed-requirements.txt").write_text(wanted)
    return os.environ | {"VENV": str(venv)}


def test_quick_start_reuses_the_environment_and_runs_the_main_job(tmp_path, ready_environment):
    flags = ["--shots", "1", "--total_iters", "2", "--results_dir", tmp_path / "results", "--cache_dir", tmp_path]
    command = ["bash", PROJECT / "scripts" / "quickstart.sh", *flags]
    done = subprocess.run(command, env=ready_environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "installing" not in done.stdout and "->  so" in done.stdout
    assert (tmp_path / "results" / "results.csv").is_file()


def test_an_old_python_is_refused_with_the_remedy(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environment = os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": str(old)}
    command = ["bash", PROJECT / "scripts" / "quickstart.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Python 3.10" in done.stderr and not (tmp_path / "venv").exists()


def test_the_tiny_clip_is_trained_from_a_seed(tmp_path):
    script = load_script("train_tiny_clip")
    files = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")]
    for file, seed in zip(files, (0, 0, 1)):
        script.main(["--steps", "3", "--batch_size", "8", "--seed", str(seed), "--out", str(file)])
    a, b, c = (file.read_bytes() for file in files)
    assert a == b != c
    model, _ = clip.load(files[0])
    assert model.arch == clip.load("tiny")[0].arch
    assert model.logit_scale.exp() > 14 and all(p.isfinite().all() for p in model.parameters())


def test_pictures_of_the_tiny_clips_training_show_what_their_captions_say():
    script = load_script("train_tiny_clip")
    pictures = script.Pictures(torch.Generator().manual_seed(0))
    images, captions, characters = pictures.batch(64)
    assert images.shape == (64, 3, 32, 32) and captions.shape == (64, 77)
    for caption, character in zip(captions, characters):
        assert any(torch.equal(caption, possible) for possible in pictures.captions[character])
    share_of_digits = (pictures.weight * (pictures.characters < 10)).sum() / pictures.weight.sum()
    assert share_of_digits == pytest.approx(0.5)
    words = clip.tokenizer.tokenizer().decode(pictures.captions[7][0].tolist())
    assert "seven" in words


def test_settings_are_tuned_on_the_val_part(monkeypatch, capsys):
    script = load_script("tune_digits")
    split, seen = split_digits(), []
    accuracies = iter([80.0, 90.0, 60.0, 50.0, 70.0, None, 70.0, 71.0])  # 1 shot: two seeds, two shots: two seeds

    def trial(evaluator, states):
        seen.append((evaluator.settings, evaluator.task))
        accuracy = next(accuracies)
        if accuracy is None:
            raise train.TrainingDiverged("the training loss is nan")
        return accuracy, 1

    monkeypatch.setattr(train, "_trained", trial)
    flags = ["--search", "lr=1e-4,1e-3", "--search", "encoder=text", "--shots", "1", "2", "--seeds", "21", "22"]
    script.main(["--methods", "adam", *flags, "--min_area", "0.4"])
    assert [(s.method, s.shots, s.seed, s.lr, s.min_area, s.encoder) for s, _ in seen] == [
        ("adam", shots, seed, lr, 0.4, "text") for shots in (1, 2) for seed in (21, 22) for lr in (1e-4, 1e-3)
    ]
    for settings, task in seen:
        assert task.test == task.val == split.val and len(task.val) == 359
        assert task.train == datasets.build("digits", None, settings.shots, settings.seed).train
    out = capsys.readouterr().out
    # Means over seeds at 1 shot and at 2: 70 and 70 for the first, 70 and 35.5 for the second, which diverged once.
    assert "adam lr=0.0001 encoder=text: val accuracy 70.00 % at 1 70.00 % at 2" in out
    assert "adam lr=0.001 encoder=text: val accuracy 70.00 % at 1 35.50 % at 2" in out
    chosen = yaml.safe_load(out[out.index("methods:") :])
    assert chosen == {"methods": {"adam": {"lr": 1e-4, "encoder": "text", "tuned_on": "val"}}}


def test_tuning_trains_and_its_grids_are_settings_of_their_methods(tmp_path, capsys):
    script = load_script("tune_digits")
    for method, grid in script.GRIDS.items():
        assert run_utils.parse(["--method", method, *(f"--search={word}" for word in grid)]).candidates
    flags = ["--search", "lr=1e-9,1e-3", "--shots", "1", "--seeds", "21", "--total_iters", "4"]
    script.main(["--methods", "so", *flags, "--cache_dir", str(tmp_path)])
    assert yaml.safe_load(capsys.readouterr().out.partition("methods:\n")[2])["so"]["lr"] == 1e-3
    for wrong in (["--methods", "sgd", *flags], ["--methods", "zero_shot"], ["--methods", "so", "--search", "depth=1"]):
        with pytest.raises(SystemExit) as stop:
            script.main(wrong)
        assert stop.value.code == 2


def test_the_comparison_is_a_table_of_means(tmp_path, monkeypatch, capsys):
    script = load_script("compare_digits")
    out = tmp_path / "table.md"
    out.write_text(f"Before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    flags = ["--methods", "so", "zero_shot", "--ablations", "dense", "--shots", "1", "2", "--seeds", "1", "2"]
    flags += ["--total_iters", "2", "--workers", "0", "--out", str(out)]
    flags += ["--results_dir", str(tmp_path / "results"), "--cache_dir", str(tmp_path / "cache")]

    def compare():
        with pytest.raises(SystemExit) as stop:
            script.main(flags)
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    assert compare()[0] == 0
    text = out.read_text()
    assert text.startswith(f"Before\n{script.BEGIN}\n|") and text.endswith(f"\n{script.END}\nafter\n")
    assert "old" not in text and "Seeds 1, 2;" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[0] == ["", "1 shot", "2 shots", "trained", "changed", "optimizer", "training"]
    results = pd.read_csv(tmp_path / "results" / "results.csv")
    assert len(results) == 12 and set(results.dataset) == {"digits"} and set(results.total_iters.dropna()) == {2}
    for line, (label, method) in zip(
        cells[2:], (("so", "so"), ("zero_shot", "zero_shot"), ("ablation: dense", "so_ablation"))
    ):
        runs = results[results.method == method]
        accuracy = [runs[runs.shots == shots].test_accuracy for shots in (1, 2)]
        most = runs[runs.shots == 2]
        assert line[:3] == [label, *(f"{x.mean():.2f} ± {x.std():.2f}" for x in accuracy)]
        assert line[3:5] == [f"{most[name].mean():,.0f}" for name in ("trainable_weights", "changed_weights")]
        assert line[5] == f"{most.optimizer_bytes.mean() / 1000:,.0f} kB"
    assert float(cells[2][1].split()[0]) > 70 and cells[4][3] == "884,736" and cells[4][5] == "7,078 kB"
    code, printed, _ = compare()  # all are recorded already
    assert code == 0 and printed.count("already done") == 12 and out.read_text() == text


def test_a_failed_run_is_missing_in_the_comparison_and_named(tmp_path, monkeypatch, capsys):
    script = load_script("compare_digits")

    def main(words):
        of = {name: words[words.index(f"--{name}") + 1] for name in ("method", "shots", "seed")}
        calls.append(tuple(of.values()))
        if of["seed"] == "2":
            raise RuntimeError("unforeseen") if of["method"] == "so" else SystemExit(2)
        if of == {"method": "adam", "shots": "4", "seed": "3"}:
            raise SystemExit(130)
        made = dict(
            trainable_weights=7,
            changed_weights=int(of["shots"]) + 1,
            optimizer_bytes=3000,
            train_seconds=1.5,
            device="cpu",
        )
        made |= dict(finished_at="2026-01-02T03", torch_version="2", git_commit="c", shots=int(of["shots"]))
        return made | {"test_accuracy": 50.0 + int(of["seed"])}

    calls = []
    monkeypatch.setattr(script.entry, "main", main)

    def compare(*seeds, shots=("4",)):
        calls.clear()
        with pytest.raises(SystemExit) as stop:
            script.main(["--methods", "so", "adam", "--ablations", "--shots", *shots, "--seeds", *seeds])
        return stop.value.code, capsys.readouterr()

    code, (out, err) = compare("1", "2", "4")
    assert code == 1 and err.count("failed: ") == 2 and "unforeseen" in err and len(calls) == 6
    assert "failed: python main.py --method adam --dataset digits --shots 4 --seed 2" in err
    assert out.count("52.50 ± 2.12 (2 of 3) | 7 | 5 | 3 kB | 1.5 s") == 2
    code, (out, _) = compare("2")
    assert code == 1 and "|" not in out
    code, (out, _) = compare("3")
    assert code == 130 and len(calls) == 2  # Ctrl-C ends it all
    code, (out, _) = compare("1", shots=("1", "4"))
    assert code == 0 and out.count("| 51.00 | 51.00 | 7 | 5 | 3 kB | 1.5 s |") == 2  # budgets at the most shots
    for path in (tmp_path / "missing.md", tmp_path / "unmarked.md"):
        (tmp_path / "unmarked.md").write_text("mine")
        calls.clear()
        with pytest.raises(SystemExit) as stop:
            script.main(["--methods", "so", "--ablations", "--out", str(path)])
        assert stop.value.code == 2 and not calls and path.name in capsys.readouterr().err


def test_the_page_of_the_comparison_has_a_place_for_the_table():
    script = load_script("compare_digits")
    assert "Seeds" in script.between_markers(PROJECT / "benchmarks" / "COMPARISON.md", "Seeds")
