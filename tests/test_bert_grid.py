"""BERT/script.py and BERT/script_LoRA.py on a tiny random BERT and made-up pairs, offline."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from support import runs
from support.bert import SMALL, read_table, small_bert

from benchmarks import bert_step
from BERT import grid, rte
from BERT.main import Result, Settings, TrainingDiverged, parser, run


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call a grid in a folder with the tiny BERT and RTE's files, and return (exit code, stdout, stderr)."""
    small_bert(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(method, *argv):
        code, _, out, err = runs.call(partial(grid.main, method, ""), *SMALL, "--max_steps", 2, *argv)
        return code, out, err

    return call


@pytest.fixture
def fake_run(monkeypatch):
    """In place of runs: note settings and (rank, seed), return numbers that follow from the seed, or raise `fail`."""
    fake = SimpleNamespace(seen=[], cells=[], fail={})

    def run(settings):
        fake.seen.append(settings)
        fake.cells.append((settings.rank, settings.seed))
        if settings.seed in fake.fail:
            raise fake.fail[settings.seed]
        return Result(100 + settings.seed, settings.seed % 2 == 0, 0.5, 50.0 + settings.seed**2, 1.0)

    monkeypatch.setattr(grid, "run", run)
    return fake


def test_the_so_grid_records_its_runs_and_writes_their_means(call):
    assert call("SO", "--kappa", 0.1, 0.01, "--T_sparse", 2, "--seed", 1, 2)[0] == 0
    table = read_table("so_grid_results.csv")
    assert list(table[0]) == ["kappa", "T", "steps", "val_acc", "val_acc_sd", "seeds", "reached", "failed"]
    assert [(row["kappa"], row["T"], row["seeds"], row["steps"]) for row in table] == [
        ("0.01", "2", "1 2", "2"),
        ("0.1", "2", "1 2", "2"),
    ]
    paths = list(Path("so_grid_runs").glob("so_tiny_kappa0.1_T2_seed2_*/result.json"))
    record = json.loads(paths[0].read_text())
    settings = {"kappa": 0.1, "T_sparse": 2, "seed": 2, "model": "tiny", "shots": 4, "max_steps": 2}
    alone = run(Settings(data_dir="RTE", **settings))
    assert (record["loss"], record["val_acc"], record["error"]) == (alone.loss, alone.val_acc, None)
    assert len(paths) == 1 and settings.items() <= record.items() and record["run_id"] == paths[0].parent.name
    assert len(read_table("so_grid_runs/results.csv")) == 4


def test_without_lists_the_published_grids_are_run(call, fake_run):
    assert call("SO")[0] == call("LoRA")[0] == 0
    cells = [(s.kappa, s.T_sparse, s.rank, s.seed) for s in fake_run.seen]
    so = [(kappa, T, None, 42) for kappa in (1e-5, 1e-4, 1e-3) for T in (5, 10, 20)]
    assert cells == [*so, *((None, None, rank, 42) for rank in (2, 4, 8, 16))]
    assert [row["rank"] for row in read_table("lora_grid_results.csv")] == ["2", "4", "8", "16"]


def test_numbers_of_the_table_by_hand(call, fake_run):
    call("LoRA", "--rank", 2, "--seed", 1, 2, 4)
    # 51, 54 and 66 % after 101, 102 and 104 steps; seeds 2 and 4 reached the loss.
    row = {"rank": "2", "steps": "102.333", "val_acc": "57.00", "val_acc_sd": "7.94"}
    assert read_table("lora_grid_results.csv") == [row | {"seeds": "1 2 4", "reached": "2", "failed": ""}]


def test_recorded_runs_are_not_done_again(call, fake_run):
    call("LoRA", "--rank", 2, 4, "--seed", 1)
    before = Path("lora_grid_results.csv").read_text()
    os.remove("lora_grid_results.csv")
    shutil.move("RTE", "elsewhere")  # the content counts, not the place
    code, out, _ = call("LoRA", "--rank", 2, 4, "--seed", 1, "--data_dir", "elsewhere")
    assert code == 0 and len(fake_run.seen) == 2 and out.count("done already, 51.0 %") == 2
    assert Path("lora_grid_results.csv").read_text() == before
    call("LoRA", "--rank", 4, 8, 4, "--seed", 1, 3, "--data_dir", "elsewhere")
    assert fake_run.cells[2:] == [(4, 3), (8, 1), (8, 3)]
    assert [row["seeds"] for row in read_table("lora_grid_results.csv")] == ["1", "1 3", "1 3"]


def test_failed_runs_are_recorded_and_listed_and_tried_again(call, fake_run):
    fake_run.fail = {2: RuntimeError("out of\nmemory"), 3: TrainingDiverged("the loss is nan")}
    code, _, err = call("LoRA", "--rank", 2, 4, "--seed", 1, 2, 3)
    assert code == 1 and len(fake_run.seen) == 6
    assert "[2/6] rank 2, seed 2: RuntimeError: out of memory" in err.splitlines()
    assert err.count("Traceback") == 2  # of errors that nobody foresaw
    for row in read_table("lora_grid_results.csv"):
        assert (row["val_acc"], row["seeds"], row["failed"]) == ("51.00", "1", "2 3")
    del fake_run.fail[2]
    assert call("LoRA", "--rank", 2, 8, "--seed", 1, 2, 3)[0] == 1
    assert fake_run.cells[6:] == [(2, 2), (2, 3), (8, 1), (8, 2), (8, 3)]
    first, second, _ = read_table("lora_grid_results.csv")
    assert (first["val_acc"], first["failed"], second["failed"]) == ("52.50", "3", "2 3")
    fake_run.fail[1] = fake_run.fail[3]
    assert call("LoRA", "--rank", 16, "--seed", 1)[0] == 1  # a row without numbers
    row = read_table("lora_grid_results.csv")[-1]
    assert (row["rank"], row["steps"], row["val_acc"], row["failed"]) == ("16", "", "", "1")


def test_a_mistake_that_all_runs_share_ends_the_grid(call, fake_run):
    fake_run.fail = {42: rte.UserError("no such thing; get one")}
    code, _, err = call("LoRA", "--rank", 2, 4)
    assert (code, err) == (2, "error: no such thing; get one\n") and len(fake_run.seen) == 1


def test_an_interrupted_grid_keeps_what_is_finished(call, fake_run):
    fake_run.fail = {3: KeyboardInterrupt()}
    assert call("LoRA", "--rank", 2, "--seed", 1, 2, 3, 4)[0] == 130
    (row,) = read_table("lora_grid_results.csv")
    assert (row["seeds"], row["failed"]) == ("1 2", "")


def test_a_damaged_record_is_left_out_and_its_run_done_again(call, fake_run):
    call("LoRA", "--rank", 2, "--seed", 1, 2)
    before = Path("lora_grid_results.csv").read_text()
    (path,) = Path("lora_grid_runs").glob("*seed2*/result.json")
    path.write_text(path.read_text()[:50])
    code, _, err = call("LoRA", "--rank", 2, "--seed", 1, 2)
    assert code == 0 and str(path) in err and fake_run.cells[2:] == [(2, 2)]
    assert Path("lora_grid_results.csv").read_text() == before


@pytest.mark.parametrize("change", ["lr", "model", "weights", "heads", "pooler", "data", "tokenizer"])
def test_runs_with_other_settings_weights_or_data_are_not_mixed(call, fake_run, change):
    call("LoRA", "--rank", 2)
    before = Path("lora_grid_results.csv").read_text()
    shutil.copytree("tiny", "other")
    shutil.copytree("RTE", "pairs")
    flags = {"lr": ["--lr", 1e-4], "model": ["--model", "other"], "data": ["--data_dir", "pairs"]}.get(change, [])
    weights = load_file("tiny/model.safetensors")
    if change in ("weights", "pooler"):
        name = "pooler.dense.bias" if change == "pooler" else "encoder.layer.1.attention.self.key.weight"
        save_file(weights | {name: weights[name] + 1}, "tiny/model.safetensors")
    elif change == "heads":
        config = json.loads(Path("tiny/config.json").read_text())
        Path("tiny/config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    elif change == "tokenizer":
        Path("tiny/vocab.txt").write_text(Path("tiny/vocab.txt").read_text().replace("cat\ndog", "dog\ncat"))
    elif change == "data":
        with open("pairs/dev.tsv", "a") as file:
            file.write("24\ta cat\ta dog\tentailment\n")
    code, _, err = call("LoRA", "--rank", 2, 4, *flags)
    assert code == 0 and "leaves out 1 run in" in err and fake_run.cells == [(2, 42), (2, 42), (4, 42)]
    assert len(read_table("lora_grid_results.csv")) == 2
    if flags:
        call("LoRA", "--rank", 2)
        assert len(fake_run.seen) == 3 and Path("lora_grid_results.csv").read_text() == before


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--rank", 2, 0], "--rank"),
        (["--rank", 2, "--seed", -1], "--seed"),
        (["--rank", 2, "--data_dir", "nowhere"], "nowhere/train.tsv"),
        (["--rank", 2, "--model", "./nowhere"], "./nowhere"),
        (["--rank", 2, "--out", "RTE"], "RTE"),
        (["--rank", 2, "--out", "."], "--out '.'"),
        (["--rank", 2, "--out", "RTE/dev.tsv/x.csv"], "RTE/dev.tsv"),
        (["--rank", 2, "--out", "precious.csv"], "precious.csv"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_run(call, fake_run, argv, named):
    Path("precious.csv").write_text("rank,steps,val_acc\n")
    code, _, err = call("LoRA", *argv)
    assert code == 2 and not fake_run.seen and err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert Path("precious.csv").read_text() == "rank,steps,val_acc\n"


@pytest.fixture
def understood(monkeypatch):
    """Parse a command of BERT/ without running it; return its first settings."""
    seen = []
    monkeypatch.setattr(grid, "Table", lambda _, __, settings: seen.append(settings) or sys.exit("not to be run"))

    def parse(script_name, *argv):
        if script_name == "main.py":
            return Settings(**vars(parser("").parse_args(argv)))
        with pytest.raises(SystemExit, match="not to be run"):
            grid.main("LoRA" if "LoRA" in script_name else "SO", "", argv)
        return seen[-1]

    return parse


def test_the_readmes_commands_are_understood(understood):
    text = (rte.ROOT / "BERT" / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"python \w+\.py", line)]
    settings = [understood(*command[1:]) for command in words]
    so = [(s.kappa, s.T_sparse) for s in settings if s.rank is None]
    assert so == [(5e-5, 10), (1e-5, 5), (1e-4, 5), (0, 10)]
    assert [s.rank for s in settings if s.rank is not None] == [8, 2, 8]


def test_the_measuring_script_runs_all_grids_and_continues_after_failed_runs(tmp_path, monkeypatch, understood):
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> calls\ncase "$*" in *script_LoRA*) exit 1;; *none*) exit $CODE;; esac\n')
    python.chmod(0o755)
    command = ["bash", rte.ROOT / "benchmarks" / "bert_rte.sh", "tiny", "RTE", "out", "--shots", "2"]
    for code, expected, calls in (("0", 1, 13), ("2", 2, 11)):
        done = subprocess.run(command, env=os.environ | {"PYTHON": python, "CODE": code})
        assert done.returncode == expected
        lines = [shlex.split(line) for line in Path("calls").read_text().splitlines()]
        assert len(lines) == calls
        Path("calls").unlink()
    for line in lines:
        settings = understood(Path(line[0]).name, *line[1:])
        assert (settings.model, settings.data_dir, settings.shots) == ("tiny", "RTE", 2)
        assert (settings.dense, settings.max_steps) == (("none", 1000) if "none" in line else ("all", 10_000))
    assert subprocess.run(command[:3], capture_output=True).returncode == 2


def test_both_sides_of_the_measured_step_compute_the_same(capsys):
    size = ["--layers", "1", "--width", "24", "--heads", "2", "--tokens", "8"]
    bert_step.main([*size, "--kappa", "1e-2", "--steps", "3"])
    out = capsys.readouterr().out
    dense, sampled = re.findall(r"last loss (\S+)", out)
    assert float(dense) == pytest.approx(float(sampled), abs=2e-6)
    (difference,) = re.findall(r"differ by (\S+) of what was trained", out)
    assert float(difference) < 1e-2  # also where nothing was trained, which is no number
