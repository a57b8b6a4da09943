"""Damages weight files at random and loads them: every file loads as a finite CLIP, or is rejected in one line.

    python -m benchmarks.fuzz_weights --damages 4000 --seed 1

Prints a row per kind of file: how many damaged files loaded, and how many were rejected. Exit code 1 if anything else
than a WeightsError was raised, a message did not name its file in one line, a weight was no finite number, or the
process took 500 MB more than before. In formats without a checksum a damage may change a weight, which nobody can
notice: PyTorch's archives have one, safetensors and the older format have none.
"""

import argparse
import contextlib
import io
import random
import resource
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

import clip
from clip.model import Architecture
from common import progress

from .fuzz_images import damaged

SMALL = Architecture(24, 32, 64, 2, 16, context_length=77, vocab_size=64, text_width=64, text_layers=2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_weights", description=__doc__)
    parser.add_argument("--damages", type=int, default=4000, help="damaged files in all")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    rng, faults = random.Random(arguments.seed), []
    torch.manual_seed(0)
    whole = kinds(clip.CLIP(SMALL))
    counts, before = {name: Counter() for name in whole}, peak_mb()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        for number in progress(range(arguments.damages), "fuzzing", "file"):
            name = list(whole)[number % len(whole)]
            path.write_bytes(damaged(whole[name], rng))
            outcome, fault = load_once(path)
            counts[name][outcome] += 1
            faults += [f"{name}, file {number}: {fault}"] if fault else []
    for name, count in counts.items():
        print(f"{name:22} loaded {count['loaded']:5}  rejected {count['rejected']:5}")
    more = peak_mb() - before
    faults += [f"{more:.0f} MB more than before"] if more > 500 else []
    print(f"{more:.0f} MB more memory at the peak; {len(faults)} faults")
    print(*faults, sep="\n")
    return 1 if faults else 0


def kinds(model: clip.CLIP) -> dict[str, bytes]:
    """Return whole weight files of eight kinds."""
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    wrapped = {
        "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1),
    }
    return {
        "safetensors": save(weights),
        "safetensors, half": save({name: tensor.half() for name, tensor in weights.items()}),
        "archive": _saved(weights),
        "archive, wrapped": _saved(wrapped),
        "archive of a module": _saved(model),
        "older format": _saved(weights, _use_new_zipfile_serialization=False),
        "older format, wrapped": _saved(wrapped, _use_new_zipfile_serialization=False),
        "TorchScript": _scripted(weights),
    }


def _saved(content: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class _Holder(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _scripted(weights: dict[str, torch.Tensor]) -> bytes:
    root = _Holder()
    for name, tensor in weights.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            node = node._modules.setdefault(parent, _Holder())
        node.register_buffer(leaf, tensor)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and OpenAI's format
        torch.jit.save(torch.jit.script(root), buffer)
    return buffer.getvalue()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load_once(path: Path) -> tuple[str, str | None]:
    """Load weights and return whether they were loaded or rejected, and what is wrong with how that was done."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model, _ = clip.load(path, arch="openai")
    except clip.WeightsError as error:
        is_clear = str(path) in str(error) and "\n" not in str(error)
        return "rejected", None if is_clear else f"message {str(error)!r}"
    except BaseException as error:
        return "raised", f"{type(error).__name__}: {error}"
    finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    return "loaded", None if finite else "a weight is no finite number"


if __name__ == "__main__":
    raise SystemExit(main())
