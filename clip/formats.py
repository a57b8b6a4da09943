"""Finds the CLIP in what a weight file holds: unwraps it, removes prefixes, and says what it is if it is no such CLIP.

The result has OpenAI's names. Nothing is guessed: two CLIPs in one file, or tensors that belong to another model, are
rejected by name.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from common import counted, note

from .files import Inert, Stored, WeightsError, read_file, resolve
from .huggingface import EMBEDDINGS, TEXT, VISION, openai_names

# OpenAI's archives hold three integers beside the weights; some exports hold the constant causal mask.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
# Where training programs keep a model, in the order in which they are tried.
WRAPPINGS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "clip", "weights")
AVERAGES = ("ema", "state_dict_ema", "ema_state_dict", "model_ema", "model_ema_state_dict")
INDEX = ".index.json"  # what the name of an index of shards ends in
_ANCHOR = "token_embedding.weight"  # every CLIP with OpenAI's names has it, once


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return by OpenAI's name the tensors of the CLIP in a weight file, or in the files that an index of shards lists.

    Read are safetensors, PyTorch's archives (also TorchScript and whole pickled modules) and its older format; the
    state dict may lie below one or two of WRAPPINGS, and its names may have prefixes, such as those of DataParallel and
    torch.compile. What lies beside it, such as an optimizer's state, is left out. No code from the file is run. Raise
    WeightsError that says what the file is.
    """
    found = {}
    for file in shards_of(path) if path.name.endswith(INDEX) else [path]:
        held = _tensors(read_file(file), file)
        found |= held if file == path else resolve(held, file)
    tensors = {name: value for name, value in found.items() if name.split(".")[-1] not in NOT_WEIGHTS}
    tensors = resolve(_without_prefix(tensors, path), path)
    if f"{EMBEDDINGS}{_ANCHOR}" in tensors:
        tensors = openai_names(tensors, path)
    for name in ("logit_scale", "logit_bias"):
        if name in tensors and tensors[name].shape == (1,):  # as some programs save it
            tensors[name] = tensors[name].reshape(())
    return tensors


def shards_of(index: Path) -> list[Path]:
    """Return the files that an index of Hugging Face's lists."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index} is not an index of weight files; name a weight file") from None
    return [index.with_name(str(name)) for name in sorted(names)]


def _tensors(content: Any, path: Path) -> dict[str, Tensor | Stored]:
    """Return the tensors of the state dict or module in `content`, which may be wrapped."""
    for _ in range(3):
        if isinstance(content, Inert):
            return dict(_of_module(content, ""))
        if not isinstance(content, dict):
            raise WeightsError(f"{path} is not a state dict: it must map names to tensors")
        inner = [name for name in WRAPPINGS if isinstance(content.get(name), (dict, Inert))]
        if not inner:
            break
        averages = [name for name in AVERAGES if isinstance(content.get(name), (dict, Inert))]
        if averages:
            note(f"{path} holds the weights {inner[0]}, which are taken, and their average {averages[0]}")
        content = content[inner[0]]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, (Tensor, Stored))}
    if not tensors and content.keys() & {"optimizer", "optimizer_state_dict", "param_groups"}:
        raise WeightsError(f"{path} holds the state of an optimizer, but no weights; use the checkpoint that has both")
    if not tensors:
        names = ", ".join(map(str, list(content)[:5]))
        raise WeightsError(
            f"{path} is not a state dict: it must map names to tensors, and it holds {names or 'nothing'}"
        )
    return tensors


def _of_module(module: Inert, prefix: str, depth: int = 0) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of a module by their dotted names; it was saved as TorchScript or pickled whole."""
    if depth > 50:
        raise WeightsError("a module contains itself")
    attributes = dict(vars(module))
    for held in ("_parameters", "_buffers", "_modules"):  # where a module keeps them that is pickled whole
        inside = attributes.pop(held, None)
        attributes |= inside if isinstance(inside, dict) else {}
    for name, value in attributes.items():
        if isinstance(value, Stored):
            yield f"{prefix}{name}", value
        elif isinstance(value, Inert):
            yield from _of_module(value, f"{prefix}{name}.", depth + 1)


def _without_prefix(tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the tensors of the CLIP under OpenAI's names. Raise WeightsError if there is none, or more than one."""
    anchors = [name.removesuffix(_ANCHOR) for name in tensors if f".{name}".endswith(f".{_ANCHOR}")]
    known = what_model(tensors)
    if known:
        raise WeightsError(f"{path} is {known}")
    if len(anchors) > 1:
        raise WeightsError(
            f"{path} holds {len(anchors)} models ({', '.join(anchors)}); save one of them as a state dict of its own"
        )
    if not anchors:
        raise WeightsError(f"{path} is not a CLIP with OpenAI's names; it holds {', '.join(list(tensors)[:3])}")
    prefix = anchors[0].removesuffix(EMBEDDINGS)
    visual = f"{prefix.removesuffix('text.')}visual."
    is_custom = prefix.endswith("text.") and any(name.startswith(visual) for name in tensors)
    text = "text." if is_custom else ""  # open_clip's CustomTextCLIP
    prefix = prefix.removesuffix(text)
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    outside = [name for name in tensors if not name.startswith(prefix)]
    if outside:
        note(
            f"{path}: left out {counted(len(outside), 'tensor')} beside the CLIP in {prefix}, for example {outside[0]}"
        )
    return {name.removeprefix(text): value for name, value in inside.items()}


_OPENAI = "use a file with OpenAI's names, such as OpenAI's .pt, open_clip's weights or clip.weights.save_weights"


def what_model(tensors: dict[str, Any]) -> str | None:
    """Return what other model than a CLIP with OpenAI's names these tensors belong to, and the remedy."""
    names = list(tensors)

    def has(*parts: str) -> bool:
        return all(any(part in name for name in names) for part in parts)

    if all(name.endswith((".indices", ".values")) for name in names) and names:
        return "a sparse delta of this program, not a whole CLIP; name the backbone it was made from as --backbone"
    if has("lora_") or has(".lora.") or has("w_lora"):
        return f"a file of LoRA matrices, not a whole CLIP; merge them into the model they belong to, then {_OPENAI}"
    if has("positional_embedding_res"):
        return f"Long-CLIP, whose second positional embedding this program does not compute; {_OPENAI}"
    if has(VISION, TEXT) and not has(f"{EMBEDDINGS}{_ANCHOR}"):
        return f"a model of Hugging Face's with another text tower than CLIP's, not read here; {_OPENAI}"
    if has("text_decoder.") or has("visual.attn_pool.") or has("visual_encoder."):
        return f"a model with a text decoder (CoCa, BLIP), not a CLIP; {_OPENAI}"
    if has("prompt_learner.") or names in (["ctx"], ["prompt"]):
        return f"a learned prompt, not a whole CLIP; {_OPENAI}"
    if has("visual.") and not has(_ANCHOR):
        return None if has("text_projection") else f"only the image tower of a CLIP; {_OPENAI}"
    if has(_ANCHOR, "text_projection") and not has("visual.") and not has(VISION):
        return f"only the text tower of a CLIP; {_OPENAI}"
    if has("layer1.0.conv1.weight", "fc.weight") and not has("visual."):
        return f"a ResNet classifier, not a CLIP; {_OPENAI}"
    if has("blocks.0.attn.qkv.weight") and not has(_ANCHOR):
        return f"a vision transformer without a text tower, not a CLIP; {_OPENAI}"
    return None
