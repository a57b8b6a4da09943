"""Writes LoRA's matrices as an adapter of peft's, for transformers' CLIPModel."""

import json
from pathlib import Path

import torch

from clip import CLIP, WeightsError, delta, describe, weights_sha256
from clip.export import checked
from clip.huggingface import their_names
from clip.weights import save_tensors
from common import UserError, new_folder

from .lora import LoRA

PREFIX = "base_model.model."  # of all tensors in peft's files
PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


def save_peft(model: CLIP, path: Path, folder: Path) -> None:
    """Write the matrices that a LoRA run saved in `path` as a folder for `peft.PeftModel.from_pretrained`.

    `model` is the unchanged CLIP; the adapter belongs to a CLIPModel with its weights. Raise UserError for another
    method's file, WeightsError for a CLIP that is no CLIPModel or for other base weights; nothing is written then.
    """
    metadata = delta.checkpoint_metadata(path)
    if metadata.get("method") != "lora":
        raise UserError(
            f"--to peft writes LoRA's matrices, and {path} has none; use --to huggingface for whole weights"
        )
    if not model.arch.is_vit or model.arch.conventions.trunk is not None:
        raise WeightsError(f"{describe(model)}: no CLIPModel has such an image tower, which peft needs; use --to onnx")
    checked(model)
    settings = json.loads(metadata["settings"])
    tensors, _ = delta.read_adapted(path, LoRA.FORMAT, weights_sha256(model))
    saved, targets = {}, set()
    for name, tensor in tensors.items():
        block, part, kind = name.replace(".attn.", ".").rsplit(".", 2)
        (layer,) = their_names({f"{block}.attn.out_proj.weight": torch.empty(0)})
        layer = layer.replace("out_proj.weight", PARTS[part])
        saved[f"{PREFIX}{layer}.{kind}.weight"] = tensor.contiguous()
        targets.add(layer)
    config = {
        "peft_type": "LORA",
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "use_rslora": True,  # alpha / sqrt(r)
        "lora_dropout": settings["dropout"],
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    with new_folder(folder) as part:
        save_tensors(saved, part / "adapter_model.safetensors", {"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
