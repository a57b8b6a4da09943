"""What LoRA, DoRA and AdaLoRA have in common: where they act, merging, dropout, bf16; and files that are merged."""

import dataclasses
import json

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from support.runs import experiment_of
from support.training import features, filled, fitted, prepared
from support.weights import assert_same_weights

import clip
import methods
from clip.weights import save_tensors, save_weights
from common import UserError
from methods.choice import select_blocks

ADAPTERS = ["lora", "dora", "adalora"]


def adapter(method, **options):
    """An adapter without dropout, LoRA on all four matrices of the attention."""
    return prepared(
        method,
        **{"dropout": 0.0, "lr": 1e-2, "total_iters": 2}
        | ({"lora_on": "q,k,v,o"} if method == "lora" else {})
        | options,
    )


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("encoder, position", [("text", "all"), ("vision", "top2")])
def test_matrices_are_in_the_chosen_blocks_and_nothing_else_is_trained(method, encoder, position):
    adaptation = adapter(method, encoder=encoder, position=position)
    blocks = select_blocks(clip.load("tiny")[0], adaptation.experiment.hparams)
    assert {name.partition(".attn")[0].partition(".mlp")[0] for name in adaptation.parameters} == blocks.keys()
    own = sorted(id(p) for p in adaptation.parameters.values())
    assert sorted(id(p) for group in adaptation.optimizer.param_groups for p in group["params"]) == own
    assert not any(p.requires_grad for p in adaptation.model.parameters() if id(p) not in own)
    assert all(p.requires_grad for p in adaptation.parameters.values())
    assert (adaptation.trains_images, adaptation.trains_text) == (encoder != "text", encoder != "vision")
    fitted(adaptation)  # two iterations: only the chosen blocks move
    before = clip.load("tiny")[0].double().state_dict()
    moved = {name for name, weight in adaptation.merge().state_dict().items() if not torch.equal(weight, before[name])}
    kinds = ["attn.in_proj_weight", "attn.out_proj.weight"]
    kinds += [] if method == "lora" else ["mlp.c_fc.weight", "mlp.c_proj.weight"]
    assert moved == {f"{block}.{kind}" for block in blocks for kind in kinds}


@pytest.mark.parametrize("method", ADAPTERS)
def test_at_the_start_it_is_the_plain_model(method):
    plain = features(clip.load("tiny")[0].double())
    adaptation = adapter(method, dropout=0.3)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(features(adaptation.model), plain))
    assert adaptation.saved.changed_weights() == 0
    for a, b in zip(features(adapter(method).model), plain):  # matrices beside the weights
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "method, options",
    [("dora", {}), ("adalora", {}), *(("lora", {"lora_on": parts}) for parts in ("q,k,v,o", "q", "k,o", "q,v"))],
)
def test_merged_equals_unmerged(method, options):
    adaptation = filled(adapter(method, **options))
    training = [f.detach() for f in features(adaptation.model)]  # matrices beside the weights
    with torch.no_grad():
        evaluation = features(adaptation.model)
    changed, base = adaptation.saved.changed_weights(), clip.load("tiny")[0].double()
    assert torch.equal(features(adaptation.model)[0], training[0]), "counting the changes changed the weights"
    merged = adaptation.merge()
    assert not hasattr(merged, "peft_config") and [*map(type, merged.modules())] == [*map(type, base.modules())]
    assert not any({"forward", "project"} & vars(module).keys() for module in merged.modules())
    state, before = merged.state_dict(), base.state_dict()
    assert state.keys() == before.keys()
    assert changed == sum(int((weight != before[name]).sum()) for name, weight in state.items()) > 0
    with torch.no_grad():
        for a, b, c, d in zip(training, evaluation, features(merged), features(base)):
            torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-10)
            assert torch.equal(b, c) and not torch.allclose(c, d, atol=1e-3)


@pytest.mark.parametrize("method", ADAPTERS)
def test_bf16_has_the_merged_weights_when_it_evaluates(method):
    adaptation = filled(adapter(method, model=clip.load("tiny")[0], precision="bf16"))
    fp32 = [f.detach() for f in features(adaptation.model)]
    with adaptation.experiment.autocast():
        training = [f.detach() for f in features(adaptation.model)]
        with torch.no_grad():
            evaluation = features(adaptation.model)
            merged = features(adaptation.merge())
    for a, b, c, d in zip(fp32, training, evaluation, merged):
        assert b.dtype == torch.bfloat16 and torch.equal(c, d)
        assert torch.cosine_similarity(a, b.float(), dim=-1).min() > 0.98
        assert torch.cosine_similarity(a, c.float(), dim=-1).min() > 0.98


@pytest.mark.parametrize("method", [*ADAPTERS, "relora"])
def test_only_the_seed_decides_what_is_drawn(method):
    def losses(disturbance, **options):
        torch.manual_seed(disturbance)
        adaptation = adapter(method, **{"dropout": 0.5, "position": "top1"} | options)
        move_on = adaptation.after_step

        def disturbed(iteration):
            torch.rand(disturbance)  # as a data loader draws
            move_on(iteration)

        adaptation.after_step = disturbed
        return tuple(row["loss"] for row in fitted(adaptation).curve)

    state = torch.get_rng_state()
    adapter(method)
    assert torch.equal(torch.get_rng_state(), state), "the program's random state was changed"
    assert losses(1) == losses(2) and len({losses(1), losses(1, dropout=0.0), losses(1, seed=9)}) == 3


# --- weight files


def saved(method, path):
    """A trained method, saved as versions did that had one class for all settings, among them those of all methods."""
    options = {"encoder": "text", "position": "top1", "n_iters": 3, "shots": 1, "lr": 1e-2}
    options |= {"density_ratio": 0.01} if method == "so" else {"rank": 3, "dropout": 0.0}
    adaptation = prepared(method, model=clip.load("tiny")[0], **options)
    fitted(adaptation)
    experiment = adaptation.experiment
    flat = {f.name: f.default for module in methods.METHODS.values() for f in dataclasses.fields(module.Hparams)}
    flat |= dataclasses.asdict(experiment.settings) | dataclasses.asdict(experiment.hparams)
    flat |= {"total_iters": None, "search": {}}
    about = {"method": method, "run_id": "old", "settings": json.dumps(flat)}
    adaptation.saved.save(path, experiment.base_sha256, about)
    return adaptation


@pytest.mark.parametrize("method", [*ADAPTERS, "so"])
def test_a_weight_file_becomes_a_plain_clip(tmp_path, method):
    adaptation = saved(method, tmp_path / "weights.safetensors")
    model, _ = clip.load("tiny")
    assert methods.merge_file(model, tmp_path / "weights.safetensors") is model
    expected = adaptation.model if method == "so" else adaptation.merge()
    assert_same_weights(model, expected.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    save_weights(model, tmp_path / "merged.safetensors")
    with torch.no_grad():
        for a, b in zip(features(clip.load(tmp_path / "merged.safetensors")[0]), features(expected)):
            assert torch.equal(a, b)
        assert not torch.equal(features(clip.load("tiny")[0])[1], features(model)[1])


@pytest.mark.parametrize("method", [*ADAPTERS, "so"])
def test_a_weight_file_that_does_not_fit_changes_nothing(tmp_path, method):
    path = tmp_path / "weights.safetensors"
    saved(method, path)
    content, whole = path.read_bytes(), load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()

    model, _ = clip.load("tiny")
    model.visual.requires_grad_(False)
    modules, before = [*model.named_modules()], {name: t.clone() for name, t in model.state_dict().items()}

    def rejected():
        with pytest.raises(clip.WeightsError, match=str(path)):
            methods.merge_file(model, path)
        assert_same_weights(model, before)
        assert [*model.named_modules()] == modules and not hasattr(model, "peft_config")
        assert not any({"forward", "project"} & vars(module).keys() for module in model.modules())
        assert all(p.requires_grad != name.startswith("visual.") for name, p in model.named_parameters())

    first = next(iter(whole))
    for tensors, about in (
        ({name: tensor for name, tensor in whole.items() if name != first}, {}),
        (whole | {"more": torch.zeros(1)}, {}),
        (whole | {first: whole[first][..., :-1].contiguous()}, {}),
        (whole | {first: whole[first].half()}, {}),
        (whole, {"base_sha256": "0" * 64}),
    ):
        save_tensors(tensors, path, metadata | about)
        rejected()
    if method != "so":  # a delta says enough by itself
        for about in ({"method": "unknown"}, {"settings": "{}"}, {"format": "clip-other-1"}):
            save_tensors(whole, path, metadata | about)
            rejected()
    path.write_bytes(content[: len(content) // 2])
    rejected()
    path.unlink()
    rejected()


@pytest.mark.parametrize("method", ["tip_adapter", "linear_probe", "gda", "coop"])
def test_what_is_no_weight_of_clip_is_not_merged(tmp_path, method):
    path, experiment = tmp_path / "head.safetensors", experiment_of(method)
    methods.METHODS[method].prepare(experiment).saved.save(path, experiment.base_sha256, {"method": method})
    with pytest.raises(UserError, match=f"{path}.*{method}"):
        methods.merge_file(clip.load("tiny")[0], path)
