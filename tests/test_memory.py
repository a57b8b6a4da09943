"""Less memory and less work for the same bits, and what is said where memory is too small."""

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from support.runs import error_of, experiment_of, in_folder, outcome
from test_contracts import quick

import clip
import experiment
import main as entry
import train
from arguments import parse
from benchmarks.memory import step_bytes
from clip import preprocess
from clip.model import CLIP, Architecture
from clip.preprocess import Preprocessing, normalise
from common import UserError
from methods.adaptation import Adaptation

RN = Architecture(32, 64, 8, (1, 1, 1, 1), None, context_length=77, vocab_size=49408, text_width=64, text_layers=2)


@pytest.mark.parametrize(
    "flags",
    [
        quick("so"),
        quick("so_ablation"),
        (*quick("so"), "--precision", "bf16"),
        (*quick("lora"), "--dropout", 0.3),
        (*quick("dora"), "--dropout", 0.3),
        quick("maple", 6),
        quick("mmrl", 6),
        quick("cocoop", 3),
    ],
    ids=lambda flags: " ".join(map(str, (flags[1], *flags[-2:]))),
)
def test_blocks_that_are_computed_again_give_the_same_bits(run_main, flags):
    outcomes = []
    for more in ((), ("--checkpoint_blocks",)):
        code, record, _, err = run_main(*flags, *in_folder(f"out{len(more)}"), *more)
        assert code == 0, err
        outcomes.append(outcome(f"out{len(more)}", record))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_inputs_of_blocks_are_kept(precision):
    layers, width, tokens = 6, 64, 17
    arch = Architecture(64, 32, width, layers, 8, context_length=77, vocab_size=49408, text_width=64, text_layers=4)
    whole, inputs = (step_bytes(arch, 10, 8, precision, checkpoints) for checkpoints in (False, True))
    one = 4 * 8 * tokens * width  # bytes of x [8, 17, 64]
    assert (layers - 1) * one <= inputs["images"] <= (layers + 3) * one
    assert whole["images"] > 5 * inputs["images"] and whole["text"] > 5 * inputs["text"]
    assert whole["weights"] == inputs["weights"] == 4 * sum(p.numel() for p in CLIP(arch).parameters())


def test_an_image_tower_without_such_blocks_is_rejected_if_it_is_trained():
    model = CLIP(RN)
    experiment = experiment_of("prolip", model=model, checkpoint_blocks=True)
    assert "--checkpoint_blocks" in error_of(UserError, train._checkpoint_blocks, experiment, train.adapt(experiment))
    experiment = experiment_of("so", model=model, checkpoint_blocks=True, encoder="text")
    train._checkpoint_blocks(experiment, train.adapt(experiment))
    assert model.transformer.checkpoints
    assert not clip.load("tiny")[0].transformer.checkpoints


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_lack_of_memory_is_a_line_with_remedies(run_main, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(train, "fit", fails)
    code, _, _, err = run_main(*quick("so"))
    assert code == 2 and "Traceback" not in err and "--checkpoint_blocks" in err.splitlines()[-1]
    config = parse(["--checkpoint_blocks", "--precision", "bf16", "--device", "cpu"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "checkpoint" not in entry.remedies(config) and "--processes 4" in entry.remedies(config)
    assert "--encoder" in entry.remedies(config) and "--encoder" not in entry.remedies(parse(["--method", "coop"]))


def test_other_errors_keep_their_traceback(run_main, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run_main(*quick("so"))


@pytest.mark.parametrize("method", ["so", "lora", "dora", "bias", "shira"])
def test_blocks_below_the_first_trained_one_are_computed_once(run_main, monkeypatch, method):
    flags, outcomes, calls = (*quick(method, 6), "--encoder", "text", "--position", "top1"), [], []
    below_block = CLIP.below_block
    monkeypatch.setattr(CLIP, "below_block", lambda *args: calls.append(args[2]) or below_block(*args))
    for folder in ("once", "always"):
        code, record, _, err = run_main(*flags, *in_folder(folder))
        assert code == 0, err
        outcomes.append(outcome(folder, record))
        monkeypatch.setattr(Adaptation, "first_text_block", 0)
    assert outcomes[0] == outcomes[1]
    layers = clip.load("tiny")[0].arch.text_layers
    assert calls == [layers - 1]


def test_test_images_are_prepared_once_for_several_runs(run_main, tmp_path, monkeypatch):
    flags = (*quick("so", 6), "--cache_dir", tmp_path / "cache")
    _, plain, _, _ = run_main(*flags, *in_folder("plain"))
    code, first, _, err = run_main(*flags, *in_folder("stored"), "--cache_test_pixels")
    assert code == 0, err
    assert outcome("stored", first) == outcome("plain", plain)
    (stored,) = (tmp_path / "cache").glob("*.npy")
    assert stored.stat().st_size == 128 + first_test_images() * 3 * 32 * 32

    def fails(*_, **__):
        raise UserError("an image is damaged; replace it")

    monkeypatch.setattr("datasets.test_loader", fails)
    code, again, _, err = run_main(*flags, *in_folder("again"), "--cache_test_pixels")
    assert code == 0, err
    assert outcome("again", again) == outcome("plain", plain)
    stored.unlink()
    assert run_main(*flags, *in_folder("other"), "--cache_test_pixels")[0] == 2
    assert not [*(tmp_path / "cache").glob("*.npy*")]


def first_test_images() -> int:
    """Return the number of test images in a run of the tests."""
    return len(entry.read_data(parse(["--device", "cpu"])).test)


def test_a_batch_on_a_stream_of_its_own_is_waited_for_and_kept(monkeypatch):
    """The order of calls; there is no GPU here to run it on."""
    said, side = [], SimpleNamespace(name="side", device="cuda")

    def event():
        number = next(numbers)
        said.append(f"event {number}")
        return SimpleNamespace(synchronize=lambda: said.append(f"wait for event {number}"))

    numbers = itertools.count()
    current = SimpleNamespace(wait_stream=lambda of: said.append(f"wait for {of.name}"), record_event=event)

    @contextmanager
    def stream(of):
        said.append(f"on {of.name}")
        yield
        said.append("off")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, of: said.append((tuple(x.shape), of is current)))
    monkeypatch.setattr(experiment, "normalise", lambda x, table: said.append("normalise") or normalise(x, table))
    pixels = [torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8) for _ in range(4)]
    transform = preprocess.train_transform(Preprocessing(4))
    batches = experiment.Normalised([(x, "labels") for x in pixels], transform, torch.device("cpu"))
    plain = [images for images, _ in batches]
    batches.side, said[:] = side, []
    for number, (expected, (images, labels)) in enumerate(zip(plain, batches, strict=True)):
        assert torch.equal(images, expected) and labels == "labels"
        done = [f"event {number - 1}"] * (number > 0) + [f"wait for event {number - 2}"] * (number > 1)
        assert said == [*done, "on side", "normalise", "off", "wait for side", ((2, 3, 4, 4), True)]
        said.clear()
