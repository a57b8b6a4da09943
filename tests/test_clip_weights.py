"""Weight files: the three formats, hostile and damaged files, saving, hashing, names."""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.weights import (
    FORMATS,
    RESNET,
    VIT,
    Node,
    assert_same_weights,
    halved,
    small_clip,
    write_pickle,
    write_safetensors,
    write_torchscript,
)
from torch import nn

import clip
from clip.conventions import with_conventions
from clip.files import Storage, Stored, resolve
from clip.model import Architecture, Conventions
from clip.weights import save_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")


def error_of(path) -> str:
    """Return the message of the WeightsError that loading raises; it must be one line and name the file."""
    with pytest.raises(clip.WeightsError) as caught:
        clip.load(path, arch="openai")
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 1000
    return message


# --- reading


@pytest.mark.parametrize("arch", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_weights_and_hash(format, arch, tmp_path):
    original = small_clip(arch)
    extras = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    extras["transformer.resblocks.0.attn_mask"] = torch.zeros(77, 77)
    model, preprocess = clip.load(FORMATS[format](halved(original) | extras, tmp_path), arch="openai")
    assert_same_weights(model, original.state_dict())
    assert model.arch == arch and clip.weights_sha256(model) == clip.weights_sha256(original)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert preprocess.transforms[1].size == (arch.resolution, arch.resolution)
    images = torch.randn(2, 3, arch.resolution, arch.resolution)
    assert torch.equal(model.encode_image(images), original.encode_image(images))


def test_transposed_and_shared_storage_in_an_archive(tmp_path):
    original = small_clip()
    tensors = original.state_dict()
    for name in ("visual.proj", "text_projection"):
        tensors[name] = tensors[name].t().contiguous().t()
    table = torch.cat([torch.zeros(77, 64), tensors["positional_embedding"]])
    tensors["positional_embedding"] = table[77:]
    model, _ = clip.load(write_torchscript(tensors, tmp_path), arch="openai")
    assert_same_weights(model, original.state_dict())
    assert all(p.is_contiguous() for p in model.parameters())  # deltas index them row by row


def test_plain_integers_and_old_batch_norms_without_a_counter(tmp_path):
    original = small_clip(RESNET)
    tensors = {n: t for n, t in original.state_dict().items() if "num_batches_tracked" not in n}
    model, _ = clip.load(write_pickle(tensors | {"input_resolution": 32}, tmp_path), arch="openai")
    assert_same_weights(model, original.state_dict())


def test_a_loaded_model_does_not_write_to_its_file(tmp_path):
    path = write_safetensors(small_clip().state_dict(), tmp_path)
    before = path.read_bytes()
    model, _ = clip.load(path, arch="openai")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == before
    assert clip.load(path, arch="openai")[0].visual.proj.any()


# --- hostile and damaged files


def calling(module: str, name: str, argument: str) -> bytes:
    """Return a pickle that calls module.name(argument)."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def archive_with(data: bytes, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("container", ["archive", "pickle"])
@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"),
        (os.system.__module__, "system"),
        ("subprocess", "getoutput"),
        ("torch.jit", "load"),
        ("torch", "load"),
        ("builtins", "eval"),
        ("torch", "FloatStorage"),  # a known name, but nothing to call
        ("__torch__.os", "system"),  # a class of the archive: no code behind it
    ],
)
def test_nothing_in_a_file_is_executed(module, name, container, tmp_path):
    marker = tmp_path / "ran"
    argument = f"open('{marker}', 'w').close()" if name == "eval" else f"touch {marker}"
    data = calling(module, name, argument)
    if name in ("system", "eval") and not module.startswith("__"):
        pickle.loads(data)
        assert marker.exists()  # so the pickle is dangerous
        marker.unlink()
    path = tmp_path / "hostile.pt"
    if container == "archive":
        archive_with(data, path)
    else:
        path.write_bytes(data)
    error_of(path)
    assert not marker.exists()


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_files(format, tmp_path):
    path = FORMATS[format](halved(small_clip()), tmp_path)
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:length])
        error_of(path)


def test_altered_bytes_of_an_archive_are_noticed_or_do_not_matter(tmp_path):
    path = write_torchscript(halved(small_clip()), tmp_path)
    content, sha256, rng, noticed = (
        path.read_bytes(),
        clip.weights_sha256(clip.load(path, arch="openai")[0]),
        random.Random(0),
        0,
    )
    for _ in range(40):
        altered = bytearray(content)
        altered[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        try:
            assert clip.weights_sha256(clip.load(path, arch="openai")[0]) == sha256
        except clip.WeightsError as error:
            assert "\n" not in str(error)
            noticed += 1
    assert noticed > 20


def test_files_of_other_things(tmp_path):
    error_of(archive_with(pickle.dumps([1, 2]), tmp_path / "list.pt"))
    with zipfile.ZipFile(tmp_path / "no-data.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    error_of(tmp_path / "no-data.pt")
    for name in ("noise.pt", "noise.safetensors"):
        (tmp_path / name).write_bytes(random.Random(0).randbytes(100_000))
        error_of(tmp_path / name)


def changed(name, tensor):
    return small_clip().state_dict() | {name: tensor}


def without(missing):
    return {name: tensor for name, tensor in small_clip().state_dict().items() if name != missing}


MISSING = ("text_projection", "ln_final.bias", "visual.class_embedding", "visual.conv1.weight")


@pytest.mark.parametrize(
    "tensors, named",
    [
        *((without(name), name) for name in MISSING),
        (without("visual.proj"), "visual.proj"),
        (changed("ln_final.bias", torch.zeros(65)), "ln_final.bias"),
        (changed("transformer.resblocks.1.attn.in_proj_weight", torch.zeros(192, 63)), "in_proj"),
        (changed("visual.positional_embedding", torch.zeros(7, 64)), "visual.positional_embedding"),  # 6 is no square
        (changed("visual.positional_embedding", torch.zeros(0, 64)), "shape"),
        (changed("text_projection", torch.zeros(64)), "shape"),
        (changed("ln_final.weight", torch.ones(96)), "96"),
        (changed("ln_final.bias", torch.zeros(64, dtype=torch.int64)), "ln_final.bias"),
        (changed("classifier.weight", torch.zeros(3)), "classifier.weight"),  # a key too many
        ({"logits.weight": torch.zeros(3)}, "OpenAI's names"),
        ({}, "holds nothing"),
        ([torch.zeros(3)], "state dict"),
        (torch.zeros(3), "state dict"),
        ({"state_dict": {"state_dict": []}}, "state dict"),
        ({1: torch.zeros(3)}, "OpenAI's names"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_state_dicts(tensors, named, tmp_path):
    assert named in error_of(write_pickle(tensors, tmp_path))


def test_unknown_names(tmp_path):
    for name in ("ViT-B/17", "vit-b/16", "tiny.safetensors", tmp_path / "none.pt"):
        message = error_of(name)
        assert all(known in message for known in ("tiny", *clip.available_models()))
    assert "open_clip_config.json" in error_of(tmp_path)


# --- files as people have them


def nested(tensors: dict) -> Node:
    """Return a module whose modules and parameters have these names."""
    root = Node()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            node = node._modules.setdefault(parent, Node())
        node.register_buffer(leaf, tensor)
    return root


def prefixed(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def custom_text(tensors: dict) -> dict:
    """Return a state dict as of open_clip's CustomTextCLIP."""
    return {name if name.startswith(("visual.", "logit")) else f"text.{name}": t for name, t in tensors.items()}


EXTRAS = {
    "epoch": 3,
    "best": np.float64(71.5),
    "args": argparse.Namespace(lr=1e-3, out=pathlib.Path("runs")),
    "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "when": datetime.datetime(2026, 1, 1),
    "rng": np.random.RandomState(0).get_state(),
    "scheduler": torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], 0.1), abs),
}
WRAPPED = {
    "state_dict": lambda w: {"state_dict": prefixed("module.", w), **EXTRAS},
    "model_state_dict": lambda w: {"model_state_dict": w, **EXTRAS},
    "model in model": lambda w: {"model": {"state_dict": prefixed("clip_model.", w)}, **EXTRAS},
    "with an average": lambda w: {"model": w, "model_ema": {name: t + 1 for name, t in w.items()}},
    "compiled and parallel": lambda w: prefixed("_orig_mod.module.", w),
    "of Lightning": lambda w: {"state_dict": prefixed("model.clip.", w) | {"criterion.weight": torch.ones(2)}},
    "custom text": custom_text,
    "custom text, parallel": lambda w: {"state_dict": prefixed("module.", custom_text(w))},
    "parameters": lambda w: {name: nn.Parameter(t, requires_grad=False) for name, t in w.items()},
    "whole module": nested,
    "module in a checkpoint": lambda w: {"model": nested(w), **EXTRAS},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_prefixed_and_accompanied_weights(wrapped, legacy, tmp_path):
    weights = small_clip().state_dict()
    torch.save(wrapped(weights), tmp_path / "w.bin", _use_new_zipfile_serialization=not legacy)
    assert_same_weights(clip.load(tmp_path / "w.bin", arch="openai")[0], weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_shared_storages_and_other_types_of_numbers(dtype, tmp_path):
    """One buffer for all tensors, as optimizers of large models keep them."""
    weights = {name: tensor.to(dtype) for name, tensor in small_clip().state_dict().items()}
    flat, start = torch.cat([tensor.reshape(-1) for tensor in weights.values()]), 0
    for name, tensor in weights.items():
        weights[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    loaded, _ = clip.load(write_pickle(weights, tmp_path), arch="openai")
    assert all(torch.equal(loaded.state_dict()[name], tensor.float()) for name, tensor in weights.items())


@pytest.mark.parametrize("format", FORMATS)
def test_the_name_of_a_file_does_not_matter(format, tmp_path):
    weights = small_clip().state_dict()
    path = FORMATS[format](weights, tmp_path)
    for name in ("w.bin", "w.pt", "w.safetensors", "w"):
        assert_same_weights(clip.load(path.rename(tmp_path / name), arch="openai")[0], weights)
        path = tmp_path / name


LORA = {"base_model.model.visual.q_proj.lora_A.weight": torch.ones(2, 2)}
HF = {"text_model.embeddings.token_embedding.weight": torch.ones(2, 2), "vision_model.x": torch.ones(2)}
OTHER_THINGS = {
    "empty": (b"", "empty"),
    "zeros": (bytes(5000), "zero bytes"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html>\n<html></html>", "a web page"),
    "config": (b'{"architectures": ["CLIPModel"]}', "JSON"),
    "index": (b'{"metadata": {}, "weight_map": {}}', "index"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "gzip"),
    "GGUF": (b"GGUF\3\0\0\0", "GGUF"),
    "plain pickle": (pickle.dumps({"a": 1}), "pickle"),
    "cut safetensors": (b"\x90\0\0\0\0\0\0\0" + b'{"visual.proj":{"dtype":"F32"', "safetensors"),
    "LoRA": (LORA, "LoRA"),
    "Hugging Face": (HF, "CLIPModel"),
    "SigLIP": (HF | {"logit_bias": torch.ones(1)}, "SiglipModel"),
    "timm": ({"visual.trunk.norm.weight": torch.ones(2), "text.token_embedding.weight": torch.ones(2)}, "--arch"),
    "Long-CLIP": ({"positional_embedding_res": torch.ones(2)}, "Long-CLIP"),
    "image tower": ({"visual.conv1.weight": torch.ones(2)}, "image tower"),
    "text tower": ({"token_embedding.weight": torch.ones(2), "text_projection": torch.ones(2)}, "text tower"),
    "ResNet": ({"layer1.0.conv1.weight": torch.ones(2), "fc.weight": torch.ones(2)}, "ResNet"),
    "prompt": ({"state_dict": {"prompt_learner.ctx": torch.ones(2)}}, "prompt"),
    "delta": ({"visual.proj.indices": torch.ones(2), "visual.proj.values": torch.ones(2)}, "delta"),
    "optimizer": ({"optimizer": {"state": {}}}, "optimizer"),
    "two models": (prefixed("a.", small_clip().state_dict()) | prefixed("b.", small_clip().state_dict()), "2 models"),
}


@pytest.mark.parametrize(("content", "named"), OTHER_THINGS.values(), ids=OTHER_THINGS)
def test_other_things_are_called_by_their_names(content, named, tmp_path):
    path = tmp_path / "ViT-B-16.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert named in error_of(path)
    assert "weights_only" not in error_of(path) and "\x1b" not in error_of(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["visual.proj", "ln_final.bias", "transformer.resblocks.1.attn.in_proj_weight"])
def test_weights_that_are_no_numbers_are_rejected(name, value, tmp_path):
    weights = small_clip().state_dict()
    weights[name].view(-1)[-1] = value
    assert name in error_of(write_safetensors(weights, tmp_path))


def test_a_tensor_that_reaches_beyond_its_storage_is_rejected(tmp_path):
    weights = small_clip().state_dict()
    for shape, stride, offset in (((9999,), (1,), 0), ((2, 2), (9999, 1), 0), ((3,), (1,), 9999), ((10**9,), (0,), 0)):
        path = tmp_path / "w.pt"
        torch.save({**weights, "ln_final.bias": torch.zeros(64)}, path)
        view = Stored(Storage(torch.float32, "0", 64, torch.zeros(64)), offset, shape, stride)
        with pytest.raises(clip.WeightsError, match=r"w\.pt is damaged"):
            resolve({"ln_final.bias": view}, path)


# --- what no tensor tells


def open_clip_config(**changes) -> dict:
    vision = {"image_size": 32, "layers": 2, "width": 320, "head_width": 80, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 64, "width": 128, "heads": 4, "layers": 2}
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text} | changes


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("mlp_ratio", [4.0, 4.9231])
def test_other_heads_mlps_and_activations_equal_open_clips(quick, mlp_ratio, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    config = open_clip_config(quick_gelu=quick)
    config["vision_cfg"]["mlp_ratio"] = mlp_ratio
    torch.manual_seed(0)
    reference = open_clip.CLIP(**config).eval()
    path = write_pickle({"state_dict": prefixed("module.", reference.state_dict())}, tmp_path)
    assert "--arch" in clip_error(path)  # 320 is a multiple of 64, too
    (tmp_path / "model.json").write_text(json.dumps(config))
    images, tokens = torch.randn(3, 3, 32, 32), torch.tensor([[49, 5, 6, 63] + [0] * 73])
    model, _ = clip.load(path, arch=str(tmp_path / "model.json"))
    for found, expected in (
        (model.encode_image(images), reference.encode_image(images)),
        (model.encode_text(tokens), reference.encode_text(tokens)),
    ):
        assert torch.allclose(found, expected, atol=1e-5)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    assert clip.weights_sha256(clip.load(path)[0]) == clip.weights_sha256(model)
    assert clip.weights_sha256(clip.load(path, arch="openai")[0]) != clip.weights_sha256(model)


def clip_error(path, arch=None) -> str:
    with pytest.raises(clip.WeightsError) as caught:
        clip.load(path, arch=arch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "pos_embed_type", "sin_cos_2d"),
        ("vision_cfg", "act_kwargs", {"inplace": True}),
        ("text_cfg", "embed_cls", True),
        ("text_cfg", "pool_type", "first"),
        ("text_cfg", "norm_kwargs", {"bias": False}),
        ("text_cfg", "hf_model_name", "xlm-roberta-base"),
        ("text_cfg", "something_new", "value"),
    ],
)
def test_what_a_config_asks_for_and_is_not_computed_is_rejected(part, key, value, tmp_path):
    config = open_clip_config()
    config[part][key] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert key in clip_error(write_pickle(small_clip().state_dict(), tmp_path))


def test_names_for_arch(tmp_path):
    path = write_pickle(small_clip().state_dict(), tmp_path)
    assert "ViT-H-14" in clip_error(path, "ViT-H14") and "shapes" in clip_error(path, "ViT-H-14")
    assert "known model" in clip_error("tiny", "openai")
    huge = Architecture(1024, 224, 1280, 32, 14, 77, 49408, 1024, 24)
    for name, activation in (("ViT-H-14", "gelu"), ("ViT-H-14-378-quickgelu", "quick_gelu")):
        arch, _ = with_conventions(huge, path, name)
        assert arch.conventions == Conventions(activation, activation, vision_head_width=80)
    with pytest.raises(clip.WeightsError, match="ViT-H-14"):
        with_conventions(huge, path, None)
    base = Architecture(512, 224, 768, 12, 16, 77, 49408, 512, 12)
    assert with_conventions(base, path, None)[0] == base
    with pytest.raises(clip.WeightsError, match="--arch"):
        with_conventions(dataclasses.replace(base, vision_mlp=3000), path, None)


def test_a_run_says_what_its_weight_file_is_taken_for(run_main, tmp_path):
    save_weights(clip.load("tiny")[0], tmp_path / "w.pt")
    flags = ("--shots", 1, "--method", "zero_shot", "--backbone", tmp_path / "w.pt")
    _, plain, out, _ = run_main(*flags)
    assert "quick GELU" in out and "32 pixels" in out
    _, other, out, _ = run_main(*flags, "--arch", "openai")
    assert plain["run_id"] != other["run_id"] and plain["weights_sha256"] == other["weights_sha256"]


# --- names


def test_input_projections_are_linear_layers_with_open_ais_names_outside():
    source, target = small_clip(seed=1), small_clip(seed=2)
    tensors = source.state_dict()
    kept = dict(tensors)
    target.load_state_dict(tensors)
    assert list(tensors) == list(kept)  # the caller's dictionary does not change
    assert_same_weights(target, kept)
    linear = target.transformer.resblocks[0].attn.in_proj
    assert isinstance(linear, nn.Linear)
    stacked = target.state_dict()["transformer.resblocks.0.attn.in_proj_weight"]
    assert stacked.data_ptr() == linear.weight.data_ptr()


# --- saving


@pytest.mark.parametrize("arch", [VIT, RESNET], ids=["vit", "resnet"])
def test_saving_is_exact(arch, tmp_path):
    model = small_clip(arch)
    with torch.no_grad():
        model.text_projection[0, 0], model.text_projection[0, 1] = 1 / 3, -0.0
    path = tmp_path / "model.safetensors"
    save_weights(model, path)
    loaded, _ = clip.load(path, arch="openai")
    assert_same_weights(loaded, model.state_dict())
    assert loaded.text_projection[0, 1].signbit()
    assert clip.weights_sha256(loaded) == clip.weights_sha256(model)
    assert os.listdir(tmp_path) == ["model.safetensors"]

    save_weights(model, str(path), half=True)
    stored = load_file(path)
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    expected = {n: t.half().float() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    assert_same_weights(clip.load(path, arch="openai")[0], expected)
    assert loaded.text_projection[0, 0] != expected["text_projection"][0, 0]


def test_permissions_of_saved_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        save_weights(small_clip(), tmp_path / "model.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


# --- hashing


def test_the_hash_sees_every_tensor_and_single_bits():
    model = small_clip(RESNET)
    seen = {clip.weights_sha256(model)}
    tensors = model.state_dict()
    for tensor in tensors.values():
        flat = tensor.view(-1)
        before = flat[-1].item()
        flat[-1] = before + 1
        seen.add(clip.weights_sha256(model))
        flat[-1] = before
    assert len(seen) == len(tensors) + 1
    with torch.no_grad():
        model.ln_final.bias[0] = 0.0
        plus = clip.weights_sha256(model)
        model.ln_final.bias[0] = -0.0
    assert clip.weights_sha256(model) != plus


def test_the_hash_never_changes():
    """Deltas name their base by it."""
    model = small_clip()
    for i, tensor in enumerate(model.state_dict().values()):
        tensor.copy_((torch.arange(tensor.numel()).view(tensor.shape) + i) / 1024)
    assert clip.weights_sha256(model) == "93f9cd52d8fc84779493930ebf04ccd1f0796f00ccae9e96428d7f6f9fd054f8"


def test_tiny_is_a_clip_with_the_real_vocabulary():
    model, preprocess = clip.load("tiny")
    assert model.arch.vocab_size == 49408 and model.arch.context_length == 77
    assert preprocess.transforms[1].size == (model.arch.resolution,) * 2
    assert model.encode_text(clip.tokenize(["a cat", "the digit five"])).shape == (2, model.arch.embed_dim)
