"""A small transformer that guesses the next character of a text: own model, data, loss and metric, in one file.

    mpirun -np 2 hpc-grawa train --model character_model.Transformer --data character_model.Text --data.path LICENSE \
        --loss character_model.NextCharacter --metric character_model.Perplexity --optimizer AdamW --budget.epochs 1

(where this file lies, or with its folder on PYTHONPATH).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_grawa.data import Data, Splits, TensorExamples
from hpc_grawa.errors import ConfigError
from hpc_grawa.metrics import Metric


@dataclass(kw_only=True)
class Text(Data):
    """The characters of a text: windows of its beginning to train on, its last tenth to test on.

    Attributes:
        batch_size: windows per rank and step.
        path: any UTF-8 text.
        context: characters that a window shows.
    """

    path: str
    batch_size: int = 16
    context: int = 64

    @cached_property
    def text(self) -> str:
        try:
            return Path(self.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.path is {self.path}: must be a UTF-8 text ({error})") from None

    @property
    def vocabulary(self) -> list[str]:
        return sorted(set(self.text))

    @property
    def end(self) -> int:
        return len(self.text) * 9 // 10

    def size(self) -> int:
        """A window begins at every character but the last ones."""
        return max(0, self.end - self.context)

    def check(self, world_size: int) -> None:
        if self.validation:
            raise ConfigError(f"data.validation is {self.validation}: must be 0, as windows overlap")
        if len(self.text) - self.end <= self.context:
            raise ConfigError(f"data.path is {self.path}: must have over {10 * self.context + 10} characters")
        super().check(world_size)

    def model_arguments(self) -> dict[str, object]:
        return {"characters": len(self.vocabulary), "context": self.context}

    def load(self) -> Splits:
        number = {character: i for i, character in enumerate(self.vocabulary)}
        numbers = torch.tensor([number[character] for character in self.text])

        def windows(part: Tensor, apart: int) -> TensorExamples:
            window = part.unfold(0, self.context + 1, apart)  # a view: nothing is copied
            return TensorExamples(window[:, :-1], window[:, 1:])

        # Windows to test on lie side by side, so that every guess counts once.
        return Splits(windows(numbers[: self.end], 1), None, windows(numbers[self.end :], self.context))


class Block(nn.Module):
    """x + attention(x), then x + mlp(x), each normalised first."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + F.dropout(self.out(seen.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class Transformer(nn.Module):
    """Logits `[B, T, characters]` of the next character at each of the places of `[B, T]`; sees no later place.

    Args:
        characters: in the vocabulary.
        context: characters seen, T at most.
        width: of the residual stream.
        layers: blocks of attention and MLP.
        heads: of each attention.
        dropout: rate, everywhere.
    """

    def __init__(
        self,
        characters: int = 256,
        context: int = 64,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.character, self.place = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        x = self.character(x) + self.place(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class NextCharacter(nn.CrossEntropyLoss):
    """Mean cross entropy of logits `[B, T, V]` and characters `[B, T]`."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output.flatten(0, 1), target.flatten())


class Perplexity(Metric):
    """exp of the mean negative log-likelihood of a character: as unsure as among so many equally likely ones."""

    name = "perplexity"
    higher_is_better = False

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        surprise = F.cross_entropy(output.flatten(0, 1).double(), target.flatten(), reduction="sum")
        return torch.stack((surprise, surprise.new_tensor(target.numel())))

    def value(self, sums: Tensor) -> float:
        return float((sums[0] / sums[1]).exp())
