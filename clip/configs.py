"""Reads configs of models: open_clip's and Hugging Face's. What they say and this program does not compute is rejected.

A reader lists the keys that it reads, those that the tensors tell, and those without effect. Any other key is rejected
unless it has its usual value, so that a future feature is not computed wrongly.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .files import WeightsError
from .model import CLIP, Conventions, Trunk
from .preprocess import MEAN, STD, Preprocessing
from .tokenizer import OtherTokenizer


@dataclass(frozen=True)
class Card:
    """What a config says of a CLIP, and no tensor tells.

    `preprocessing` has the size 0 if the config does not say it. `tokenizer` None: CLIP's. `where` names the config in
    messages.
    """

    conventions: Conventions
    where: str
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing(size=0))
    tokenizer: OtherTokenizer | None = None
    context_length: int = 77


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raise WeightsError if the file is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}; name a config of open_clip") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not the config of a model: it has no names")
    return content


# --- open_clip's configs

# What the tensors tell, and what has no effect here.
_TOLD = {"embed_dim", "image_size", "layers", "width", "patch_size", "mlp_ratio", "context_length", "vocab_size"}
_NO_EFFECT = {"patch_dropout", "output_tokens", "pad_id", "init_logit_scale", "init_logit_bias", "custom_text"}
_NO_EFFECT |= {"dropout", "nonscalar_logit_scale", "attn_pooler_heads", "attn_pooler_queries", "correct_cls_mask"}
_USUAL = {"pos_embed_type": ("learnable",), "block_type": ("default",), "mode": ("RGB",), "fill_color": (0,)}
_READ = {
    "": {"quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"head_width", "pool_type", "final_ln_after_pool", "no_ln_pre", "ls_init_value"},
    "text_cfg": {"heads", "pool_type", "final_ln_after_pool", "no_causal_mask", "eos_id", "proj_type", "proj_bias"},
    "preprocess_cfg": {"size", "mean", "std", "interpolation", "resize_mode"},
}
_READ["vision_cfg"] |= {"act_kwargs", "norm_kwargs"}
_READ["text_cfg"] |= {"act_kwargs", "norm_kwargs", "ls_init_value", "hf_tokenizer_name", "tokenizer_kwargs"}
_READ["vision_cfg"] |= {f"timm_{key}" for key in ("model_name", "pool", "proj", "proj_bias")}
_NO_EFFECT |= {"timm_model_pretrained", "timm_drop", "timm_drop_path"}  # of training, or of weights that are replaced
_TEXT_POOLS = ("argmax", "eos", "last")


def open_clip_card(
    config: dict[str, Any],
    preprocess: dict[str, Any],
    where: str,
    folder: Path | None = None,
    quick_gelu: bool = False,
) -> Card:
    """Return what a model config of open_clip and its preprocess_cfg say.

    `folder` has the tokenizer's files, if the model is a folder. `quick_gelu`: the weights were trained with the quick
    GELU, whatever the config says. Raise WeightsError for what is not computed here.
    """
    vision, text = (config.get(name) for name in ("vision_cfg", "text_cfg"))
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise WeightsError(f"{where} is not a config of open_clip: it has no vision_cfg and text_cfg")
    if "multimodal_cfg" in config:
        raise WeightsError(f"{where} is a CoCa, whose text decoder this program does not compute; use another model")
    for name, part in (("", config), ("vision_cfg", vision), ("text_cfg", text), ("preprocess_cfg", preprocess)):
        _check_keys(part, _READ[name], where)
    quick = bool(config.get("quick_gelu")) or quick_gelu
    try:
        conventions = Conventions(
            vision_activation=_activation(vision, quick, where),
            text_activation=_activation(text, quick, where),
            vision_head_width=int(vision.get("head_width", 64)),
            text_head_width=int(text["width"]) // int(text["heads"]),
            vision_pool=_vision_pool(vision, where),
            ln_pre=not vision.get("no_ln_pre"),
            vision_scaled=vision.get("ls_init_value") is not None,
            text_scaled=text.get("ls_init_value") is not None,
            causal=not text.get("no_causal_mask"),
            text_pool=_one_of(text, "pool_type", _TEXT_POOLS, where),
            eos_id=text.get("eos_id", 2) if text.get("pool_type") == "eos" else None,
            text_projection=_text_projection(text, where),
            vision_eps=_eps(vision, where),
            text_eps=_eps(text, where),
            trunk=_trunk(vision, config),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise WeightsError(f"{where} does not say the width and the number of heads of its towers") from None
    context = int(text.get("context_length", 77))
    return Card(conventions, where, _preprocessing(preprocess, where), _tokenizer(text, context, folder), context)


def _check_keys(part: dict[str, Any], read: set[str], where: str) -> None:
    """Raise WeightsError for a setting that changes what is computed and is not computed here."""
    for key, value in part.items():
        usual = value in _USUAL.get(key, ()) or value is None or value is False
        if key not in _TOLD | _NO_EFFECT | read and not usual:
            found = f"{key} {json.dumps(value)[:60]}"
            raise WeightsError(f"{where}: {found} is not computed by this program; use another model")


def _one_of(part: dict[str, Any], key: str, known: tuple[str, ...], where: str) -> str:
    """Return the value of `key`, by default the first known one."""
    value = part.get(key) or known[0]
    if value not in known:
        raise WeightsError(
            f"{where}: {key} {json.dumps(value)[:60]} is not computed by this program; use another model"
        )
    return value


def _activation(part: dict[str, Any], quick: bool, where: str) -> str:
    extra = part.get("act_kwargs") or {}
    if quick:
        if extra:
            raise WeightsError(f"{where}: act_kwargs {json.dumps(extra)[:60]} do not go with the quick GELU")
        return "quick_gelu"
    if set(extra) - {"approximate"}:
        raise WeightsError(f"{where}: act_kwargs {json.dumps(extra)[:60]} is not computed by this program")
    return "gelu_tanh" if _one_of(extra, "approximate", ("none", "tanh"), where) == "tanh" else "gelu"


def _eps(part: dict[str, Any], where: str) -> float:
    extra = part.get("norm_kwargs") or {}
    if set(extra) - {"eps"}:
        raise WeightsError(f"{where}: norm_kwargs {json.dumps(extra)[:60]} is not computed by this program")
    return float(extra.get("eps", 1e-5))


def _vision_pool(vision: dict[str, Any], where: str) -> str:
    pool = _one_of(vision, "pool_type", ("tok", "avg"), where)
    if pool == "avg" and not vision.get("final_ln_after_pool"):
        raise WeightsError(f'{where}: pool_type "avg" without final_ln_after_pool is not computed by this program')
    return {"tok": "token", "avg": "mean"}[pool]


def _text_projection(text: dict[str, Any], where: str) -> str:
    if _one_of(text, "proj_type", ("linear", "none"), where) == "none":
        return "none"
    return "linear" if text.get("proj_bias") else "matrix"


def _trunk(vision: dict[str, Any], config: dict[str, Any]) -> Trunk | None:
    if not vision.get("timm_model_name"):
        return None
    return Trunk(
        vision["timm_model_name"],
        vision.get("timm_pool", "avg"),
        vision.get("timm_proj", "linear"),
        bool(vision.get("timm_proj_bias")),
        int(vision.get("image_size", 224)),
        int(config["embed_dim"]),
    )


def _preprocessing(part: dict[str, Any], where: str) -> Preprocessing:
    size = part.get("size", 0)
    size = size if isinstance(size, (list, tuple)) else (size, size)
    if len(set(size)) > 1:
        raise WeightsError(f"{where}: images of {size[0]} x {size[1]} pixels are not square; use another model")
    return Preprocessing(
        int(size[0]),
        tuple(part.get("mean") or MEAN),
        tuple(part.get("std") or STD),
        _one_of(part, "interpolation", ("bicubic", "bilinear"), where),
        _one_of(part, "resize_mode", ("shortest", "squash"), where),
    )


def _tokenizer(text: dict[str, Any], context: int, folder: Path | None) -> OtherTokenizer | None:
    name, extra = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    if not name:
        return None
    clean, strip = extra.get("clean", "whitespace"), bool(extra.get("strip_sep_token"))
    return OtherTokenizer(str(folder or name), context, clean, strip)


# --- Hugging Face's folders

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# What a config.json leaves out has its class's default.
_VISION = {"hidden_size": 768, "num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_TEXT = {**_VISION, "hidden_size": 512, "num_attention_heads": 8, "eos_token_id": 49407, "vocab_size": 49408}
_TEXT |= {"max_position_embeddings": 77}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
KINDS = ("clip", "metaclip_2", "siglip")
CLIP_VOCABULARY = 49408


def hugging_face_card(folder: Path) -> Card:
    """Return what the config.json of a Hugging Face CLIPModel or SiglipModel says, and its preprocessor_config.json.

    Raise WeightsError for other models, and for what is not computed here.
    """
    path = folder / CONFIG
    config = read_json(path)
    kind = config.get("model_type")
    if kind == "siglip":
        return _siglip_card(folder, config)
    if kind not in KINDS:
        raise WeightsError(
            f"{path}: a model of the type {kind!r} is not read here; use a CLIPModel, or open_clip's names"
        )
    vision, text = (
        {**usual, **(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}
        for name, usual in (("vision", _VISION), ("text", _TEXT))
    )
    for part in (vision, text):
        if part["hidden_act"] not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise WeightsError(
                f"{path}: hidden_act {part['hidden_act']!r} is not computed by this program ({known} are)"
            )
    # In configs of CLIP, 2 is a mark of old versions for the token of the largest id.
    argmax = kind == "clip" and text["eos_token_id"] == 2
    try:
        conventions = Conventions(
            vision_activation=_ACTIVATIONS[vision["hidden_act"]],
            text_activation=_ACTIVATIONS[text["hidden_act"]],
            vision_head_width=vision["hidden_size"] // vision["num_attention_heads"],
            text_head_width=text["hidden_size"] // text["num_attention_heads"],
            text_pool="argmax" if argmax else "eos",
            eos_id=None if argmax else text["eos_token_id"],
            vision_eps=float(vision["layer_norm_eps"]),
            text_eps=float(text["layer_norm_eps"]),
        )
    except (TypeError, ZeroDivisionError):
        raise WeightsError(f"{path} does not say the width and the number of heads of its towers") from None
    if conventions.text_pool == "eos" and conventions.eos_id == text["vocab_size"] - 1:
        # The same token as the largest id, by the name that OpenAI's have.
        conventions = dataclasses.replace(conventions, text_pool="argmax", eos_id=None)
    context = int(text["max_position_embeddings"])
    other = text["vocab_size"] != CLIP_VOCABULARY
    tokenizer = OtherTokenizer(str(folder), context) if other else None
    return Card(conventions, str(path), _of_processor(folder / PREPROCESSOR, Preprocessing(size=0)), tokenizer, context)


_OF_SIGLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_OF_SIGLIP |= {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_SIGLIP_VISION = {**_OF_SIGLIP, "image_size": 224, "patch_size": 16, "vision_use_head": True}
_SIGLIP_TEXT = {**_OF_SIGLIP, "max_position_embeddings": 64}
_SIGLIP_IMAGES = Preprocessing(0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize="squash")  # its processor's defaults


def _siglip_card(folder: Path, config: dict[str, Any]) -> Card:
    path = folder / CONFIG
    vision = {**_SIGLIP_VISION, **(config.get("vision_config") or {})}
    text = {**_SIGLIP_TEXT, **(config.get("text_config") or {})}
    for part in (vision, text):
        if part["hidden_act"] not in ("gelu", "gelu_pytorch_tanh"):
            raise WeightsError(f"{path}: hidden_act {part['hidden_act']!r} is not computed by this program")
    if not vision["vision_use_head"] or vision["layer_norm_eps"] != 1e-6:
        raise WeightsError(
            f"{path}: an image tower without its head, or with another layer_norm_eps, is not computed here"
        )
    options = {
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embed_dim": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "num_heads": vision["num_attention_heads"],
        "mlp_ratio": (vision["intermediate_size"] + 0.5) / vision["hidden_size"],  # timm rounds the product down
        "act_layer": _ACTIVATIONS[vision["hidden_act"]],
    }
    trunk = Trunk(
        "vit_base_patch16_siglip_224",
        "map",
        "none",
        False,
        vision["image_size"],
        vision["hidden_size"],
        tuple(options.items()),
    )
    conventions = Conventions(
        text_activation=_ACTIVATIONS[text["hidden_act"]],
        text_head_width=text["hidden_size"] // text["num_attention_heads"],
        causal=False,
        text_pool="last",
        text_projection="linear",
        text_eps=float(text["layer_norm_eps"]),
        trunk=trunk,
    )
    context = int(text["max_position_embeddings"])
    images = _of_processor(folder / PREPROCESSOR, _SIGLIP_IMAGES)
    return Card(conventions, str(path), images, OtherTokenizer(str(folder), context), context)


_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def _of_processor(path: Path, usual: Preprocessing) -> Preprocessing:
    """Return the preprocessing that a preprocessor_config.json says; `usual` is that of its class."""
    if not path.is_file():
        return usual
    part = read_json(path)
    steps = {name: part.get(name, True) for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")}
    size, crop = part.get("size", {}), part.get("crop_size", {})
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    sides = {*size.values(), *crop.values()}
    if not all(steps.values()) or len(sides) > 1 or set(size) - {"shortest_edge", "height", "width"}:
        off = [name for name, value in steps.items() if not value]
        found = (
            f"{off[0]} false"
            if off
            else f"size {json.dumps(part.get('size'))}, crop_size {json.dumps(part.get('crop_size'))}"
        )
        raise WeightsError(f"{path}: {found} is not done by this program; use another model")
    if part.get("resample", 3) not in _RESAMPLE:
        raise WeightsError(f"{path}: resample {part['resample']} is not done by this program ({_RESAMPLE} are)")
    return Preprocessing(
        int(next(iter(sides), 0)),
        tuple(part.get("image_mean") or usual.mean),
        tuple(part.get("image_std") or usual.std),
        _RESAMPLE[part.get("resample", 3)],
        "squash" if {"height", "width"} <= set(size) else "shortest",
    )


# --- files that this program writes

_METADATA = "clip_conventions"


def card_metadata(model: CLIP) -> dict[str, str]:
    """Return what `card_in` reads: the model's conventions, preprocessing and tokenizer, as metadata of a file."""
    tokenizer = dataclasses.asdict(model.tokenize) if isinstance(model.tokenize, OtherTokenizer) else None
    said = {
        "conventions": dataclasses.asdict(model.arch.conventions),
        "preprocessing": dataclasses.asdict(model.preprocessing),
        "tokenizer": tokenizer,
        "context_length": model.arch.context_length,
    }
    return {_METADATA: json.dumps(said)}


def card_in(path: Path) -> Card | None:
    """Return the card in the metadata of a safetensors file, None if it is another file or has none."""
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})[_METADATA])
    except (OSError, KeyError, ValueError, SafetensorError):
        return None
    try:
        trunk, images, tokenizer = said["conventions"].pop("trunk"), said["preprocessing"], said["tokenizer"]
        if trunk is not None:
            trunk = Trunk(**trunk | {"options": tuple(map(tuple, trunk["options"]))})
        return Card(
            Conventions(**said["conventions"], trunk=trunk),
            str(path),
            Preprocessing(**images | {"mean": tuple(images["mean"]), "std": tuple(images["std"])}),
            OtherTokenizer(**tokenizer) if tokenizer else None,
            said["context_length"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged, or from another version ({error}); save it again") from error
