"""CoCoOp, KgCoOp, ProGrad, MaPLe, PromptSRC and MMRL beside plain loops over padded prompts, block by block."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from support.runs import NAMES, TASK, error_of, experiment_of
from support.training import SGD, VIT_B16, AdamW, fitted, noise, prepared
from support.weights import RESNET

import clip
from arguments import parse
from benchmarks.plain import _block as plain_block
from common import UserError
from methods import METHODS
from methods.prompts.promptsrc import TEMPLATES

STEPS = 20
WORDS = "a photo of a"
VALUES = {  # of the methods as they are trained here; 4 images in a batch: an epoch is one iteration
    "cocoop": {},
    "kgcoop": {},
    "prograd": {"n_ctx": 6},
    "maple": {"depth": 2},
    "promptsrc": {"depth": 2, "gpa_mean": 12.0, "gpa_std": 3.0},
    "mmrl": {"first_block": 2, "rep_dim": 24, "n_tokens": 3, "lr": 1e-3, "reg_weight": 2.0},
}


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def same(index, x):
    return x


def tokens_of(words, names=NAMES):
    return clip.tokenize([f"{words} {name.replace('_', ' ')}.".strip() for name in names])


def texts(model, tokens, first=None, enter=same):
    """Return the embeddings [C, E] of padded prompts, with vectors `first` in the places 1 ... of the embeddings."""
    x = model.token_embedding(tokens)
    if first is not None:
        x = torch.cat([x[:, :1], first.expand(len(x), -1, -1), x[:, 1 + len(first) :]], dim=1)
    x = x + model.positional_embedding
    for index, block in enumerate(model.transformer.resblocks):
        x = enter(index, x)
        x = plain_block(block, x, torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1))
    ends = tokens.argmax(dim=1) + x.shape[1] - tokens.shape[1]
    return model.ln_final(x[torch.arange(len(x)), ends]) @ model.text_projection


def image_tokens(model, images, last=None, enter=same):
    """Return the tokens [B, T, D] of the last block, with tokens `last` after the patches."""
    tower = model.visual
    x = tower.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1) + tower.positional_embedding
    x = x if last is None else torch.cat([x, last.expand(len(x), -1, -1)], dim=1)
    x = tower.ln_pre(x)
    for index, block in enumerate(tower.transformer.resblocks):
        x = plain_block(block, enter(index, x), None)
    return tower.ln_post(x)


def images_of(model, images, *tokens):
    return image_tokens(model, images, *tokens)[:, 0] @ model.visual.proj


def replaced(tokens, first):
    """Replace, before blocks 1, 2, ..., as many tokens from place `first` on as there are new ones."""

    def enter(index, x):
        if not 0 < index < len(tokens):
            return x
        new, place = tokens[index].expand(len(x), -1, -1), first % x.shape[1]
        return torch.cat([x[:, :place], new, x[:, place + new.shape[1] :]], dim=1)

    return enter


def kgcoop(model, p, images, labels):
    text, frozen = unit(texts(model, tokens_of(WORDS), p["vectors"])), texts(model, clip.tokenize(NAMES_AS_WORDS))
    z = 100 * unit(images_of(model, images)) @ text.T
    return F.cross_entropy(z, labels), 8 * (1 - (text * unit(frozen)).sum(1).mean())


def cocoop(model, p, images, labels):
    rows = []
    for f in unit(images_of(model, images)):
        shift = p["weight_2"] @ torch.relu(p["weight_1"] @ f + p["bias_1"]) + p["bias_2"]
        rows.append(100 * unit(texts(model, tokens_of(WORDS), p["vectors"] + shift)) @ f)
    return F.cross_entropy(torch.stack(rows), labels), 0.0


def prograd(model, p, images, labels):
    """Return the cross-entropy, and the loss whose gradient it must not work against."""
    f = unit(images_of(model, images))
    z = 100 * f @ unit(texts(model, tokens_of("x x " + WORDS), p["vectors"])).T
    teacher = (100 * f @ unit(texts(model, tokens_of(WORDS))).T).softmax(1)
    return F.cross_entropy(z, labels), -(teacher * z.log_softmax(1)).sum(1).mean()


def maple(model, p, images, labels):
    text_tokens = [p["vectors"], *p["deeper"]]
    shown = [u @ weight.T + bias for u, weight, bias in zip(text_tokens, p["weight"], p["bias"])]
    text = unit(texts(model, tokens_of(WORDS), text_tokens[0], replaced(text_tokens, 1)))
    f = unit(images_of(model, images, shown[0], replaced(shown, -2)))
    return F.cross_entropy(100 * f @ text.T, labels), 0.0


def promptsrc(model, p, images, labels):
    text = unit(texts(model, tokens_of(WORDS), p["text"][0], replaced(p["text"], 1)))
    f = unit(images_of(model, images, p["image"][0], replaced(p["image"], -4)))
    words = [[template.replace("{}", name) for name in NAMES_AS_WORDS] for template in TEMPLATES]
    frozen = unit(sum(texts(model, clip.tokenize(row)) for row in words) / 60)
    f0 = unit(images_of(model, images))
    z, q = 100 * f @ text.T, (100 * f0 @ frozen.T).log_softmax(1)
    apart = (q.exp() * (q - z.log_softmax(1))).sum() / z.numel()
    return F.cross_entropy(z, labels), 25 * (text - frozen).abs().mean() + 10 * (f - f0).abs().mean() + apart


def mmrl(model, p, images, labels):
    def enter(kind):
        def inside(index, x):
            if index < 1:
                return x
            new = p["space"] @ p[f"{kind}_weight"][index - 1].T + p[f"{kind}_bias"][index - 1]
            return torch.cat([x[:, :1], new.expand(len(x), -1, -1), x[:, 1 if index == 1 else 4 :]], dim=1)

        return inside

    prompts = clip.tokenize(NAMES_AS_WORDS)
    text, frozen = unit(texts(model, prompts, None, enter("text"))), unit(texts(model, prompts))
    x = image_tokens(model, images, None, enter("image"))
    f, second = unit(x[:, 0] @ model.visual.proj), unit(x[:, 1:4].mean(1) @ p["projection"])
    f0 = unit(images_of(model, images))
    loss = 0.7 * F.cross_entropy(100 * f @ text.T, labels) + 0.3 * F.cross_entropy(100 * second @ text.T, labels)
    return loss, 2 * (1 - (f * f0).sum(1).mean()) + 2 * (1 - (text * frozen).sum(1).mean())


NAMES_AS_WORDS = [name.replace("_", " ") for name in NAMES]  # TASK's only template is "{}"
PLAIN = {f.__name__: f for f in (cocoop, kgcoop, prograd, maple, promptsrc, mmrl)}


def gradients(method, losses, parameters):
    if method != "prograd":
        return torch.autograd.grad(sum(losses), parameters)
    (k,) = torch.autograd.grad(losses[1], parameters, retain_graph=True)
    (g,) = torch.autograd.grad(losses[0], parameters)
    unit_k = k.flatten() / k.norm()
    return [g - (g.flatten() @ unit_k) * unit_k.view_as(g) if (g * k).sum() < 0 else g]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", PLAIN)
def test_training_beside_a_plain_loop(method):
    values = {"lr": 0.05, "batch_size": 4} | VALUES[method]
    adaptation = prepared(method, total_iters=STEPS, **values)
    own = {name: p.detach().clone().requires_grad_() for name, p in adaptation.parameters.items()}
    start = {name: p.detach().clone() for name, p in own.items()}
    fit, losses, rates = fitted(adaptation), [], []
    model, parameters = clip.load("tiny")[0].double(), list(own.values())
    optimizer = AdamW(parameters, 5e-4) if method == "mmrl" else SGD(parameters, 5e-4)
    averages, weights = [torch.zeros_like(p) for p in parameters], 0.0
    for step, batch in enumerate(noise(STEPS)):
        both = PLAIN[method](model, own, *batch)
        losses.append(both[0].item())
        rates.append(1e-5 if step == 0 else values["lr"] / 2 * (1 + math.cos(math.pi * (step - 1) / STEPS)))
        optimizer.step(parameters, gradients(method, both, parameters), rates[-1])
        weight = math.exp(-0.5 * ((step + 1 - 12) / 3) ** 2)
        averages, weights = [a + weight * p.detach() for a, p in zip(averages, parameters)], weights + weight
    if method == "promptsrc":
        own = {name: average / weights for name, average in zip(own, averages)}
    assert [row["loss"] for row in fit.curve] == pytest.approx(losses, rel=1e-6)  # the loop adds up in float32
    assert [row["lr"] for row in fit.curve] == pytest.approx(rates)
    for name, p in adaptation.parameters.items():
        torch.testing.assert_close(p, own[name], rtol=1e-9, atol=1e-11)
        assert (p - start[name]).abs().max() > 1e-5, name
    assert all(p.grad is None for p in adaptation.model.parameters())


@pytest.mark.usefixtures("float64")
def test_a_gradient_loses_only_what_works_against_clip():
    adaptation = prepared("prograd", n_ctx=6, prograd_lambda=0.5, total_iters=1)
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(6, 64, generator=generator, dtype=torch.float64)
    across = torch.randn(6, 64, generator=generator, dtype=torch.float64)
    across -= (across * k).sum() / k.square().sum() * k
    for along, left in ((2.0, 2.0), (-2.0, -1.0)):
        adaptation.vectors.grad, adaptation.direction = across + along * k, 3 * k
        adaptation.project()
        torch.testing.assert_close(adaptation.vectors.grad, across + left * k)
    adaptation.vectors.grad, adaptation.direction = across.clone(), torch.zeros_like(k)
    adaptation.project()
    assert torch.equal(adaptation.vectors.grad, across)


def start_of(method, model=None, **values):
    own = VALUES[method] | values
    return {name: p.detach() for name, p in prepared(method, model=model, total_iters=4, **own).parameters.items()}


def test_starts():
    model = clip.load("tiny")[0]
    words = model.token_embedding(clip.tokenize(WORDS)[0, 1:5]).detach()
    assert torch.equal(start_of("kgcoop", model)["vectors"], words)
    assert torch.equal(start_of("prograd", model)["vectors"], torch.cat([torch.zeros(2, 64), words]))
    own = start_of("cocoop", model)
    assert torch.equal(own["vectors"], words) and own["weight_1"].shape == (4, 64) and own["weight_2"].shape == (64, 4)
    assert 0.4 < own["weight_2"].abs().max() <= 0.5 and 0.1 < own["weight_1"].abs().max() <= 1 / 8
    own = start_of("maple")
    assert torch.equal(own["vectors"], words[:2]) and own["deeper"].std().item() == pytest.approx(0.02, rel=0.1)
    assert 0.12 < own["weight"].abs().max() <= 1 / 8 and not torch.equal(own["weight"][0], own["weight"][1])
    own = start_of("promptsrc")
    assert torch.equal(own["text"][0], words)
    assert [own[name].std().item() for name in ("image",)] == pytest.approx([0.02], rel=0.1)
    own = start_of("mmrl")
    assert own["image_weight"].shape == (3, 128, 24) and own["text_weight"].shape == (1, 64, 24)
    assert torch.equal(own["image_weight"][0], own["image_weight"][2])
    assert own["projection"].std().item() == pytest.approx(128**-0.5, rel=0.05)
    for method in ("cocoop", "maple", "promptsrc", "mmrl"):  # the seed alone decides
        torch.manual_seed(1)
        first, again, other = start_of(method, seed=1), start_of(method, seed=1), start_of(method, seed=2)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)


def test_numbers_of_weights_are_the_published_ones():
    counts = {"coop": 8192, "cocoop": 35360, "kgcoop": 2048, "maple": 3555072, "promptsrc": 46080, "mmrl": 4992256}
    for method, count in counts.items():
        experiment = experiment_of(method, total_iters=4)
        with torch.device("meta"):
            model = clip.CLIP(VIT_B16)
        assert METHODS[method].prepare(dataclasses.replace(experiment, model=model)).trainable_weights == count, method


def test_published_values():
    def own(method, dataset="dtd", shots=16, *more):
        words = ["--method", method, "--dataset", dataset, "--root_path", "data", "--shots", str(shots)]
        return parse([*words, *more]).hparams

    assert (own("cocoop").batch_size, own("cocoop").epochs, own("cocoop").lr) == (1, 10, 2e-3)
    assert (own("kgcoop").batch_size, own("kgcoop").epochs, own("kgcoop").kgcoop_weight) == (128, 100, 8)
    assert [own("prograd", "oxford_pets", shots).epochs for shots in (1, 2, 4, 8)] == [50, 100, 100, 200]
    assert own("prograd", "dtd").ctx_init == "a texture of" and own("prograd", "imagenet", 4).epochs == 50
    assert own("prograd", "sun397").ctx_init == WORDS and own("prograd").n_ctx == 16
    maple = own("maple")
    assert (maple.lr, maple.batch_size, maple.epochs, maple.depth, maple.n_ctx) == (3.5e-3, 4, 50, 9, 2)
    source = own("promptsrc")
    assert (source.lr, source.batch_size, source.epochs, source.n_ctx) == (2.5e-3, 4, 50, 4)
    assert (source.gpa_mean, source.gpa_std) == (45, 5) and own("promptsrc", "food101").gpa_mean == 30
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 60 and all(line.count("{}") == 1 for line in TEMPLATES)
    weights = {"stanford_cars": 7, "fgvc": 6, "sun397": 6, "dtd": 6, "food101": 5, "oxford_flowers": 4, "ucf101": 3}
    weights |= {"imagenet": 0.5, "caltech101": 0.5, "oxford_pets": 0.2, "eurosat": 0.01}
    assert {name: own("mmrl", name).reg_weight for name in weights} == weights
    assert own("mmrl", "eurosat").rep_dim == 2048 and own("mmrl", "imagenet").epochs == 5
    assert (own("mmrl").lr, own("mmrl").batch_size, own("mmrl").epochs, own("mmrl").min_area) == (1e-3, 32, 50, 0.5)


@pytest.mark.parametrize(
    "name, dataset, expected",
    [
        ("kgcoop_released", "dtd", {"kgcoop_weight": 8, "template": ("a photo of a {}, a type of texture.",)}),
        ("kgcoop_released", "imagenet", {"epochs": 100, "prompts": "released"}),
        ("prograd_base_to_new", "oxford_pets", {"epochs": 100, "ctx_init": "a type of pet, a photo of a"}),
        ("maple_base_to_new", "dtd", {"epochs": 5, "depth": 9, "lr": 3.5e-3}),
        ("maple_cross_dataset", "imagenet", {"epochs": 2, "depth": 3, "lr": 2.6e-3}),
        ("promptsrc_base_to_new", "dtd", {"epochs": 20, "gpa_mean": 15, "gpa_std": 1}),
        ("promptsrc_cross_dataset", "imagenet", {"epochs": 20, "depth": 3, "gpa_mean": 6, "gpa_std": 10}),
        ("mmrl_released", "eurosat", {"reg_weight": 0.01, "rep_dim": 2048, "prompts": "specific"}),
        ("mmrl_common", "eurosat", {"reg_weight": 0.5, "rep_dim": 512}),
        ("mmrl_base_to_new", "dtd", {"reg_weight": 6, "epochs": 10, "batch_size": 4}),
        ("mmrl_base_to_new", "imagenet", {"epochs": 5, "batch_size": 32, "prompts": "released"}),
        ("mmrl_cross_dataset", "imagenet", {"epochs": 1, "warmup": False, "reg_weight": 0.2}),
    ],
)
def test_published_files(name, dataset, expected):
    config = parse(["--config", f"configs/prompts/{name}.yaml", "--dataset", dataset, "--root_path", "data"])
    values = vars(config.settings) | vars(config.hparams)
    assert {key: values[key] for key in expected} == expected


def test_mmrl_tells_new_classes_by_clips_own_feature(tmp_path):
    tiny, path = clip.load("tiny")[0], tmp_path / "mmrl.safetensors"
    first = prepared("mmrl", model=tiny, total_iters=4, **VALUES["mmrl"])
    first.saved.save(path, "a" * 64, {})
    generator = torch.Generator().manual_seed(0)
    f, text = torch.randn(5, 2, 64, generator=generator), torch.randn(3, 64, generator=generator)
    z, z_r = 100 * f[:, 0] @ text.T, 100 * f[:, 1] @ text.T
    for names, expected in ((NAMES, 0.7 * z + 0.3 * z_r), (("horse", "zebra", "cow"), z)):
        task = dataclasses.replace(TASK, class_names=names)
        other = prepared("mmrl", task, tiny, total_iters=4, seed=9, **VALUES["mmrl"])
        other.saved.load(path, "a" * 64)
        assert torch.equal(other.parameters["projection"], first.parameters["projection"])
        torch.testing.assert_close(other.logits(f, text), expected)
    elsewhere = prepared("mmrl", model=tiny, total_iters=4, eval_datasets="imagenet_v2", **VALUES["mmrl"])
    assert not elsewhere.fuses


@pytest.mark.parametrize("method", ["maple", "promptsrc", "mmrl"])
def test_towers_without_places_for_tokens_are_rejected(method):
    assert "vision transformer" in error_of(UserError, prepared, method, model=clip.CLIP(RESNET), total_iters=4)
    flag = {"mmrl": "first_block"}.get(method, "depth")
    assert f"--{flag} 3" in error_of(UserError, prepared, method, total_iters=4, **{flag: 3})


def test_impossible_words_are_rejected():
    for method, values in (
        ("prograd", {"n_ctx": 3}),
        ("maple", {"n_ctx": 5, "depth": 1}),
        ("kgcoop", {"ctx_init": " "}),
        ("prograd", {"ctx_init": "a photo of a {}"}),
    ):
        assert "--ctx_init" in error_of(UserError, prepared, method, total_iters=4, **values)
    task = dataclasses.replace(TASK, class_names=("dog " * 80, "cat", "cow"))
    assert "shorten the class name" in error_of(UserError, prepared, "maple", task, total_iters=4, depth=2)
    assert "--epochs" in error_of(UserError, prepared, "promptsrc", total_iters=5, batch_size=2, **VALUES["promptsrc"])
    assert {"cocoop", "kgcoop", "prograd", "maple", "promptsrc", "mmrl"} <= METHODS.keys()
