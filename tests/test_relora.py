"""ReLoRA: what a restart keeps, what it begins again, its schedule, and its cycles beside plain LoRA."""

import math

import pytest
import torch
from support.training import cosine, features, fitted, noise, plain_loss, prepared

import clip
from arguments import parse
from clip.delta import difference
from methods.adapters.relora import jagged_cosine


def relora(method="relora", **options):
    return prepared(method, **{"dropout": 0.0, "lr": 1e-2} | options)


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_a_restart_changes_the_matrices_and_not_the_outputs():
    adaptation = relora(total_iters=20, merge_every=10)
    fitted(adaptation, noise(9))  # up to the restart, and finished
    finished = copies(adaptation.parameters)
    assert all(p.any() != name.endswith("lora_B") for name, p in finished.items())
    with torch.no_grad():
        for p in adaptation.parameters.values():
            p.add_(0.05)  # something to merge
    matrices, weights = copies(adaptation.parameters), copies(adaptation.model.state_dict())
    with torch.no_grad():
        outputs = features(adaptation.model)
    for iteration in (9, 11, 20):  # not when it is due
        adaptation.after_step(iteration)
    assert len(adaptation.optimizer.state) == 36
    assert all(torch.equal(p, matrices[name]) for name, p in adaptation.parameters.items())
    adaptation.after_step(10)
    with torch.no_grad():
        for a, b in zip(features(adaptation.model), outputs):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not adaptation.optimizer.state
    for name, p in adaptation.parameters.items():
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


@pytest.mark.parametrize("merge_every, rank", [(2, 4), (4, 2), (8, 1)])
def test_updates_of_low_rank_add_up_to_a_higher_one(merge_every, rank):
    adaptation = relora(total_iters=8, merge_every=merge_every, rank=1, position="top1")
    name = "transformer.resblocks.1.attn.in_proj_weight"
    before = adaptation.model.state_dict()[name].clone()
    fitted(adaptation)
    for part in (adaptation.model.state_dict()[name] - before).chunk(3):
        values = torch.linalg.svdvals(part)
        assert int((values > 1e-10 * values[0]).sum()) == rank


def test_what_is_saved_are_the_weights_that_changed():
    base, adaptation = clip.load("tiny")[0], relora(model=clip.load("tiny")[0], total_iters=3, merge_every=2)
    fitted(adaptation)
    found, expected = adaptation.saved.state_dict(), difference(base.state_dict(), adaptation.model)
    assert found.keys() == expected.keys() == {name for name in base.state_dict() if name.endswith("in_proj_weight")}
    assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], expected[name]))
    assert adaptation.saved.changed_weights() > 200_000


def test_the_learning_rate_climbs_back_to_the_cosine():
    factor = jagged_cosine(1e-2, 60, 25)
    ramp = {25: 1 / 3, 26: 2 / 3, 50: 1 / 3, 51: 2 / 3}  # ceil(25 / 10) = 3 iterations, the last at full rate
    for iteration in range(61):
        expected = cosine(1e-2, iteration, 60) * ramp.get(iteration, 1)
        assert 1e-2 * factor(iteration) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("merge_every", [4, 10])
def test_ten_steps_are_those_of_lora_and_adamw_between_restarts(merge_every):
    """Each cycle by hand: LoRA on the weights as they are, with a new AdamW and the same matrices to start from."""
    adaptation = relora(total_iters=10, merge_every=merge_every)
    starts, restart = [copies(adaptation.parameters)], adaptation.after_step

    def spied(iteration):
        restart(iteration)
        if iteration % merge_every == 0 and iteration < 10:
            starts.append(copies(adaptation.parameters))

    adaptation.after_step = spied
    rates = [row["lr"] for row in fitted(adaptation).curve]
    factor = jagged_cosine(1e-2, 10, merge_every)
    assert rates == pytest.approx([1e-2 * factor(step) for step in range(10)])
    model, batches = clip.load("tiny")[0].double(), noise(10)
    for cycle, start in enumerate(starts):
        lora = relora("lora", model=model)
        with torch.no_grad():
            for name, p in lora.parameters.items():
                p.copy_(start[name])
        optimizer = torch.optim.AdamW(lora.parameters.values(), weight_decay=0.01)
        for step in range(merge_every * cycle, min(merge_every * (cycle + 1), 10)):
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
            plain_loss(model, *batches[step]).backward()
            optimizer.step()
        lora.merge()
    weights = adaptation.model.state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)


def test_published_values_are_those_of_lora():
    data = ["--dataset", "dtd", "--root_path", "data", "--shots", "4", "--method"]
    relora, lora = parse([*data, "relora"]).hparams, parse([*data, "lora"]).hparams
    assert vars(relora) == vars(lora) | {"merge_every": 125}
