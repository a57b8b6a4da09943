"""Models of open_clip's and Hugging Face's beside the packages that define them: features, preprocessing, tokenizers."""

import copy
import json
import math

import open_clip
import pytest
import torch
from open_clip.factory import get_model_config
from torch import nn

import clip
from clip import sources

CONFIGS = {name: get_model_config(name) for name in open_clip.list_models()}
FOREIGN = ("timm_model_name", "hf_model_name")
NATIVE = [
    name
    for name, config in CONFIGS.items()
    if "multimodal_cfg" not in config
    and not any(config[part].get(key) for part in ("vision_cfg", "text_cfg") for key in FOREIGN)
]
EXTREMES = {  # what no published configuration has, all at once
    "vision_cfg": {"ls_init_value": 0.1, "norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}},
    "text_cfg": {"ls_init_value": 0.1, "norm_kwargs": {"eps": 1e-3}, "proj_bias": True, "no_causal_mask": True},
}


def reduced(config: dict) -> dict:
    """Return a config with two layers and two heads a tower, but with its own widths of heads, ratios and pooling."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = 24
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64}
    elif "layers" in vision:
        vision |= {"layers": 2, "width": 2 * vision.get("head_width", 64), "image_size": 3 * vision["patch_size"]}
    if "layers" in text:
        text |= {"layers": 2, "width": 2 * (text["width"] // text["heads"]), "heads": 2, "vocab_size": 99}
    text["context_length"] = min(text.get("context_length", 77), 20)
    if text.get("proj_type") == "none":
        config["embed_dim"] = text["width"]
    return config


def randomised(model: nn.Module) -> nn.Module:
    """Fill all weights, also biases and gains, with numbers that hide nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.add_(torch.randn_like(tensor) * (0.05 if tensor.ndim > 1 else 0.2))
            if name.endswith("logit_scale"):
                tensor.fill_(3.7)
    return model.eval()


def tokens_for(config: dict) -> torch.Tensor:
    """Return prompts of several lengths, with the end that the config's pooling looks for."""
    text = config["text_cfg"]
    end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else 98
    rows = torch.zeros(4, text["context_length"], dtype=torch.int64)
    for row, length in zip(rows, (5, 9, 17, 18)):
        row[: length + 1] = torch.tensor([97, 11, 12, *torch.randint(20, 90, (length - 3,)), end])
    return rows


def folder_of(model: nn.Module, config: dict, folder, preprocess: dict | None = None):
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def assert_equal_features(model, reference, resolution: int, tokens: torch.Tensor) -> None:
    images = torch.randn(2, 3, resolution, resolution)
    with torch.no_grad():
        expected = reference.encode_image(images), reference.encode_text(tokens)
        for found, true in zip((model.encode_image(images), model.encode_text(tokens)), expected):
            assert torch.allclose(found, true, atol=1e-5, rtol=1e-5), (found - true).abs().max()


def test_there_are_as_many_native_models_as_counted():
    assert len(NATIVE) >= 55


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("name", [*NATIVE, "extremes"])
def test_native_towers_equal_open_clips(name, custom, tmp_path):
    config = reduced(CONFIGS["ViT-B-16" if name == "extremes" else name])
    if name == "extremes":
        for part, changes in EXTREMES.items():
            config[part] |= changes
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    config.pop("custom_text", None)
    reference = randomised(kind(**config))
    model, _ = clip.load(folder_of(reference, config, tmp_path / "model"))
    tokens = tokens_for(config)
    assert_equal_features(model, reference, config["vision_cfg"]["image_size"], tokens)
    packs = not config["text_cfg"].get("no_causal_mask")
    assert (model.prompts(tokens).ids.ndim == 1) == packs
    assert model.logit_factor == (
        100 if model.arch.conventions == clip.model.Conventions() else pytest.approx(math.exp(3.7), rel=1e-5)
    )
    assert ("packed" in clip.describe(model)) == packs


# --- tags


def tags() -> list[tuple[str, str]]:
    return open_clip.list_pretrained()


def test_every_tag_has_its_config_or_is_rejected_by_name():
    """Preprocessing, context and activation are those of open_clip's tables."""
    computed = 0
    for model, tag in tags():
        config, about = CONFIGS.get(model) or get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
        if model not in NATIVE:
            continue
        card = sources.card_of(f"{model}/{tag}")
        quick = config.get("quick_gelu", False) or about.get("quick_gelu", False)
        assert card.conventions.text_activation == ("quick_gelu" if quick else "gelu"), (model, tag)
        found = card.preprocessing
        assert (found.mean, found.std) == (tuple(about["mean"]), tuple(about["std"]))
        assert (found.interpolation, found.resize) == (about["interpolation"], about["resize_mode"])
        assert card.context_length == config["text_cfg"].get("context_length", 77)
        assert (card.tokenizer is not None) == ("hf_tokenizer_name" in config["text_cfg"])
        computed += 1
    assert computed >= 108
