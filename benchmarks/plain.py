"""The plain computation, slow and obvious. Tests compare the fast one with it, and benchmarks time both.

Prompts are padded to 77 tokens, every token of every block is computed, weight gradients are dense, and SO works on
dense tensors, one parameter at a time. It uses the weights of an ordinary `clip.CLIP`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.model import CLIP, Block
from optimizers.SparseOptimizer import draw_support


def encode_image(model: CLIP, images: Tensor) -> Tensor:
    """Map images [B, 3, R, R] to embeddings [B, E]."""
    if not model.arch.is_vit:
        return model.visual(images)
    tower = model.visual
    x = tower.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1) + tower.positional_embedding
    x = tower.ln_pre(x)
    for block in tower.transformer.resblocks:
        x = _block(block, x, mask=None)
    return tower.ln_post(x[:, 0]) @ tower.proj


def encode_text(model: CLIP, tokens: Tensor, vector_at: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
    """Map token ids [B, 77] to embeddings [B, E]; `vectors` [V, D] replace tokens where `vector_at` [B, 77] >= 0."""
    x = model.token_embedding(tokens)
    if vectors is not None:
        x = torch.where((vector_at >= 0)[..., None], vectors[vector_at.clamp(min=0)], x)
    x = x + model.positional_embedding
    mask = torch.full((tokens.shape[1], tokens.shape[1]), -torch.inf, device=x.device).triu(1)
    for block in model.transformer.resblocks:
        x = _block(block, x, mask)
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
    return model.ln_final(x) @ model.text_projection


def _block(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    attn, mlp = block.attn, block.mlp
    B, T, D = x.shape
    y = F.linear(block.ln_1(x), attn.in_proj.weight, attn.in_proj.bias)
    q, k, v = y.view(B, T, 3, attn.heads, D // attn.heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / (D // attn.heads) ** 0.5
    if mask is not None:
        scores = scores + mask
    y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, D)
    x = x + F.linear(y, attn.out_proj.weight, attn.out_proj.bias)
    y = F.linear(block.ln_2(x), mlp.c_fc.weight, mlp.c_fc.bias)
    y = y * torch.sigmoid(1.702 * y)
    return x + F.linear(y, mlp.c_proj.weight, mlp.c_proj.bias)


class DenseSO:
    """SO on dense tensors: masks and moments are as large as the weights, and the top-k is over all of them."""

    def __init__(self, params: list[nn.Parameter], lr: float, density_ratio: float, T: int, seed: int = 0):
        self.params, self.lr, self.T, self.betas, self.eps = params, lr, T, (0.9, 0.999), 1e-8
        self.ks = [max(1, int(p.numel() * density_ratio)) for p in params]
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]
        self.kept = [torch.zeros_like(p, dtype=torch.bool) for p in params]
        self.support = [torch.zeros_like(p, dtype=torch.bool) for p in params]
        self.generator = torch.Generator().manual_seed(seed)  # in the same state as SO's: the same draws
        self.t = 0

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        if self.t % self.T == 0:
            for p, support, k in zip(self.params, self.support, self.ks):
                support.zero_().view(-1)[draw_support(p.numel(), k, self.generator, p.device)] = True
        self.t += 1
        beta1, beta2 = self.betas
        for p, m, v, kept, support, k in zip(self.params, self.m, self.v, self.kept, self.support, self.ks):
            grad = p.grad * support
            m.mul_(beta1).add_(grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            update = self.lr / (1 - beta1**self.t) * m / ((v / (1 - beta2**self.t)).sqrt() + self.eps)
            union = kept | support
            p.sub_(update * union)
            best = m.abs().masked_fill(~union, -1).view(-1).topk(k).indices
            kept.zero_().view(-1)[best] = True
            m.mul_(kept)
            v.mul_(kept)
