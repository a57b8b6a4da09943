"""ReLoRA: what a restart keeps, what it begins anew, and whole runs."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import clip
import datasets
import train
from clip.delta import apply_delta
from methods import METHODS
from run_utils import Settings, parse
from utils import cosine_logits, encode_image, encode_text

NAMES = ("cat", "dog", "traffic_light")
TASK = datasets.Task("noise", NAMES, ("a {}.",), tuple(datasets.Item(str(i), i % 3) for i in range(3)), (), (), None)
QUICK = ("--method", "relora", "--shots", 2, "--total_iters", 7, "--merge_every", 3, "--workers", 0, "--lr", "1e-2")
QUICK = (*QUICK, "--alpha", 4)


def settings_of(**options):
    defaults = {"method": "relora", "backbone": "tiny", "device": "cpu", "workers": 0, "dropout": 0.0, "lr": 1e-2}
    return Settings(**defaults | options)


def prepared(**options):
    return METHODS[options.get("method", "relora")].prepare(clip.load("tiny")[0].double(), TASK, settings_of(**options))


def batches_of(count):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 3, 32, 32, generator=generator).double(), torch.arange(3)) for _ in range(count)]


def fitted(adaptation, **options):
    batches = batches_of(options["total_iters"])
    return train.fit(adaptation.model, TASK, adaptation, batches, settings_of(early_stop_loss=0.0, **options), None)


@torch.no_grad()
def features(model):
    images = batches_of(1)[0][0].to(model.logit_scale.dtype)
    return model.encode_image(images), model.encode_text(clip.tokenize(["a cat.", "a small dog."]))


def test_a_restart_changes_the_matrices_and_not_the_outputs():
    adaptation = prepared(total_iters=20, merge_every=10)
    fitted(adaptation, total_iters=9, merge_every=10)  # up to the restart
    assert len(adaptation.optimizer.state) == 36
    outputs, matrices = features(adaptation.model), {n: p.detach().clone() for n, p in adaptation.parameters.items()}
    weights = {name: t.clone() for name, t in adaptation.model.state_dict().items()}
    for iteration in (9, 11, 20):  # not when it is due
        adaptation.after_step(iteration)
    assert all(torch.equal(p, matrices[name]) for name, p in adaptation.parameters.items())
    adaptation.after_step(10)
    adaptation._fold()  # has nothing left to do
    for a, b in zip(features(adaptation.model), outputs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not adaptation.optimizer.state
    for name, p in adaptation.parameters.items():
        assert matrices[name].any()
        if name.endswith("lora_B"):
            assert not p.any()
        else:
            assert 0 < p.abs().max() * math.sqrt(p.shape[1]) <= 1
            assert torch.isclose(p, matrices[name]).float().mean() < 0.05
    state = adaptation.model.state_dict()
    changed = {name for name, t in state.items() if not torch.equal(t, weights[name])}
    assert changed == {name for name in state if name.endswith("in_proj_weight")}
    name = "visual.transformer.resblocks.3.attn"
    A, B = matrices[f"{name}.v.lora_A"], matrices[f"{name}.v.lora_B"]
    expected = weights[f"{name}.in_proj_weight"][256:] + B @ A / math.sqrt(2)
    torch.testing.assert_close(state[f"{name}.in_proj_weight"][256:], expected, rtol=0, atol=1e-14)


def test_counting_and_saving_do_not_disturb(tmp_path):
    options = dict(total_iters=3, merge_every=2)
    adaptation = METHODS["relora"].prepare(clip.load("tiny")[0], TASK, settings_of(**options))
    batches = [(images.float(), labels) for images, labels in batches_of(3)]
    train.fit(adaptation.model, TASK, adaptation, batches, settings_of(early_stop_loss=0.0, **options), None)
    outputs, states = features(adaptation.model), len(adaptation.optimizer.state)
    changed = adaptation.changed_weights()
    adaptation.save(tmp_path / "relora.safetensors", "0" * 64, {})
    assert changed == adaptation.changed_weights() > 200_000 and states == len(adaptation.optimizer.state) > 0
    assert all(torch.equal(a, b) for a, b in zip(features(adaptation.model), outputs))


@pytest.mark.parametrize("merge_every, rank", [(2, 4), (4, 2), (8, 1)])
def test_updates_of_low_rank_add_up_to_a_higher_one(merge_every, rank):
    options = dict(total_iters=8, merge_every=merge_every, rank=1)
    adaptation = prepared(**options)
    before = {name: t.clone() for name, t in adaptation.model.state_dict().items()}
    fitted(adaptation, **options)
    adaptation._fold()
    name = "visual.transformer.resblocks.1.attn.in_proj_weight"
    change = adaptation.model.state_dict()[name] - before[name]
    for part in change.chunk(3):
        values = torch.linalg.svdvals(part)
        assert int((values > 1e-10 * values[0]).sum()) == rank


def test_without_a_restart_it_is_lora():
    relora, lora = prepared(total_iters=4, merge_every=4), prepared(method="lora", total_iters=4)
    fits = [fitted(adaptation, total_iters=4, merge_every=4) for adaptation in (relora, lora)]
    assert [row["loss"] for row in fits[0].curve] == pytest.approx([row["loss"] for row in fits[1].curve], rel=1e-9)
    for name, p in lora.parameters.items():
        torch.testing.assert_close(relora.parameters[name], p, rtol=1e-9, atol=1e-9)


def test_the_learning_rate_climbs_back_to_the_cosine():
    fit = fitted(adaptation := prepared(total_iters=60, merge_every=25), total_iters=60, merge_every=25)
    assert adaptation.optimizer.param_groups[0]["lr"] == pytest.approx(1e-6 * 11 / 3 / (11 / 3), rel=1e-6)
    ramp = {25: 1 / 3, 26: 2 / 3, 50: 1 / 3, 51: 2 / 3}  # ceil(25 / 10) = 3 iterations, the last at full rate
    for iteration, row in enumerate(fit.curve):
        cosine = 1e-6 + (1e-2 - 1e-6) * (1 + math.cos(math.pi * iteration / 60)) / 2
        assert row["lr"] == pytest.approx(cosine * ramp.get(iteration, 1), rel=1e-9)


def test_ten_steps_are_those_of_lora_and_adamw_between_restarts():
    """Each cycle by hand: LoRA on the weights as they are, with a new AdamW and the same matrices to start from."""
    relora = prepared(total_iters=10, merge_every=4)
    schedule = [METHODS["relora"].jagged_cosine(1e-2, 10, 4)(step) * 1e-2 for step in range(10)]
    weights = relora.model.state_dict()
    starts, restart = [], relora.after_step

    def spied(iteration):
        restart(iteration)
        if iteration in (4, 8):
            starts.append({name: p.detach().clone() for name, p in relora.parameters.items()})

    starts.append({name: p.detach().clone() for name, p in relora.parameters.items()})
    relora.after_step = spied
    model = clip.load("tiny")[0].double()
    batches, tokens = batches_of(10), clip.tokenize([f"a {name.replace('_', ' ')}." for name in NAMES])
    train.fit(relora.model, TASK, relora, batches, settings_of(total_iters=10, early_stop_loss=0.0), None)
    for cycle, start in enumerate(starts):
        lora = METHODS["lora"].prepare(model, TASK, settings_of(method="lora"))
        with torch.no_grad():
            for name, p in lora.parameters.items():
                p.copy_(start[name])
        optimizer = torch.optim.AdamW(lora.parameters.values(), weight_decay=0.01)
        for step in range(4 * cycle, min(4 * cycle + 4, 10)):
            optimizer.param_groups[0]["lr"] = schedule[step]
            images, labels = batches[step]
            loss = F.cross_entropy(cosine_logits(encode_image(model, images), encode_text(model, tokens)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        lora.merge()
    relora._fold()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)


def test_a_run_is_saved_as_a_delta_and_evaluates_to_the_same(run_main):
    flags = (*QUICK, "--save_path", "saved", "--dropout", "0.3")
    _, trained, out, _ = run_main(*flags)
    assert "trains 36 tensors, 7,680 weights" in out and trained["merge_every"] == 3
    assert trained["test_accuracy"] != trained["zero_shot_accuracy"]
    _, evaluated, _, _ = run_main(*flags, "--eval_only", "--merge_every", 1)
    for name in ("test_accuracy", "changed_weights", "merge_every"):
        assert evaluated[name] == trained[name]
    model, _ = clip.load("tiny")
    base = {name: t.clone() for name, t in model.state_dict().items()}
    apply_delta(model, Path("saved/tiny/digits/2shots/seed3/relora.safetensors"), trained["weights_sha256"])
    differing = {name: int((t != base[name]).sum()) for name, t in model.state_dict().items()}
    assert sum(differing.values()) == pytest.approx(trained["changed_weights"], abs=2)  # a zero may change its sign
    assert {name for name, count in differing.items() if count} == {n for n in base if n.endswith("in_proj_weight")}


def test_the_same_run_gives_the_same_curve(run_main):
    curves = []
    for extra in (("--results_dir", "a"), ("--results_dir", "b", "--eval_every", 3)):
        _, record, _, _ = run_main(*QUICK, "--dropout", "0.3", *extra)
        curves.append(pd.read_csv(Path(extra[1]) / record["run_id"] / "curve.csv")[["loss", "lr"]])
    assert curves[0].equals(curves[1])


def test_settings():
    data = ["--dataset", "dtd", "--root_path", "data", "--shots", "4"]
    relora, lora = parse(["--method", "relora", *data]), parse(["--method", "lora", *data])
    assert relora.hyperparameters == {**lora.hyperparameters, "merge_every": 125} and relora.iterations == 2000
    assert settings_of().run_id != settings_of(merge_every=7).run_id
