"""Small CLIPs with random weights, and the file formats that weights come in."""

import torch
from safetensors.torch import save_file
from torch import nn

import clip
from clip.model import Architecture

VIT = Architecture(24, 32, 64, 2, 16, context_length=77, vocab_size=64, text_width=64, text_layers=2)
RESNET = Architecture(16, 64, 8, (1, 2, 1, 1), None, context_length=9, vocab_size=64, text_width=128, text_layers=1)


class Node(nn.Module):
    """A holder of tensors and nodes; TorchScript needs a forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write_torchscript(tensors, folder):
    """Write a real TorchScript archive whose modules hold these tensors, in a tree by their dotted names."""
    root = Node()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, Node())
            node = node._modules[parent]
        if tensor.is_floating_point() and "running" not in leaf:
            node.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            node.register_buffer(leaf, tensor)
    path = folder / "archive.pt"
    torch.jit.script(root).save(str(path))
    return path


def write_pickle(tensors, folder):
    path = folder / "state.pt"
    torch.save(tensors, path)
    return path


def write_safetensors(tensors, folder):
    path = folder / "state.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


FORMATS = {"torchscript": write_torchscript, "pickle": write_pickle, "safetensors": write_safetensors}


@torch.no_grad()
def small_clip(arch: Architecture = VIT, seed: int = 0) -> clip.CLIP:
    """Return a CLIP with random weights that are exact in half precision; no tensor is all zeros or ones."""
    torch.manual_seed(seed)
    model = clip.CLIP(arch).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.1 * torch.randn_like(tensor)
            tensor.copy_((tensor + (noise.abs() if "running_var" in name else noise)).half())
    return model


def halved(model):
    return {n: t.half() if t.dim() > 1 else t for n, t in model.state_dict().items()}


def assert_same_weights(model, expected):
    actual = model.state_dict()
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
