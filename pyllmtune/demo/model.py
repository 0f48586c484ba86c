"""A small decoder-only transformer in plain PyTorch: rotary positions and a key-value cache.

Positions are relative, so a prompt may be padded on the left: only the padding keys are masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyllmtune.demo.vocabulary import PAD, TOKENS


@dataclass(frozen=True)
class ModelConfig:
    vocab: int = len(TOKENS)
    width: int = 64
    layers: int = 3
    heads: int = 2
    max_length: int = 128
    dtype: torch.dtype = torch.float32


class Cache:
    """Keys and values, written in place: ``[layers, 2, B, heads, length, head_width]``."""

    def __init__(self, config: ModelConfig, batch: int, length: int) -> None:
        head_width = config.width // config.heads
        shape = (config.layers, 2, batch, config.heads, length, head_width)
        self.store = torch.zeros(shape, dtype=config.dtype)
        self.valid = torch.zeros(batch, length, dtype=torch.bool)  # False at padding
        self.length = 0

    def expand(self, copies: int) -> None:
        """Repeat each row: a prompt is read once for all the answers of its group."""
        self.store = self.store.repeat_interleave(copies, dim=2)
        self.valid = self.valid.repeat_interleave(copies, dim=0)


def rotary_table(config: ModelConfig) -> Tensor:
    """``[max_length, head_width]``: cosines, then sines."""
    half = config.width // config.heads // 2
    frequency = 100.0 ** (
        -torch.arange(half) / half
    )  # 100: the longest prompt here is below 100 tokens
    angle = torch.arange(config.max_length)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """``x [B, heads, T, head_width]`` rotated by position, ``table [T, head_width]``."""
    cos, sin = table.chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Attention and a ReLU layer, each after a norm and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.feed_norm = nn.LayerNorm(config.width)
        self.feed_in = nn.Linear(config.width, 4 * config.width)
        self.feed_out = nn.Linear(4 * config.width, config.width)

    def forward(
        self, x: Tensor, table: Tensor, mask: Tensor | None, store: Tensor | None, start: int
    ) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(batch, length, 3 * self.heads, -1)
        query, key, value = heads.transpose(1, 2).chunk(3, dim=1)  # [B, heads, T, head_width] each
        query, key = rotate(query, table), rotate(key, table)
        if store is not None:
            store[0, :, :, start : start + length] = key
            store[1, :, :, start : start + length] = value
            key, value = store[0, :, :, : start + length], store[1, :, :, : start + length]
        causal = mask is None and length > 1
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed_out(F.relu(self.feed_in(self.feed_norm(x))))


class Transformer(nn.Module):
    """``tokens [B, T] -> logits [B, T, V]``; with a cache, they are the next ``T`` positions."""

    rotary: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.critic: nn.Linear | None = None
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.to(config.dtype)

    def add_critic(self) -> None:
        """A value head, 0 everywhere until it has learned."""
        self.critic = nn.Linear(self.config.width, 1, dtype=self.config.dtype)
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        return self.head(self.features(tokens, cache))

    def features(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """``[B, T, width]``, what the heads read."""
        start = 0 if cache is None else cache.length
        stop = start + tokens.shape[1]
        valid = tokens != PAD
        if cache is not None:
            cache.valid[:, start:stop] = valid
            valid = cache.valid[:, :stop]
        mask = attention_mask(valid, tokens.shape[1])
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            store = None if cache is None else cache.store[layer]
            x = block(x, self.rotary[start:stop], mask, store, start)
        if cache is not None:
            cache.length = stop
        return self.norm(x)


def attention_mask(valid: Tensor, queries: int) -> Tensor | None:
    """``[B, 1, queries, T]``, true where a query may look; None if that is plain causal."""
    length = valid.shape[1]
    causal = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    if valid.all() and queries in (1, length):
        return None
    own = torch.eye(queries, length, dtype=torch.bool).roll(
        length - queries, dims=1
    )  # padding sees itself: no NaN
    return (causal & valid[:, None, :] | own)[:, None]
