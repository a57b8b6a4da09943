"""Reads what a weight file holds, whatever its format and name, without running code from it.

A file is judged by its first bytes. Pickles, in which PyTorch saves, may name any function to be called; here they are
read by an unpickler that knows tensors and plain containers. Every other class or function that a pickle names becomes
an `Inert` object, which is neither imported nor called.
"""

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common import UserError


class WeightsError(UserError):
    """A weight file that is missing, damaged or belongs to something else. The message names it and the remedy."""


def read_file(path: Path) -> Any:
    """Return what a weight file holds: tensors (or `Stored` ones, not read yet) in dicts, lists and `Inert` objects.

    Reads safetensors, PyTorch's archives (also TorchScript) and its older format. Raise WeightsError, with what the
    file is and a remedy, for anything else.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except FileNotFoundError:
        raise WeightsError(f"there is no weight file {path}") from None
    except PermissionError:
        raise WeightsError(f"no permission to read the weight file {path}; change its permissions") from None
    except IsADirectoryError:
        raise WeightsError(f"{path} is a folder; name the weight file in it") from None
    except WeightsError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise WeightsError(f"{path} is damaged or not a weight file ({reason}); {REMEDY}") from error


REMEDY = "use OpenAI's .pt, a saved state dict or .safetensors"


def _read(file: BinaryIO, path: Path) -> Any:
    head = file.read(4096)
    file.seek(0)
    if _is_safetensors(head):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{path} is a damaged safetensors file ({error}); download it again") from error
    kind = what_it_is(head)
    if kind:
        raise WeightsError(f"{path} is {kind}; {REMEDY}")
    if zipfile.is_zipfile(file):
        return _read_archive(zipfile.ZipFile(file), path)
    file.seek(0)  # where is_zipfile left it does not matter
    if head[:1] != b"\x80":
        raise WeightsError(f"{path} is damaged or not a weight file; {REMEDY}")
    return _read_legacy(file, path)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and head[9:10] in (b'"', b"}", b" ")


_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer and not the file itself, which git lfs pull fetches",
    b"GGUF": "a GGUF file of a language model",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF document",
}


def what_it_is(head: bytes) -> str | None:
    """Return what a file is that begins like this, if that is something else than weights."""
    if not head:
        return "empty (0 bytes): download it again"
    if not any(head):
        return "zero bytes, as after an interrupted download: download it again"
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if b"\x12" in head[:4] and any(name in head[:64] for name in (b"pytorch", b"onnx")):
        return "an ONNX model, whose weights cannot be adapted"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")):
        return "a web page, perhaps of a failed download or of a page about the file"
    if text.startswith((b"{", b"[")):
        return (
            "an index of weights in several files" if b"weight_map" in text else "JSON text, perhaps a model's config"
        )
    return "a text file" if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head) else None


# --- tensors that are not read yet


@dataclass
class Storage:
    """The numbers of one or several tensors in a file. `content` is None until it is read."""

    dtype: torch.dtype
    key: str
    count: int
    content: Tensor | None = None


@dataclass(frozen=True)
class Stored:
    """A tensor as a pickle describes it: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Return the tensor. Raise ValueError if it reaches beyond its storage."""
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor has an impossible shape")
        count = math.prod(self.shape)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride)) if count else -1
        if last >= self.storage.count or count > max(self.storage.count, 0):
            raise ValueError("a tensor reaches beyond its storage")
        return self.storage.content.as_strided(self.shape, self.stride, self.offset)


def resolve(values: dict[str, "Tensor | Stored"], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, those that are not read yet too. Raise WeightsError if one is damaged."""
    wanted = {id(value.storage): value.storage for value in values.values() if isinstance(value, Stored)}
    try:
        _fill([storage for storage in wanted.values() if storage.content is None], path)
        return {name: value.tensor() if isinstance(value, Stored) else value for name, value in values.items()}
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise WeightsError(f"{path} is damaged ({reason}); download it again, or save it again") from error


def _fill(storages: list[Storage], path: Path) -> None:
    """Read the contents of storages of a PyTorch archive; those of the older format are read at once."""
    if not storages:
        return
    with zipfile.ZipFile(path) as archive:
        folder = _folder(archive)
        for storage in storages:
            content = bytearray(archive.read(f"{folder}data/{storage.key}"))
            if len(content) < storage.count * storage.dtype.itemsize:
                raise ValueError(f"the numbers of storage {storage.key} are missing")
            storage.content = _numbers(content, storage.dtype)


def _numbers(content: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


# --- pickles

# The names under which pickles mention the types of numbers.
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
    "UntypedStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Inert:
    """A stand-in for an object of any class, or for what any function would return. It only keeps attributes."""

    def __new__(cls, *_: object, **__: object):
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object):
        pass

    def __call__(self, *_: object, **__: object) -> "Inert":
        return Inert()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                vars(self).update({name: value for name, value in part.items() if isinstance(name, str)})

    def _ignore(self, *_: object) -> None:
        pass

    append = extend = add = __setitem__ = _ignore


def _rebuild_tensor(storage: Storage, offset: int, shape: tuple, stride: tuple, *_: object) -> Stored:
    return Stored(storage, offset, tuple(shape), tuple(stride))


def _first(value: Any, *_: object) -> Any:
    return value


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, in Python: the one in C reserves as much memory as a damaged file asks for."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin1")  # texts of Python 2, too
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return _first
        if module == "torch.jit._pickle" and name != "build_boollist":  # typed lists of TorchScript
            return _first
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        return type(name, (Inert,), {"__module__": module})

    def persistent_load(self, saved_id: Any) -> Any:
        if saved_id[0] == "module":  # its class, with the source code, which the older format kept
            return saved_id[1]
        _, dtype, key, _, count, *view = saved_id
        if not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0 or view[:1] not in ([], [None]):
            raise pickle.UnpicklingError("a tensor of an unknown kind")
        return self.storages.setdefault(str(key), Storage(dtype, str(key), count))


def _folder(archive: zipfile.ZipFile) -> str:
    """Return the folder of an archive that holds data.pkl, with a slash at its end, or an empty text."""
    found = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    return min(found, key=len).removesuffix("data.pkl")


def _read_archive(archive: zipfile.ZipFile, path: Path) -> Any:
    names = archive.namelist()
    if any(name.endswith(".npy") for name in names):
        raise WeightsError(f"{path} is an archive of NumPy arrays, as JAX programs write it; {REMEDY}")
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        inside = f", which holds {names[0]}" if names else ""
        raise WeightsError(f"{path} is a ZIP archive{inside}: unpack it first, or {REMEDY}")
    folder = _folder(archive)
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise WeightsError(f"{path} was saved on a machine with another byte order; save it on this kind of machine")
    return _Unpickler(io.BytesIO(archive.read(f"{folder}data.pkl"))).load()


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def _read_legacy(file: BinaryIO, path: Path) -> Any:
    """Read PyTorch's format before 1.6: pickles one after the other, then the numbers of all storages."""
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise WeightsError(f"{path} is a pickle that PyTorch did not write; {REMEDY}")
    _Unpickler(file).load()  # version
    if _Unpickler(file).load().get("little_endian") is not True:
        raise WeightsError(f"{path} was saved on a machine with another byte order; save it on this kind of machine")
    unpickler = _Unpickler(file)
    content, keys = unpickler.load(), _Unpickler(file).load()
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        storage = unpickler.storages[str(key)]
        if count != storage.count:
            raise ValueError(f"the numbers of storage {key} are missing")
        numbers = file.read(count * storage.dtype.itemsize)
        if len(numbers) < count * storage.dtype.itemsize:
            raise ValueError("the end of the file is missing")
        storage.content = _numbers(bytearray(numbers), storage.dtype)
    return content


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty for other files."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(min(length, 100_000_000))).get("__metadata__", {})
    except (OSError, ValueError, struct.error, AttributeError):
        return {}
