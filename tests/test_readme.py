"""The README's commands and code do what it says."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from support.fabricate import VARIANTS, fabricate, fabricate_variant, picture, variant_labels

import datasets
from arguments import parse
from datasets import doctor, download
from datasets.manifest import read_manifest
from datasets.splits import imagenet_classes, read_json_split
from methods import METHODS
from scripts import report

PROJECT = Path(__file__).parent.parent
DOCS = "".join(path.read_text(encoding="utf-8") for path in sorted((PROJECT / "docs").glob("*.md")))
README, DATASETS = ((PROJECT / name).read_text(encoding="utf-8") for name in ("README.md", "DATASETS.md"))


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text, program):
    """The arguments of each call of `program` in the text, loops unrolled once."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"`([^`\n]*python main\.py --[^`\n]* [^`\n]*)`", prose)
    joined = "\n".join([*blocks(text, "bash"), *inline]).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if program in line]
    calls = [line.split(program, 1)[1].split(";")[0].split("  #")[0] for line in lines]
    words = [shlex.split(call.replace("$shots", "1").replace("$seed", "1"), comments=True) for call in calls]
    return [[word.replace("$DATA", "data") for word in call] for call in words]


@pytest.fixture
def data(tmp_path):
    """What the commands ask for: DTD, and your own images."""
    fabricate("dtd", tmp_path / "data", classes=4)
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    for label, name in enumerate(("fox", "hen")):
        for number in range(9):
            path = tmp_path / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(label, number).save(path)


def run_all(calls, run_main):
    for call in calls:
        code, _, _, err = run_main(*call, "--backbone", "tiny", "--total_iters", 2)
        assert code == 0, (call, err)


def test_every_command_and_every_piece_of_code_runs(run_main, data):
    calls = commands(README + DOCS, "python main.py")
    assert len(calls) == 14
    run_all(calls, run_main)
    assert len(pd.read_csv("results/results.csv")) == len(calls) - 2  # one prints help, one its settings
    for program, module in (("python -m datasets.download", download), ("python -m datasets.doctor", doctor)):
        for call in commands(README, program):
            assert module.main(call) == 0, call  # what is complete is not downloaded
    for call in commands(README, "python scripts/report.py"):
        report.main(call)
        assert "DTD" in (Path("report") / "tables.md").read_text()
    (example,) = blocks(DOCS, "yaml")
    Path("example.yaml").write_text(example)
    assert parse(["--config", "example.yaml", "--dataset", "eurosat", "--root_path", "x"]).hparams.t == 10
    code_blocks = blocks(README, "python")
    assert len(code_blocks) == 3
    for code in code_blocks:
        exec(compile(code, "README.md", "exec"), {})


def test_every_command_in_the_manual_of_the_datasets_runs(run_main, data, few_imagenet_classes, tmp_path):
    fabricate("eurosat", tmp_path / "data")
    fabricate("imagenet", tmp_path / "data", per_class=2)
    wnids, _ = imagenet_classes()
    for name, places in VARIANTS.items():
        fabricate_variant(tmp_path / "data", places[0], [wnids[label] for label in variant_labels(name)])
    calls = [["1" if word == "4" else word for word in call] for call in commands(DATASETS, "python main.py")]
    run_all(calls, run_main)
    assert len(calls) == 5 and len(pd.read_csv("results/results.csv")) == len(calls) + 3
    for program, module in (("python -m datasets.download", download), ("python -m datasets.doctor", doctor)):
        for call in commands(DATASETS, program):
            assert module.main(call) == 0, call
    for number, language in enumerate(("json", "csv")):  # what a split and a manifest look like
        (text,) = blocks(DATASETS, language)
        Path(f"example{number}.{language}").write_text(text)
    assert read_manifest(Path("example1.csv"))[0].class_names == ("house hen", "red fox")
    assert read_json_split(Path("example0.json")).class_names == ("banded", "blotchy")


def test_set_up_scripts_exist_and_the_tables_name_everything():
    for script in re.findall(r"bash (scripts/\S+)", README):
        assert (PROJECT / script).is_file()
    for name in (*datasets.available_datasets(), *METHODS):
        assert re.search(rf"\b{name}\b", README), name
    for name, spec in datasets.specs.SPECS.items():
        (row,) = re.findall(rf"^\| {name} \| {spec.classes} \|.*$", DATASETS, flags=re.MULTILINE)
        assert all(f"{size:,}" in row for size in spec.sizes if size), row
        rows = re.findall(rf"^\| {name} \|.*$", DATASETS, flags=re.MULTILINE)
        parts = [layout.folder for layout in spec.layouts] + [spec.split_file or ""]
        assert any(all(part in row for part in parts) for row in rows), name
