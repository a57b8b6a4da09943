"""Writes a CLIP for other programs: OpenAI's, open_clip and Hugging Face's transformers."""

import io
import json
from pathlib import Path

import torch
from torch import Tensor

from common import new_folder, write_atomically

from .files import WeightsError
from .huggingface import their_names
from .model import CLIP, Conventions
from .preprocess import Preprocessing
from .tokenizer import ClipTokenizer
from .weights import save_tensors

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours, Hugging Face's


def save_openai(model: CLIP, path: Path) -> None:
    """Write a state dict that OpenAI's `clip.load(path)` reads, in float32.

    That program rounds most weights to half precision when it loads them. Raise WeightsError for a model whose
    activation or head width is not OpenAI's, which that program could not know.
    """
    if model.arch.conventions != Conventions() or model.preprocessing != Preprocessing(model.arch.resolution):
        raise WeightsError(
            "OpenAI's program knows only heads of width 64, the quick GELU and its own preprocessing, which this model "
            "does not have; use --to open_clip"
        )
    content = io.BytesIO()
    torch.save(_weights(model), content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getbuffer())


def save_open_clip(model: CLIP, folder: Path) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads, in float32.

    Raise WeightsError for towers with different activations, which its config cannot say.
    """
    arch = model.arch
    activation = checked(model).vision_activation
    if activation != arch.conventions.text_activation or activation == "gelu_tanh":
        raise WeightsError("open_clip's config cannot say the activations of this model's towers; use --to huggingface")
    conventions = arch.conventions
    vision = {
        "image_size": arch.resolution,
        "layers": arch.vision_layers,
        "width": arch.vision_width,
        "patch_size": arch.patch_size,
        "head_width": conventions.vision_head_width,
    }
    if arch.vision_mlp:
        vision["mlp_ratio"] = arch.vision_mlp / arch.vision_width
    text = {
        "context_length": arch.context_length,
        "vocab_size": arch.vocab_size,
        "width": arch.text_width,
        "heads": arch.text_width // conventions.text_head_width,
        "layers": arch.text_layers,
    }
    if arch.text_mlp:
        text["mlp_ratio"] = arch.text_mlp / arch.text_width
    config = {"embed_dim": arch.embed_dim, "quick_gelu": activation == "quick_gelu"}
    config |= {"vision_cfg": vision, "text_cfg": text}
    images = model.preprocessing
    preprocess = {"mean": images.mean, "std": images.std, "interpolation": images.interpolation}
    preprocess["resize_mode"] = images.resize
    with new_folder(folder) as part:
        _write_json(part / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
        save_tensors(_weights(model), part / "open_clip_model.safetensors", {"format": "pt"})


def save_huggingface(model: CLIP, folder: Path) -> None:
    """Write a folder that `transformers.CLIPModel.from_pretrained` reads, in float32, and its image processor's config.

    The tokenizer is that of every CLIP of OpenAI's. Raise WeightsError for a ResNet, which CLIPModel has not.
    """
    arch, conventions = model.arch, checked(model)
    if not arch.is_vit:
        raise WeightsError("Hugging Face's CLIPModel has no ResNet; use --to openai or open_clip")
    vision = {
        "hidden_size": arch.vision_width,
        "intermediate_size": arch.vision_mlp or 4 * arch.vision_width,
        "num_hidden_layers": arch.vision_layers,
        "num_attention_heads": arch.vision_width // conventions.vision_head_width,
        "image_size": arch.resolution,
        "patch_size": arch.patch_size,
        "hidden_act": _ACTIVATIONS[conventions.vision_activation],
        "projection_dim": arch.embed_dim,
    }
    text = {
        "hidden_size": arch.text_width,
        "intermediate_size": arch.text_mlp or 4 * arch.text_width,
        "num_hidden_layers": arch.text_layers,
        "num_attention_heads": arch.text_width // conventions.text_head_width,
        "max_position_embeddings": arch.context_length,
        "vocab_size": arch.vocab_size,
        "hidden_act": _ACTIVATIONS[conventions.text_activation],
        "projection_dim": arch.embed_dim,
        "bos_token_id": arch.vocab_size - 2,
        "eos_token_id": arch.vocab_size - 1,  # the text embedding is that of the first token with this id
        "pad_token_id": arch.vocab_size - 1,
    }
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": arch.embed_dim}
    config |= {"torch_dtype": "float32", "vision_config": vision, "text_config": text}
    images, square = model.preprocessing, {"height": arch.resolution, "width": arch.resolution}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": arch.resolution} if images.resize == "shortest" else square,
        "crop_size": square,
        "image_mean": images.mean,
        "image_std": images.std,
        "resample": {"bilinear": 2, "bicubic": 3}[images.interpolation],
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    }
    with new_folder(folder) as part:
        _write_json(part / "config.json", config)
        _write_json(part / "preprocessor_config.json", processor)
        save_tensors(their_names(_weights(model)), part / "model.safetensors", {"format": "pt"})


def checked(model: CLIP) -> Conventions:
    """Return the model's conventions. Raise WeightsError if they say more than the width of heads and the activations,
    which is all that the configs here can say."""
    found = model.arch.conventions
    said = Conventions(
        vision_activation=found.vision_activation,
        text_activation=found.text_activation,
        vision_head_width=found.vision_head_width,
        text_head_width=found.text_head_width,
    )
    if found != said or not isinstance(model.tokenize, ClipTokenizer):
        raise WeightsError(f"{model.origin}: a model of this kind cannot be exported; use a CLIP built like OpenAI's")
    return found


def _weights(model: CLIP) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")
