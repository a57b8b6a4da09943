"""What training, evaluation and methods share: prompts, classifiers, features and their cache, accuracy; files that are
written whole, and states of unfinished work.

Shapes: B images, C classes, E embedding size, P prompts.
"""

import contextlib
import hashlib
import io
import os
import pickle
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import PIL
import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import clip
from clip.layouts import PackedPrompts
from clip.weights import save_tensors

LOGIT_FACTOR = 100.0  # logits are 100 x cosine, as published, not the model's own logit_scale
PROMPTS_AT_ONCE, IMAGES_AT_ONCE = 256, 4096  # without gradients, to bound memory


def progress(
    iterable: Iterable,
    label: str,
    total: int | None = None,
    leave: bool = False,
    unit: str = "batch",
    done: int = 0,
) -> tqdm:
    """A progress bar, of which a part may be `done`; where it does not go to a terminal but to a log, a line every half
    minute at most."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        iterable,
        desc=label,
        total=total,
        leave=leave,
        unit=unit,
        initial=done,
        mininterval=interval,
        maxinterval=2 * interval,
    )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of forward passes: bf16 autocast or, for fp32, none. Weights are float32 either way."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def tokenize_classes(class_names: Sequence[str], template: str) -> Tensor:
    """Token ids [C, 77] of `template` filled with each class name; underscores become spaces."""
    return clip.tokenize([template.format(name.replace("_", " ")) for name in class_names])


def encode_text(model: clip.CLIP, prompts: Tensor | PackedPrompts) -> Tensor:
    """Unit text features [P, E] in float32 of token ids [P, 77] or packed prompts, with gradients where the
    weights have them."""
    return F.normalize(model.encode_text(prompts).float(), dim=-1)


def encode_image(model: clip.CLIP, images: Tensor) -> Tensor:
    """Unit image features [B, E] in float32, with gradients where the weights have them."""
    return F.normalize(model.encode_image(images.to(model.device, non_blocking=True)).float(), dim=-1)


@torch.no_grad()
def text_classifier(model: clip.CLIP, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Zero-shot classifier [C, E] (Radford et al. 2021, section 3.1.4): for each class the mean of its unit
    text features over the templates, normalised again."""
    total = 0
    for template in templates:
        tokens = tokenize_classes(class_names, template)
        total = total + torch.cat([encode_text(model, part) for part in tokens.split(PROMPTS_AT_ONCE)])
    return F.normalize(total, dim=-1)


@torch.no_grad()
def image_features(model: clip.CLIP, loader: DataLoader, precision: str, label: str) -> Tensor:
    """Unit features [N, E] in float32, in main memory, of all the loader's images in order."""
    parts = []
    for images, _ in progress(loader, label):
        with autocast(model.device, precision):
            parts.append(encode_image(model, images).cpu())
    return torch.cat(parts)


def cosine_logits(image_features: Tensor, text_features: Tensor) -> Tensor:
    """CLIP's logits [B, C]: 100 x the cosines of unit image features [B, E] and unit text features [C, E]."""
    return LOGIT_FACTOR * image_features @ text_features.T


@torch.no_grad()
def accuracy(logits: Callable[[Tensor], Tensor], features: Tensor, labels: Sequence[int]) -> float:
    """Per cent of the image features [N, E] whose largest of the `logits` [B, C] is their label's."""
    predictions = torch.cat([logits(part).argmax(dim=-1).cpu() for part in features.split(IMAGES_AT_ONCE)])
    correct = int((predictions == torch.tensor(labels)).sum())
    return 100 * correct / len(labels)


class States:
    """States of unfinished work, to go on from if it is stopped: the newest two, each a file in `folder`.

    A file's name holds a number, which grows, and the SHA-256 of its content, so that a damaged one is noticed and the
    one before it taken. A state that was saved with another `belongs_to`, a dict of plain values, is not taken, and
    makes room for the first that is saved here. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None, name: str = "", belongs_to: dict | None = None):
        self.folder, self.name, self.belongs_to = folder, name, belongs_to
        self.number, self.newest = 0, None  # of the state that `take` gives
        self.others: list[Path] = []
        for path in self._files():
            content = self._read(path)
            if content is not None:
                self.number, self.newest = int(path.name.split("-")[-2]), content["state"]
                break

    def take(self) -> dict | None:
        """The newest state, in main memory, and None the next time; None if there is none to go on from."""
        state, self.newest = self.newest, None
        return state

    def save(self, number: int, state: dict) -> bool:
        """Keeps what `torch.load` reads with weights_only. Work goes on where the disk does not take it, with a note on
        stderr; False then."""
        if self.folder is None:
            return False
        content = io.BytesIO()
        torch.save({"belongs_to": self.belongs_to, "state": state}, content)
        path = self.folder / f"{self.name}-{number:09d}-{_digest(content.getbuffer())}.pt"
        try:
            write_atomically(path, content.getbuffer())
        except OSError as error:
            print(f"note: {path} could not be saved ({error.strerror}); the run goes on", file=sys.stderr)
            return False
        while self.others:
            self.others.pop().unlink()
        for old in self._files()[2:]:
            old.unlink()
        return True

    def clear(self) -> None:
        """Removes what was saved."""
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob(f"{self.name}-*-*.pt"), reverse=True) if self.folder else []

    def _read(self, path: Path) -> dict | None:
        """What `save` wrote; None if it is damaged, and then removed, or belongs to something else."""
        content = path.read_bytes()
        if path.stem.split("-")[-1] == _digest(content):
            try:
                content = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                if content["belongs_to"] == self.belongs_to:
                    return content
                print(f"note: {path} belongs to other images or weights and is not taken", file=sys.stderr)
                self.others.append(path)
                return None
            except (RuntimeError, pickle.UnpicklingError):  # nothing that `save` wrote
                pass
        print(f"note: {path} is damaged and is removed", file=sys.stderr)
        path.unlink()
        return None


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one, never half of it."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # processes of two hosts may have the same number
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may keep the new name and lose what is in the file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes new names in a folder survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cache_file(folder: str, *key: str) -> Path:
    """Where features are kept that are determined by `key` and by the versions of the libraries that make them."""
    versions = torch.__version__, torchvision.__version__, PIL.__version__
    digest = hashlib.sha256("\n".join((*key, *versions)).encode()).hexdigest()
    return Path(folder).expanduser() / f"{digest}.safetensors"


def load_features(path: Path) -> Tensor | None:
    """What `save_features` wrote, or None if there is nothing or it is damaged."""
    try:
        return load_file(path)["features"]
    except (OSError, KeyError, SafetensorError):
        return None


def save_features(path: Path, features: Tensor) -> None:
    """Writes features atomically. A cache that cannot be written is said and done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"features": features}, path)
    except OSError as error:
        print(f"note: features are not cached in {path.parent} ({error.strerror}); --cache_dir chooses another folder")
