"""LoRA on packed attention projections: beside its definition and an implementation without packing; whole runs."""

import copy
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import clip
import datasets
import train
import utils
from benchmarks.step import ARCHITECTURES
from clip.layouts import PackedPrompts
from clip.weights import save_weights
from methods import METHODS
from methods.adapters import SeededDropout
from methods.lora import Branches, LoRA
from run_utils import Settings, UserError, parse

QUICK = ("--method", "lora", "--shots", 2, "--total_iters", 6, "--workers", 0, "--lr", "1e-2", "--alpha", 4)
NAMES = ("cat", "dog", "traffic_light")
TASK = datasets.Task("noise", NAMES, ("a {}.",), tuple(datasets.Item(str(i), i % 3) for i in range(4)), (), (), None)
FILE = Path("saved/tiny/digits/2shots/seed3/lora.safetensors")


def settings_of(**options):
    defaults = {"method": "lora", "backbone": "tiny", "device": "cpu", "workers": 0, "dropout": 0.0}
    return Settings(**defaults | options)


def prepared(model=None, **options):
    """LoRA on the tiny CLIP in float64, so that two ways to one number differ by next to nothing."""
    model = clip.load("tiny")[0].double() if model is None else model
    return METHODS["lora"].prepare(model, TASK, settings_of(**options))


def fill(adaptation):
    """Matrices as after some training: none is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adaptation.parameters.values():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return adaptation


def images_of(count=2, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(model):
    return model.encode_image(images_of()), model.encode_text(clip.tokenize(["a cat.", "a small dog.", "a"]))


# --- the definition


@pytest.mark.parametrize(
    "options, tensors, weights",
    [
        ({}, 36, 3 * 2 * (4 * 256 + 2 * 128)),
        ({"encoder": "text", "rank": 5}, 12, 2 * 3 * 5 * 128),
        ({"encoder": "vision", "position": "top1", "lora_on": "q,v,o", "rank": 1}, 6, 3 * 256),
        ({"lora_on": "o", "position": "half-up"}, 6, 2 * (2 * 256 + 128)),
    ],
)
def test_what_is_trained(options, tensors, weights):
    adaptation = prepared(**options)
    assert (len(adaptation.parameters), adaptation.trainable_weights) == (tensors, weights)
    assert not any(p.requires_grad for p in adaptation.model.parameters())
    encoder = options.get("encoder", "both")
    assert (adaptation.trains_images, adaptation.trains_text) == (encoder != "text", encoder != "vision")
    (group,) = adaptation.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in adaptation.parameters.values()]
    assert isinstance(adaptation.optimizer, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"], group["betas"]) == (2e-4, 1e-2, (0.9, 0.999))


def test_vit_b16_as_published():
    with torch.device("meta"):
        model = clip.CLIP(ARCHITECTURES["ViT-B/16"])
    adaptation = METHODS["lora"].prepare(model.to_empty(device="cpu"), TASK, settings_of(dropout=0.25))
    assert (len(adaptation.parameters), adaptation.trainable_weights) == (144, 184_320)


def test_published_defaults():
    settings = parse(["--method", "lora", "--dataset", "dtd", "--root_path", "data", "--shots", "4"])
    config = Path(__file__).parent.parent / "configs" / "clip_lora.yaml"
    assert parse(["--config", str(config), "--dataset", "dtd", "--root_path", "data", "--shots", "4"]) == settings
    assert (settings.rank, settings.alpha, settings.dropout, settings.lora_on) == (2, 1, 0.25, "q,k,v")
    assert (settings.lr, settings.iterations, settings.early_stop_loss, settings.batch_size) == (2e-4, 2000, 0, 32)


def test_matrices_start_as_published_and_from_the_seed_alone():
    torch.manual_seed(1)
    first = prepared(rank=4).parameters
    torch.manual_seed(2)
    again, other = prepared(rank=4).parameters, prepared(rank=4, seed=4).parameters
    for name, p in first.items():
        assert torch.equal(p, again[name])
        if name.endswith("lora_B"):
            assert not p.any()
        else:
            width = p.shape[1]
            assert p.shape == (4, width) and not torch.equal(p, other[name])
            # Kaiming with a = sqrt(5): uniform within gain sqrt(3 / fan_in) = 1 / sqrt(width)
            assert 0.95 < p.abs().max() * math.sqrt(width) <= 1
            assert p.std().item() * math.sqrt(3 * width) == pytest.approx(1, abs=0.15)
    matrices = [p for name, p in first.items() if name.endswith("lora_A")]
    assert len({p[0, 0].item() for p in matrices}) == len(matrices), "two branches start alike"


def test_at_the_start_it_is_the_plain_model():
    plain = [f.detach() for f in features(clip.load("tiny")[0].double())]
    adaptation = prepared(dropout=0.25)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(features(adaptation.model), plain))
    assert adaptation.changed_weights() == 0


def test_a_weight_becomes_w_plus_scaled_b_a():
    model = clip.load("tiny")[0].double()
    base = copy.deepcopy(model.state_dict())
    adaptation = fill(prepared(model, rank=4, alpha=3.0, lora_on="q,v,o"))
    matrices = {name: p.detach().clone() for name, p in adaptation.parameters.items()}
    merged = adaptation.merge().state_dict()
    assert merged.keys() == base.keys()
    changed = set()
    for name, weight in base.items():
        expected = weight.clone()
        prefix = name.removesuffix(".in_proj_weight").removesuffix(".out_proj.weight")
        if name.endswith(".in_proj_weight"):
            D = weight.shape[1]
            for part, start in (("q", 0), ("v", 2 * D)):  # and k, the rows between, stays as it was
                A, B = matrices[f"{prefix}.{part}.lora_A"], matrices[f"{prefix}.{part}.lora_B"]
                expected[start : start + D] += 3 / math.sqrt(4) * B @ A
        elif name.endswith(".attn.out_proj.weight"):
            expected += 1.5 * matrices[f"{prefix}.o.lora_B"] @ matrices[f"{prefix}.o.lora_A"]
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-14)
        changed |= set() if torch.equal(merged[name], weight) else {name}
    assert len(changed) == 12


@pytest.mark.parametrize("lora_on", ["q,k,v", "q", "k", "v", "o", "k,o", "q,v"])
def test_merged_equals_unmerged(lora_on):
    adaptation = fill(prepared(lora_on=lora_on))
    training = [f.detach() for f in features(adaptation.model)]  # branches beside the weights
    with torch.no_grad():
        evaluation = features(adaptation.model)
    changed = adaptation.changed_weights()
    merged = adaptation.merge()
    with torch.no_grad():
        plain = features(merged)
    assert not any("forward" in vars(module) for module in merged.modules())
    before = clip.load("tiny")[0].double().state_dict()
    assert changed == sum(int((t != before[name]).sum()) for name, t in merged.state_dict().items()) > 0
    for a, b, c, d in zip(training, evaluation, plain, features(clip.load("tiny")[0].double())):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)
        assert torch.equal(b, c) and not torch.allclose(c, d, atol=1e-3)


@pytest.mark.parametrize("encoder, position, lora_on", [("text", "top1", "q,v"), ("vision", "half-bottom", "k,o")])
def test_only_the_chosen_parts_move(encoder, position, lora_on):
    adaptation = prepared(encoder=encoder, position=position, lora_on=lora_on, total_iters=2, lr=1e-2)
    batches = [(images_of(3, seed), torch.arange(3)) for seed in range(2)]
    train.fit(adaptation.model, TASK, adaptation, batches, settings_of(total_iters=2), None)
    before = clip.load("tiny")[0].double().state_dict()
    rows = {}
    for name, weight in adaptation.merge().state_dict().items():
        moved = (weight != before[name]).reshape(len(weight), -1).any(dim=1) if weight.dim() else weight != before[name]
        if moved.any():
            rows[name] = moved.nonzero().view(-1).tolist()
    if encoder == "text":
        assert rows == {"transformer.resblocks.1.attn.in_proj_weight": [*range(64), *range(128, 192)]}
    else:
        attention = [f"visual.transformer.resblocks.{block}.attn" for block in (0, 1)]
        expected = {f"{name}.in_proj_weight": list(range(128, 256)) for name in attention}
        assert rows == expected | {f"{name}.out_proj.weight": list(range(128)) for name in attention}


# --- dropout


def test_dropout_is_on_the_input_of_each_branch_alone():
    """A and B that hand the first inputs on to the first outputs show what each branch was given."""
    torch.manual_seed(0)
    layer, p, r, s = nn.Linear(8, 24), 0.25, 8, 0.5
    dropout = SeededDropout(p, torch.Generator().manual_seed(1))
    branches = Branches(layer, "qkv", "qk", r, s, dropout)
    with torch.no_grad():
        for part in "qk":
            branches.A[part].copy_(torch.eye(8))
            branches.B[part].copy_(torch.eye(8))
    x = torch.randn(4000, 8)
    y = (branches.forward(x) - layer(x)).detach()
    q, k, v = (y / s).chunk(3, dim=-1)
    assert not v.any()
    for branch in (q, k):
        kept = branch.abs() > 1e-4
        torch.testing.assert_close(branch[kept], (x / (1 - p))[kept], rtol=1e-3, atol=1e-3)
        assert kept.float().mean() == pytest.approx(1 - p, abs=0.01)
    assert ((q.abs() > 1e-4) != (k.abs() > 1e-4)).float().mean() == pytest.approx(2 * p * (1 - p), abs=0.02)
    assert not torch.equal(branches.forward(x), branches.forward(x))
    with torch.no_grad():
        torch.testing.assert_close(branches.forward(x), layer(x) + s * torch.cat([x, x, 0 * x], -1))


@pytest.mark.parametrize("dropout, prefix", [(0.0, 2), (0.25, 0)])
def test_with_dropout_each_prompt_has_a_beginning_of_its_own(monkeypatch, dropout, prefix):
    seen = []

    def packed(*args):
        seen.append(PackedPrompts(*args))
        return seen[-1]

    monkeypatch.setattr(train, "PackedPrompts", packed)
    adaptation = prepared(dropout=dropout, total_iters=1)
    train.fit(adaptation.model, TASK, adaptation, [(images_of(3), torch.arange(3))], settings_of(total_iters=1), None)
    assert [prompts.prefix for prompts in seen] == [prefix]


def test_prompts_without_a_shared_beginning():
    model, tokens = clip.load("tiny")[0].double(), clip.tokenize(["a photo of a cat", "a photo of", "a"])
    apart = PackedPrompts(tokens, share_prefix=False)
    assert apart.prefix == 0 and len(apart.ids) == 7 + 5 + 3
    torch.testing.assert_close(model.encode_text(apart), model.encode_text(tokens), rtol=1e-9, atol=1e-11)


# --- an implementation without packing


class PlainLoRA:
    """CLIP with separate projections and LoRA on them, each written out; prompts padded, every token computed."""

    def __init__(self, model, matrices, scaling):
        self.w = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self.matrices = {name: p.detach().clone().requires_grad_() for name, p in matrices.items()}
        self.scaling = scaling

    def project(self, name, part, x, weight, bias):
        y = x @ weight.T + bias
        if f"{name}.{part}.lora_A" in self.matrices:
            y = (
                y
                + self.scaling
                * (x @ self.matrices[f"{name}.{part}.lora_A"].T)
                @ self.matrices[f"{name}.{part}.lora_B"].T
            )
        return y

    def tower(self, x, prefix, blocks, causal):
        D, w = x.shape[-1], self.w
        for i in range(blocks):
            name = f"{prefix}resblocks.{i}"
            h = F.layer_norm(x, (D,), w[f"{name}.ln_1.weight"], w[f"{name}.ln_1.bias"])
            weights, biases = w[f"{name}.attn.in_proj_weight"], w[f"{name}.attn.in_proj_bias"]
            q, k, v = (
                self.project(f"{name}.attn", part, h, weights[j * D : (j + 1) * D], biases[j * D : (j + 1) * D])
                .unflatten(-1, (-1, 64))
                .transpose(1, 2)
                for j, part in enumerate("qkv")
            )
            scores = q @ k.transpose(-1, -2) / 8
            if causal:
                scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
            h = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            o = w[f"{name}.attn.out_proj.weight"], w[f"{name}.attn.out_proj.bias"]
            x = x + self.project(f"{name}.attn", "o", h, *o)
            h = F.layer_norm(x, (D,), w[f"{name}.ln_2.weight"], w[f"{name}.ln_2.bias"])
            h = h @ w[f"{name}.mlp.c_fc.weight"].T + w[f"{name}.mlp.c_fc.bias"]
            h = h * torch.sigmoid(1.702 * h)
            x = x + h @ w[f"{name}.mlp.c_proj.weight"].T + w[f"{name}.mlp.c_proj.bias"]
        return x

    def image(self, images):
        w = self.w
        x = F.conv2d(images, w["visual.conv1.weight"], stride=w["visual.conv1.weight"].shape[-1]).flatten(2).mT
        x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + w["visual.positional_embedding"]
        x = F.layer_norm(x, x.shape[-1:], w["visual.ln_pre.weight"], w["visual.ln_pre.bias"])
        x = self.tower(x, "visual.transformer.", 4, causal=False)[:, 0]
        x = F.layer_norm(x, x.shape[-1:], w["visual.ln_post.weight"], w["visual.ln_post.bias"])
        return F.normalize((x @ w["visual.proj"]).float(), dim=-1)  # as the harness

    def text(self, tokens):
        w = self.w
        x = self.tower(w["token_embedding.weight"][tokens] + w["positional_embedding"], "transformer.", 2, causal=True)
        x = x[torch.arange(len(x)), tokens.argmax(-1)]
        x = F.layer_norm(x, x.shape[-1:], w["ln_final.weight"], w["ln_final.bias"])
        return F.normalize((x @ w["text_projection"]).float(), dim=-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_on": "q,v,o", "rank": 3, "alpha": 2.0, "position": "half-up"},
        {"encoder": "text", "lora_on": "k"},
    ],
)
def test_ten_steps_in_lockstep_with_plain_projections(options):
    options = {"lr": 1e-2, "total_iters": 10, "batch_size": 3} | options
    adaptation = prepared(**options)
    rank, alpha = options.get("rank", 2), options.get("alpha", 1.0)
    plain = PlainLoRA(adaptation.model, adaptation.parameters, alpha / math.sqrt(rank))
    optimizer = torch.optim.AdamW(plain.matrices.values(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)
    tokens = clip.tokenize([f"a {name.replace('_', ' ')}." for name in NAMES])
    batches = [(images_of(3, seed), torch.tensor([0, 1, 2]).roll(seed)) for seed in range(10)]
    losses = []
    for step, (images, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-6 + (1e-2 - 1e-6) * (1 + math.cos(math.pi * step / 10)) / 2
        loss = F.cross_entropy(100 * plain.image(images) @ plain.text(tokens).T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    fit = train.fit(adaptation.model, TASK, adaptation, batches, settings_of(early_stop_loss=0.0, **options), None)
    measured = [row["loss"] for row in fit.curve]
    means = [sum(losses[i : i + 2]) / 2 for i in range(0, 10, 2)]  # four images, so an epoch is two steps
    assert measured == pytest.approx(means, rel=1e-5) and len(set(measured)) == 5
    for name, p in adaptation.parameters.items():
        torch.testing.assert_close(p, plain.matrices[name], rtol=0, atol=1e-6)  # where a step is 1e-2
        assert p.abs().max() > 1e-3


# --- whole runs


def test_saved_matrices_evaluate_to_the_same_accuracy(run_main):
    flags = (*QUICK, "--save_path", "saved", "--lora_on", "v, q", "--rank", 3, "--lr", 0.03)
    _, trained, out, _ = run_main(*flags)
    assert "trains 24 tensors, 7,680 weights" in out and (trained["lora_on"], trained["rank"]) == ("q,v", 3)
    assert FILE.stat().st_size == trained["checkpoint_bytes"] < 50_000
    assert trained["trainable_weights"] == 7680 and trained["test_accuracy"] != trained["zero_shot_accuracy"]
    assert trained["changed_weights"] == pytest.approx(2 * (4 * 128**2 + 2 * 64**2), rel=1e-3)
    with safetensors.safe_open(FILE, "pt") as file:
        assert file.metadata()["base_sha256"] == trained["weights_sha256"]
        assert json.loads(file.metadata()["settings"])["rank"] == 3
    _, evaluated, _, _ = run_main(*QUICK, "--save_path", "saved", "--eval_only")  # settings come from the file
    for name in ("test_accuracy", "changed_weights", "trainable_weights", "rank", "lora_on", "alpha"):
        assert evaluated[name] == trained[name], name
    assert evaluated["iterations"] == 0
    assert "already done" in run_main(*QUICK, "--save_path", "saved", "--lora_on", "q,v", "--rank", 3, "--lr", 0.03)[2]


def test_a_merged_file_is_a_plain_clip(run_main):
    run_main(*QUICK, "--save_path", "saved", "--lora_on", "q,k,v,o")
    model, _ = clip.load("tiny")
    assert LoRA.merge_file(model, FILE) is model
    save_weights(model, "merged.safetensors")
    plain, _ = clip.load("merged.safetensors")
    adapted = METHODS["lora"].prepare(clip.load("tiny")[0], TASK, settings_of(alpha=4.0, lora_on="q,k,v,o"))
    adapted.load(FILE, clip.weights_sha256(clip.load("tiny")[0]))
    expected = _float_features(adapted.model)
    for m in (plain, model):
        assert all(torch.equal(a, b) for a, b in zip(_float_features(m), expected))
    base = _float_features(clip.load("tiny")[0])
    assert not torch.allclose(base[0], _float_features(plain)[0], atol=1e-3)


@torch.no_grad()
def _float_features(model):
    return model.encode_image(images_of().float()), model.encode_text(clip.tokenize(["a cat.", "a small dog."]))


def refused(call, *words):
    code, record, _, err = call
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and record is None and len(lines) == 1 and "Traceback" not in err
    assert all(word in lines[0] for word in words), lines[0]


def test_matrices_of_other_weights_and_damaged_ones_are_refused(run_main):
    flags = (*QUICK, "--save_path", "saved", "--eval_only")
    run_main(*QUICK, "--save_path", "saved")
    other, _ = clip.load("tiny")
    with torch.no_grad():
        other.logit_scale += 1
    save_weights(other, "tiny.safetensors")
    refused(run_main(*flags, "--backbone", "tiny.safetensors"), "other base weights")
    before = clip.weights_sha256(other)
    with pytest.raises(clip.WeightsError, match="other base weights"):
        LoRA.merge_file(other, FILE)
    assert clip.weights_sha256(other) == before and all(p.requires_grad for p in other.parameters())
    content = FILE.read_bytes()
    FILE.write_bytes(content[: len(content) // 2])
    refused(run_main(*flags), "lora.safetensors")
    FILE.write_bytes(content)
    with safetensors.safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    for tensors in (
        dict(list(load_file(FILE).items())[1:]),
        load_file(FILE) | {"more": torch.zeros(1)},
        {name: t[..., :-1] for name, t in load_file(FILE).items()},
        {name: t.half() for name, t in load_file(FILE).items()},
    ):
        save_file({name: t.contiguous() for name, t in tensors.items()}, FILE, metadata)
        refused(run_main(*flags), "lora.safetensors", "does not fit")
        model, _ = clip.load("tiny")
        before = clip.weights_sha256(model)
        with pytest.raises(clip.WeightsError, match="does not fit"):
            LoRA.merge_file(model, FILE)
        assert clip.weights_sha256(model) == before and not any("forward" in vars(m) for m in model.modules())
        FILE.write_bytes(content)
    save_file(load_file(FILE), FILE, metadata | {"format": "clip-sparse-delta-1"})
    refused(run_main(*flags), "clip-lora-1")


def losses(record):
    return pd.read_csv(Path("results") / record["run_id"] / "curve.csv")[["iteration", "loss", "train_accuracy", "lr"]]


def test_dropout_is_repeatable_whatever_happens_beside_it(run_main, tmp_path):
    flags = (*QUICK, "--dropout", "0.5")
    _, first, _, _ = run_main(*flags)
    expected = losses(first)
    _, curved, _, _ = run_main(*flags, "--eval_every", 2)
    assert losses(curved).equals(expected) and curved["test_accuracy"] == first["test_accuracy"]
    _, again, _, _ = run_main(*flags, "--force", "--workers", 2, "--cache_dir", tmp_path / "fresh")
    assert again["run_id"] == first["run_id"] and losses(again).equals(expected)
    _, other, _, _ = run_main(*flags, "--dropout", "0")
    assert not losses(other).equals(expected)


def test_bf16_learns_too(run_main):
    _, fp32, _, _ = run_main(*QUICK)
    _, bf16, _, _ = run_main(*QUICK, "--precision", "bf16")
    assert bf16["final_loss"] != fp32["final_loss"] == pytest.approx(bf16["final_loss"], rel=0.1)
    assert bf16["final_loss"] < losses(bf16).loss[0]


def test_bf16_evaluation_has_the_merged_weights():
    adaptation = fill(METHODS["lora"].prepare(clip.load("tiny")[0], TASK, settings_of()))
    with utils.autocast(torch.device("cpu"), "bf16"):
        before = _float_features(adaptation.model)
    adaptation.merge()
    with utils.autocast(torch.device("cpu"), "bf16"):
        after = _float_features(adaptation.model)
    assert all(torch.equal(a, b) for a, b in zip(before, after)) and before[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name, value", [("rank", 3), ("alpha", 2.0), ("dropout", 0.1), ("lora_on", "q,v")])
def test_settings_are_part_of_the_run(name, value):
    base, other = settings_of(), settings_of(**{name: value})
    assert base.run_id != other.run_id and base.hyperparameters[name] != other.hyperparameters[name] == value
    assert settings_of(method="so").run_id == settings_of(method="so", **{name: value}).run_id
    assert settings_of(density_ratio=0.5, t=9, merge_every=3).run_id == base.run_id


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rank", "0"], "--rank must be at least 1"),
        (["--alpha", "0"], "--alpha must be positive"),
        (["--alpha", "inf"], "--alpha must be positive"),
        (["--dropout", "1"], r"--dropout must be in \[0, 1\)"),
        (["--dropout", "nan"], "--dropout must be in"),
        (["--lora_on", "q,k,x"], "--lora_on must name some of q,k,v,o"),
        (["--lora_on", "q,q"], "--lora_on"),
        (["--lora_on", ""], "--lora_on"),
        (["--merge_every", "0"], "--merge_every must be at least 1"),
    ],
)
def test_settings_that_cannot_work(flags, words):
    with pytest.raises(UserError, match=words):
        parse(["--method", "lora", *flags])
