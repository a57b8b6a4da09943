"""The text tower's mathematics on a small random CLIP, beside a slow reference."""

import math

import pytest
import torch

import clip
from clip.model import Architecture

END = 49407
PROMPTS = ["a cat.", "a photo of a polka-dotted texture, a type of pattern.", "", "dog " * 75]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    arch = Architecture(24, 32, 64, 1, 16, 77, 49408, text_width=128, text_layers=3)
    model = clip.CLIP(arch).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def relative(a, b):
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


def slow_text_feature(model, ids):
    """One prompt of exactly these ids, one query and one head at a time."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"][: len(ids)]
    for layer in range(model.arch.text_layers):
        block = f"transformer.resblocks.{layer}"
        y = norm(x, f"{block}.ln_1")
        qkv = y @ weights[f"{block}.attn.in_proj_weight"].T + weights[f"{block}.attn.in_proj_bias"]
        q, k, v = qkv[:, :128], qkv[:, 128:256], qkv[:, 256:]
        mixed = torch.zeros_like(x)
        for t in range(len(ids)):
            for head in (slice(0, 64), slice(64, 128)):
                scores = torch.stack([q[t, head] @ k[s, head] for s in range(t + 1)]) / math.sqrt(64)
                mixed[t, head] = scores.softmax(0) @ v[: t + 1, head]
        x = x + mixed @ weights[f"{block}.attn.out_proj.weight"].T + weights[f"{block}.attn.out_proj.bias"]
        y = norm(x, f"{block}.ln_2") @ weights[f"{block}.mlp.c_fc.weight"].T + weights[f"{block}.mlp.c_fc.bias"]
        y = y / (1 + (-1.702 * y).exp())
        x = x + y @ weights[f"{block}.mlp.c_proj.weight"].T + weights[f"{block}.mlp.c_proj.bias"]
    return norm(x[-1], "ln_final") @ weights["text_projection"]


@torch.no_grad()
def test_text_feature_beside_slow_reference(model):
    tokens = clip.tokenize(PROMPTS[:3])
    features = model.encode_text(tokens)
    for row, feature in zip(tokens, features):
        ids = row[: row.tolist().index(END) + 1]
        assert relative(feature.double(), slow_text_feature(model, ids)) < 1e-5


@torch.no_grad()
def test_neighbours_and_padding_do_not_matter(model):
    tokens = clip.tokenize(PROMPTS)
    together = model.encode_text(tokens)
    for i in range(len(PROMPTS)):
        alone = model.encode_text(tokens[i : i + 1])
        assert relative(alone[0], together[i]) < 1e-6
    assert relative(together[:1], together[1:2]) > 0.1  # prompts do differ


@torch.no_grad()
def test_tokens_after_the_end_do_not_matter_and_those_before_do(model):
    tokens = clip.tokenize(PROMPTS[:2])
    features = model.encode_text(tokens)
    noisy = tokens.clone()
    for row in noisy:
        rest = row.tolist().index(END) + 1
        row[rest:] = torch.randint(1, END, (77 - rest,))
    noisy[0, 20] = END  # a second end-of-text: the first one counts
    assert relative(model.encode_text(noisy), features) < 1e-6

    for position in (1, 2, 3):  # "a cat." holds three tokens between start and end
        changed = tokens.clone()
        changed[0, position] = 1000
        assert relative(model.encode_text(changed)[:1], features[:1]) > 1e-3


def test_gradients_reach_every_weight(model):
    images = torch.randn(2, 3, 32, 32)
    (model.encode_image(images).square().sum() + model.encode_text(clip.tokenize(PROMPTS)).square().sum()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    model.zero_grad()
    assert without == {"logit_scale"}
