"""CLIP's two towers, with OpenAI's parameter names, in float32.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3.

Notation in shape comments: B images or prompts, T tokens, D width, H heads, E embedding size.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .activations import ACTIVATIONS
from .layouts import IMAGES, MEAN_IMAGES, Layout, PackedPrompts, PaddedPrompts, Prompts
from .preprocess import Preprocessing
from .resnet import ModifiedResNet
from .tokenizer import ClipTokenizer


@dataclass(frozen=True)
class Trunk:
    """An image tower of timm's, as open_clip's configs name it; `resolution` in pixels, `embed_dim` of the CLIP.

    `options`: names and values that timm builds the tower with, where they are not those of `name`.
    """

    name: str
    pool: str
    proj: str | None
    proj_bias: bool
    resolution: int
    embed_dim: int
    options: tuple[tuple[str, int | float | str], ...] = ()


@dataclass(frozen=True)
class Conventions:
    """What no shape tells about a CLIP; the defaults are OpenAI's. `clip/conventions.py` knows those of other models.

    Activations are those of the MLPs: "quick_gelu", "gelu" or "gelu_tanh". The image embedding is computed from the
    class token ("token") or from the mean of the patches' ("mean"), the text embedding from the token of the largest id
    ("argmax"), from the first `eos_id` ("eos") or from the last place of the context ("last"). Without `causal`, every
    text token sees all others, padding included. `text_projection` is a "matrix", "linear" (with a bias) or "none".
    With a `trunk` the image tower is timm's, and what is said of images here has no meaning. Which tensors there must
    be stands here too, so that a file that lacks some is noticed.
    """

    vision_activation: str = "quick_gelu"
    text_activation: str = "quick_gelu"
    vision_head_width: int = 64
    text_head_width: int = 64
    vision_pool: str = "token"
    ln_pre: bool = True
    vision_scaled: bool = False  # LayerScale after attention and MLP
    text_scaled: bool = False
    causal: bool = True
    text_pool: str = "argmax"
    eos_id: int | None = None
    text_projection: str = "matrix"
    vision_eps: float = 1e-5  # of LayerNorms
    text_eps: float = 1e-5
    trunk: Trunk | None = None

    def ends(self, tokens: Tensor) -> Tensor:
        """Return for token ids [B, T] the place [B] that each text embedding is computed from."""
        if self.text_pool == "eos":
            return (tokens == self.eos_id).int().argmax(dim=1)
        if self.text_pool == "last":
            return torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
        return tokens.argmax(dim=1)


@dataclass(frozen=True)
class Architecture:
    """The numbers in which CLIPs differ; `clip.weights.read_architecture` derives them from shapes.

    A ViT has an integer `vision_layers` and a `patch_size`. A modified ResNet has a tuple of four block counts and
    `patch_size` None. With a tower of timm's, `vision_width` and `vision_layers` are 0.
    """

    embed_dim: int
    resolution: int
    vision_width: int
    vision_layers: int | tuple[int, int, int, int]
    patch_size: int | None
    context_length: int
    vocab_size: int
    text_width: int
    text_layers: int
    vision_mlp: int | None = None  # width of the MLPs; None: four times that of the tower
    text_mlp: int | None = None
    logit_bias: bool = False  # added to all logits, so that no accuracy and no gradient sees it
    conventions: Conventions = Conventions()

    @property
    def attention_width(self) -> int:
        """The width of the image tower's attention; a ResNet's pooled map is 32 times as wide as its stem."""
        return self.vision_width * (1 if self.is_vit else 32)

    @property
    def is_vit(self) -> bool:
        return isinstance(self.vision_layers, int)


@dataclass(frozen=True)
class Tower:
    """The numbers of a transformer. `mlp` is the width of its MLPs; `scaled`: it has LayerScale."""

    width: int
    layers: int
    heads: int
    mlp: int
    activation: str
    scaled: bool = False
    eps: float = 1e-5


class LayerScale(nn.Module):
    """A learned factor for each of D features, of a residual branch [..., D]."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention with queries, keys and values stacked in one projection.

    The input projection is an ordinary linear layer; in state dicts it has OpenAI's names `in_proj_weight` and
    `in_proj_bias`. `project` is the only method that applies it: code that changes the projection replaces `project`
    on the instance. The `layout` (`clip/layouts.py`) says how tokens are arranged and which of them see which.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.width, self.heads = width, heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.register_state_dict_post_hook(_use_openai_names)
        self.register_load_state_dict_pre_hook(_use_module_names)

    def project(self, x: Tensor, parts: str) -> Tensor:
        """Return queries, keys and values side by side, or only some `parts` of them, "q" or "kv": [..., parts x D]."""
        if parts == "qkv":
            return self.in_proj(x)
        rows = self.rows(parts)
        return F.linear(x, self.in_proj.weight[rows], self.in_proj.bias[rows])

    def rows(self, parts: str) -> slice:
        """Return the output rows of `in_proj` that `parts` are computed with."""
        start = "qkv".index(parts) * self.width
        return slice(start, start + len(parts) * self.width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map all tokens [..., D] to [..., D]."""
        return self.out_proj(layout.attend(self.project(x, "qkv"), self.heads))

    def forward_used(self, x: Tensor, layout: Layout) -> Tensor:
        """Map all tokens [..., D] to the output [B, D] of the used token of each image or prompt."""
        q = self.project(layout.used(x), "q")
        return self.out_proj(layout.attend_used(q, self.project(x, "kv"), self.heads))


def _use_openai_names(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for kind in ("weight", "bias"):
        if f"{prefix}in_proj.{kind}" in state_dict:  # not if a method has put another layer there
            state_dict[f"{prefix}in_proj_{kind}"] = state_dict.pop(f"{prefix}in_proj.{kind}")


def _use_module_names(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    for kind in ("weight", "bias"):
        if f"{prefix}in_proj_{kind}" in state_dict:
            state_dict[f"{prefix}in_proj.{kind}"] = state_dict.pop(f"{prefix}in_proj_{kind}")


class Block(nn.Module):
    """A pre-norm residual block: attention, then an MLP."""

    def __init__(self, tower: Tower):
        super().__init__()
        width, mlp = tower.width, tower.mlp
        self.ln_1 = nn.LayerNorm(width, tower.eps)
        self.attn = Attention(width, tower.heads)
        self.ls_1 = LayerScale(width) if tower.scaled else nn.Identity()
        self.ln_2 = nn.LayerNorm(width, tower.eps)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, mlp), gelu=ACTIVATIONS[tower.activation](), c_proj=nn.Linear(mlp, width))
        )
        self.ls_2 = LayerScale(width) if tower.scaled else nn.Identity()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), layout))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def forward_used(self, x: Tensor, layout: Layout) -> Tensor:
        """Map all tokens [..., D] to the output [B, D] of the used token of each image or prompt."""
        x = layout.used(x) + self.ls_1(self.attn.forward_used(self.ln_1(x), layout))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


Enter = Callable[[int, Tensor, Layout], tuple[Tensor, Layout]]


def _unchanged(index: int, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    return x, layout


class Transformer(nn.Module):
    """A stack of blocks, from all tokens [..., D] to the used token [B, D] of each image or prompt, or their mean.

    For the tokens that are not used the last block computes only keys and values: nothing else of them is needed.
    """

    checkpoints = False  # see `checkpoint_blocks`
    generators: Sequence[torch.Generator] = ()

    def __init__(self, tower: Tower):
        super().__init__()
        width, layers = tower.width, tower.layers
        self.resblocks = nn.ModuleList(Block(tower) for _ in range(layers))
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj.weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * layers) ** -0.5)
            nn.init.zeros_(block.attn.in_proj.bias)
            nn.init.zeros_(block.attn.out_proj.bias)

    def forward(self, x: Tensor, layout: Layout, enter: Enter = _unchanged, first: int = 0) -> Tensor:
        """`enter` may change tokens and layout before each block: (index of the block, x, layout) to (x, layout). `x`
        is what block `first` reads."""
        *blocks, last = self.resblocks
        for index, block in enumerate(blocks[first:], start=first):
            x, layout = enter(index, x, layout)
            x = self._run(block, x, layout)
        x, layout = enter(len(blocks), x, layout)
        return layout.used(self._run(last, x, layout)) if layout.pools else self._run(last.forward_used, x, layout)

    def checkpoint_blocks(self, generators: Sequence[torch.Generator] = ()) -> None:
        """From now on keep only the input of each block for backward, which computes the block again: the same bits for
        less memory and about a third more time (Chen et al. 2016, arXiv 1604.06174). Blocks may draw from torch's own
        generators and from `generators`."""
        self.checkpoints, self.generators = True, generators

    def _run(self, function: Callable[[Tensor, Layout], Tensor], x: Tensor, layout: Layout) -> Tensor:
        if not (self.checkpoints and torch.is_grad_enabled()):
            return function(x, layout)
        drawn = [generator.get_state() for generator in self.generators]
        contexts = lambda: (contextlib.nullcontext(), _drawing_again(self.generators, drawn))  # noqa: E731
        return checkpoint(function, x, layout, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _drawing_again(generators: Sequence[torch.Generator], drawn: Sequence[Tensor]) -> Iterator[None]:
    """Let generators draw again what they drew from the states `drawn` on."""
    now = [generator.get_state() for generator in generators]
    for generator, state in zip(generators, drawn):
        generator.set_state(state)
    try:
        yield
    finally:
        for generator, state in zip(generators, now):
            generator.set_state(state)


class VisionTransformer(nn.Module):
    """An image tower from [B, 3, R, R] to embeddings [B, E], computed from the class token or the patches' mean."""

    def __init__(
        self, resolution: int, patch_size: int, tower: Tower, embed_dim: int, ln_pre: bool = True, pool: str = "token"
    ):
        super().__init__()
        width = tower.width
        scale = width**-0.5
        tokens = (resolution // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width, tower.eps) if ln_pre else nn.Identity()
        self.transformer = Transformer(tower)
        self.ln_post = nn.LayerNorm(width, tower.eps)
        self.layout = MEAN_IMAGES if pool == "mean" else IMAGES
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.transformer(self.ln_pre(self.embed(images)), self.layout)
        return self.ln_post(x) @ self.proj

    def embed(self, images: Tensor) -> Tensor:
        """Return the class token and the patches of images, with their positions: [B, T, D]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, patches, D]
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)
        return torch.cat([class_token, x], dim=1) + self.positional_embedding


class CLIP(nn.Module):
    """Both towers. A new instance has random weights, as for training from scratch; `clip.load` replaces them.

    `tokenize` maps texts to token ids [N, context], `preprocessing` says how images become its input, `origin` where
    its conventions are known from. `logit_factor` is what cosines are multiplied by: 100, as in what was published with
    OpenAI's models; models with other conventions have their own, exp(logit_scale).
    """

    def __init__(self, arch: Architecture, visual: nn.Module | None = None):
        """`visual` is the image tower of an architecture with a trunk (`clip/trunks.py`)."""
        super().__init__()
        self.arch = arch
        self.tokenize: Callable[[Sequence[str]], Tensor] = ClipTokenizer(arch.context_length)
        self.preprocessing = Preprocessing(arch.resolution)
        self.origin = "its class"
        self.logit_factor = 100.0
        self.visual = visual or image_tower(arch)
        conventions, width = arch.conventions, arch.text_width
        tower = Tower(
            width,
            arch.text_layers,
            width // conventions.text_head_width,
            arch.text_mlp or 4 * width,
            conventions.text_activation,
            conventions.text_scaled,
            conventions.text_eps,
        )
        self.transformer = Transformer(tower)
        self.token_embedding = nn.Embedding(arch.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(arch.context_length, width))
        self.ln_final = nn.LayerNorm(width, tower.eps)
        if conventions.text_projection == "matrix":
            self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, arch.embed_dim))
        elif conventions.text_projection == "linear":
            self.text_projection = nn.Linear(width, arch.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        if arch.logit_bias:
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Map preprocessed images [B, 3, R, R] to embeddings [B, E], not normalised."""
        return self.visual(images)

    def prompts(self, tokens: Tensor, share_prefix: bool = True, vector_at: Tensor | None = None) -> Prompts:
        """Return prompts for `encode_text` of token ids [B, context]: packed, unless each token sees all others.

        The arguments are those of `PackedPrompts`. Make the prompts that are encoded again and again only once.
        """
        ends = self.arch.conventions.ends(tokens)
        if not self.arch.conventions.causal:
            return PaddedPrompts(tokens, ends, vector_at)
        return PackedPrompts(tokens, share_prefix, vector_at, ends)

    def encode_text(self, tokens: Tensor | Prompts, vectors: Tensor | None = None, enter: Enter = _unchanged) -> Tensor:
        """Map token ids [B, context] from `tokenize`, or `prompts` of them, to embeddings [B, E], not normalised.

        `vectors` [V, D] replace the embeddings of some tokens, as the prompts' `vector_at` says; positional embeddings
        are added afterwards. `enter`: see `Transformer`.
        """
        prompts = self.prompts(tokens) if isinstance(tokens, Tensor) else tokens
        prompts = prompts.to(self.device)
        return self._text_embedding(self.transformer(self._embedded(prompts, vectors), prompts, enter))

    def encode_text_from(self, x: Tensor, prompts: Prompts, block: int) -> Tensor:
        """Return what `encode_text` does, from `below_block`'s result on."""
        return self._text_embedding(self.transformer(x, prompts, first=block))

    @torch.no_grad()
    def below_block(self, prompts: Prompts, block: int) -> Tensor:
        """Return what a block of the text tower reads, [T, D] or [B, T, D], from 0 on; no gradient goes further."""
        x = self._embedded(prompts)
        for below in self.transformer.resblocks[:block]:
            x = below(x, prompts)
        return x

    def _embedded(self, prompts: Prompts, vectors: Tensor | None = None) -> Tensor:
        x = self.token_embedding(prompts.ids)  # [T, D], or [B, T, D] if padded
        if (vectors is None) != (len(prompts.vector_places) == 0):
            raise ValueError("learned vectors need prompts with vector_at, and such prompts need vectors")
        if vectors is not None:
            x = x.flatten(0, -2).index_copy(0, prompts.vector_places, vectors[prompts.vector_rows]).view_as(x)
        return x + self.positional_embedding[prompts.positions]

    def _text_embedding(self, x: Tensor) -> Tensor:
        x = self.ln_final(x)
        if self.arch.conventions.text_projection == "matrix":
            return x @ self.text_projection
        return self.text_projection(x) if self.arch.conventions.text_projection == "linear" else x


def image_tower(arch: Architecture) -> VisionTransformer | ModifiedResNet:
    """Return the image tower of an architecture, with random weights."""
    conventions = arch.conventions
    heads = arch.attention_width // conventions.vision_head_width
    if not arch.is_vit:
        return ModifiedResNet(arch.resolution, arch.vision_width, arch.vision_layers, heads, arch.embed_dim)
    tower = Tower(
        arch.vision_width,
        arch.vision_layers,
        heads,
        arch.vision_mlp or 4 * arch.vision_width,
        conventions.vision_activation,
        conventions.vision_scaled,
        conventions.vision_eps,
    )
    return VisionTransformer(
        arch.resolution, arch.patch_size, tower, arch.embed_dim, conventions.ln_pre, conventions.vision_pool
    )
