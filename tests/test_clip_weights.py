"""Weight files: the three formats, hostile and damaged files, saving, hashing, names."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from support.weights import (
    FORMATS,
    RESNET,
    VIT,
    assert_same_weights,
    halved,
    small_clip,
    write_pickle,
    write_safetensors,
    write_torchscript,
)
from torch import nn

import clip
from clip.weights import save_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")


def error_of(path) -> str:
    """Return the message of the WeightsError that loading raises; it must be one line and name the file."""
    with pytest.raises(clip.WeightsError) as caught:
        clip.load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 1000
    return message


# --- reading


@pytest.mark.parametrize("arch", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_weights_and_hash(format, arch, tmp_path):
    original = small_clip(arch)
    extras = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    extras["transformer.resblocks.0.attn_mask"] = torch.zeros(77, 77)
    model, preprocess = clip.load(FORMATS[format](halved(original) | extras, tmp_path))
    assert_same_weights(model, original.state_dict())
    assert model.arch == arch and clip.weights_sha256(model) == clip.weights_sha256(original)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert preprocess.transforms[1].size == (arch.resolution, arch.resolution)
    images = torch.randn(2, 3, arch.resolution, arch.resolution)
    assert torch.equal(model.encode_image(images), original.encode_image(images))


def test_transposed_and_shared_storage_in_an_archive(tmp_path):
    original = small_clip()
    tensors = original.state_dict()
    for name in ("visual.proj", "text_projection"):
        tensors[name] = tensors[name].t().contiguous().t()
    table = torch.cat([torch.zeros(77, 64), tensors["positional_embedding"]])
    tensors["positional_embedding"] = table[77:]
    model, _ = clip.load(write_torchscript(tensors, tmp_path))
    assert_same_weights(model, original.state_dict())
    assert all(p.is_contiguous() for p in model.parameters())  # deltas index them row by row


def test_plain_integers_and_old_batch_norms_without_a_counter(tmp_path):
    original = small_clip(RESNET)
    tensors = {n: t for n, t in original.state_dict().items() if "num_batches_tracked" not in n}
    model, _ = clip.load(write_pickle(tensors | {"input_resolution": 32}, tmp_path))
    assert_same_weights(model, original.state_dict())


def test_a_loaded_model_does_not_write_to_its_file(tmp_path):
    path = write_safetensors(small_clip().state_dict(), tmp_path)
    before = path.read_bytes()
    model, _ = clip.load(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == before
    assert clip.load(path)[0].visual.proj.any()


# --- hostile and damaged files


def calling(module: str, name: str, argument: str) -> bytes:
    """Return a pickle that calls module.name(argument)."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def archive_with(data: bytes, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("container", ["archive", "pickle"])
@pytest.mark.parametrize(
    "module, name, rejected",
    [
        ("os", "system", True),
        (os.system.__module__, "system", True),
        ("subprocess", "getoutput", True),
        ("torch.jit", "load", True),
        ("torch", "load", True),
        ("builtins", "eval", True),
        ("torch", "FloatStorage", False),  # a known name, but nothing to call
        ("__torch__.os", "system", False),  # a class of the archive: no code behind it
    ],
)
def test_nothing_in_a_file_is_executed(module, name, rejected, container, tmp_path):
    marker = tmp_path / "ran"
    argument = f"open('{marker}', 'w').close()" if name == "eval" else f"touch {marker}"
    data = calling(module, name, argument)
    if name in ("system", "eval") and not module.startswith("__"):
        pickle.loads(data)
        assert marker.exists()  # so the pickle is dangerous
        marker.unlink()
    path = tmp_path / "hostile.pt"
    if container == "archive":
        archive_with(data, path)
    else:
        path.write_bytes(data)
    message = error_of(path)
    assert not marker.exists()
    if rejected and container == "archive":
        assert f"rejected {module}.{name}" in message


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_files(format, tmp_path):
    path = FORMATS[format](halved(small_clip()), tmp_path)
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:length])
        assert "not a readable weight file" in error_of(path)


def test_altered_bytes_of_an_archive_are_noticed_or_do_not_matter(tmp_path):
    path = write_torchscript(halved(small_clip()), tmp_path)
    content, sha256, rng, noticed = path.read_bytes(), clip.weights_sha256(clip.load(path)[0]), random.Random(0), 0
    for _ in range(40):
        altered = bytearray(content)
        altered[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        try:
            assert clip.weights_sha256(clip.load(path)[0]) == sha256
        except clip.WeightsError as error:
            assert "\n" not in str(error)
            noticed += 1
    assert noticed > 20


def test_files_of_other_things(tmp_path):
    error_of(archive_with(pickle.dumps([1, 2]), tmp_path / "list.pt"))
    with zipfile.ZipFile(tmp_path / "no-data.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    error_of(tmp_path / "no-data.pt")
    for name in ("noise.pt", "noise.safetensors"):
        (tmp_path / name).write_bytes(random.Random(0).randbytes(100_000))
        error_of(tmp_path / name)


def changed(name, tensor):
    return small_clip().state_dict() | {name: tensor}


def without(missing):
    return {name: tensor for name, tensor in small_clip().state_dict().items() if name != missing}


MISSING = ("text_projection", "ln_final.bias", "visual.class_embedding", "visual.conv1.weight")


@pytest.mark.parametrize(
    "tensors, named",
    [
        *((without(name), name) for name in MISSING),
        (without("visual.proj"), "visual.attnpool"),  # the others look like a ResNet's
        (changed("ln_final.bias", torch.zeros(65)), "ln_final.bias"),
        (changed("transformer.resblocks.1.attn.in_proj_weight", torch.zeros(192, 63)), "in_proj"),
        (changed("visual.positional_embedding", torch.zeros(7, 64)), "visual.positional_embedding"),  # 6 is no square
        (changed("visual.positional_embedding", torch.zeros(0, 64)), "shape"),
        (changed("text_projection", torch.zeros(64)), "shape"),
        (changed("ln_final.weight", torch.ones(96)), "96"),
        (changed("ln_final.bias", torch.zeros(64, dtype=torch.int64)), "ln_final.bias"),
        (changed("classifier.weight", torch.zeros(3)), "classifier.weight"),  # a key too many
        ({"logits.weight": torch.zeros(3)}, "OpenAI's names"),
        ({}, "OpenAI's names"),
        ([torch.zeros(3)], "state dict"),
        (torch.zeros(3), "state dict"),
        ({"state_dict": small_clip().state_dict()}, "state dict"),
        ({1: torch.zeros(3)}, "state dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_state_dicts(tensors, named, tmp_path):
    assert named in error_of(write_pickle(tensors, tmp_path))


def test_unknown_names(tmp_path):
    for name in ("ViT-B/17", "vit-b/16", "tiny.safetensors", tmp_path, tmp_path / "none.pt"):
        message = error_of(name)
        assert all(known in message for known in ("tiny", *clip.available_models()))


# --- names


def test_input_projections_are_linear_layers_with_open_ais_names_outside():
    source, target = small_clip(seed=1), small_clip(seed=2)
    tensors = source.state_dict()
    kept = dict(tensors)
    target.load_state_dict(tensors)
    assert list(tensors) == list(kept)  # the caller's dictionary does not change
    assert_same_weights(target, kept)
    linear = target.transformer.resblocks[0].attn.in_proj
    assert isinstance(linear, nn.Linear)
    stacked = target.state_dict()["transformer.resblocks.0.attn.in_proj_weight"]
    assert stacked.data_ptr() == linear.weight.data_ptr()


# --- saving


@pytest.mark.parametrize("arch", [VIT, RESNET], ids=["vit", "resnet"])
def test_saving_is_exact(arch, tmp_path):
    model = small_clip(arch)
    with torch.no_grad():
        model.text_projection[0, 0], model.text_projection[0, 1] = 1 / 3, -0.0
    path = tmp_path / "model.safetensors"
    save_weights(model, path)
    loaded, _ = clip.load(path)
    assert_same_weights(loaded, model.state_dict())
    assert loaded.text_projection[0, 1].signbit()
    assert clip.weights_sha256(loaded) == clip.weights_sha256(model)
    assert os.listdir(tmp_path) == ["model.safetensors"]

    save_weights(model, str(path), half=True)
    stored = load_file(path)
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    expected = {n: t.half().float() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    assert_same_weights(clip.load(path)[0], expected)
    assert loaded.text_projection[0, 0] != expected["text_projection"][0, 0]


def test_permissions_of_saved_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        save_weights(small_clip(), tmp_path / "model.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


# --- hashing


def test_the_hash_sees_every_tensor_and_single_bits():
    model = small_clip(RESNET)
    seen = {clip.weights_sha256(model)}
    tensors = model.state_dict()
    for tensor in tensors.values():
        flat = tensor.view(-1)
        before = flat[-1].item()
        flat[-1] = before + 1
        seen.add(clip.weights_sha256(model))
        flat[-1] = before
    assert len(seen) == len(tensors) + 1
    with torch.no_grad():
        model.ln_final.bias[0] = 0.0
        plus = clip.weights_sha256(model)
        model.ln_final.bias[0] = -0.0
    assert clip.weights_sha256(model) != plus


def test_the_hash_never_changes():
    """Deltas name their base by it."""
    model = small_clip()
    for i, tensor in enumerate(model.state_dict().values()):
        tensor.copy_((torch.arange(tensor.numel()).view(tensor.shape) + i) / 1024)
    assert clip.weights_sha256(model) == "93f9cd52d8fc84779493930ebf04ccd1f0796f00ccae9e96428d7f6f9fd054f8"


def test_tiny_is_a_clip_with_the_real_vocabulary():
    model, preprocess = clip.load("tiny")
    assert model.arch.vocab_size == 49408 and model.arch.context_length == 77
    assert preprocess.transforms[1].size == (model.arch.resolution,) * 2
    assert model.encode_text(clip.tokenize(["a cat", "the digit five"])).shape == (2, model.arch.embed_dim)
