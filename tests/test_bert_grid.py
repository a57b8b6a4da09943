"""BERT/script.py and BERT/script_LoRA.py on a tiny random BERT and made-up pairs, offline."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
from safetensors.torch import load_file, save_file
from support.bert import read_table, rte_files, tiny_bert

from benchmarks import bert_step
from BERT import grid, rte, script, script_LoRA
from BERT.main import Result, Settings, TrainingDiverged, parser, run

SMALL = "--model tiny --data_dir RTE --shots 4 --max_steps 2 --device cpu".split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the tiny BERT and RTE's files; the current one."""
    tiny_bert(tmp_path / "tiny")
    rte_files(tmp_path / "RTE")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(place, capsys):
    """Calls a grid on the tiny BERT and returns (exit code, stdout, stderr)."""

    def call(module, *argv):
        code = 0
        try:
            module.main([*SMALL, *(str(word) for word in argv)])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def fake_run(monkeypatch):
    """Instead of training: notes the settings, and gives a number that follows from them. `fail` makes runs fail."""

    class Fake:
        def __init__(self):
            self.seen, self.fail = [], {}

        def __call__(self, settings):
            self.seen.append(settings)
            error = self.fail.get(settings.seed)
            if error is not None:
                raise error
            return Result(100 + settings.seed, settings.seed % 2 == 0, 0.5, 50.0 + settings.seed**2, 1.0)

    fake = Fake()
    monkeypatch.setattr(grid, "run", fake)
    return fake


def test_the_so_grid_writes_means_over_its_seeds(call):
    code, _, _ = call(script, "--kappa", 0.1, 0.01, "--T_sparse", 2, "--seed", 1, 2, 3)
    assert code == 0
    results, runs = read_table("so_grid_results.csv"), read_table("so_grid_runs.csv")
    assert list(results[0])[:4] == ["kappa", "T", "steps", "val_acc"]
    assert [(row["kappa"], row["T"], row["seeds"]) for row in results] == [
        ("0.01", "2", "1 2 3"),
        ("0.1", "2", "1 2 3"),
    ]
    assert len(runs) == 6 and all(row["error"] == "" and row["steps"] == "2" for row in runs)
    for row in results:
        accuracies = [float(r["val_acc"]) for r in runs if r["kappa"] == row["kappa"]]
        assert float(row["val_acc"]) == pytest.approx(mean(accuracies), abs=0.005)
        assert float(row["val_acc_sd"]) == pytest.approx(stdev(accuracies), abs=0.005)
        assert (row["steps"], row["reached"], row["failed"]) == ("2", "0", "")
    alone = run(Settings(kappa=0.1, T_sparse=2, seed=2, model="tiny", data_dir="RTE", shots=4, max_steps=2))
    (row,) = [row for row in runs if (row["kappa"], row["seed"]) == ("0.1", "2")]
    assert (float(row["loss"]), float(row["val_acc"])) == (alone.loss, alone.val_acc)


def test_the_lora_grid_is_a_command_of_its_folder(place):
    flags = ["--model", place / "tiny", "--data_dir", place / "RTE", "--shots", "4", "--max_steps", "1"]
    command = [sys.executable, "script_LoRA.py", "--rank", "2", "4", *flags, "--out", place / "lora_grid_results.csv"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=rte.ROOT / "BERT", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = read_table("lora_grid_results.csv")
    assert list(results[0])[:3] == ["rank", "steps", "val_acc"]
    assert [(row["rank"], row["steps"], row["seeds"], row["val_acc_sd"]) for row in results] == [
        ("2", "1", "42", ""),
        ("4", "1", "42", ""),
    ]
    assert len(read_table("lora_grid_runs.csv")) == 2


def test_without_lists_the_published_grids_are_run(call, fake_run):
    assert call(script)[0] == call(script_LoRA)[0] == 0
    cells = [(s.kappa, s.T_sparse, s.rank, s.seed) for s in fake_run.seen]
    so = [(kappa, T, None, 42) for kappa in (1e-5, 1e-4, 1e-3) for T in (5, 10, 20)]
    assert cells == [*so, *((None, None, rank, 42) for rank in (2, 4, 8, 16))]
    assert [row["rank"] for row in read_table("lora_grid_results.csv")] == ["2", "4", "8", "16"]


def test_numbers_of_the_table_by_hand(call, fake_run):
    call(script_LoRA, "--rank", 2, "--seed", 1, 2, 4)
    (row,) = read_table("lora_grid_results.csv")
    # 51, 54 and 66 per cent after 101, 102 and 104 steps; seeds 2 and 4 reached the loss.
    assert row == {
        "rank": "2",
        "steps": "102.333",
        "val_acc": "57.00",
        "val_acc_sd": "7.94",
        "seeds": "1 2 4",
        "reached": "2",
        "failed": "",
    }


def test_finished_runs_are_not_done_again(call, fake_run):
    call(script_LoRA, "--rank", 2, 4, "--seed", 1)
    before = [Path(f"lora_grid_{name}.csv").read_text() for name in ("runs", "results")]
    os.remove("lora_grid_results.csv")
    code, out, _ = call(script_LoRA, "--rank", 2, 4, "--seed", 1)
    assert code == 0 and len(fake_run.seen) == 2 and out.count("done already, 51.0 %") == 2
    assert [Path(f"lora_grid_{name}.csv").read_text() for name in ("runs", "results")] == before
    call(script_LoRA, "--rank", 4, 8, 4, "--seed", 1, 3)
    assert [(s.rank, s.seed) for s in fake_run.seen[2:]] == [(4, 3), (8, 1), (8, 3)]
    assert [row["seeds"] for row in read_table("lora_grid_results.csv")] == ["1", "1 3", "1 3"]


def test_failures_are_in_the_table_and_in_the_exit_code_and_are_tried_again(call, fake_run):
    fake_run.fail = {2: RuntimeError("out of\nmemory"), 3: TrainingDiverged("the loss is nan")}
    code, _, err = call(script_LoRA, "--rank", 2, 4, "--seed", 1, 2, 3)
    assert code == 1 and len(fake_run.seen) == 6
    assert "[2/6] rank 2, seed 2: RuntimeError: out of memory" in err.splitlines()
    assert "Traceback" in err  # of what nobody foresaw
    for row in read_table("lora_grid_results.csv"):
        assert (row["val_acc"], row["seeds"], row["failed"]) == ("51.00", "1", "2 3")
    assert [row["error"] for row in read_table("lora_grid_runs.csv")[:3]] == [
        "",
        "RuntimeError: out of memory",
        "TrainingDiverged: the loss is nan",
    ]
    fake_run.fail, fake_run.seen = {3: TrainingDiverged("the loss is nan")}, []
    assert call(script_LoRA, "--rank", 2, "--seed", 1, 2, 3)[0] == 1
    assert [s.seed for s in fake_run.seen] == [2, 3]
    first, second = read_table("lora_grid_results.csv")
    assert (first["val_acc"], first["failed"]) == ("52.50", "3")
    assert second["failed"] == "2 3"
    assert len(read_table("lora_grid_runs.csv")) == 6


def test_a_failure_is_not_in_place_of_what_another_process_finished(call, fake_run, place):
    call(script_LoRA, "--rank", 2, "--seed", 1)
    before = Path("lora_grid_runs.csv").read_text()
    settings = Settings(rank=2, seed=1, model="tiny", data_dir="RTE", shots=4, max_steps=2, device="cpu")
    tables = grid.Tables(Path("lora_grid_results.csv"), {"rank": "rank"}, grid.configuration(settings))
    tables.record(tables.key_of(settings) | dict.fromkeys(grid.OUTCOME, "") | {"error": "no memory"})
    assert Path("lora_grid_runs.csv").read_text() == before


def test_a_cell_of_failures_alone_is_a_row_without_numbers(call, fake_run):
    fake_run.fail = {42: TrainingDiverged("the loss is nan")}
    assert call(script, "--kappa", 0.1, "--T_sparse", 5)[0] == 1
    (row,) = read_table("so_grid_results.csv")
    assert (row["kappa"], row["steps"], row["val_acc"], row["failed"]) == ("0.1", "", "", "42")


def test_a_mistake_that_all_runs_share_is_no_failure_of_one(call, fake_run):
    fake_run.fail = {42: rte.UserError("no such thing; get one")}
    code, _, err = call(script_LoRA, "--rank", 2, 4)
    assert (code, err) == (2, "error: no such thing; get one\n") and len(fake_run.seen) == 1


@pytest.fixture
def understood(monkeypatch):
    """Parses a command of BERT/ without running it; returns its settings."""
    seen = []
    monkeypatch.setattr(grid, "configuration", lambda settings: seen.append(settings) or {})
    monkeypatch.setattr(grid, "Tables", lambda *_: sys.exit("not to be run"))

    def parse(script_name, *argv):
        if script_name == "main.py":
            return Settings(**vars(parser().parse_args(argv)))
        with pytest.raises(SystemExit, match="not to be run"):
            {"script.py": script, "script_LoRA.py": script_LoRA}[script_name].main(argv)
        return seen[-1]

    return parse


def test_the_readmes_commands_are_understood(understood):
    text = (rte.ROOT / "BERT" / "README.md").read_text(encoding="utf-8")
    lines = [
        line.split("#")[0] for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.split("\n")
    ]
    settings = [understood(*shlex.split(line)[1:]) for line in lines if re.match(r"python \w+\.py", line)]
    assert [(s.kappa, s.T_sparse, s.rank) for s in settings] == [
        (5e-5, 10, None),
        (None, None, 8),
        (1e-5, 5, None),
        (None, None, 2),
        (1e-4, 5, None),
        (0, 10, None),
        (None, None, 8),
    ]


def test_the_measuring_script_runs_all_grids_and_goes_on_after_failed_runs(place, understood):
    python = place / "python"
    python.write_text('#!/bin/sh\necho "$@" >> calls\ncase "$*" in *script_LoRA*) exit 1;; *none*) exit $CODE;; esac\n')
    python.chmod(0o755)
    script = rte.ROOT / "benchmarks" / "bert_rte.sh"
    command = ["bash", script, "tiny", "RTE", "out", "--shots", "2"]
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
    bert_step.main("--layers 1 --width 24 --heads 2 --tokens 8 --kappa 1e-2 --steps 3".split())
    out = capsys.readouterr().out
    dense, sampled = re.findall(r"last loss (\S+)", out)
    assert float(dense) == pytest.approx(float(sampled), abs=2e-6)
    (difference,) = re.findall(r"differ by (\S+) of what was trained", out)
    assert float(difference) < 1e-2  # also where nothing was trained, which is no number


def test_an_interrupted_grid_keeps_what_is_finished(call, fake_run):
    fake_run.fail = {3: KeyboardInterrupt()}
    code, _, err = call(script_LoRA, "--rank", 2, "--seed", 1, 2, 3, 4)
    assert code == 130 and err.splitlines()[-1] == "interrupted"
    (row,) = read_table("lora_grid_results.csv")
    assert (row["seeds"], row["failed"]) == ("1 2", "")
    assert not [name for name in os.listdir() if name.endswith(".part")]


def test_half_a_row_is_left_out_and_done_again(call, fake_run):
    call(script_LoRA, "--rank", 2, "--seed", 1, 2)
    text = Path("lora_grid_runs.csv").read_text()
    Path("lora_grid_runs.csv").write_text(text[: text.rindex("102,54") + 5])
    code, _, err = call(script_LoRA, "--rank", 2, "--seed", 1, 2)
    assert code == 0 and [s.seed for s in fake_run.seen] == [1, 2, 2]
    assert err.count("line 3 is damaged and left out") == 1
    assert Path("lora_grid_runs.csv").read_text() == text


@pytest.mark.parametrize(
    "change, column",
    [
        (["--shots", 3], "shots 4, and this is 3"),
        (["--protocol", "released"], "protocol balanced, and this is released"),
        (["--dense", "none"], "dense all, and this is none"),
        (["--max_steps", 9], "max_steps 2, and this is 9"),
        (["--lr", 1e-4], "lr 2e-05, and this is 0.0001"),
        (["--loss_stop", 0.5], "loss_stop 0.001, and this is 0.5"),
        (["--model", "other"], "model tiny, and this is other"),
        ("weights", "weights_sha256"),
        ("heads", "weights_sha256"),
        ("pooler", "weights_sha256"),
        ("data", "data_sha256"),
        ("tokenizer", "data_sha256"),
    ],
)
def test_other_settings_are_not_mixed_into_a_table(call, fake_run, place, change, column):
    call(script_LoRA, "--rank", 2)
    tiny_bert(place / "other")
    if change == "weights":
        tiny_bert(place / "tiny", seed=1)
    elif change == "heads":
        config = json.loads(Path("tiny/config.json").read_text())
        Path("tiny/config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    elif change == "pooler":
        weights = load_file("tiny/model.safetensors")
        save_file(weights | {"pooler.dense.bias": weights["pooler.dense.bias"] + 1}, "tiny/model.safetensors")
    elif change == "tokenizer":
        Path("tiny/vocab.txt").write_text(Path("tiny/vocab.txt").read_text().replace("cat\ndog", "dog\ncat"))
    elif change == "data":
        with open("RTE/dev.tsv", "a") as file:
            file.write("24\ta cat\ta dog\tentailment\n")
    before = Path("lora_grid_runs.csv").read_text()
    code, _, err = call(script_LoRA, "--rank", 4, *(change if isinstance(change, list) else []))
    assert code == 2 and err.startswith("error: lora_grid_runs.csv has runs with") and column in err and "--out" in err
    assert Path("lora_grid_runs.csv").read_text() == before and len(fake_run.seen) == 1
    code, *_ = call(script_LoRA, "--rank", 4, *(change if isinstance(change, list) else []), "--out", "new/x.csv")
    assert code == 0 and os.listdir("new") != [] and len(read_table("new/x_runs.csv")) == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rank", 2, 0], "--rank must be at least 1"),
        (["--rank", 2, "--seed", -1], "--seed must be at least 0"),
        (["--rank", 2, "--data_dir", "nowhere"], "nowhere/train.tsv"),
        (["--rank", 2, "--model", "./nowhere"], "there is no folder ./nowhere"),
        (["--rank", 2, "--out", "RTE"], "RTE"),
        (["--rank", 2, "--out", "."], "--out '.' is no file's name"),
        (["--rank", 2, "--out", "RTE/dev.tsv/x.csv"], "RTE/dev.tsv"),
        (["--rank", 2, "--out", "precious_results.csv"], "precious_results.csv is there without its precious_runs.csv"),
        (["--rank", 2, "--out", "x_results.csv"], "x_runs.csv is no table of this grid's runs"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_run(call, fake_run, place, argv, message):
    (place / "precious_results.csv").write_text("rank,steps,val_acc\n")
    (place / "x_runs.csv").write_text("kappa,T\n1,2\n")
    code, _, err = call(script_LoRA, *argv)
    assert code == 2 and not fake_run.seen
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", err)
    assert (place / "precious_results.csv").read_text() == "rank,steps,val_acc\n"
