"""The model beside open_clip's, with OpenAI's file formats in between; and the nine models' sizes."""

import re

import open_clip
import pytest
import torch
from support.weights import FORMATS
from torch import nn

import clip
from clip.model import Architecture
from clip.tokenizer import tokenizer
from clip.weights import read_architecture

SINGLE = re.compile(r"\bln_|\bbn\d|downsample\.1\.|(token|positional|class)_embedding|logit_scale")
EXTRAS = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}

PROMPTS = ["a photo of a cat.", "a centered satellite photo of Annual Crop Land, 1987.", "dog " * 75]

# name: (architecture, weights in all, weights of the image tower)
SIZES = {
    "RN50": (Architecture(1024, 224, 64, (3, 4, 6, 3), None, 77, 49408, 512, 12), 102_007_137, 38_316_896),
    "RN101": (Architecture(512, 224, 64, (3, 4, 23, 3), None, 77, 49408, 512, 12), 119_688_033, 56_259_936),
    "RN50x4": (Architecture(640, 288, 80, (4, 6, 10, 6), None, 77, 49408, 640, 12), 178_300_601, 87_137_080),
    "RN50x16": (Architecture(768, 384, 96, (6, 8, 18, 8), None, 77, 49408, 768, 12), 290_979_217, 167_328_912),
    "RN50x64": (Architecture(1024, 448, 128, (3, 15, 36, 10), None, 77, 49408, 1024, 12), 623_258_305, 420_380_352),
    "ViT-B/32": (Architecture(512, 224, 768, 12, 32, 77, 49408, 512, 12), 151_277_313, 87_849_216),
    "ViT-B/16": (Architecture(512, 224, 768, 12, 16, 77, 49408, 512, 12), 149_620_737, 86_192_640),
    "ViT-L/14": (Architecture(768, 224, 1024, 24, 14, 77, 49408, 768, 12), 427_616_513, 303_966_208),
    "ViT-L/14@336px": (Architecture(768, 336, 1024, 24, 14, 77, 49408, 768, 12), 427_944_193, 304_293_888),
}


def as_openai_stores(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Half precision except for normalisations, embeddings and the scale; and the archives' three integers."""
    stored = {n: t if SINGLE.search(n) or not t.is_floating_point() else t.half() for n, t in weights.items()}
    return stored | {name: torch.tensor(value) for name, value in EXTRAS.items()}


@torch.no_grad()
def with_random_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give open_clip's model random weights that a file of OpenAI's can hold; return that file's tensors.

    Biases and normalisations, which start as zeros and ones, get values that matter; the running statistics of batch
    norms are about those of random images, so that a ResNet's features depend on its input.
    """
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)  # open_clip starts some at zero
            module.momentum = 1.0
    model.visual.train()(random_images(4))
    model.eval()
    stored = as_openai_stores(model.state_dict())
    model.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in stored.items() if n not in EXTRAS})
    return stored


def random_images(count: int) -> torch.Tensor:
    """[count, 3, 64, 64] of blotches and noise."""
    blotches = nn.functional.interpolate(torch.randn(count, 3, 7, 7), size=64, mode="bilinear")
    return blotches + 0.3 * torch.randn(count, 3, 64, 64)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Rows differ by less than 1e-5 of their length; and are not all alike, which would prove nothing."""
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max() < 1e-5
    for row in theirs[1:]:
        assert (row - theirs[0]).norm() / theirs[0].norm() > 1e-2


TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3}
VIT = {"layers": 3, "width": 128, "patch_size": 8, "image_size": 64}
RESNET = {"layers": (2, 1, 2, 1), "width": 16, "image_size": 64}


@pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")
@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["ViT", "ResNet"])
@torch.no_grad()
def test_features_equal_open_clips(vision, tmp_path):
    torch.manual_seed(1)
    reference = open_clip.CLIP(48, vision, TEXT, quick_gelu=True)
    model, preprocess = clip.load(FORMATS["torchscript"](with_random_weights(reference), tmp_path), arch="openai")
    assert preprocess.transforms[1].size == (64, 64)
    expected, actual = reference.state_dict(), model.state_dict()
    expected.pop("attn_mask", None)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    images, tokens = random_images(2), clip.tokenize(PROMPTS)
    assert tokens[-1, 76] == 49407  # a full context
    assert_close(model.encode_image(images), reference.encode_image(images))
    assert_close(model.encode_text(tokens), reference.encode_text(tokens))


def test_sizes_and_architecture_from_shapes():
    assert clip.available_models() == list(SIZES)
    for arch, total, visual in SIZES.values():
        assert arch.vocab_size == len(tokenizer().symbols)
        with torch.device("meta"):
            model = clip.CLIP(arch)
        assert sum(p.numel() for p in model.parameters()) == total
        assert sum(p.numel() for p in model.visual.parameters()) == visual
        assert read_architecture(model.state_dict()) == arch
