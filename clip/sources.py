"""What --backbone and --arch mean: where weights are, and the config that says what they do not.

    ViT-B/16                            OpenAI's nine, and tiny
    ViT-B-16/laion2b_s34b_b88k          a model and a tag of open_clip's table (also written with a colon)
    hf-hub:timm/ViT-B-16-SigLIP2        a folder on Hugging Face's Hub, of open_clip or of a CLIPModel
    FOLDER, local-dir:FOLDER            such a folder on disk
    FILE                                a weight file; --arch says what it does not tell

open_clip and huggingface_hub are imported only for the names that need them.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import file_sha256

from .configs import CONFIG, KINDS, PREPROCESSOR, Card, card_in, hugging_face_card, open_clip_card, read_json
from .conventions import NAMED, OPENAI, QUICK
from .download import MODELS, fetch_model
from .files import WeightsError
from .formats import INDEX, shards_of

HUB, LOCAL = "hf-hub:", "local-dir:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
TINY = Path(__file__).parent / "tiny.safetensors"
# The weight files of a folder, in the order in which open_clip and transformers look for them.
OF_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
OF_TRANSFORMERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_INSTALL = "pip install open_clip_torch"


@dataclass(frozen=True)
class Source:
    """The weight file of a CLIP, what a config says of it, None without a config, and what it is if that is known."""

    weights: Path
    card: Card | None = None
    known_as: str | None = None


def is_known(name: str) -> bool:
    """Return whether a backbone is one of OpenAI's models or the tiny one."""
    return name in MODELS or name == "tiny"


def card_of(name: str, arch: str | None = None) -> Card | None:
    """Return what the config of a backbone says, without its weights; None if it has none. See `find`."""
    if not is_known(name) and _names_a_file(name):
        return _card_of_file(Path(name).expanduser(), arch)
    if is_known(name):
        card = None
    elif name.startswith(HUB):
        card = _card_of_folder(_fetched(name, ("*.json", "*.model", "*.txt")), name)
    elif (folder := _folder(name)) is not None:
        card = _card_of_folder(folder, name)
    else:
        card = _card_of_tag(*_model_and_tag(name))
    if arch is not None:
        raise WeightsError(f"--arch is for weight files; {name} is a known model, leave it out")
    return card


def find(name: str, arch: str | None = None, download_root: str | Path | None = None) -> Source:
    """Return where the weights of a backbone are, downloaded if need be, and its card.

    Raise WeightsError with a remedy if the name means nothing, or if something cannot be had.
    """
    card = card_of(name, arch)
    if name in MODELS:
        return Source(fetch_model(name, download_root), known_as=f"OpenAI's {name}")
    if name == "tiny":
        return Source(TINY, known_as="this program's tiny CLIP")
    if name.startswith(HUB):
        return Source(_weights_on_hub(name), card)
    if (folder := _folder(name)) is not None:
        return Source(_weights_in(folder), card)
    if _names_a_file(name):
        return Source(Path(name).expanduser(), card)
    return Source(_download(*_model_and_tag(name)), card)


def identity(name: str, arch: str | None) -> dict[str, str]:
    """Return what identifies the backbone of a run where its name does not: hashes of its files, and --arch."""
    found = {} if arch is None else {"arch": arch}
    if arch is not None and Path(arch).is_file():
        found[Path(arch).name] = file_sha256(arch)
    if is_known(name) or name.startswith(HUB):
        return found
    folder, file = _folder(name), Path(name).expanduser()
    if folder is not None:
        file = _weights_in(folder)
    elif not file.is_file():
        return found | {"backbone": "/".join(_model_and_tag(name))}  # however the tag is written
    shards = shards_of(file) if file.name.endswith(INDEX) else [file]
    found["backbone"] = " ".join(map(file_sha256, shards))
    names = (OPEN_CLIP_CONFIG, CONFIG, PREPROCESSOR, *TOKENIZERS)
    beside = [file.with_name(config) for config in (names if folder or _is_clip_model(file.parent) else names[:1])]
    return found | {path.name: file_sha256(path) for path in beside if path.is_file()}


def _names_a_file(name: str) -> bool:
    return Path(name).expanduser().is_file()


def _folder(name: str) -> Path | None:
    """Return the folder that a backbone names, or None."""
    path = Path(name.removeprefix(LOCAL)).expanduser()
    if name.startswith(LOCAL) and not path.is_dir():
        raise WeightsError(f"--backbone {name}: there is no folder {path}")
    return path if path.is_dir() else None


# --- files and folders


def _card_of_file(path: Path, arch: str | None) -> Card | None:
    """Return the card that --arch or a config beside the file gives, or None."""
    if arch is not None and arch.endswith(".json"):
        file = Path(arch).expanduser()
        return _card_of_config(read_json(file), f"--arch {arch}")
    if arch is not None and "/" in arch:
        return _card_of_tag(*_model_and_tag(arch))
    if arch is not None:
        known = arch == OPENAI or arch.removesuffix(QUICK) in NAMED
        config = None if known else open_clip_config(arch)
        return None if config is None else open_clip_card(config, {}, f"--arch {arch}")
    if (inside := card_in(path)) is not None:
        return inside
    if (beside := path.with_name(OPEN_CLIP_CONFIG)).is_file():
        return _card_of_config(read_json(beside), str(beside), path.parent)
    return hugging_face_card(path.parent) if _is_clip_model(path.parent) else None


def _is_clip_model(folder: Path) -> bool:
    """Return whether a folder has the config of a model of Hugging Face's that is read here."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") in KINDS


def _card_of_config(content: dict[str, Any], where: str, folder: Path | None = None) -> Card:
    """Return the card of a model config of open_clip, or of an open_clip_config.json, which also has preprocessing."""
    return open_clip_card(content.get("model_cfg", content), content.get("preprocess_cfg") or {}, where, folder)


def _card_of_folder(folder: Path, name: str) -> Card:
    if (path := folder / OPEN_CLIP_CONFIG).is_file():
        return _card_of_config(read_json(path), str(path), folder if _has_tokenizer(folder) else None)
    if (folder / CONFIG).is_file():
        return hugging_face_card(folder)
    raise WeightsError(
        f"--backbone {name}: the folder has neither an {OPEN_CLIP_CONFIG} nor a {CONFIG}; name a file in it"
    )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def _weights_in(folder: Path) -> Path:
    """Return the weight file in a folder. Raise WeightsError if there is none, or if it is not clear which."""
    for name in (*OF_OPEN_CLIP, *OF_TRANSFORMERS):
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix in _ENDINGS)
    if len(others) == 1:
        return others[0]
    found = f"several weight files ({', '.join(path.name for path in others[:3])})" if others else "no weight file"
    raise WeightsError(f"{folder} has {found}; name the file as --backbone, or rename it to {OF_OPEN_CLIP[0]}")


def _weights_on_hub(name: str) -> Path:
    """Return the weight file of a model on the Hub. Repositories have it in several formats; only one is downloaded."""
    *transformers, pickled = OF_TRANSFORMERS
    for group in ([*OF_OPEN_CLIP[:-1]], [OF_OPEN_CLIP[-1]], [*transformers, "model-*.safetensors"], [pickled]):
        folder = _fetched(name, tuple(group))
        if any((folder / weights).is_file() for weights in group):
            break
    return _weights_in(folder)


def _fetched(name: str, patterns: tuple[str, ...]) -> Path:
    """Return the folder of a model on the Hub, with the files of these patterns downloaded to the Hub's cache."""
    repository = name.removeprefix(HUB)
    try:
        from huggingface_hub import snapshot_download  # optional
    except ImportError:
        raise WeightsError(f"--backbone {name} needs huggingface_hub: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # no network, no such name, no permission
        raise _not_fetched(name, error) from error


def _not_fetched(name: str, error: Exception) -> WeightsError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return WeightsError(
        f"--backbone {name} cannot be downloaded ({reason}); download it elsewhere and name its folder or file"
    )


# --- open_clip's table


def _model_and_tag(name: str) -> tuple[str, str]:
    """Return the model and the tag of open_clip's table that a name means. Raise WeightsError with what is known."""
    nothing = f"--backbone {name} is neither a file or folder nor a known model"
    if name.startswith(("/", ".", "~")) or Path(name).suffix in _ENDINGS:  # a path, whatever open_clip knows
        raise WeightsError(f"{nothing}; use a file, tiny, or {', '.join(MODELS)}")
    try:
        from open_clip.pretrained import list_pretrained, list_pretrained_tags_by_model  # optional, slow
    except ImportError:
        raise WeightsError(
            f"{nothing}: use a file, tiny, or {', '.join(MODELS)}; names such as ViT-B-16/laion2b_s34b_b88k need "
            f"open_clip: {_INSTALL}"
        ) from None
    models = {model for model, _ in list_pretrained()}
    model, _, tag = name.replace(":", "/").rpartition("/")
    if name in models:
        model, tag = name, ""
    tags = list_pretrained_tags_by_model(model)
    if not tags:
        close = difflib.get_close_matches(model or name, [*models, *MODELS], n=1, cutoff=0.5)
        meant = f"; meant {close[0]}?" if close else ""
        raise WeightsError(
            f"{nothing}{meant}; use a file, tiny, {', '.join(MODELS)}, or MODEL/TAG of open_clip's table"
        )
    clean = tag.lower().replace("-", "_")
    if clean not in tags:
        wrong = f"{model} has no tag {tag}" if tag else f"{model} is an architecture; add a tag"
        raise WeightsError(f"--backbone {name}: {wrong}: {', '.join(f'{model}/{known}' for known in tags)}")
    return model, clean


def _pretrained(model: str, tag: str) -> dict[str, Any]:
    from open_clip.pretrained import get_pretrained_cfg

    return get_pretrained_cfg(model, tag)


def open_clip_config(model: str) -> dict[str, Any] | None:
    """Return open_clip's config of an architecture, or None if it does not know it or is not installed."""
    try:
        from open_clip.factory import get_model_config  # optional
    except ImportError:
        return None
    return None if ":" in model else get_model_config(model)


def _card_of_tag(model: str, tag: str) -> Card:
    about = _pretrained(model, tag)
    preprocess = {key: about[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in about}
    return open_clip_card(
        open_clip_config(model), preprocess, f"{model}/{tag}", quick_gelu=bool(about.get("quick_gelu"))
    )


def _download(model: str, tag: str) -> Path:
    from open_clip.pretrained import download_pretrained

    try:
        return Path(download_pretrained(_pretrained(model, tag)))
    except Exception as error:  # no network, no permission
        raise _not_fetched(f"{model}/{tag}", error) from error
