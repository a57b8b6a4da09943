"""The names that Hugging Face's CLIPModel and SiglipModel give to a CLIP's tensors, and ours for the same.

Ours are OpenAI's and, for SigLIP's image tower, those of timm (`clip/trunks.py`).
"""

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
_IN_BLOCK_OF_TIMM = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SIGLIP = {  # beside the text tower's names above
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
    **{name: _TOP[name] for name in _TOP if name.startswith("text_model.")},
    **{f"text_model.head.{kind}": f"text_projection.{kind}" for kind in ("weight", "bias")},
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    **{
        f"vision_model.{theirs}.{kind}": f"visual.trunk.{ours}.{kind}"
        for kind in ("weight", "bias")
        for theirs, ours in {
            "embeddings.patch_embedding": "patch_embed.proj",
            "post_layernorm": "norm",
            "head.attention.out_proj": "attn_pool.proj",
            "head.layernorm": "attn_pool.norm",
            "head.mlp.fc1": "attn_pool.mlp.fc1",
            "head.mlp.fc2": "attn_pool.mlp.fc2",
        }.items()
    },
}
_POOL_INPUT = "vision_model.head.attention.in_proj_"  # queries, keys and values; timm has queries apart
_IN_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_IN_OUR_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_TURNED = {"visual.proj", "text_projection"}  # OpenAI multiplies by them from the right


def openai_names(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a CLIPModel or SiglipModel by our names, queries, keys and values stacked.

    Raise WeightsError, naming the file, for a tensor of another model, or if one of the three is missing.
    """
    is_siglip = "logit_bias" in tensors
    top = _SIGLIP if is_siglip else _TOP
    found, thirds = {}, {}
    for name, tensor in tensors.items():
        block = _IN_BLOCK.fullmatch(name)
        of_timm = is_siglip and block and block[1] == "vision"
        names = _IN_BLOCK_OF_TIMM if of_timm else _BLOCK
        if name in top:
            found[top[name]] = tensor.T.contiguous() if top[name] in _TURNED else tensor
        elif is_siglip and name.startswith(_POOL_INPUT):
            query, key_and_value = tensor.split([len(tensor) // 3, 2 * len(tensor) // 3])
            kind = name.removeprefix(_POOL_INPUT)
            found[f"visual.trunk.attn_pool.q.{kind}"] = query
            found[f"visual.trunk.attn_pool.kv.{kind}"] = key_and_value
        elif block and block[3] in names:
            found[f"{_blocks(block[1], of_timm)}{block[2]}.{names[block[3]]}.{block[4]}"] = tensor
        elif block and block[3] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            stacked = f"attn.qkv.{block[4]}" if of_timm else f"attn.in_proj_{block[4]}"
            thirds.setdefault(f"{_blocks(block[1], of_timm)}{block[2]}.{stacked}", {})[block[3][-6]] = tensor
        else:
            raise WeightsError(
                f"{path}: {name} is no tensor of a CLIPModel or SiglipModel; use one, or a file with OpenAI's names"
            )
    for name, parts in thirds.items():
        if set(parts) != set("qkv"):
            raise WeightsError(f"{path} is damaged: {name} needs queries, keys and values, and has {', '.join(parts)}")
        found[name] = torch.cat([parts[part] for part in "qkv"])
    if is_siglip:
        found["visual.trunk.pos_embed"] = found["visual.trunk.pos_embed"][None]
    return found


def their_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a CLIP with a ViT by the names of a CLIPModel: the inverse of `openai_names`."""
    top = {ours: theirs for theirs, ours in _TOP.items()}
    layers = {ours: theirs for theirs, ours in _BLOCK.items()}
    found = {}
    for name, tensor in weights.items():
        if name in top:
            found[top[name]] = tensor.T.contiguous() if name in _TURNED else tensor
            continue
        tower, number, layer, kind = _IN_OUR_BLOCK.fullmatch(name).groups()
        prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
        if layer == "attn.in_proj":
            for part, third in zip("qkv", tensor.chunk(3)):
                found[f"{prefix}self_attn.{part}_proj.{kind}"] = third.contiguous()
        else:
            found[f"{prefix}{layers[layer]}.{kind}"] = tensor
    return found


def _blocks(tower: str, of_timm: bool | None) -> str:
    if of_timm:
        return "visual.trunk.blocks."
    return "visual.transformer.resblocks." if tower == "vision" else "transformer.resblocks."
