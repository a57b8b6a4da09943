"""The names that Hugging Face's CLIPModel gives to a CLIP's tensors, and OpenAI's for the same."""

import re
from pathlib import Path

import torch
from torch import Tensor

from .files import WeightsError

VISION, TEXT = "vision_model.", "text_model."
EMBEDDINGS = f"{TEXT}embeddings."  # what the token embedding's name begins with
# Hugging Face's names and OpenAI's; `*` is the number of a block.
_TOP = {
    "logit_scale": "logit_scale",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    **{f"vision_model.pre_layrnorm.{kind}": f"visual.ln_pre.{kind}" for kind in ("weight", "bias")},  # so misspelt
    **{f"vision_model.post_layernorm.{kind}": f"visual.ln_post.{kind}" for kind in ("weight", "bias")},
    **{f"text_model.final_layer_norm.{kind}": f"ln_final.{kind}" for kind in ("weight", "bias")},
}
_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_IN_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_TURNED = {"visual.proj", "text_projection"}  # OpenAI multiplies by them from the right


def openai_names(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a CLIPModel's tensors by OpenAI's names, queries, keys and values stacked.

    Raise WeightsError, naming the file, for a tensor of another model, or if one of the three is missing.
    """
    found, thirds = {}, {}
    for name, tensor in tensors.items():
        block = _IN_BLOCK.fullmatch(name)
        if name in _TOP:
            ours = _TOP[name]
            found[ours] = tensor.T.contiguous() if ours in _TURNED else tensor
        elif block and block[3] in _BLOCK:
            found[f"{_blocks(block[1])}{block[2]}.{_BLOCK[block[3]]}.{block[4]}"] = tensor
        elif block and block[3] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            thirds.setdefault(f"{_blocks(block[1])}{block[2]}.attn.in_proj_{block[4]}", {})[block[3][-6]] = tensor
        else:
            raise WeightsError(
                f"{path}: {name} is no tensor of a CLIPModel; use a CLIPModel, or a file with OpenAI's names"
            )
    for name, parts in thirds.items():
        if set(parts) != set("qkv"):
            raise WeightsError(f"{path} is damaged: {name} needs queries, keys and values, and has {', '.join(parts)}")
        found[name] = torch.cat([parts[part] for part in "qkv"])
    return found


def _blocks(tower: str) -> str:
    return "visual.transformer.resblocks." if tower == "vision" else "transformer.resblocks."
