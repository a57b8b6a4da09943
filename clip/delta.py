"""Sparse deltas: the weights that an adaptation changed in a CLIP, as flat indices and new values.

A delta is one safetensors file. For each changed tensor, named as OpenAI names it, it holds `NAME.indices` (int32,
row-major, ascending) and `NAME.values` (float32, the new weights). Its metadata hold the format, the SHA-256 of the
base weights (`weights_sha256`) and what the writer adds. Applied to the same base weights, it gives the adapted weights
bit for bit.
"""

from pathlib import Path

import safetensors
import torch
from torch import Tensor

from .files import WeightsError
from .model import CLIP
from .weights import save_tensors

FORMAT = "clip-sparse-delta-1"


def snapshot(model: CLIP) -> dict[str, Tensor]:
    """Return copies, in main memory, of all weights that require a gradient, under OpenAI's names."""
    return {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.requires_grad
    }


def difference(before: dict[str, Tensor], model: CLIP) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (indices, new values) of each tensor in `before` whose bits differ from the model's."""
    after, changes = model.state_dict(), {}
    for name, old in before.items():
        new = after[name].cpu().contiguous()
        # Compared as integers: -0.0 and 0.0 are different bits, and a NaN equals itself.
        indices = (new.view(torch.int32) != old.view(torch.int32)).view(-1).nonzero().view(-1)
        if len(indices):
            changes[name] = indices.to(torch.int32), new.view(-1)[indices]
    return changes


def save_delta(
    changes: dict[str, tuple[Tensor, Tensor]], path: Path, base_sha256: str, metadata: dict[str, str]
) -> None:
    """Write a delta atomically; make its folder if needed."""
    tensors = {f"{name}.indices": indices for name, (indices, _) in changes.items()}
    tensors |= {f"{name}.values": values for name, (_, values) in changes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, {**metadata, "format": FORMAT, "base_sha256": base_sha256})


@torch.no_grad()
def apply_delta(model: CLIP, path: Path, base_sha256: str) -> dict[str, str]:
    """Change the model's weights as the delta says and return the delta's metadata.

    `base_sha256` is `weights_sha256` of the model as it is. Raise WeightsError, without a change, if the delta belongs
    to other weights or is damaged.
    """
    tensors, metadata = read_adapted(path, FORMAT, base_sha256)
    weights = model.state_dict()
    names = sorted({name.rpartition(".")[0] for name in tensors})
    for name in names:  # check all of them before the first weight changes
        if not _fits(tensors.get(f"{name}.indices"), tensors.get(f"{name}.values"), weights.get(name)):
            raise WeightsError(f"{path} is damaged: its entry for {name!r} fits no weight; save it again")
    apply_changes(model, {name: (tensors[f"{name}.indices"], tensors[f"{name}.values"]) for name in names})
    return metadata


@torch.no_grad()
def apply_changes(model: CLIP, changes: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Set the weights that `difference` found, in place."""
    weights = model.state_dict()
    for name, (indices, values) in changes.items():
        weights[name].view(-1)[indices.long().to(model.device)] = values.to(model.device)


def read_adapted(path: Path, expected_format: str, base_sha256: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a file of adapted weights: a delta or another format of this program.

    Raise WeightsError if it is missing, unreadable, of another format or made on other base weights.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
    except FileNotFoundError:
        raise WeightsError(f"there is no file {path}; save one with --save_path") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} is not a readable file of adapted weights ({error}); save it again") from error
    if metadata.get("format") != expected_format:
        raise WeightsError(f"{path} has the format {metadata.get('format')}, not {expected_format}; use another file")
    base = metadata.get("base_sha256", "")
    if base != base_sha256:
        raise WeightsError(
            f"{path} belongs to other base weights (SHA-256 {base[:12]}..., not {base_sha256[:12]}...); load the "
            "backbone it was made from"
        )
    return tensors, metadata


def checkpoint_metadata(checkpoint: Path) -> dict[str, str]:
    """Return what a run wrote into its weight file: run_id, method and settings. Empty for other or missing files."""
    try:
        with safetensors.safe_open(checkpoint, "pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}


def _fits(indices: Tensor | None, values: Tensor | None, weight: Tensor | None) -> bool:
    """Return whether `difference` could have made this change of `weight`."""
    if indices is None or values is None or weight is None:
        return False
    return (
        (indices.dtype, values.dtype) == (torch.int32, torch.float32)
        and indices.shape == values.shape == (len(indices.view(-1)),)
        and bool(((indices >= 0) & (indices < weight.numel())).all())
        and bool((indices.diff() > 0).all())
    )
