"""Weight files: reading every format that CLIP comes in, the architecture from shapes, saving, hashing.

No reader here runs code from a file. TorchScript archives, OpenAI's own format, are not executed: their
tensors are picked out of the archive by an unpickler that knows tensors and nothing else.
"""

import hashlib
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import WeightsError
from .model import CLIP, Architecture

# OpenAI's archives hold three integers beside the weights; some exports hold the constant causal mask.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file, a TorchScript archive or a saved state dict, types as stored.

    Raises WeightsError if the file is none of these.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        elif _is_torchscript(path):
            tensors = _read_torchscript(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"there is no weight file {path}") from None
    except (
        pickle.UnpicklingError,
        safetensors.SafetensorError,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
    ) as e:
        reason = str(e).split("\n")[0]
        raise WeightsError(
            f"{path} is no readable weight file ({reason}); expected OpenAI's .pt, a saved state dict or .safetensors"
        ) from e
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise WeightsError(f"{path} is not a state dict: it must map names to tensors")
    return {name: t for name, t in tensors.items() if name.split(".")[-1] not in NOT_WEIGHTS}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Module:
    """Stands for any module of a TorchScript archive; unpickling fills its attributes."""


class _TensorUnpickler(pickle.Unpickler):
    """Reads the pickle of a TorchScript archive: modules become `_Module`, tensors are rebuilt from the
    archive's records, and any other class or function is refused."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        if module == "torch.jit._pickle":  # typed lists: the list itself, whatever its type tag
            return lambda value, *tag: value
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")

    def persistent_load(self, saved_id) -> Tensor:
        _, storage, key, _, _ = saved_id
        record = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
        return torch.frombuffer(record, dtype=storage.dtype) if record else torch.empty(0, dtype=storage.dtype)


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        folder = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("/data.pkl")
        root = _TensorUnpickler(archive, folder).load()

    def walk(module: _Module, prefix: str):
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, _Module):
                yield from walk(value, f"{prefix}{name}.")

    return dict(walk(root, ""))


def read_architecture(weights: dict[str, Tensor]) -> Architecture:
    """The architecture that these tensors' names and shapes belong to. KeyError if they are no CLIP's."""

    def count(prefix: str) -> int:
        depth = prefix.count(".")
        return len({name.split(".")[depth] for name in weights if name.startswith(prefix)})

    def shape(name: str) -> torch.Size:
        return weights[name].shape

    if "visual.proj" in weights:
        patch_size = shape("visual.conv1.weight")[-1]
        side = math.isqrt(shape("visual.positional_embedding")[0] - 1)
        vision = dict(
            resolution=patch_size * side,
            vision_width=shape("visual.conv1.weight")[0],
            vision_layers=count("visual.transformer.resblocks."),
            patch_size=patch_size,
        )
    else:
        side = math.isqrt(shape("visual.attnpool.positional_embedding")[0] - 1)
        vision = dict(
            resolution=32 * side,
            vision_width=shape("visual.layer1.0.conv1.weight")[0],
            vision_layers=tuple(count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
            patch_size=None,
        )
    return Architecture(
        embed_dim=shape("text_projection")[1],
        context_length=shape("positional_embedding")[0],
        vocab_size=shape("token_embedding.weight")[0],
        text_width=shape("ln_final.weight")[0],
        text_layers=count("transformer.resblocks."),
        **vision,
    )


def build_model(weights: dict[str, Tensor], source: str, device: str | torch.device = "cpu") -> CLIP:
    """The CLIP that these weights belong to, in float32 on `device`. `source` names them in errors."""
    try:
        arch = read_architecture(weights)
    except KeyError as error:
        raise WeightsError(f"{source} holds no CLIP in OpenAI's naming: {error} is missing") from None
    with torch.device("meta"):  # allocate nothing that the weights replace anyway
        model = CLIP(arch)
    weights = {
        name: t.to(device, torch.float32 if t.is_floating_point() else t.dtype, copy=True)
        for name, t in weights.items()
    }
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source} does not fit the architecture of its shapes: {reason}") from None
    return model.eval()


def save_weights(model: CLIP, path: str | Path, half: bool = False) -> None:
    """Writes all weights under OpenAI's names as safetensors, in float32 or half precision, atomically."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float16 if half and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file` that never leaves half a file: written beside `path`, then renamed."""
    part = f"{path}.{os.getpid()}.part"
    try:
        save_file(tensors, part, metadata)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def weights_sha256(model: CLIP) -> str:
    """SHA-256 over all weights' names, shapes and float32 bytes, in the order of the names: the same for the
    same weights, from whichever file format they came."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()
