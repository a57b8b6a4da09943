"""CoOp: its prompts beside ones written in words, its training beside a plain loop, its schedule beside the formula."""

import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from support.runs import NAMES, TASK, experiment_of

import train
import utils
from arguments import parse
from clip import WeightsError
from common import UserError
from datasets import Task
from methods import METHODS

OTHERS = Task("noise", ("horse", "zebra", "cow"), ("{}",), (), (), (), None)


def coop(**values):
    return METHODS["coop"].prepare(experiment_of("coop", total_iters=6, **values))


@pytest.mark.parametrize(
    "position, words", [("end", "a photo of a {}."), ("middle", "a photo {} of a."), ("front", "{} a photo of a.")]
)
def test_vectors_that_start_at_words_are_the_prompt_of_these_words(position, words):
    adaptation = coop(ctx_init="a photo of a", class_position=position)
    expected = utils.text_classifier(adaptation.model, NAMES, [words])
    assert adaptation.vectors.shape == (4, 64) and not torch.equal(expected[0], expected[1])
    torch.testing.assert_close(adaptation.text_classifier(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(adaptation.text_features(), expected, rtol=0, atol=1e-6)


def test_random_vectors_follow_the_seed_alone():
    torch.manual_seed(0)
    first = coop(seed=1).vectors
    torch.manual_seed(1)
    assert torch.equal(first, coop(seed=1).vectors) and not torch.equal(first, coop(seed=2).vectors)
    assert first.shape == (16, 64) and first.std().item() == pytest.approx(0.02, rel=0.1)


def test_class_specific_contexts_are_separate():
    adaptation = coop(csc=True, n_ctx=3, class_position="middle")
    assert adaptation.vectors.shape == (9, 64)
    adaptation.text_features()[1].sum().backward()
    assert adaptation.vectors.grad.abs().sum(dim=1).gt(0).tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_training_is_a_plain_loop_of_sgd():
    adaptation = coop(n_ctx=2, lr=0.1)
    vectors, velocity = adaptation.vectors.detach().clone(), 0.0
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4) % 3) for _ in range(6)]
    fit = train.fit(adaptation.experiment, adaptation, batches)
    rates = [1e-5, *(0.05 * (1 + math.cos(math.pi * e / 6)) for e in range(5))]
    assert [row["lr"] for row in fit.curve] == pytest.approx(rates)  # four images: an epoch is one iteration
    for (images, labels), rate in zip(batches, rates):
        vectors.requires_grad_(True)
        text = utils.encode_text(adaptation.model, adaptation.prompts, vectors)
        logits = 100 * utils.encode_image(adaptation.model, images) @ text.T
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), vectors)
        velocity = 0.9 * velocity + gradient + 5e-4 * vectors.detach()
        vectors = vectors.detach() - rate * velocity
    torch.testing.assert_close(adaptation.vectors.detach(), vectors, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in adaptation.model.parameters())


def test_an_epoch_leaves_out_its_smaller_last_batch(run_main):
    flags = ("--method", "coop", "--shots", 1, "--batch_size", 4, "--epochs", 3, "--n_ctx", 2, "--workers", 0)
    _, record, _, _ = run_main(*flags)
    curve = pd.read_csv(f"results/{record['run_id']}/curve.csv")
    assert list(curve.iteration) == [2, 4, 6]  # ten images
    assert list(curve.lr) == pytest.approx([1e-5, 2e-3, 2e-3 * (1 + math.cos(math.pi / 3)) / 2])


def test_published_epochs_depend_on_shots_and_dataset():
    def epochs(dataset, shots, *more):
        return parse(
            ["--method", "coop", "--dataset", dataset, "--root_path", "x", "--shots", str(shots), *more]
        ).hparams

    assert [epochs("dtd", shots).epochs for shots in (1, 2, 4, 8, 16)] == [50, 100, 100, 200, 200]
    assert [epochs("imagenet", shots).epochs for shots in (1, 4, 16)] == [50, 50, 50]
    assert epochs("imagenet", 4, "--epochs", "7").epochs == 7
    assert epochs("dtd", 4, "--total_iters", "9").epochs is None


def test_shared_vectors_serve_other_classes_and_class_specific_ones_do_not(tmp_path):
    for csc in (False, True):
        adaptation, path = coop(n_ctx=2, csc=csc), tmp_path / f"{csc}.safetensors"
        adaptation.saved.save(path, adaptation.experiment.base_sha256, {})
        other = METHODS["coop"].prepare(experiment_of("coop", task=OTHERS, total_iters=6, n_ctx=2, csc=csc, seed=9))
        if csc:
            with pytest.raises(WeightsError, match="other classes"):
                other.saved.load(path, other.experiment.base_sha256)
        else:
            other.saved.load(path, other.experiment.base_sha256)
            assert torch.equal(other.vectors, adaptation.vectors)


def test_a_full_stop_may_be_one_token_with_the_name():
    task = Task("noise", ("kite (bird of prey)", "cat"), ("{}",), (), (), (), None)
    adaptation = METHODS["coop"].prepare(experiment_of("coop", task=task, total_iters=6, ctx_init="a photo of a"))
    expected = utils.text_classifier(adaptation.model, task.class_names, ["a photo of a {}."])
    torch.testing.assert_close(adaptation.text_classifier(), expected, rtol=0, atol=1e-6)


def test_an_odd_number_of_vectors_has_the_smaller_half_in_front():
    adaptation = coop(n_ctx=5, class_position="middle")
    places = adaptation.prompt("cat", 0)[1]
    assert places[:8] == [-1, 0, 1, -1, 2, 3, 4, -1]


def test_impossible_prompts_are_rejected():
    with pytest.raises(UserError, match="--ctx_init"):
        coop(ctx_init="a photo of a", csc=True)
    with pytest.raises(UserError, match=f"{TASK.class_names[0]!r}.*--n_ctx"):
        coop(n_ctx=76)
    with pytest.raises(UserError, match="--ctx_init"):
        coop(ctx_init=" ")
