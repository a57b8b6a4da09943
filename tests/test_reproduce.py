"""The paper's tables in one command: from the empty folder to the page, killed, without a network; published numbers."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from support.report import Folder, texts
from support.runs import MEASURED, Killed, call, killed_after
from support.server import offer

import main as entry
from fetching import fetch
from methods import METHODS
from scripts import reproduce, sweep
from scripts.reporting import deviations, figures
from scripts.reporting.results import ELEVEN, PUBLISHED, SUITES
from scripts.reproducing import costs, machine
from scripts.reproducing.parts import PARTS, read_part
from scripts.sweeping.clusters import Cluster
from scripts.sweeping.grid import cells


class Here(Cluster):
    """Does one run after another in this process."""

    poll_seconds = 0

    def __init__(self, feature_cache):
        super().__init__(Path("logs"))
        self.flags = ["--cache_dir", feature_cache, "--workers", 0]

    def start(self, waiting):
        cell = waiting.pop(0)
        self.code, _, _, self.err = call(entry.main, *cell.words, *self.flags)
        self.jobs["the only one"] = cell
        if self.code == -9:
            raise Killed

    def ended(self):
        return [(cell, self.code, self.err) for cell in [self.jobs.pop("the only one", None)] if cell]

    def running(self):
        return 0

    def stop(self):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch, feature_cache):
    """Calls reproduce.py in an empty folder; its runs are done in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "_cluster", lambda *_: Here(feature_cache))
    monkeypatch.setattr(figures, "grids", lambda results, folder: ([], []))  # they take most of a report's time

    def reproduced(*argv):
        code, _, out, err = call(reproduce.main, *argv)
        return code, out, [line for line in err.splitlines() if line.startswith("error: ")]

    return reproduced


def outcome(out):
    """All tables of the page, except what is measured with a clock."""
    runs = pd.read_csv(Path(out, "report", "runs.csv"))
    runs = runs.drop(columns=[name for name in (*MEASURED, "finished_at") if name in runs]).sort_values("run_id")
    return runs.to_csv(), *(Path(out, "report", f"{name}.csv").read_text() for name in ("differences", "deviations"))


SMALL = ("--quick", "--datasets", "dtd", "eurosat", "--methods", "so_released", "zero_shot", "--root_path", "data")
SMALL += ("--parts", "main", "new_classes", "--seeds", 1)


def test_from_the_empty_folder_to_the_page_killed_and_resumed(run, world, data_root, tmp_path):
    for name in ("dtd", "eurosat"):
        offer(world, name, tmp_path)
    code, out, errors = run(*SMALL, "--out", "whole")
    assert (code, errors) == (0, []) and "4 runs: 4 done" in out and len(world.requests) == 4
    with killed_after(8):  # in the second training
        assert run(*SMALL, "--out", "killed")[0] == -9
    assert 0 < len(list(Path("killed/results").glob("*/result.json"))) < 12 and not Path("killed/report").exists()
    assert run(*SMALL, "--out", "killed")[0] == 0
    runs = pd.read_csv("killed/report/runs.csv")
    assert len(runs) == 12 and set(runs.classes) == {"all", "base", "new"} and set(runs.backbone) == {"tiny"}
    assert outcome("killed") == outcome("whole")
    assert "quick: " in Path("whole/report/index.html").read_text()
    _, out, _ = run(*SMALL, "--out", "whole")
    assert "0 done, 4 were done before" in out and len(world.requests) == 4


def test_without_network_each_missing_thing_is_one_line(run, world, data_root, monkeypatch):
    def no_network(*names):
        raise machine.UserError("no network")

    monkeypatch.setattr(machine, "find", no_network)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, errors = run("--root_path", "data", "--datasets", "dtd", "imagenet", "--parts", "main")
    assert code == 2 and not Path("reproduced/report").exists()
    for line, name in zip(errors, ("GPU", "imagenet", "dtd", "weights of ViT-B/16"), strict=True):
        assert line.startswith(f"error: {name}: ")


def test_a_run_that_fails_is_named_and_the_rest_goes_on(run, monkeypatch):
    do = entry.do
    monkeypatch.setattr(entry, "do", lambda one: 1 / 0 if one.settings.classes == "base" else do(one))
    with pytest.raises(ZeroDivisionError):
        run("--quick", "--methods", "zero_shot", "--parts", "new_classes", "main", "--seeds", 1)


def test_mistakes_are_one_line(run):
    for flags, word in (
        (("--gpu", "abacus", "--dry_run"), "T4"),
        (("--methods", "magic"), "so_released"),
        (("--datasets", "dtd", "--parts", "transfer", "--shots", 16), "--datasets"),
    ):
        code, _, (error,) = run(*flags, "--root_path", "data")
        assert code == 2 and word in error
    assert "--root_path" in run()[2][0]


def test_dry_run_lists_runs_and_hours(run):
    code, out, _ = run("--root_path", "data", "--dry_run", "--gpu", "A100", "--parts", "new_classes", "--seeds", 1)
    lines = out.splitlines()
    assert code == 0 and "88 runs" in lines[-2] and "A100" in lines[-2] and costs.BASIS in lines[-1]
    listed = [line for line in lines if "python main.py" in line]
    hours = [float(line.split()[0]) for line in listed]
    assert len(listed) == 44 and min(hours) > 0 and not Path("reproduced").exists()
    assert float(lines[-2].split(", ")[1].split()[0]) == pytest.approx(sum(hours), abs=0.5)
