"""--precision fp16: the loss is scaled as GradScaler does it, resumes, and is rejected where it cannot work."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.runs import TASK, experiment_of, in_folder, killed_after, outcome, refused
from support.training import TOKENS, cosine, fitted, noise, prepared

import clip
from methods import METHODS

FP16 = ("--precision", "fp16")
SHORT = ("--shots", 4, "--seed", 5, "--batch_size", 16, "--total_iters", 6, "--lr", "1e-3", "--position", "top1")


def test_an_update_that_overflows_is_skipped_and_halves_the_scale():
    adaptation = prepared("layernorm", model=clip.load("tiny")[0], precision="fp16", total_iters=8, lr=1e-3)
    adaptation.scaler._init_scale = 2.0**24  # so large that the first gradients overflow
    fit = fitted(adaptation)
    model = clip.load("tiny")[0].requires_grad_(False)
    own = [p.requires_grad_() for name, p in model.named_parameters() if "ln_" in name]
    optimizer, scale, skipped, losses = torch.optim.AdamW(own, lr=1e-3, weight_decay=0.01), 2.0**24, 0, []
    for step, (images, labels) in enumerate(noise(8, dtype=torch.float32)):
        with torch.autocast("cpu", torch.float16):
            features = [F.normalize(x.float()) for x in (model.encode_image(images), model.encode_text(TOKENS))]
        losses.append(F.cross_entropy(100 * features[0] @ features[1].T, labels))
        optimizer.zero_grad()
        (scale * losses[-1]).backward()
        optimizer.param_groups[0]["lr"] = cosine(1e-3, step, 8)  # a skipped update counts
        if all(p.grad.isfinite().all() for p in own):
            for p in own:
                p.grad /= scale
            optimizer.step()
        else:
            scale, skipped = scale / 2, skipped + 1
    assert 0 < skipped < 8 and adaptation.scaler.get_scale() == scale
    assert [row["loss"] for row in fit.curve] == pytest.approx([loss.item() for loss in losses], rel=0.02)
    assert {p.dtype for p in adaptation.parameters.values()} == {torch.float32}


def test_so_skips_an_update_that_overflows_and_keeps_its_support():
    adaptation = prepared("so", model=clip.load("tiny")[0], precision="fp16", total_iters=8, lr=1e-3, t=2)
    adaptation.scaler._init_scale = 2.0**24
    fitted(adaptation)
    steps = {state["step"] for state in adaptation.optimizer.state.values()}
    skipped = round(math.log2(2.0**24 / adaptation.scaler.get_scale()))
    assert 0 < skipped < 8 and steps == {8 - skipped}


@pytest.mark.parametrize("method", ["so", "lora", "prolip", "coop", "two_stage", "shira", "so_ablation"])
def test_methods_train_as_in_float32(method):
    fits = []
    for precision in ("fp32", "fp16"):
        options = {"total_iters": 8, "lr": 1e-3, "precision": precision, "seed": 1}
        adaptation = prepared(method, TASK, clip.load("tiny")[0], **options)
        fits.append([row["loss"] for row in fitted(adaptation).curve])
    assert fits[0] == pytest.approx(fits[1], rel=0.1) and fits[0] != fits[1]


@pytest.mark.parametrize("method", ["layernorm", "so"])
def test_a_killed_run_resumes_with_its_scale(run_main, tmp_path, method):
    flags = ("--method", method, *SHORT, *FP16)
    code, record, _, err = run_main(*flags, *in_folder(tmp_path / "whole"))
    assert code == 0 and record["precision"] == "fp16", err
    again = (*flags, *in_folder(tmp_path / "killed"), "--save_every", 3)
    with killed_after(5):
        run_main(*again)
    code, resumed, out, _ = run_main(*again)
    assert code == 0 and "resumes after iteration 3," in out
    assert outcome(tmp_path / "killed", resumed) == outcome(tmp_path / "whole", record)


def test_where_it_cannot_work_something_else_is_named(run_main):
    line = refused(run_main("--method", "adalora", *SHORT, *FP16))
    assert "fp16" in line and "--precision bf16" in line


def test_heads_need_no_scale():
    head = METHODS["zs_lp"].prepare(experiment_of("zs_lp", precision="fp16"))
    assert not head.scaler.is_enabled() and head.experiment.autocast().fast_dtype == torch.float16
