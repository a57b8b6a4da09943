"""Packed prompts, sampled gradients and the trimmed last block together equal the plain computation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import clip
from benchmarks.plain import DenseSO, encode_image, encode_text
from clip.activations import ACTIVATIONS, QuickGELU
from clip.layouts import PackedPrompts
from clip.model import CLIP, Architecture
from methods.choice import Blocks, select_matrices
from optimizers import SO, attach

TEXT = dict(embed_dim=32, context_length=77, vocab_size=49408, text_width=64, text_layers=3)
VIT = Architecture(resolution=32, vision_width=128, vision_layers=3, patch_size=8, **TEXT)
RESNET = Architecture(resolution=32, vision_width=8, vision_layers=(1, 1, 1, 1), patch_size=None, **TEXT)
END = 49407
PROMPTS = {
    "shared prefix": ["a photo of a cat.", "a photo of a very large dog, seen from above.", "a photo of a F-16A/B."],
    "only the start token": ["cat", "two words", "itap of a thing"],
    "one is the beginning of another": ["a photo", "a photo of a cat", "a photo of"],
    "all the same": ["same", "same"],
    "one prompt": ["a photo of a single thing."],
    "full length": ["a photo of a " + "dog " * 71, "a photo of a cat."],
    "empty": ["", "a photo"],
}


def model_of(arch):
    torch.manual_seed(0)
    return CLIP(arch).double().eval()


@pytest.mark.parametrize("texts", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("arch", [VIT, RESNET], ids=["vit", "resnet"])
def test_features(arch, texts):
    model, tokens = model_of(arch), clip.tokenize(texts)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model.encode_image(images), encode_image(model, images), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.encode_text(tokens), encode_text(model, tokens), rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_other_prompts_and_tokens_after_the_end_do_not_matter_and_those_before_do():
    model, tokens = model_of(VIT), clip.tokenize(PROMPTS["shared prefix"])
    features = model.encode_text(tokens)
    close = dict(rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat([model.encode_text(row[None]) for row in tokens]), features, **close)
    noisy = tokens.clone()
    for row in noisy:
        start = row.tolist().index(END) + 1
        row[start:] = torch.randint(1, END, (77 - start,))
    noisy[0, 20] = END  # a second end-of-text: the first one counts
    torch.testing.assert_close(model.encode_text(noisy), features, **close)
    for position in range(1, 7):  # "a photo of a cat." has six tokens between start and end
        changed = tokens.clone()
        changed[0, position] = 1000
        assert (model.encode_text(changed)[0] - features[0]).norm() > 1e-3 * features[0].norm()


def test_gradients_reach_every_weight():
    model = model_of(VIT)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    text = model.encode_text(clip.tokenize(PROMPTS["full length"]))
    (model.encode_image(images).square().sum() + text.square().sum()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"logit_scale"}


@pytest.mark.parametrize(
    "arch, encoder, texts, density",
    [
        (VIT, "both", "shared prefix", 0.002),
        (VIT, "both", "only the start token", 0.03),  # so dense that the product is dense
        (VIT, "vision", "shared prefix", 0.03),
        (RESNET, "text", "only the start token", 0.002),
    ],
)
def test_training_steps(arch, encoder, texts, density):
    plain = model_of(arch)
    select_matrices(plain, Blocks(encoder=encoder))
    fast = copy.deepcopy(plain)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (plain, fast)]
    dense = DenseSO(trained[0], lr=1e-3, density_ratio=density, T=2)
    sparse = SO(trained[1], lr=1e-3, density_ratio=density, T=2)
    attach(fast, sparse)
    tokens = clip.tokenize(PROMPTS[texts])
    prompts = PackedPrompts(tokens)
    start = [p.detach().clone() for p in trained[1]]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(len(tokens), (4,), generator=generator)

        def loss_of(image, text, labels=labels):
            return F.cross_entropy(100 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T, labels)

        expected = loss_of(encode_image(plain, images), encode_text(plain, tokens))
        loss = loss_of(fast.encode_image(images), fast.encode_text(prompts))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
        plain.zero_grad()
        expected.backward()
        dense.step()
        sparse.zero_grad()
        loss.backward()
        assert all(p.grad is None for p in fast.parameters())
        sparse.step()
        for p, q in zip(*trained):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-10)
    assert all(not torch.equal(p, q) for p, q in zip(trained[1], start))


CONTEXTS = {  # M vectors stand where X is; C class names
    "shared, at the beginning": ("X X X {}.", False),
    "shared, in the middle": ("a X {} X X.", False),
    "shared, at the end": ("{} X X X.", False),
    "of each class, at the beginning": ("X X X {}.", True),
    "of each class, around the name": ("a X X {} X.", True),
}


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("template, of_each_class", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_learned_prompt_vectors(template, of_each_class, share_prefix):
    model = model_of(VIT)
    tokens = clip.tokenize([template.format(name) for name in ("cat", "dog", "very large dog")])
    places = tokens == clip.tokenize("X")[0, 1]
    assert (places.sum(dim=1) == 3).all()
    vector_at = torch.where(places, places.cumsum(dim=1) - 1, -1)
    if of_each_class:
        vector_at = torch.where(places, vector_at + 3 * torch.arange(3)[:, None], -1)
    vectors = torch.randn(int(vector_at.max()) + 1, 64, dtype=torch.float64, requires_grad=True)
    prompts = PackedPrompts(tokens, share_prefix, vector_at)
    if share_prefix:
        agreed = {("X", False): 4, ("X", True): 1, ("{", False): 1, ("a", False): 3, ("a", True): 2}
        assert prompts.prefix == agreed[template[0], of_each_class]
    features = model.encode_text(prompts, vectors)
    expected = encode_text(model, tokens, vector_at, vectors)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-11)
    weight = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((x * weight).sum(), [vectors, *model.transformer.parameters()])
        for x in (features, expected)
    ]
    for gradient, reference in zip(*gradients):
        assert reference.abs().max() > 0
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(features, model.encode_text(tokens))
    for arguments in ((tokens, vectors), (prompts,)):
        with pytest.raises(ValueError, match="vector_at"):
            model.encode_text(*arguments)


def linear_flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if op.__name__.startswith(("addmm", "mm", "linear")))


@torch.no_grad()
def test_the_last_block_computes_only_keys_and_values_of_unused_tokens():
    model = model_of(VIT).float()
    D, T = 128, 17
    full, keys_values, one_token = 2 * T * 12 * D**2, 2 * T * 2 * D**2, 2 * 10 * D**2
    projection = 2 * D * 32
    counted = linear_flops(model.encode_image, torch.randn(1, 3, 32, 32))
    assert counted == 2 * full + keys_values + one_token + projection


@torch.no_grad()
def test_a_shared_prefix_is_computed_once_and_padding_never():
    model = model_of(VIT).float()
    texts = [f"a photo of a {word}." for word in ("cat", "dog", "small house")]
    prompts = PackedPrompts(clip.tokenize(texts))
    assert prompts.prefix == 5  # start, a, photo, of, a
    D, T = 64, 5 + 3 + 3 + 4  # word(s), full stop, end
    assert len(prompts.ids) == T
    expected = 2 * 2 * T * 12 * D**2 + 2 * T * 2 * D**2 + 3 * (2 * 10 * D**2 + 2 * D * 32)
    assert linear_flops(model.encode_text, prompts) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_quick_gelu_has_the_same_bits_with_and_without_gradients_and_in_place(dtype):
    x = torch.linspace(-20, 20, 4001).to(dtype)
    expected = QuickGELU()(x.clone().requires_grad_()).detach()
    x64, tolerance = x.double(), 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(expected.double(), x64 * torch.sigmoid(1.702 * x64), rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        for inplace in (False, True):
            own = x.clone()
            assert torch.equal(QuickGELU(inplace)(own), expected) and torch.equal(own, x) != inplace
        assert ACTIVATIONS["quick_gelu"]().inplace


def test_frozen_parts_are_outside_the_graph():
    model = model_of(VIT)
    select_matrices(model, Blocks(encoder="text", position="top1"))
    assert not model.encode_image(torch.randn(1, 3, 32, 32, dtype=torch.float64)).requires_grad
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model.encode_text(clip.tokenize(PROMPTS["shared prefix"]))
    assert len(kept) < 40  # those of one block, not of three
