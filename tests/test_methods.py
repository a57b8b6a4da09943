"""Which weights a method trains and with what settings, and what it changed."""

import copy
import math
from itertools import combinations

import pytest
import safetensors
import torch
from torch import nn

import clip
import datasets
import train
from benchmarks.step import ARCHITECTURES
from clip.model import CLIP
from methods import METHODS, Adaptation, MethodError, cosine_schedule, select_matrices
from methods.adaptation import ENCODERS, POSITIONS, chosen_blocks
from optimizers import SO
from run_utils import Settings

NAMES = ("cat", "dog", "traffic_light")
TASK = datasets.Task("noise", NAMES, ("{}",), tuple(datasets.Item(str(i), i % 3) for i in range(4)), (), (), None)


def settings_of(**options):
    return Settings(**{"backbone": "tiny", "device": "cpu", "workers": 0, "density_ratio": 0.005} | options)


# --- blocks and matrices

POSITION_TABLE = {  # position: first and last block of a tower of 12, of 24
    "all": ((0, 11), (0, 23)),
    "bottom": ((0, 3), (0, 7)),
    "mid": ((4, 7), (8, 15)),
    "up": ((8, 11), (16, 23)),
    "half-bottom": ((0, 5), (0, 11)),
    "half-up": ((6, 11), (12, 23)),
    "top1": ((11, 11), (23, 23)),
    "top2": ((10, 11), (22, 23)),
    "top3": ((9, 11), (21, 23)),
}


@pytest.mark.parametrize("position", POSITIONS)
def test_blocks_of_a_position(position):
    for layers, (first, last) in zip((12, 24), POSITION_TABLE[position]):
        assert list(chosen_blocks(position, layers)) == list(range(first, last + 1))


def test_every_position_can_be_chosen():
    assert POSITION_TABLE.keys() == set(POSITIONS)
    assert set(ENCODERS) == {"text", "vision", "both"}


@pytest.mark.parametrize("layers", range(3, 30))
def test_thirds_and_halves_share_the_tower(layers):
    for parts in (("bottom", "mid", "up"), ("half-bottom", "half-up")):
        blocks = [set(chosen_blocks(part, layers)) for part in parts]
        assert set.union(*blocks) == set(range(layers))
        assert all(not a & b for a, b in combinations(blocks, 2))


@pytest.mark.parametrize("position, layers", [("top3", 2), ("top2", 1), ("bottom", 2), ("half-bottom", 1)])
def test_a_tower_that_is_too_small_is_named(position, layers):
    with pytest.raises(MethodError, match=f"{position}.*the {layers} of a tower.*--position all"):
        chosen_blocks(position, layers)


@pytest.fixture(scope="module")
def vit_b16():
    with torch.device("meta"):
        return CLIP(ARCHITECTURES["ViT-B/16"])


@pytest.mark.parametrize(
    "encoder, position, tensors, weights",
    [
        ("both", "all", 96, 122_683_392),
        ("text", "all", 48, 37_748_736),
        ("vision", "all", 48, 84_934_656),
        ("both", "bottom", 32, 4 * 12 * (768**2 + 512**2)),
        ("vision", "top1", 4, 12 * 768**2),
        ("text", "half-up", 24, 6 * 12 * 512**2),
    ],
)
def test_matrices_of_vit_b16(vit_b16, encoder, position, tensors, weights):
    vit_b16.requires_grad_(True)  # as it is when new
    parameters = select_matrices(vit_b16, encoder, position)
    assert (len(parameters), sum(p.numel() for p in parameters.values())) == (tensors, weights)
    trained = {name for name, p in vit_b16.named_parameters() if p.requires_grad}
    assert trained == parameters.keys()
    kinds = {"attn.in_proj.weight": (3, 1), "attn.out_proj.weight": (1, 1)}
    kinds |= {"mlp.c_fc.weight": (4, 1), "mlp.c_proj.weight": (1, 4)}
    towers = {"text": ("transformer.resblocks.", 512), "vision": ("visual.transformer.resblocks.", 768)}
    expected = {
        f"{prefix}{block}.{kind}": (rows * width, columns * width)
        for tower, (prefix, width) in towers.items()
        for block in range(12)
        for kind, (rows, columns) in kinds.items()
        if encoder in (tower, "both") and POSITION_TABLE[position][0][0] <= block <= POSITION_TABLE[position][0][1]
    }
    assert {name: tuple(p.shape) for name, p in parameters.items()} == expected


def test_towers_of_different_depth_are_cut_separately():
    model, _ = clip.load("tiny")  # four blocks and two
    names = select_matrices(model, "both", "half-up")
    assert {name.rpartition("resblocks.")[0] + name.rpartition("resblocks.")[2][0] for name in names} == {
        "visual.transformer.2",
        "visual.transformer.3",
        "transformer.1",
    }


# --- the schedule


@pytest.mark.parametrize("lr, iterations", [(2e-4, 50), (1e-3, 1), (1e-3, 7), (1e-6, 5), (1e-7, 5)])
def test_cosine_schedule_at_every_step(lr, iterations):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = cosine_schedule(optimizer, iterations)
    lowest = min(1e-6, lr)
    for step in range(iterations + 1):
        expected = lowest + (lr - lowest) * (1 + math.cos(math.pi * step / iterations)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        schedule.step()
    assert expected == pytest.approx(lowest)


# --- what an adaptation trains, and what it changed


@pytest.mark.parametrize(
    "encoder, towers", [("text", (False, True)), ("vision", (True, False)), ("both", (True, True))]
)
def test_an_adaptation_knows_its_towers_and_its_size(encoder, towers):
    model, _ = clip.load("tiny")
    adaptation = Adaptation(model, select_matrices(model, encoder, "all"))
    assert (adaptation.trains_images, adaptation.trains_text) == towers
    sizes = {"text": 2 * 12 * 64**2, "vision": 4 * 12 * 128**2}
    sizes["both"] = sizes["text"] + sizes["vision"]
    assert adaptation.trainable_weights == sizes[encoder]


def test_changed_weights_are_counted_saved_and_loaded(tmp_path):
    model, _ = clip.load("tiny")
    parameters = select_matrices(model, "both", "all")
    first, *_, last = parameters.values()
    with torch.no_grad():
        last[2, 2] = 0.0
    sha256, base = clip.weights_sha256(model), copy.deepcopy(model)
    adaptation = Adaptation(model, parameters)
    assert adaptation.changed_weights() == 0
    with torch.no_grad():
        first[3, :5] += 1
        last[0, 0] = 7
        last[1, 1] += 0  # touched and the same
        last[2, 2] = -0.0  # equal, and another bit
    assert adaptation.changed_weights() == 7
    path = tmp_path / "new" / "delta.safetensors"
    assert adaptation.save(path, sha256, {"method": "mine"}) == path.stat().st_size < 20_000
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["method"] == "mine"
    loaded = Adaptation(base, select_matrices(base, "both", "all"))
    loaded.load(path, sha256)
    assert loaded.changed_weights() == 7 and clip.weights_sha256(base) == clip.weights_sha256(model) != sha256
    with torch.no_grad():
        last[0, 0] = adaptation.before[next(reversed(adaptation.before))][0, 0]
    assert adaptation.changed_weights() == 6  # a weight that came back is not counted
    other, _ = clip.load("tiny")
    with pytest.raises(clip.WeightsError, match="other base weights"):
        Adaptation(other, {}).load(path, clip.weights_sha256(other))


def test_the_size_of_the_optimizers_state_counts_its_tensors():
    model, _ = clip.load("tiny")
    parameters = select_matrices(model, "text", "top1")
    weights = sum(p.numel() for p in parameters.values())
    for optimizer, expected in (
        (torch.optim.SGD(parameters.values(), lr=0.1), 0),
        (torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9), 4 * weights),
        (torch.optim.Adam(parameters.values()), 8 * weights + 4 * 4),  # and a float32 step counter a tensor
        (SO(parameters.values(), dense=True), 8 * weights),
        (SO(parameters.values(), density_ratio=1.0), 24 * weights),
    ):
        adaptation = Adaptation(model, parameters, optimizer)
        assert adaptation.optimizer_bytes == 0
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert adaptation.optimizer_bytes == expected
    assert Adaptation(model, parameters).optimizer_bytes == 0


# --- SO


def test_so_takes_its_settings():
    model, _ = clip.load("tiny")
    settings = settings_of(lr=3e-3, density_ratio=0.003, t=7, prune_first=True, seed=2**62, n_iters=11, shots=2)
    adaptation = METHODS["so"].prepare(model, TASK, settings)
    optimizer = adaptation.optimizer
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, SO) and [id(p) for p in group["params"]] == [
        id(p) for p in adaptation.parameters.values()
    ]
    expected = dict(lr=3e-3, density_ratio=0.003, T=7, prune_first=True, dense=False)
    expected |= dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    assert {name: group[name] for name in expected} == expected
    assert optimizer.generator.initial_seed() == 2**62
    assert not METHODS["so"].prepare(model, TASK, settings_of()).optimizer.param_groups[0]["prune_first"]
    for step in range(22):  # shots x n_iters
        assert group["lr"] == pytest.approx(1e-6 + (3e-3 - 1e-6) * (1 + math.cos(math.pi * step / 22)) / 2)
        adaptation.optimizer.step()
        adaptation.scheduler.step()
    assert group["lr"] == pytest.approx(1e-6)


@pytest.mark.parametrize("encoder, position", [("text", "all"), ("vision", "top1"), ("both", "half-up")])
def test_so_trains_the_chosen_matrices(encoder, position):
    model, other = clip.load("tiny")[0], clip.load("tiny")[0]
    adaptation = METHODS["so"].prepare(model, TASK, settings_of(encoder=encoder, position=position))
    assert adaptation.parameters.keys() == select_matrices(other, encoder, position).keys()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adaptation.parameters.keys()


def supports(**options):
    adaptation = METHODS["so"].prepare(clip.load("tiny")[0], TASK, settings_of(**options))
    adaptation.optimizer.draw_supports()
    return [adaptation.optimizer.state[p]["support"] for p in adaptation.parameters.values()]


def test_the_seed_decides_what_is_drawn():
    torch.manual_seed(0)
    first = supports(seed=1)
    torch.manual_seed(99)  # the optimizer's generator is its own
    assert all(torch.equal(a, b) for a, b in zip(first, supports(seed=1)))
    assert not any(torch.equal(a, b) for a, b in zip(first, supports(seed=2)))
    matrices = {width: (3 * width**2, width**2, 4 * width**2, 4 * width**2) for width in (128, 64)}
    assert [len(s) for s in first] == [int(0.005 * n) for n in 4 * matrices[128] + 2 * matrices[64]]


def train_so(sampled, iterations=6):
    """Weights after a short run in float64, so that gradients differ by rounding far below what matters."""
    model = clip.load("tiny")[0].double()
    settings = settings_of(
        sampled_gradients=sampled, total_iters=iterations, batch_size=3, lr=1e-3, t=2, early_stop_loss=0.0
    )
    adaptation = METHODS["so"].prepare(model, TASK, settings)
    replaced = [layer for layer in model.modules() if "forward" in vars(layer)]
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 1] * (iterations // 2)
    batches = [(torch.randn(n, 3, 32, 32, generator=generator).double(), torch.arange(n)) for n in sizes]
    fit = train.fit(model, TASK, adaptation, batches, settings, None)
    return {name: p.detach() for name, p in adaptation.parameters.items()}, fit, len(replaced)


def test_sampled_gradients_train_the_same_weights():
    plain, plain_fit, plain_layers = train_so(sampled=False)
    sampled, sampled_fit, sampled_layers = train_so(sampled=True)
    assert (plain_layers, sampled_layers) == (0, 24)
    untrained = dict(clip.load("tiny")[0].double().named_parameters())
    for name, p in plain.items():
        assert not torch.equal(p, untrained[name])
        torch.testing.assert_close(sampled[name], p, rtol=0, atol=1e-7)  # where a step is 1e-3
    losses = [[row["loss"] for row in fit.curve] for fit in (plain_fit, sampled_fit)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) == 3


# --- zero-shot


def test_zero_shot_trains_nothing():
    model, _ = clip.load("tiny")
    assert any(p.requires_grad for p in model.parameters())
    adaptation = METHODS["zero_shot"].prepare(model, TASK, settings_of(method="zero_shot"))
    assert not any(p.requires_grad for p in model.parameters())
    assert (adaptation.parameters, adaptation.optimizer, adaptation.scheduler) == ({}, None, None)
    assert adaptation.trainable_weights == adaptation.changed_weights() == 0
    assert not adaptation.trains_images and not adaptation.trains_text
