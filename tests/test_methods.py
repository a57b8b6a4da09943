"""What methods share: chosen blocks, schedules, what is trained and how it is saved."""

import copy
import dataclasses

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from support.runs import experiment_of
from support.training import VIT_B16, cosine, fitted, prepared
from support.weights import RESNET, small_clip
from torch import nn

import clip
from clip.weights import save_tensors
from common import UserError
from methods.adaptation import Adaptation
from methods.choice import (
    ENCODERS,
    POSITIONS,
    Blocks,
    chosen_blocks,
    cosine_schedule,
    select_attention,
    select_blocks,
    select_matrices,
)
from methods.saving import Tensors
from optimizers import SO

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


def test_blocks_of_every_position():
    assert POSITION_TABLE.keys() == set(POSITIONS) and set(ENCODERS) == {"text", "vision", "both"}
    for position, ends in POSITION_TABLE.items():
        for layers, (first, last) in zip((12, 24), ends):
            assert list(chosen_blocks(position, layers)) == list(range(first, last + 1)), (position, layers)


def test_thirds_and_halves_share_a_tower_of_any_depth():
    for layers in range(3, 30):
        for parts in (("bottom", "mid", "up"), ("half-bottom", "half-up")):
            assert sorted(block for part in parts for block in chosen_blocks(part, layers)) == list(range(layers))


@pytest.mark.parametrize("position, layers", [("top3", 2), ("top2", 1), ("bottom", 2), ("half-bottom", 1)])
def test_a_tower_that_is_too_small_is_named(position, layers):
    with pytest.raises(UserError, match=f"{position}.*the {layers} of a tower.*--position all"):
        chosen_blocks(position, layers)


def test_the_blocks_of_a_resnet_are_its_bottlenecks():
    """Five of them, of 3 convolutions each and, in the first of a stage, a fourth on the shortcut. No attention."""
    with torch.device("meta"):
        model = clip.CLIP(RESNET)
    assert len(select_blocks(model, Blocks(encoder="text"))) == 1
    assert [*select_blocks(model, Blocks(encoder="vision", position="top2"))] == ["visual.layer3.0", "visual.layer4.0"]
    matrices = select_matrices(model, Blocks(encoder="vision"))
    assert len(matrices) == 5 * 3 + 4 and {p.ndim for p in matrices.values()} == {4}
    with pytest.raises(UserError, match="--encoder text"):
        select_attention(model, Blocks())


def test_so_on_a_resnet_changes_convolutions_and_no_statistics():
    model = small_clip(dataclasses.replace(RESNET, resolution=32, context_length=77, vocab_size=49408))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adaptation = prepared("so", model=copy.deepcopy(model), density_ratio=0.01, total_iters=3, lr=1e-3)
    dense = prepared("so", model=model, density_ratio=0.01, total_iters=3, lr=1e-3, sampled_gradients=False)
    fits = [fitted(adaptation), fitted(dense)]
    assert [row["loss"] for row in fits[0].curve] == pytest.approx([row["loss"] for row in fits[1].curve], rel=1e-4)
    after = adaptation.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name.replace("in_proj.weight", "in_proj_weight") for name in adaptation.parameters}
    assert changed == trained and any(".conv2." in name for name in changed)


@pytest.fixture(scope="module")
def vit_b16():
    with torch.device("meta"):
        return clip.CLIP(VIT_B16)


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
    parameters = select_matrices(vit_b16, Blocks(encoder, position))
    assert (len(parameters), sum(p.numel() for p in parameters.values())) == (tensors, weights)
    assert {name for name, p in vit_b16.named_parameters() if p.requires_grad} == parameters.keys()
    kinds = {"attn.in_proj.weight": (3, 1), "attn.out_proj.weight": (1, 1)}
    kinds |= {"mlp.c_fc.weight": (4, 1), "mlp.c_proj.weight": (1, 4)}
    towers = {"text": ("transformer.resblocks.", 512), "vision": ("visual.transformer.resblocks.", 768)}
    first, last = POSITION_TABLE[position][0]
    expected = {
        f"{prefix}{block}.{kind}": (rows * width, columns * width)
        for tower, (prefix, width) in towers.items()
        for block in range(first, last + 1)
        for kind, (rows, columns) in kinds.items()
        if encoder in (tower, "both")
    }
    assert {name: tuple(p.shape) for name, p in parameters.items()} == expected


def test_towers_of_different_depth_are_cut_separately():
    model, _ = clip.load("tiny")  # four blocks and two
    expected = {f"{tower}.resblocks.{i}" for tower, i in (("visual.transformer", 2), ("visual.transformer", 3))}
    assert select_blocks(model, Blocks(position="half-up")).keys() == expected | {"transformer.resblocks.1"}


@pytest.mark.parametrize("lr, iterations", [(2e-4, 50), (1e-3, 1), (1e-3, 7), (1e-6, 5), (1e-7, 5)])
def test_cosine_schedule_at_every_step(lr, iterations):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = cosine_schedule(optimizer, iterations)
    for step in range(iterations + 1):
        expected = cosine(lr, step, iterations, lowest=min(1e-6, lr))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        schedule.step()
    assert expected == pytest.approx(min(1e-6, lr))


# --- what an adaptation trains, and what it changed


def test_changed_weights_are_counted_saved_and_loaded(tmp_path):
    def adaptation_of(model):
        return Adaptation(experiment_of("so", model=model), select_matrices(model, Blocks()))

    model, base = clip.load("tiny")[0], clip.load("tiny")[0]
    for each in (model, base):
        with torch.no_grad():
            each.visual.transformer.resblocks[3].mlp.c_proj.weight[2, 2] = 0.0
    adaptation = adaptation_of(model)
    first = model.transformer.resblocks[0].attn.in_proj.weight
    last = model.visual.transformer.resblocks[3].mlp.c_proj.weight
    sha256, before = clip.weights_sha256(model), last[0, 0].item()
    assert adaptation.saved.changed_weights() == 0
    with torch.no_grad():
        first[3, :5] += 1
        last[0, 0] = 7
        last[1, 1] += 0  # touched and the same
        last[2, 2] = -0.0  # equal, and another bit
    assert adaptation.saved.changed_weights() == 7
    path = tmp_path / "new" / "delta.safetensors"
    adaptation.saved.save(path, sha256, {"method": "mine"})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["method"] == "mine" and path.stat().st_size < 20_000
    loaded = adaptation_of(base)
    loaded.saved.load(path, sha256)
    assert loaded.saved.changed_weights() == 7 and clip.weights_sha256(base) == clip.weights_sha256(model) != sha256
    with torch.no_grad():
        last[0, 0] = before
    assert adaptation.saved.changed_weights() == 6  # a weight that came back is not counted
    with pytest.raises(clip.WeightsError, match="other base weights"):
        loaded.saved.load(path, clip.weights_sha256(base))


def test_tensors_beside_clip_are_loaded_whole_or_not_at_all(tmp_path):
    path, names = tmp_path / "new" / "head.safetensors", ("cat", "dog")

    def tensors_of(images):
        labels = torch.arange(images) % 2
        tensors = {"weight": torch.randn(2, 3), "keys": torch.randn(images, 3), "labels": labels}
        return Tensors("clip-thing-1", tensors, names, varying=("keys", "labels"))

    saved = tensors_of(images=4)
    assert saved.changed_weights() == 6 + 12  # integers are no weights
    saved.save(path, "a" * 64, {"method": "mine"})
    other = tensors_of(images=0)
    other.load(path, "a" * 64)  # the file decides how many rows there are
    assert all(torch.equal(tensor, saved.tensors[name]) for name, tensor in other.tensors.items())
    whole = load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["method"] == "mine"
    for message, tensors, about in (
        ("weight differs", {name: tensor for name, tensor in whole.items() if name != "weight"}, {}),
        ("more differs", whole | {"more": torch.zeros(1)}, {}),
        ("weight differs", whole | {"weight": torch.zeros(3, 3)}, {}),
        ("keys differs", whole | {"keys": torch.zeros(4, 2)}, {}),
        ("keys differs", whole | {"keys": whole["keys"].half()}, {}),
        ("different lengths", whole | {"keys": torch.zeros(3, 3)}, {}),
        ("clip-thing-1", whole, {"format": "clip-other-1"}),
        ("other base weights", whole, {"base_sha256": "b" * 64}),
        ("2 other classes", whole, {"class_names": '["dog", "cat"]'}),
    ):
        save_tensors(tensors, path, metadata | about)
        fresh = tensors_of(images=4)
        before = {name: tensor.clone() for name, tensor in fresh.tensors.items()}
        with pytest.raises(clip.WeightsError, match=f"{path}.*{message}"):
            fresh.load(path, "a" * 64)
        assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.tensors.items()), message
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(clip.WeightsError, match="readable"):
        other.load(path, "a" * 64)


def test_the_size_of_the_optimizers_state_counts_its_tensors():
    experiment = experiment_of("so", encoder="text", position="top1")
    parameters = select_matrices(experiment.model, experiment.hparams)
    weights = sum(p.numel() for p in parameters.values())
    for optimizer, expected in (
        (torch.optim.SGD(parameters.values(), lr=0.1), 0),
        (torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9), 4 * weights),
        (torch.optim.Adam(parameters.values()), 8 * weights + 4 * 4),  # and a float32 step counter a tensor
        (SO(parameters.values(), dense=True), 8 * weights),
        (SO(parameters.values(), density_ratio=1.0), 24 * weights),
    ):
        adaptation = Adaptation(experiment, parameters, optimizer)
        assert adaptation.optimizer_bytes == 0
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert adaptation.optimizer_bytes == expected
    assert Adaptation(experiment, parameters).optimizer_bytes == 0
