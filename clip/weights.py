"""Weight files: read every format that CLIP comes in, find the architecture from shapes, save, hash.

No reader here runs code from a file. TorchScript archives, OpenAI's own format, are not executed: an unpickler that
knows only tensors reads the tensors out of the archive.
"""

import hashlib
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from common import UserError, replacing

from .model import CLIP, HEAD_WIDTH, Architecture


class WeightsError(UserError):
    """A weight file that is missing, damaged or belongs to something else. The message names it and the remedy."""


# OpenAI's archives hold three integers beside the weights; some exports hold the constant causal mask.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return by name, as stored, the tensors of a safetensors file, a TorchScript archive or a saved state dict."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        elif _is_torchscript(path):
            tensors = _read_torchscript(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"there is no weight file {path}") from None
    except PermissionError:
        raise WeightsError(f"no permission to read the weight file {path}; change its permissions") from None
    except Exception as error:  # a damaged archive or pickle raises almost anything
        reason = (str(error) or type(error).__name__).split("\n")[0]
        if "weights_only" in reason:  # torch then advises to load the file in a way that may run code
            reason = "damaged, or it holds more than tensors"
        raise WeightsError(
            f"{path} is not a readable weight file ({reason}); use OpenAI's .pt, a saved state dict or .safetensors"
        ) from error
    if isinstance(tensors, dict):
        tensors = {name: t for name, t in tensors.items() if str(name).split(".")[-1] not in NOT_WEIGHTS}
        if all(isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()):
            return tensors
    raise WeightsError(f"{path} is not a state dict: it must map names to tensors")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


# The storage types of TorchScript's pickle. They are dtypes, which a pickle can neither call nor change.
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Module:
    """A stand-in for any module of a TorchScript archive; unpickling fills its attributes."""


class _TensorUnpickler(pickle.Unpickler):
    """A reader for the pickle of a TorchScript archive.

    Modules become `_Module`, tensors are rebuilt from the archive's records, other classes and functions are rejected.
    """

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
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle":  # a typed list: take the list and ignore its type tag
            return lambda value, *tag: value
        raise pickle.UnpicklingError(f"rejected {module}.{name}")

    def persistent_load(self, saved_id) -> Tensor:
        _, dtype, key, _, _ = saved_id
        record = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
        return torch.frombuffer(record, dtype=dtype) if record else torch.empty(0, dtype=dtype)


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
    """Return the architecture of these tensors. Raise KeyError, IndexError or ValueError if they are not a CLIP's."""

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
    arch = Architecture(
        embed_dim=shape("text_projection")[1],
        context_length=shape("positional_embedding")[0],
        vocab_size=shape("token_embedding.weight")[0],
        text_width=shape("ln_final.weight")[0],
        text_layers=count("transformer.resblocks."),
        **vision,
    )
    for width in (arch.text_width, arch.vision_width * (1 if arch.is_vit else 32)):
        if width % HEAD_WIDTH:
            raise ValueError(f"a width of {width} is not a multiple of {HEAD_WIDTH}, the width of a head")
    return arch


def build_model(weights: dict[str, Tensor], source: str, device: str | torch.device = "cpu") -> CLIP:
    """Return the CLIP of these weights, in float32. Raise WeightsError, naming their `source`, if they fit none."""
    try:
        arch = read_architecture(weights)
    except KeyError as error:
        raise WeightsError(f"{source} is not a CLIP with OpenAI's names: {error} is missing") from None
    except (IndexError, ValueError) as error:
        raise WeightsError(f"{source} is not a CLIP: a tensor has an impossible shape ({error})") from None
    with torch.device("meta"):  # allocate nothing: the weights replace all of it
        model = CLIP(arch)

    def own(tensor: Tensor) -> Tensor:  # row-major, because deltas index rows, whatever the layout in the file
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)

    try:
        model.load_state_dict({name: own(tensor) for name, tensor in weights.items()}, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source} does not fit the architecture of its shapes: {reason}") from None
    return model.eval()


def save_weights(model: CLIP, path: str | Path, half: bool = False) -> None:
    """Write all weights under OpenAI's names as safetensors, in float32 or half precision, atomically."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float16 if half and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Its permissions follow the umask; `save_file` would make it private."""
    with replacing(path) as part:
        part.write_bytes(save(tensors, metadata))


def weights_sha256(model: CLIP) -> str:
    """Return the SHA-256 of all weights' names, shapes and float32 bytes; it is the same in every file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()
