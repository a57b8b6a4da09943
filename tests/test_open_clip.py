"""Models of open_clip's and Hugging Face's beside these packages: features, preprocessing, tokenizers, names."""

import copy
import fnmatch
import json
import math
import shutil
import sys

import open_clip
import pytest
import timm
import torch
from open_clip.factory import get_model_config
from PIL import Image
from support.runs import error_of
from support.training import filled, fitted, prepared
from test_export import assert_onnx_equals
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

import clip
from clip import parts, preprocess, sources
from clip.onnx import save_onnx
from clip.preprocess import Preprocessing
from clip.tokenizer import OtherTokenizer
from clip.weights import save_weights
from common import UserError
from methods.choice import Blocks, select_matrices
from optimizers import SO, attach

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


# --- image towers of timm's

FAMILIES = {  # a config of each family, and what makes it small: arguments of timm's, and the images' size
    "SigLIP": ("ViT-B-16-SigLIP", {"depth": 1, "img_size": 32}, 32),
    "SigLIP 2": ("ViT-B-16-SigLIP2-256", {"depth": 1, "img_size": 32}, 32),
    "EVA01": ("EVA01-g-14", {"depth": 1, "img_size": 28, "embed_dim": 128, "num_heads": 2}, 28),
    "EVA02": ("EVA02-B-16", {"depth": 1, "img_size": 32}, 32),
    "MobileCLIP-B": ("MobileCLIP-B", {"depth": 1, "img_size": 32}, 32),
    "MobileCLIP-S": ("MobileCLIP-S1", {"layers": (1, 1, 1, 1)}, 64),
    "PE-Core": ("PE-Core-T-16-384", {"depth": 1, "img_size": 32}, 32),
    "ConvNeXt": ("convnext_base", {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 96)}, 64),
    "ConvNeXt, MLP": ("convnext_large_d", {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 96)}, 64),
    "ViTamin": ("ViTamin-S", {"depth": 1, "img_size": 64}, 64),
    "Swin": ("swin_base_patch4_window7_224", {"depths": (1, 1, 1, 1)}, 224),
}
CANNOT = {"ConvNeXt": ["lora"], "ConvNeXt, MLP": ["lora"], "MobileCLIP-S": ["dora"]}  # attention; convolutions


@pytest.fixture(params=FAMILIES)
def trunk(request, monkeypatch, tmp_path):
    """A small model of open_clip's with such a tower, the same model here, and the family's name."""
    name, small, size = FAMILIES[request.param]
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: create(*names, **options, **small))
    config = reduced(CONFIGS[name])
    config["vision_cfg"]["image_size"] = size
    if config["vision_cfg"]["timm_proj"] == "none":
        config["embed_dim"] = 768  # the tower's own width
    custom = config.pop("custom_text", False)
    config["text_cfg"].pop("hf_tokenizer_name", None)
    reference = randomised((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config))
    model, _ = clip.load(folder_of(reference, config, tmp_path / "model"))
    return request.param, config, reference, model


def test_towers_of_timm(trunk, monkeypatch):
    family, config, reference, model = trunk
    tokens, size = tokens_for(config), config["vision_cfg"]["image_size"]
    assert_equal_features(model, reference, size, tokens)
    assert not model.training and "timm" in clip.describe(model)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    assert (parts.projection(model) is None) == family.startswith("SigLIP")

    # SO with sampled gradients beside SO with dense ones, in float64.
    images, labels = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([0, 1])
    found = []
    for sampled in (False, True):
        adapted = copy.deepcopy(model).double()
        parameters = select_matrices(adapted, Blocks())
        optimizer = SO(parameters.values(), lr=1e-3, density_ratio=0.01, T=2)
        attached = attach(adapted, optimizer, dense_above=1) if sampled else None
        prompts, losses = adapted.prompts(tokens[:2]), []
        for _ in range(4):
            features = [
                nn.functional.normalize(x) for x in (adapted.encode_image(images), adapted.encode_text(prompts))
            ]
            loss = nn.functional.cross_entropy(10 * features[0] @ features[1].T, labels)
            loss.backward()
            if sampled:  # no linear layer of a block is passed by
                dense = [p for name, p in parameters.items() if p.grad is not None and p.ndim == 2]
                assert not dense and attached.replaced
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-12) and len(set(found[0])) == 4
    assert any(name.startswith("visual.") for name in parameters)


@pytest.mark.parametrize("trunk", ["SigLIP 2", "EVA02", "ConvNeXt"], indirect=True)
def test_towers_of_timm_as_onnx(trunk, monkeypatch, tmp_path):
    model, folder = trunk[3], tmp_path / "onnx"
    save_onnx(model, folder)
    assert_onnx_equals(model, folder, tokens_for(trunk[1]))

    def fails(*_, **__):
        raise torch.onnx.OnnxExporterError("no such operation")

    monkeypatch.setattr(torch.onnx, "export", fails)
    assert model.arch.conventions.trunk.name in error_of(clip.WeightsError, save_onnx, model, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "onnx"}


def test_lora_and_dora_on_towers_of_timm(trunk):
    family, config, _, model = trunk
    size = config["vision_cfg"]["image_size"]
    for method in ("lora", "dora"):
        if method in CANNOT.get(family, []):
            with pytest.raises(UserError, match="--encoder text"):
                prepared(method, model=copy.deepcopy(model))
            continue
        adaptation = filled(prepared(method, model=copy.deepcopy(model).double(), dropout=0.0))
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        features = adaptation.model.encode_image(images)
        features.square().sum().backward()
        used = [name for name, p in adaptation.parameters.items() if name.startswith("visual.")]
        assert used and all(adaptation.parameters[name].grad.abs().sum() > 0 for name in used)
        with torch.no_grad():
            merged = adaptation.model.encode_image(images)
            plain = adaptation.merge().encode_image(images)
        assert torch.allclose(merged, features, rtol=1e-9) and torch.allclose(merged, plain, rtol=1e-12)


REJECTED = {"ConvNeXt": {"relora", "lora"}, "ConvNeXt, MLP": {"relora", "lora"}}
REJECTED |= {"MobileCLIP-S": {"adalora", "layernorm", "bias", "two_stage"}}
REJECTED |= {"SigLIP": {"prolip"}, "SigLIP 2": {"prolip"}}


def test_all_methods_train_towers_of_timm_or_say_what_is_missing(trunk):
    family, config, _, model = trunk
    size = config["vision_cfg"]["image_size"]
    model.tokenize = lambda texts: tokens_for(config)[: len(texts)]
    batches = [(torch.randn(3, 3, size, size), torch.tensor([0, 1, 2]))] * 2
    for method in ("adam", "so_ablation", "layernorm", "bias", "partial", "two_stage", "prolip", "relora", "adalora"):
        options = {"epochs": 2} if method in ("partial", "prolip") else {"total_iters": 2}
        options |= {"batch_size": 4} if method == "partial" else {}
        adapted = copy.deepcopy(model)
        if method in REJECTED.get(family, ()):
            with pytest.raises(UserError, match=r"--encoder text|projection"):
                prepared(method, model=adapted, **options)
            continue
        options |= {"encoder": "vision"} if method != "prolip" else {}
        adaptation = prepared(method, model=adapted, lr=1e-3, **options)
        before = {name: p.detach().clone() for name, p in adaptation.parameters.items()}
        fitted(adaptation, batches)
        moved = [name for name, p in adaptation.parameters.items() if not torch.equal(p, before[name])]
        assert any(name.startswith("visual.") for name in moved), method


def test_a_file_with_a_tower_of_timm_needs_its_name_unless_this_program_wrote_it(trunk, tmp_path):
    torch.save(trunk[2].state_dict(), tmp_path / "w.pt")
    with pytest.raises(clip.WeightsError, match="--arch"):
        clip.load(tmp_path / "w.pt")
    model = trunk[3]
    save_weights(model, tmp_path / "w.safetensors")
    again, _ = clip.load(tmp_path / "w.safetensors")
    assert again.arch == model.arch and again.preprocessing == model.preprocessing and again.tokenize == model.tokenize
    assert clip.weights_sha256(again) == clip.weights_sha256(model)


# --- tags


def tags() -> list[tuple[str, str]]:
    return open_clip.list_pretrained()


def test_every_tag_has_its_config_or_is_rejected_by_name():
    """Preprocessing, context and activation are those of open_clip's tables: 108 native towers, 75 with timm's."""
    computed = {True: 0, False: 0}
    for model, tag in tags():
        config, about = CONFIGS.get(model) or get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
        text = config["text_cfg"]
        if "multimodal_cfg" in config or "hf_model_name" in text:
            with pytest.raises(clip.WeightsError, match=r"CoCa|hf_model_name"):
                sources.card_of(f"{model}/{tag}")
            continue
        card = sources.card_of(f"{model}/{tag}")
        quick = config.get("quick_gelu", False) or about.get("quick_gelu", False)
        usual = "gelu_tanh" if text.get("act_kwargs") else "quick_gelu" if quick else "gelu"
        assert card.conventions.text_activation == usual, (model, tag)
        found = card.preprocessing
        assert (found.mean, found.std) == (tuple(about["mean"]), tuple(about["std"]))
        assert (found.interpolation, found.resize) == (about["interpolation"], about["resize_mode"])
        assert card.context_length == text.get("context_length", 77)
        assert (card.tokenizer is not None) == ("hf_tokenizer_name" in text)
        assert (card.conventions.trunk is None) == (model in NATIVE)
        computed[model in NATIVE] += 1
    assert computed[True] >= 108 and computed[False] >= 75


def test_without_open_clip_its_names_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "open_clip.pretrained", None)
    with pytest.raises(clip.WeightsError, match="pip install open_clip_torch"):
        clip.load("ViT-B-16/laion2b_s34b_b88k")
    assert clip.load("tiny")[0].arch.is_vit


@pytest.mark.parametrize("written", ["ViT-B-16:LAION2B-s34b-b88k", "ViT-B-16/laion2b_s34b_b88k"])
def test_a_tag_may_be_written_in_several_ways(written, monkeypatch):
    assert sources.identity(written, None)["backbone"] == "ViT-B-16/laion2b_s34b_b88k"


@pytest.mark.parametrize(
    "name, named",
    [
        ("ViT-B-16", "ViT-B-16/datacomp_xl_s13b_b90k"),
        ("ViT-B-16/nothing", "ViT-B-16/openai"),
        ("ViT-B_16/openai", "ViT-B/16"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "CoCa"),
        ("xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k", "hf_model_name"),
        ("local-dir:/nowhere", "/nowhere"),
    ],
)
def test_names_that_are_rejected(name, named):
    with pytest.raises(clip.WeightsError, match=named) as caught:
        clip.load(name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_tag_is_downloaded_and_loaded(tmp_path, monkeypatch):
    """The download itself is the Hub's client; here it is replaced."""
    config = reduced(CONFIGS["ViT-L-14"])
    folder = folder_of(randomised(open_clip.CLIP(**config)), config, tmp_path / "model")
    file = folder / "open_clip_pytorch_model.bin"
    asked = []
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda about: asked.append(about) or str(file))
    monkeypatch.setattr(sources, "open_clip_config", lambda name: config if name == "ViT-L-14" else None)
    model, transform = clip.load("ViT-L-14/laion2b_s32b_b82k")
    assert asked[0]["hf_hub"].startswith("laion/CLIP-ViT-L-14") and model.preprocessing.mean == (0.5, 0.5, 0.5)
    assert transform(Image.new("RGB", (90, 60))).shape == (3, 42, 42) and model.preprocessing.size == 42
    assert clip.load(file, arch="ViT-L-14/laion2b_s32b_b82k")[0].preprocessing == model.preprocessing


@pytest.mark.parametrize("kept", ["open_clip", "transformers", "shards", "none"])
def test_a_folder_on_the_hub_is_downloaded_in_one_format(kept, tmp_path, monkeypatch):
    """The Hub's client is replaced by one that copies the files of the patterns that it is asked for."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    reference = clip_folder(hub, max_shard_size="300KB" if kept == "shards" else "5GB")
    save_tokenizer(hub)
    torch.save(reference.state_dict(), hub / "pytorch_model.bin")
    if kept == "open_clip":
        config = reduced(CONFIGS["ViT-B-32"])
        folder_of(randomised(open_clip.CLIP(**config)), config, hub)
    elif kept == "none":
        for file in (*hub.glob("*.safetensors"), hub / "pytorch_model.bin"):
            file.unlink()

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "someone/model"
        cache.mkdir(exist_ok=True)
        for file in hub.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    if kept == "none":
        with pytest.raises(clip.WeightsError, match="no weight file"):
            clip.load("hf-hub:someone/model")
        return
    model, _ = clip.load("hf-hub:someone/model")
    weights = {file.name for file in cache.iterdir() if file.suffix in (".safetensors", ".bin")}
    expected = {"open_clip": {"open_clip_pytorch_model.bin"}, "transformers": {"model.safetensors"}}
    assert weights == expected.get(kept, {file.name for file in hub.glob("model-*.safetensors")})
    assert (cache / "open_clip_config.json").is_file() == (kept == "open_clip") and model.arch.is_vit


# --- preprocessing and tokenizers


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("size", [(90, 60), (31, 77), (40, 40)])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_prepared_as_open_clip_does(mode, size, resize, interpolation):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (size[1], size[0], 4), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy(), "RGBA").convert(mode)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    about = open_clip.transform.PreprocessCfg(40, "RGB", mean, std, interpolation, resize)
    expected = open_clip.transform.image_transform_v2(about, is_train=False)(image)
    found = preprocess.test_transform(Preprocessing(40, mean, std, interpolation, resize))(image)
    assert torch.allclose(found, expected, atol=1e-5)


def save_tokenizer(folder, words: int = 60) -> PreTrainedTokenizerFast:
    """Write a tokenizer of whole words, with the special tokens of BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *(f"w{i}" for i in range(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("clean, strip", [("whitespace", False), ("canonicalize", True)])
def test_other_tokenizers_equal_open_clips_and_do_not_cut_texts(clean, strip, tmp_path):
    save_tokenizer(tmp_path)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), 12, clean=clean, strip_sep_token=strip)
    ours = OtherTokenizer(str(tmp_path), 12, clean, strip)
    generator = torch.Generator().manual_seed(0)
    texts = ["W1, w2_w3.", ""]
    texts += [" ".join(f"w{i}" for i in torch.randint(0, 70, (n % 10,), generator=generator)) for n in range(2000)]
    assert torch.equal(ours(texts), theirs(texts))
    with pytest.raises(ValueError, match="w1 w1"):
        ours(["w1 " * 11])


# --- Hugging Face's folders

SHAPES = {  # hidden width, heads, MLP, text width, text heads, text MLP, projection
    "usual": (128, 2, 512, 128, 2, 512, 96),
    "odd heads": (96, 4, 100, 72, 2, 500, 64),
    "wide heads": (72, 2, 288, 64, 2, 256, 24),
}


def clip_folder(folder, shape=SHAPES["usual"], act="quick_gelu", eos=99, vocabulary=100, **options) -> CLIPModel:
    width, heads, mlp, text_width, text_heads, text_mlp, projection = shape
    common = {"hidden_act": act, "num_hidden_layers": 2}
    vision = common | {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": mlp}
    vision |= {"image_size": 32, "patch_size": 8}
    text = common | {"hidden_size": text_width, "num_attention_heads": text_heads, "intermediate_size": text_mlp}
    text |= {"vocab_size": vocabulary, "eos_token_id": eos, "bos_token_id": 98, "max_position_embeddings": 77}
    model = randomised(CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)))
    model.save_pretrained(folder, **options)
    return model


def features_of(model: CLIPModel, images, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        image, text = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=tokens)
    return tuple(getattr(x, "pooler_output", x) for x in (image, text))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("act, eos", [("quick_gelu", 99), ("gelu", 2), ("gelu_new", 7)])
def test_folders_of_clip_models_equal_transformers(shape, act, eos, tmp_path):
    reference = clip_folder(tmp_path, shape, act, eos)
    save_tokenizer(tmp_path)
    model, _ = clip.load(tmp_path)
    tokens = torch.randint(10, 98, (3, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[0, 5], tokens[1, 9], tokens[2, 76] = 98, *(3 * [eos if eos != 2 else 99])
    images = torch.randn(2, 3, 32, 32)
    for found, true in zip(
        (model.encode_image(images), model.encode_text(tokens)), features_of(reference, images, tokens)
    ):
        assert torch.allclose(found, true, atol=1e-5, rtol=1e-5)
    assert (model.arch.conventions.text_pool == "eos") == (eos == 7)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("width, heads, mlp", [(64, 2, 256), (72, 4, 269)])
def test_folders_of_siglip_models_equal_transformers(act, width, heads, mlp, tmp_path):
    common = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": mlp, "num_hidden_layers": 2}
    vision = common | {"hidden_act": act, "image_size": 32, "patch_size": 8}
    text = common | {"vocab_size": 64, "max_position_embeddings": 12, "projection_size": width}
    reference = randomised(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
    reference.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model, transform = clip.load(tmp_path)
    tokens, images = model.tokenize(["w1 w2", "w3"]), torch.randn(2, 3, 32, 32)
    expected = features_of(reference, images, tokens)
    for found, true in zip((model.encode_image(images), model.encode_text(tokens)), expected):
        assert torch.allclose(found, true, atol=1e-5, rtol=1e-5)
    assert model.logit_factor == pytest.approx(math.exp(3.7), rel=1e-5) and model.logit_bias.shape == ()
    image = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB")
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    assert torch.allclose(transform(image), processor(image, return_tensors="pt").pixel_values[0], atol=0.03)


@pytest.mark.parametrize("how", ["shards", "bin", "prefix", "bare file and --arch"])
def test_clip_models_are_found_however_they_are_saved(how, tmp_path):
    reference = clip_folder(tmp_path, max_shard_size="300KB" if how == "shards" else "5GB")
    save_tokenizer(tmp_path)
    name, arch = tmp_path, None
    if how != "shards":
        (tmp_path / "model.safetensors").unlink()
    if how == "bin":
        torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    elif how == "prefix":
        torch.save({f"clip.{name}": value for name, value in reference.state_dict().items()}, tmp_path / "w.pt")
    elif how.startswith("bare"):
        (tmp_path / "elsewhere").mkdir()
        name, arch = tmp_path / "elsewhere" / "w.pt", "openai"
        torch.save({"state_dict": reference.state_dict()}, name)
    images = torch.randn(2, 3, 32, 32)
    found = clip.load(name, arch=arch)[0].encode_image(images)
    assert torch.allclose(found, features_of(reference, images, torch.tensor([[98, 99]]))[0], atol=1e-5)


@pytest.mark.parametrize("change", [{"hidden_act": "swish"}, {"model_type": "siglip2"}])
def test_configs_of_other_models_are_rejected(change, tmp_path):
    clip_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config if "model_type" in change else config["text_config"]).update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(clip.WeightsError, match=next(iter(change.values()))):
        clip.load(tmp_path)


def test_images_are_prepared_as_the_folder_says(tmp_path):
    clip_folder(tmp_path)
    save_tokenizer(tmp_path)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.5] * 3, resample=2
    )
    processor.save_pretrained(tmp_path)
    image = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB")
    found = clip.load(tmp_path)[1](image)
    assert torch.allclose(found, processor(image, return_tensors="pt").pixel_values[0], atol=0.02)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 40}, "crop_size": 32}')
    with pytest.raises(clip.WeightsError, match="crop_size"):
        clip.load(tmp_path)


# --- runs


def test_runs_of_a_folder(run_main, tmp_path):
    """A CLIPModel with CLIP's vocabulary is adapted like any other; its config belongs to the run's identity."""
    clip_folder(tmp_path / "my.model", eos=49407, vocabulary=49408)
    flags = ("--backbone", tmp_path / "my.model", "--shots", 1, "--total_iters", 2, "--batch_size", 4)
    code, record, out, _ = run_main(*flags)
    assert code == 0 and "my.model" in record["run_id"] and "packed" in out and record["changed_weights"] > 0
    config = json.loads((tmp_path / "my.model/config.json").read_text())
    config["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "my.model/config.json").write_text(json.dumps(config))
    _, other, _, _ = run_main(*flags)
    assert other["run_id"] != record["run_id"] and other["weights_sha256"] != record["weights_sha256"]
    assert "logit_factor" not in record and other["logit_factor"] == pytest.approx(math.exp(3.7), rel=1e-5)


def test_coop_needs_clips_own_tokens(run_main, tmp_path):
    clip_folder(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    assert run_main("--backbone", tmp_path / "m", "--method", "coop", "--shots", 1)[0] == 2
