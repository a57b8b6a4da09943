"""Weights: find the architecture from shapes, build the model, save it, hash it."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from common import replacing

from . import trunks
from .configs import CLIP_VOCABULARY, Card, card_metadata
from .conventions import with_conventions
from .files import WeightsError
from .model import CLIP, Architecture, Conventions, Trunk
from .preprocess import Preprocessing
from .tokenizer import ClipTokenizer


def read_architecture(weights: dict[str, Tensor], trunk: Trunk | None = None) -> Architecture:
    """Return the architecture of these tensors; `trunk` if the image tower is timm's.

    Raise KeyError, IndexError or ValueError if they are not a CLIP's.
    """

    def count(prefix: str) -> int:
        depth = prefix.count(".")
        return len({name.split(".")[depth] for name in weights if name.startswith(prefix)})

    def shape(name: str) -> torch.Size:
        return weights[name].shape

    def mlp(prefix: str, width: int) -> int | None:
        found = shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0]
        return None if found == 4 * width else found

    if trunk is not None:
        vision = dict(
            resolution=trunk.resolution, vision_width=0, vision_layers=0, patch_size=None, embed_dim=trunk.embed_dim
        )
    elif any(name.startswith("visual.transformer.") for name in weights):
        patch_size = shape("visual.conv1.weight")[-1]
        side = math.isqrt(shape("visual.positional_embedding")[0] - 1)
        vision = dict(
            resolution=patch_size * side,
            vision_width=shape("visual.conv1.weight")[0],
            vision_layers=count("visual.transformer.resblocks."),
            patch_size=patch_size,
            vision_mlp=mlp("visual.", shape("visual.conv1.weight")[0]),
            embed_dim=shape("visual.proj")[1],
        )
    else:
        side = math.isqrt(shape("visual.attnpool.positional_embedding")[0] - 1)
        vision = dict(
            resolution=32 * side,
            vision_width=shape("visual.layer1.0.conv1.weight")[0],
            vision_layers=tuple(count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
            patch_size=None,
            embed_dim=shape("visual.attnpool.c_proj.weight")[0],
        )
    return Architecture(
        context_length=shape("positional_embedding")[0],
        vocab_size=shape("token_embedding.weight")[0],
        text_width=shape("ln_final.weight")[0],
        text_layers=count("transformer.resblocks."),
        text_mlp=mlp("", shape("ln_final.weight")[0]),
        logit_bias="logit_bias" in weights,
        **vision,
    )


def build_model(
    weights: dict[str, Tensor],
    source: Path,
    device: str | torch.device = "cpu",
    asked: str | None = None,
    card: Card | None = None,
) -> CLIP:
    """Return the CLIP of these weights, in float32, with what belongs to it.

    `asked` is --arch, `card` what a config says. The model's `origin` says where its conventions are known from. Raise
    WeightsError, naming the weights' `source`, if they fit no CLIP, if its conventions are not known or if a weight is
    no finite number.
    """
    trunk = card.conventions.trunk if card else None
    if trunk is None and any(name.startswith("visual.trunk.") for name in weights):
        raise WeightsError(f"{source} does not tell which of timm's image towers it has; give its name as --arch")
    try:
        arch = read_architecture(weights, trunk)
    except KeyError as error:
        raise WeightsError(f"{source} is not a CLIP with OpenAI's names: {error} is missing") from None
    except (IndexError, ValueError) as error:
        raise WeightsError(f"{source} is not a CLIP: a tensor has an impossible shape ({error})") from None
    tokenizer = card.tokenizer if card else None
    if tokenizer is None and arch.vocab_size > CLIP_VOCABULARY:
        raise WeightsError(
            f"{source} has a vocabulary of {arch.vocab_size} tokens, that of another tokenizer than CLIP's, of "
            f"{CLIP_VOCABULARY}; put the model's config and tokenizer beside it and name the folder, or use --arch"
        )
    arch, origin = with_conventions(arch, source, asked, card)
    visual = None if trunk is None else trunks.build(trunk).to(device)
    with torch.device("meta"):  # allocate nothing: the weights replace all of it
        model = CLIP(arch, visual)

    def own(tensor: Tensor) -> Tensor:  # row-major, because deltas index rows, whatever the layout in the file
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)

    for name, tensor in weights.items():
        if tensor.numel() and tensor.is_floating_point() and not all(map(math.isfinite, torch.aminmax(tensor))):
            raise WeightsError(f"{source}: {name} holds NaN or infinite numbers; its training failed, use another file")
    try:
        model.load_state_dict({name: own(tensor) for name, tensor in weights.items()}, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source} does not fit the architecture of its shapes: {reason}") from None
    model.origin = origin
    if arch.conventions != Conventions():
        model.logit_factor = model.logit_scale.exp().item()
    model.tokenize = tokenizer or ClipTokenizer(arch.context_length)
    model.preprocessing = _preprocessing(card, arch, source)
    return model.eval()


def _preprocessing(card: Card | None, arch: Architecture, source: Path) -> Preprocessing:
    """Return how images are prepared for a model of this resolution. Raise WeightsError if its config says another."""
    if card is None:
        return Preprocessing(arch.resolution)
    if card.preprocessing.size not in (0, arch.resolution):
        raise WeightsError(
            f"{source} has a model for {arch.resolution} pixels, but {card.where} prepares images of "
            f"{card.preprocessing.size}; correct the config"
        )
    return replace(card.preprocessing, size=arch.resolution)


def save_weights(model: CLIP, path: str | Path, half: bool = False) -> None:
    """Write all weights under OpenAI's names as safetensors, in float32 or half precision, atomically.

    What no tensor tells goes into the file's metadata, where `clip.load` finds it, if it is not OpenAI's.
    """
    tensors = {
        name: tensor.detach().to("cpu", torch.float16 if half and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    metadata = card_metadata(model) if model.arch.conventions != Conventions() else None
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Its permissions follow the umask; `save_file` would make it private."""
    with replacing(path) as part:
        part.write_bytes(save(tensors, metadata))


def weights_sha256(model: CLIP) -> str:
    """Return the SHA-256 of all weights' names, shapes and float32 bytes, and of conventions other than OpenAI's.

    It is the same in every file format.
    """
    digest = hashlib.sha256()
    if model.arch.conventions != Conventions():
        digest.update(repr(model.arch.conventions).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()
