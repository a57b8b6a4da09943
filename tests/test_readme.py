"""The README's commands and code do what it says."""

import re
import shlex
from pathlib import Path

import pandas as pd
from fabricate import fabricate

import datasets
from methods import METHODS

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """The calls of main.py in the README, loops unrolled once, each as its arguments."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if "python main.py" in line]
    calls = [line.split("python main.py", 1)[1].split(";")[0].split("#")[0] for line in lines]
    return [shlex.split(call.replace("$shots", "1").replace("$seed", "1")) for call in calls]


def test_every_command_and_every_piece_of_code_runs(run_main, tmp_path):
    fabricate("dtd", tmp_path / "data")
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    calls = commands()
    assert len(calls) >= 5
    for call in calls:
        small = ["--backbone", "tiny", "--total_iters", "2", *(word.replace("$DATA", "data") for word in call)]
        code, _, _, err = run_main(*small)
        assert code == 0, (call, err)
    assert len(pd.read_csv("results/results.csv")) == len(calls)
    code_blocks = blocks("python")
    assert len(code_blocks) == 3
    for code in code_blocks:
        exec(compile(code, "README.md", "exec"), {})


def test_set_up_scripts_exist_and_the_tables_name_everything():
    for script in re.findall(r"bash (scripts/\S+)", README):
        assert (PROJECT / script).is_file()
    for name in (*datasets.available_datasets(), *METHODS):
        assert re.search(rf"\b{name}\b", README), name
    manual = (PROJECT / "DATASETS.md").read_text(encoding="utf-8")
    for name, spec in datasets.specs.SPECS.items():
        (row,) = re.findall(rf"^\| {name} \| {spec.classes} \|.*$", manual, flags=re.MULTILINE)
        assert all(f"{size:,}" in row for size in spec.sizes if size), row
        (row,) = [line for line in re.findall(rf"^\| {name} \|.*$", manual, flags=re.MULTILINE) if line != row]
        assert all(layout.folder in row for layout in spec.layouts), row
        assert (spec.split_file or "-") in row
