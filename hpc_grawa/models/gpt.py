"""A small GPT: Radford et al., Language Models are Unsupervised Multitask Learners, 2019."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require


def _rotations(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, width / 2]`` by which pairs of a head's ``width`` channels turn at each place.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
    """
    frequency = 10_000 ** -(torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(length, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def _rotated(x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    """``x`` ``[..., length, width]`` with its pairs (channel i of either half) turned."""
    (cos, sin), (a, b) = rotations, x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


class _Block(nn.Module):
    """x + attention(x), then x + mlp(x), each normalised first; no place sees a later one."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, rotations: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        if rotations is not None:
            q, k = _rotated(q, rotations), _rotated(k, rotations)
        dropped = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
        x = x + F.dropout(self.out(seen.transpose(1, 2).flatten(2)), dropped)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), dropped)


class GPT(nn.Module):
    """A transformer that guesses the next token at each place; embedding and output share one matrix.

    About 12·depth·width² parameters, and those of vocabulary and places. Initialised as GPT-2: N(0, .02²), biases 0,
    what is added to the residual stream smaller by √(2·depth), places N(0, .01²).

    Args:
        vocabulary: tokens that there are, V; settled by the data.
        context: places of a sequence at most; settled by the data.
        depth: blocks of attention and MLP.
        width: channels of the residual stream.
        heads: of each attention; they divide the width.
        dropout: rate, of attention, of what is added to the residual stream, and of the embedding.
        positions: how a place is known: rotary (queries and keys turn, no parameters) or learned (a vector each, as in
            GPT-2).
    """

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 128,
        depth: int = 4,
        width: int = 128,
        heads: int = 4,
        dropout: float = 0.0,
        positions: Literal["rotary", "learned"] = "rotary",
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("context", context), ("depth", depth), ("heads", heads)):
            require(value >= 1, f"model.{name}", value, "at least 1")
        pairs = 2 if positions == "rotary" else 1
        divisible = f"a multiple of {pairs * heads}, for {heads} heads{' of pairs' if pairs == 2 else ''}"
        require(width >= 1 and width % (pairs * heads) == 0, "model.width", width, divisible)
        require(0 <= dropout < 1, "model.dropout", dropout, "in [0, 1)")
        self.context, self.dropout, self.head_width = context, dropout, width // heads
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width) if positions == "learned" else None
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                added = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * depth) if added else 0.01 if name.startswith("place") else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, V, T]`` of the token after each of ``tokens`` ``[B, T]``; classes second, as torch's losses."""
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"sequences of {length} tokens: model.context allows {self.context}")
        x = self.token(tokens)
        rotations = None
        if self.place is None:
            rotations = _rotations(length, self.head_width, tokens.device)
        else:
            x = x + self.place.weight[:length]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, rotations)
        return F.linear(self.norm(x), self.token.weight).transpose(1, 2)
