"""What the reproduction needs of this machine: a GPU, space, the datasets and CLIP's weights. What is missing is one
line each, and the rest continues."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from clip.sources import find
from common import UserError, progress
from datasets.acquire import doctor, download
from datasets.acquire.sources import SOURCES

WEIGHTS_GB = 0.5  # ViT-B/16 and RN50, with some room
EMBEDDED = "digits"


def check_gpu() -> list[str]:
    """Return a line if this machine has no GPU."""
    if torch.cuda.is_available():
        return []
    return [
        "GPU: torch finds none here, and on a CPU this takes months; run it where there is one, submit it with "
        "--cluster slurm, try --quick, or say --device cpu"
    ]


def check_space(names: Iterable[str], root: Path) -> list[str]:
    """Return a line if what is still to be downloaded does not fit below `root`."""
    needed = WEIGHTS_GB
    for name in names:
        try:
            download.check(name, root)
        except UserError:
            needed += 2 * SOURCES[name].gigabytes  # the archive and what is in it
    folder = next(path for path in (root, *root.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free / 1e9
    if free >= needed:
        return []
    return [
        f"space: {folder} has {free:.0f} GB free, about {needed:.0f} GB are needed; free some, or choose --datasets"
    ]


def prepare(names: Sequence[str], root: Path) -> tuple[list[str], list[str]]:
    """Download and examine datasets. Return the names of those that are ready, and a line for each other."""
    ready, missing = [], []
    for name in progress(names, "datasets", "dataset"):
        if name == EMBEDDED:
            ready.append(name)
            continue
        try:
            print(f"{name}: {download.prepare(name, root)}")
        except (UserError, OSError) as error:
            missing.append(f"{name}: {' '.join(str(error).split())}")
            continue
        report = doctor.examine(name, root)
        if report.problems:
            missing.append(
                f"{name}: the doctor names what is wrong: python -m datasets.doctor {name} --root_path {root}"
            )
        else:
            ready.append(name)
    return ready, missing


def check_weights(backbones: Iterable[str]) -> tuple[set[str], list[str]]:
    """Download the weights of these backbones. Return the names of those that are there, and a line for each other."""
    ready, missing = set(), []
    for name in sorted(backbones):
        try:
            find(name)
            ready.add(name)
        except UserError as error:
            missing.append(f"weights of {name}: {error}")
    return ready, missing
