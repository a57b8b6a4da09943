"""Image towers that are timm's, built by open_clip: SigLIP, EVA, ConvNeXt, ViTamin, MobileCLIP, PE-Core.

The text tower beside them is this program's own. timm is only imported for such models.
"""

import re

from torch import Tensor, nn

from .files import WeightsError
from .model import Trunk

_BLOCKS = re.compile(r"trunk\.(?:(?:stages|layers)\.\d+\.)?blocks")  # ViTs and EVA; ConvNeXt and FastViT; Swin
# Where open_clip puts the matrix that maps pooled features to the embedding, by the order of search.
_PROJECTIONS = ("head.proj.weight", "head.mlp.fc2.weight", "trunk.head.weight", "trunk.head.fc.weight")


def build(trunk: Trunk) -> nn.Module:
    """Return the image tower, from images [B, 3, R, R] to embeddings [B, E], with random weights.

    Raise WeightsError if open_clip or timm is missing, or does not know the tower.
    """
    try:
        import timm  # optional
        from open_clip.timm_model import TimmModel
    except ImportError as error:
        raise WeightsError(
            f"the image tower {trunk.name} needs open_clip and timm ({error}): pip install open_clip_torch"
        ) from None
    try:
        if trunk.options:
            tower = _Tower(timm.create_model(trunk.name, num_classes=0, global_pool=trunk.pool, **dict(trunk.options)))
        else:
            tower = TimmModel(
                trunk.name,
                trunk.embed_dim,
                image_size=trunk.resolution,
                pool=trunk.pool,
                proj=trunk.proj,
                proj_bias=trunk.proj_bias,
                pretrained=False,
            )
    except Exception as error:  # an unknown name, or sizes that do not go together
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"timm does not build the image tower {trunk.name} ({reason}); update timm") from error
    for module in tower.modules():
        if hasattr(module, "qkv_bias_separate"):  # EVA: else it passes its matrix by, and SO and LoRA do not see it
            module.qkv_bias_separate = True
    return tower.eval()


class _Tower(nn.Module):
    """A tower without anything behind it; its tensors have the same names as in open_clip's."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images)


def version() -> str:
    """Return timm's version, which features of such a tower depend on."""
    import timm

    return f"timm {timm.__version__}"


def blocks(tower: nn.Module) -> dict[str, nn.Module]:
    """Return the tower's blocks by name, in order. ViTamin's first stages lie before them."""
    found = {}
    for name, module in tower.named_modules():
        if _BLOCKS.fullmatch(name):
            found |= {f"{name}.{number}": block for number, block in module.named_children()}
    return found


def projection(tower: nn.Module) -> str | None:
    """Return the name of the matrix that gives the embedding, None if there is none, as in SigLIP."""
    names = {name for name, parameter in tower.named_parameters() if parameter.ndim > 1}
    return next((name for name in _PROJECTIONS if name in names), None)
