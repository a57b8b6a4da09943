"""Exported models, read back by the programs they are for, give the same features."""

import dataclasses
import errno
import json
import sys
from pathlib import Path

import onnxruntime
import open_clip
import peft
import pytest
import torch
import transformers
from open_clip.openai import load_openai_model
from support.fabricate import picture
from support.runs import call, error_of, in_folder, refused
from support.weights import RESNET, VIT, small_clip
from test_contracts import quick

import clip
import main as entry
from clip.export import save_huggingface, save_open_clip, save_openai
from clip.onnx import save_onnx
from methods import merge_file
from methods.adapters.peft_files import save_peft
from scripts import export

PROMPTS = clip.tokenize(["a photo of a cat.", "two"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Weight files of short runs, by method."""
    folder, found = tmp_path_factory.mktemp("saved"), {}
    for method in ("so", "lora", "coop"):
        flags = (*quick(method, 3), *in_folder(folder), "--filename", method, "--cache_dir", folder / "cache")
        assert call(entry.main, *flags)[0] == 0
        (found[method],) = folder.rglob(f"{method}.safetensors")
    return found


@pytest.fixture
def adapted(saved):
    """A CLIP adapted by SO, and features of an image and of two prompts."""
    model, preprocess = clip.load("tiny")
    return merge_file(model, saved["so"]), picture(1, 2, (50, 70)), preprocess


@torch.no_grad()
def features(model, image, tokens=PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    return model.encode_image(image), model.encode_text(tokens)


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_openai(saved, adapted, tmp_path):
    model, image, preprocess = adapted
    assert call(export.main, "--weights", saved["so"], "--to", "openai", "--out", tmp_path / "a" / "clip.pt")[0] == 0
    content = torch.load(tmp_path / "a" / "clip.pt", weights_only=True)
    assert all(torch.equal(content[name], tensor) for name, tensor in model.state_dict().items())
    assert content.keys() == model.state_dict().keys()
    other = load_openai_model(str(tmp_path / "a" / "clip.pt"), precision="fp32", device="cpu")
    other.load_state_dict(content)  # in float32: the program rounds to half precision
    batch = preprocess(image)[None]
    assert_close(features(other.eval(), batch), features(model, batch))


def test_open_clip(saved, adapted, tmp_path):
    model, image, preprocess = adapted
    assert call(export.main, "--weights", saved["so"], "--to", "open_clip", "--out", tmp_path / "oc")[0] == 0
    other, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'oc'}")
    torch.testing.assert_close(transform(image), preprocess(image), atol=1e-6, rtol=0)
    batch = preprocess(image)[None]
    assert_close(features(other.eval(), batch), features(model, batch))
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'oc'}")(["two"]), clip.tokenize(["two"]))


@torch.no_grad()
def huggingface_features(folder: Path, batch, tokens=PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    other, about = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    found = other.eval().get_image_features(pixel_values=batch), other.get_text_features(input_ids=tokens)
    return tuple(getattr(each, "pooler_output", each) for each in found)  # of transformers 5, or 4


def test_huggingface(saved, adapted, tmp_path):
    _, image, preprocess = adapted
    model = merge_file(clip.load("tiny")[0], saved["lora"])
    assert call(export.main, "--weights", saved["lora"], "--to", "huggingface", "--out", tmp_path / "hf")[0] == 0
    batch = preprocess(image)[None]
    assert_close(huggingface_features(tmp_path / "hf", batch), features(model, batch))
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "hf")
    found = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, batch, atol=0.05, rtol=0)  # it rounds to whole pixels


OTHER = clip.model.Conventions("gelu", "gelu", vision_head_width=16, text_head_width=32)


def test_other_activations_heads_and_widths(tmp_path):
    arch = dataclasses.replace(VIT, conventions=OTHER, vision_mlp=160, text_mlp=96)
    model = small_clip(arch).requires_grad_(False)
    batch, tokens = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 77).long()
    tokens[0, :3], tokens[1, :5] = torch.tensor([62, 5, 63]), torch.tensor([62, 9, 8, 7, 63])
    save_open_clip(model, tmp_path / "oc")
    save_huggingface(model, tmp_path / "hf")
    other = open_clip.create_model(f"local-dir:{tmp_path / 'oc'}").eval()
    assert_close(features(other, batch, tokens), features(model, batch, tokens))
    assert_close(huggingface_features(tmp_path / "hf", batch, tokens), features(model, batch, tokens))
    assert "open_clip" in error_of(clip.WeightsError, save_openai, model, tmp_path / "clip.pt")
    assert not (tmp_path / "clip.pt").exists()


def test_a_resnet(tmp_path):
    model = small_clip(dataclasses.replace(RESNET, context_length=77)).requires_grad_(False)
    save_open_clip(model, tmp_path / "oc")
    assert json.loads((tmp_path / "oc" / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 16
    other = open_clip.create_model(f"local-dir:{tmp_path / 'oc'}").eval()
    batch, tokens = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 77).long()
    tokens[0, :3] = torch.tensor([62, 5, 63])
    assert_close(features(other, batch, tokens), features(model, batch, tokens))
    assert "ResNet" in error_of(clip.WeightsError, save_huggingface, model, tmp_path / "hf")


@torch.no_grad()
def assert_onnx_equals(model, folder, tokens):
    size = json.loads((folder / "preprocessing.json").read_text())["size"]
    sessions = [onnxruntime.InferenceSession(folder / f"{tower}.onnx") for tower in ("image", "text")]
    for count in (1, len(tokens)):  # any batch
        images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        found = sessions[0].run(["features"], {"pixels": images.numpy()})[0]
        texts = sessions[1].run(["features"], {"tokens": tokens[:count].numpy()})[0]
        expected = features(model, images, tokens[:count])
        assert_close([torch.from_numpy(found), torch.from_numpy(texts)], expected, 1e-4)


def test_onnx(saved, tmp_path):
    assert call(export.main, "--weights", saved["lora"], "--to", "onnx", "--out", tmp_path / "onnx")[0] == 0
    model = merge_file(clip.load("tiny")[0], saved["lora"])
    tokens = clip.tokenize(["a photo of a cat.", "two", "a very long prompt, " * 8])
    assert_onnx_equals(model, tmp_path / "onnx", tokens)
    about = json.loads((tmp_path / "onnx" / "preprocessing.json").read_text())
    assert about["logit_factor"] == pytest.approx(100) and about["interpolation"] == "bicubic"
    assert {path.name for path in tmp_path.iterdir()} == {"onnx"}
    code = str(Path(clip.__file__).parent).encode()
    assert not any(code in path.read_bytes() for path in (tmp_path / "onnx").iterdir()), "a path of this machine"


def test_onnx_of_a_resnet_and_of_other_conventions(tmp_path):
    other = dataclasses.replace(OTHER, vision_pool="mean", causal=False, text_pool="last", vision_scaled=True)
    for name, arch in (
        ("rn", dataclasses.replace(RESNET, context_length=77)),
        ("vit", dataclasses.replace(VIT, conventions=other)),
    ):
        model = small_clip(arch).requires_grad_(False)
        save_onnx(model, tmp_path / name)
        tokens = torch.randint(1, 60, (3, 77), generator=torch.Generator().manual_seed(0))
        assert_onnx_equals(model, tmp_path / name, tokens)


@pytest.mark.parametrize("save", [save_open_clip, save_huggingface, save_onnx])
def test_a_full_disk_leaves_no_half_folder(save, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("clip.export.save_tensors", full)
    monkeypatch.setattr("clip.onnx._save", full)
    with pytest.raises(OSError):
        save(small_clip(dataclasses.replace(VIT, context_length=77)), tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install" in error_of(clip.WeightsError, save_onnx, small_clip(VIT), tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_peft(saved, tmp_path, monkeypatch):
    assert call(export.main, "--weights", saved["lora"], "--to", "peft", "--out", tmp_path / "peft")[0] == 0
    save_huggingface(clip.load("tiny")[0], tmp_path / "base")
    base = transformers.CLIPModel.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload()
    adapted.save_pretrained(tmp_path / "merged")
    model = merge_file(clip.load("tiny")[0], saved["lora"])
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = huggingface_features(tmp_path / "merged", batch)
    assert_close(found, features(model, batch))
    assert (found[0] - features(clip.load("tiny")[0], batch)[0]).abs().max() > 1e-4
    mean = dataclasses.replace(VIT, conventions=clip.model.Conventions(vision_pool="mean"))
    for arch in (RESNET, mean):  # no CLIPModel has these towers
        assert error_of(clip.WeightsError, save_peft, small_clip(arch), saved["lora"], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "--to huggingface" in refused(call(export.main, "--weights", saved["so"], "--to", "peft", "--out", "x"))


@pytest.mark.parametrize(("weights", "out"), [("coop", "x"), ("none.safetensors", "x"), ("so", "there")])
def test_mistakes(saved, weights, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    flags = ("--weights", saved.get(weights, weights), "--to", "openai", "--out", out)
    line = refused(call(export.main, *flags), ["there"])
    assert (out if out == "there" else weights) in line
