"""How the tokens of a batch are arranged, and which tokens attention lets each of them see.

A transformer block leaves three things to a layout, such as `Images` or `PackedPrompts`: `attend` is attention among
all tokens, from queries, keys and values side by side [..., 3D] to [..., D], `used` picks the token of each image or
prompt that the embedding is computed from, [..., D] to [B, D], and `attend_used` is attention with only those tokens'
queries [B, D], and keys and values [..., 2D] of all. Everything else in a block works on each token separately. A
layout that `pools` has no such token: `used` is a mean of several, after the whole last block.
Notation: B images or prompts, T tokens, D width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:  # [B, T, D] -> [B, H, T, D/H]
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join_heads(x: Tensor) -> Tensor:  # [B, H, T, D/H] -> [B, T, D]
    return x.transpose(1, 2).flatten(2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, all [B, H, T, D/H]; `mask` is 0 where a query sees a key, else -inf."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and not is_causal:
        # On a CPU the fused kernel's backward is slow in bf16: forward and backward of ViT-B/16's attention on
        # 4 images take 25 ms with it and 11 ms as matrix products (benchmarks/RESULTS.md).
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """The same with all heads side by side, [B, T, D]."""
    return _join_heads(_attention(*(split_heads(x, heads) for x in (q, k, v)), mask, is_causal))


class _Rearranged(torch.autograd.Function):
    """Rows of x [N, D] in another order, x[index]. The gradient is also only a gather, grad[inverse].

    A row without a place in the result has any number in `inverse`, and `unplaced` [N, 1] is True there.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, unplaced: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, unplaced)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse, unplaced = ctx.saved_tensors
        return grad.index_select(0, inverse).masked_fill_(unplaced, 0), None, None, None


class _Padded(torch.autograd.Function):
    """The `parts` of x [T, parts x D], (queries,) keys and values, as attention takes them, from packed prompts.

    Return them for each prompt, queries [B, S, D] of its rest, keys and values [B, prefix + S, D], then for the common
    prefix, all [prefix, D].
    """

    @staticmethod
    def forward(ctx, x: Tensor, prompts: "PackedPrompts", parts: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.prompts, ctx.parts, (B, S), prefix = prompts, parts, prompts.shape, prompts.prefix
        *queries, keys, values = x.index_select(0, prompts.filled).view(B, prefix + S, -1).chunk(parts, dim=-1)
        return *(q[:, prefix:] for q in queries), keys, values, *x[:prefix].chunk(parts, dim=-1)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        prefix, (*queries, keys, values) = ctx.prompts.prefix, grads[: ctx.parts]
        # No token sees padding, and what it attends to is dropped: its gradient is zero.
        rests = torch.cat([*queries, keys[:, prefix:], values[:, prefix:]], dim=-1).flatten(0, 1)
        rests = rests.index_select(0, ctx.prompts.slots)
        if prefix == 0:
            return rests, None, None
        shared = torch.cat([keys[:, :prefix], values[:, :prefix]], dim=-1).sum(dim=0)
        if grads[-1] is not None:
            first = torch.cat(grads[ctx.parts :], dim=-1)
            first[:, -shared.shape[1] :].add_(shared)
            shared = first
        return torch.cat([shared, rests]), None, None


class Images:
    """Image tokens [B, T, D]. Each token sees all tokens of its image; the first, the class token, is used."""

    pools = False

    def attend(self, qkv: Tensor, heads: int) -> Tensor:
        return _attend(*qkv.chunk(3, dim=-1), heads)

    def used(self, x: Tensor) -> Tensor:
        return x[:, 0]

    def attend_used(self, q: Tensor, kv: Tensor, heads: int) -> Tensor:
        return _attend(q.unsqueeze(1), *kv.chunk(2, dim=-1), heads).squeeze(1)


class MeanImages(Images):
    """The same, with the mean of the patches' tokens in place of the class token's."""

    pools = True

    def used(self, x: Tensor) -> Tensor:
        return x[:, 1:].mean(dim=1)


IMAGES, MEAN_IMAGES = Images(), MeanImages()


class Prompts:
    """What both kinds of prompts have: token ids, their positions, and the places of learned vectors (as in CoOp).

    `ids` are [T] or [B, T], `positions` index the positional embeddings. `vector_places` are the places, among all
    tokens in order, that learned vectors take, and `vector_rows` are the vectors.
    """

    pools = False
    ids: Tensor
    positions: Tensor
    vector_places: Tensor
    vector_rows: Tensor

    def _place_vectors(self, rows: Tensor | None) -> None:
        """Set the places from `rows`, which has for each token the vector in its place, or -1. None: no vectors."""
        if rows is None:
            self.vector_places = self.vector_rows = self.ids.new_empty(0)
            return
        rows = rows.flatten()
        self.vector_places = (rows >= 0).nonzero().view(-1)
        self.vector_rows = rows[self.vector_places]

    def to(self, device: torch.device) -> "Prompts":
        """Move the indices to `device`, in place, and return self."""
        if self.ids.device != device:
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(device))
        return self


class PaddedPrompts(Prompts, Images):
    """Prompts of a text tower in which every token sees all others, padding included: activations [B, T, D].

    Nothing can be left out then, and a common beginning has other activations in every prompt.
    """

    def __init__(self, tokens: Tensor, ends: Tensor, vector_at: Tensor | None = None):
        """`tokens`, `vector_at` [B, T]: see `PackedPrompts`. `ends` [B]: the tokens that embeddings come from."""
        self.ids, self.ends = tokens, ends
        self.positions = torch.arange(tokens.shape[1], device=tokens.device)
        self.rows = torch.arange(tokens.shape[0], device=tokens.device)
        self._place_vectors(vector_at)

    def used(self, x: Tensor) -> Tensor:
        return x[self.rows, self.ends]


class PackedPrompts(Prompts):
    """Prompts without padding and with their common beginning only once: token ids [T], then activations [T, D].

    Text attention is causal, and the embedding is computed from one token, the prompt's end; in CLIP it is the
    end-of-text token. So the tokens after it do not matter, and a beginning that all prompts share ("<start> a photo of
    a") has the same activations in all of them. The T tokens are this prefix, then the rest of each prompt up to its
    end. ImageNet's 1000 class names take 4,170 tokens instead of 77,000 in padded prompts.

    Only attention needs separate prompts: it pads their rests to the longest, [B, S], and removes the padding again.

    Learned prompt vectors (as in CoOp) may replace tokens: `vector_at` says where, and `CLIP.encode_text` gets them.
    """

    def __init__(
        self,
        tokens: Tensor,
        share_prefix: bool = True,
        vector_at: Tensor | None = None,
        ends: Tensor | None = None,
    ):
        """Pack one prompt or more.

        `tokens` [B, context]: int64 ids as `clip.tokenize` makes them. `share_prefix`: False where dropout makes the
        activations of a common beginning differ. `vector_at` [B, context], int64: -1 where a token keeps its own
        embedding, else the row of the learned vector that replaces it; its token is a placeholder, such as that of "X".
        A beginning is shared where tokens and `vector_at` agree. `ends` [B]: the place of each prompt's end, by default
        that of its largest id, CLIP's end-of-text token.
        """
        lengths = (tokens.argmax(dim=1) if ends is None else ends) + 1  # [B], the end included
        vector_at = torch.full_like(tokens, -1) if vector_at is None else vector_at
        same = ((tokens == tokens[0]) & (vector_at == vector_at[0])).all(dim=0)
        shared = same.cumprod(dim=0).sum()
        # Every prompt keeps its end.
        self.prefix = int(min(shared, lengths.min() - 1)) if share_prefix else 0
        rests = lengths - self.prefix
        self.shape = len(tokens), int(rests.max())  # B, S
        columns = torch.arange(self.shape[1], device=tokens.device)
        is_token = columns < rests[:, None]  # [B, S]

        def pack(x: Tensor) -> Tensor:  # [B, context] -> [T]
            return torch.cat([x[0, : self.prefix], x[:, self.prefix : self.prefix + self.shape[1]][is_token]])

        self.ids = pack(tokens)
        self.positions = pack(torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))
        self._place_vectors(pack(vector_at))
        last = rests.cumsum(dim=0) - 1  # [B], each prompt's end among the rests
        # [T - prefix], each rest's place in the padded [B * S], and the other way round; a prompt's end fills its row.
        self.slots = is_token.view(-1).nonzero().view(-1)
        self.is_padding = ~is_token.view(-1, 1)
        fillers = torch.minimum((last - rests + 1)[:, None] + columns, last[:, None])
        self.fillers = fillers.view(-1)
        # [B * (prefix + S)], the same places among the T, with the prefix before each rest.
        prefixes = torch.arange(self.prefix, device=tokens.device).expand(len(tokens), -1)
        self.filled = torch.cat([prefixes, self.prefix + fillers], dim=1).view(-1)
        self.ends = self.prefix + last  # [B], each prompt's end among the T, and [T], whose end a token is, if any
        self.is_no_end = torch.ones(len(self.ids), 1, dtype=torch.bool, device=tokens.device)
        self.is_no_end[self.ends] = False
        self.end_of = ((~self.is_no_end).view(-1).cumsum(dim=0) - 1).clamp(min=0)
        # Which keys (prefix, then padded rest) a query sees. Padding is last, so no token sees it.
        keys = torch.arange(self.prefix + self.shape[1], device=tokens.device)
        self.causal = keys <= self.prefix + columns[:, None]  # [S, prefix + S]
        self.until_end = (keys < lengths[:, None])[:, None, None]  # [B, 1, 1, prefix + S]
        self.masks: dict[tuple, Tensor] = {}

    def _mask(self, name: str, x: Tensor) -> Tensor:
        """Return `causal` or `until_end` as `_attention` takes it, in the type of x; it is made once.

        In memory each row has a multiple of 16 numbers, as a GPU's attention wants it.
        """
        key = name, x.dtype, x.device
        if key not in self.masks:
            sees = getattr(self, name)
            *rows, length = sees.shape
            mask = x.new_zeros(*rows, length + -length % 16)[..., :length]
            self.masks[key] = mask.masked_fill_(~sees, -torch.inf)
        return self.masks[key]

    def attend(self, qkv: Tensor, heads: int) -> Tensor:
        q, k, v, *first = _Padded.apply(qkv, self, 3)
        rests = _attend(q, k, v, heads, self._mask("causal", qkv)).flatten(0, 1)
        rests = _Rearranged.apply(rests, self.slots, self.fillers, self.is_padding)
        if self.prefix == 0:
            return rests
        first = _attend(*(x.unsqueeze(0) for x in first), heads, is_causal=True)
        return torch.cat([first.squeeze(0), rests])

    def used(self, x: Tensor) -> Tensor:
        return _Rearranged.apply(x, self.ends, self.end_of, self.is_no_end)

    def attend_used(self, q: Tensor, kv: Tensor, heads: int) -> Tensor:
        keys, values, *_ = _Padded.apply(kv, self, 2)
        return _attend(q.unsqueeze(1), keys, values, heads, self._mask("until_end", q)).squeeze(1)


Layout = Images | Prompts
