"""Sparse deltas: the changes bit for bit, and only on the base weights that a delta was made from."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.runs import error_of
from support.weights import RESNET, VIT, small_clip

import clip
from clip.delta import FORMAT, apply_delta, difference, save_delta, snapshot

IN_PROJ = "visual.transformer.resblocks.1.attn.in_proj_weight"
NAN = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32)  # one NaN among many


@torch.no_grad()
def adapted(base: clip.CLIP) -> clip.CLIP:
    """A copy of `base` with a few weights changed by hand; `CHANGES` says which."""
    model = copy.deepcopy(base)
    model.visual.transformer.resblocks[1].attn.in_proj.weight[2, 3] += 1e-7
    model.visual.transformer.resblocks[1].attn.in_proj.weight[191, 63] = 5
    model.transformer.resblocks[0].mlp.c_fc.bias[4] = NAN
    model.ln_final.bias[0] = -0.0
    model.logit_scale += 1
    return model


CHANGES = {
    IN_PROJ: [2 * 64 + 3, 192 * 64 - 1],
    "transformer.resblocks.0.mlp.c_fc.bias": [4],
    "ln_final.bias": [0],
    "logit_scale": [0],
}


@pytest.fixture
def base():
    model = small_clip()
    with torch.no_grad():
        model.ln_final.bias[0] = 0.0
        model.visual.transformer.resblocks[1].attn.in_proj.weight[2, 3] = 0.5
    return model


@pytest.fixture
def delta(base, tmp_path):
    path = tmp_path / "folder" / "run.safetensors"
    save_delta(
        difference(snapshot(base), adapted(base)), path, clip.weights_sha256(base), {"method": "so", "shots": "4"}
    )
    return path


def bits(model):
    return {
        n: t.view(torch.int32).clone() if t.is_floating_point() else t.clone() for n, t in model.state_dict().items()
    }


def same_bits(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rejection(model, path, sha256) -> str:
    """Return the message of the WeightsError: one line that names the file. The model must not change."""
    before = bits(model)
    message = error_of(clip.WeightsError, apply_delta, model, path, sha256)
    assert same_bits(bits(model), before) and str(path) in message
    return message


def test_difference_by_hand(base):
    changes = difference(snapshot(base), adapted(base))
    assert {name: indices.tolist() for name, (indices, _) in changes.items()} == CHANGES
    assert changes[IN_PROJ][1].tolist() == [torch.tensor(0.5).add(1e-7).item(), 5.0]
    assert changes["ln_final.bias"][1].signbit().tolist() == [True]
    for indices, values in changes.values():
        assert indices.dtype == torch.int32 and values.dtype == torch.float32


def test_equal_bits_are_no_difference_and_no_change_is_a_delta_too(base, tmp_path):
    with torch.no_grad():
        base.ln_final.weight[3] = NAN  # unequal to itself, as a number
    changes = difference(snapshot(base), copy.deepcopy(base))
    assert changes == {}
    before, sha256, path = bits(base), clip.weights_sha256(base), tmp_path / "none.safetensors"
    save_delta(changes, path, sha256, {"format": "mine", "base_sha256": "other"})
    assert apply_delta(base, path, sha256) == {"format": FORMAT, "base_sha256": sha256}
    assert same_bits(bits(base), before)


def test_a_snapshot_holds_copies_of_the_trained_weights(base):
    base.requires_grad_(False)
    base.transformer.resblocks[0].attn.in_proj.requires_grad_(True)
    base.visual.proj.requires_grad_(True)
    before = snapshot(base)
    block = "transformer.resblocks.0.attn"
    assert set(before) == {f"{block}.in_proj_weight", f"{block}.in_proj_bias", "visual.proj"}
    kept = before["visual.proj"].clone()
    with torch.no_grad():
        base.visual.proj += 1
        base.ln_final.bias += 1  # not trained, so not in the difference
    assert torch.equal(before["visual.proj"], kept)
    assert list(difference(before, base)) == ["visual.proj"]


def test_the_file_is_as_documented(base, delta):
    tensors = load_file(delta)
    assert set(tensors) == {f"{name}.{part}" for name in CHANGES for part in ("indices", "values")}
    for name, indices in CHANGES.items():
        assert tensors[f"{name}.indices"].dtype == torch.int32
        assert tensors[f"{name}.indices"].tolist() == indices
        assert tensors[f"{name}.values"].dtype == torch.float32
    with safe_open(delta, "pt") as file:
        expected = {"format": FORMAT, "base_sha256": clip.weights_sha256(base), "method": "so", "shots": "4"}
        assert file.metadata() == expected
    assert [entry.name for entry in delta.parent.iterdir()] == [delta.name]


def test_applying_gives_the_adapted_bits(base, delta):
    expected, sha256 = bits(adapted(base)), clip.weights_sha256(base)
    assert not same_bits(bits(base), expected)
    metadata = apply_delta(base, delta, sha256)
    assert same_bits(bits(base), expected)
    assert metadata == {"format": FORMAT, "base_sha256": sha256, "method": "so", "shots": "4"}
    assert all(p.requires_grad and p.grad_fn is None for p in base.parameters())


@pytest.mark.parametrize("arch", [VIT, RESNET], ids=["vit", "resnet"])
def test_random_changes_of_all_tensors(arch, tmp_path):
    base, model = small_clip(arch), small_clip(arch)
    with torch.no_grad():
        for parameter in model.parameters():
            chosen = torch.rand_like(parameter) < 0.1
            parameter[chosen] += torch.randn(int(chosen.sum()))
    save_delta(difference(snapshot(base), model), tmp_path / "d.safetensors", clip.weights_sha256(base), {})
    apply_delta(base, tmp_path / "d.safetensors", clip.weights_sha256(base))
    assert same_bits(bits(base), bits(model))


def test_rejected_on_other_weights_and_when_applied_twice(base, delta):
    other = small_clip(seed=5)
    message = rejection(other, delta, clip.weights_sha256(other))
    assert clip.weights_sha256(base)[:12] in message and clip.weights_sha256(other)[:12] in message
    apply_delta(base, delta, clip.weights_sha256(base))
    rejection(base, delta, clip.weights_sha256(base))


def test_files_that_are_no_deltas(base, delta, tmp_path):
    sha256, content = clip.weights_sha256(base), delta.read_bytes()
    rejection(base, tmp_path / "none.safetensors", sha256)
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        delta.write_bytes(content[:length])
        rejection(base, delta, sha256)
    foreign = tmp_path / "foreign.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"ln_final.bias.indices": torch.zeros(1, dtype=torch.int32)}, foreign, metadata)
        assert FORMAT in rejection(base, foreign, sha256)
    save_file({}, foreign, {"format": FORMAT})
    assert "other base" in rejection(base, foreign, sha256)


def entry(indices, values, dtype=torch.int32):
    return {"ln_final.bias.indices": torch.tensor(indices, dtype=dtype), "ln_final.bias.values": torch.tensor(values)}


@pytest.mark.parametrize(
    "damage",
    [
        entry([64], [1.0]),  # the tensor has 64 weights
        entry([-1], [1.0]),
        entry([1, 2, 3], [1.0, 2.0]),
        entry([1, 2, 3], [1.0]),  # would spread over all three
        entry([2, 1], [1.0, 2.0]),
        entry([1, 1], [1.0, 2.0]),
        entry([[1]], [[1.0]]),
        entry([1.0], [1.0], torch.float32),
        entry([1], [1]),
        {"ln_final.bias.indices": torch.zeros(1, dtype=torch.int32)},
        {"ln_final.bias.values": torch.zeros(1)},
        {"head.indices": torch.zeros(1, dtype=torch.int32), "head.values": torch.zeros(1)},
        {"visual.proj": torch.zeros(1)},
    ],
)
def test_entries_that_fit_no_weight_change_nothing(base, damage, tmp_path):
    path, sha256 = tmp_path / "damaged.safetensors", clip.weights_sha256(base)
    good = {"ln_final.weight.indices": torch.ones(1, dtype=torch.int32), "ln_final.weight.values": torch.ones(1)}
    save_file(good | damage, path, {"format": FORMAT, "base_sha256": sha256})
    rejection(base, path, sha256)
    save_file(good, path, {"format": FORMAT, "base_sha256": sha256})
    apply_delta(base, path, sha256)
    assert base.ln_final.weight[1] == 1
