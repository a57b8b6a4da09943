"""A saved adaptation, loaded again from its file alone: the file says which model, method and classes it belongs to."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from clip import WeightsError
from clip.delta import checkpoint_metadata
from datasets.folder import FolderTask
from experiment import Experiment
from settings import Settings

from . import METHODS, saved_settings
from .adaptation import Adaptation


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of programs that use a saved adaptation: which one, its model, and the machine."""
    parser.add_argument("--weights", required=True, metavar="FILE", help="what a run with --save_path saved")
    parser.add_argument("--backbone", help="where the unchanged model is, if it is not where it was for the run")
    parser.add_argument("--arch", help="as in main.py, with --backbone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")


def load_adapted(
    path: Path,
    backbone: str | None = None,
    arch: str | None = None,
    class_names: Sequence[str] | None = None,
    **machine: str | int,
) -> Adaptation:
    """Return the adaptation that a run saved in `path`, ready to make logits of images.

    `backbone` and `arch` say where the unchanged model is, by default where it was for the run; its weights must be the
    same. `class_names` replace those that the file was made with. `machine` are common settings, such as the device.
    The task of its experiment has classes and prompts, but no images. Raise WeightsError if the file is no such file,
    belongs to other weights, or is tied to its classes.
    """
    metadata = checkpoint_metadata(path)
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    if "operation" not in metadata and metadata.get("method") not in METHODS:
        raise WeightsError(f"{path} was not saved by a run of this program; --save_path makes such files")
    hparams, common = saved_settings(path, metadata)
    saved = json.loads(metadata["settings"])
    settings = Settings(
        **common,
        backbone=backbone or metadata["backbone"],
        arch=arch or (None if backbone else saved.get("arch")),
        precision=saved["precision"],
        **machine,
    )
    names = class_names or json.loads(metadata["class_names"])
    task = FolderTask(metadata["run_id"], tuple(names), tuple(json.loads(metadata["templates"])), (), (), (), Path())
    experiment = Experiment.load(settings, hparams, task)
    adaptation = METHODS[settings.method].prepare(experiment)
    adaptation.saved.load(path, experiment.base_sha256)
    return adaptation
