"""Text as ``data_prep/text.py`` leaves it: a stream of tokens, seen through windows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import in_a_line, require, wrong
from .base import Data, Splits

_PARTS = ("train", "validation", "test")


@dataclass(kw_only=True)
class Text(Data):
    """Windows of a text, and at each place the token that comes next.

    Windows lie side by side, so that an epoch's N windows hold N · ``context`` tokens to guess, and an evaluation
    guesses each token once (but for fewer than ``context`` at the end). The files are mapped: ranks on a host share
    them, and only what is seen is read.

    Attributes:
        batch_size: windows per rank and step.
        validation: windows of the prepared validation part, evenly spaced, that evaluations in the run are made on; 0:
            they are made on the test part.
        path: the folder that ``python data_prep/text.py --files FILE ... --out DIR`` made.
        context: tokens that a window shows.
        shift: move each training window by 0 to ``context`` - 1 tokens, at random: cuts differ from pass to pass.
    """

    batch_size: int = 32
    path: str
    context: int = 128
    shift: bool = True

    def size(self) -> int:
        """Windows to train on, and those to validate on, which are no part of them.

        Raises:
            ConfigError: the folder is missing, foreign or damaged.
        """
        return self._windows("train") + self.validation

    def check(self, world_size: int) -> None:
        """Find impossible values without loading or communicating anything.

        Raises:
            ConfigError: the message names key, value and what is allowed.
        """
        require(self.context >= 1, "data.context", self.context, "at least 1 token")
        counts = self._facts()["counts"]
        part, least = min(((part, counts[part]) for part in _PARTS), key=lambda pair: pair[1])
        most = f"at most {least - 1:,}, as the {part} part has {least:,} tokens"
        require(self.context < least, "data.context", self.context, most)
        windows = self._windows("validation")
        most = f"0 to {windows}, the windows of the validation part"
        require(0 <= self.validation <= windows, "data.validation", self.validation, most)
        super().check(world_size)

    def load(self) -> Splits:
        """Map the files.

        Raises:
            ConfigError: the folder is missing, foreign or damaged.
        """
        self._facts()
        train, validation, test = (
            Windows(np.load(self._file(part), mmap_mode="r"), self.context, self.shift and part == "train")
            for part in _PARTS
        )
        count = self.validation
        spaced = torch.arange(count) * len(validation) // max(count, 1)
        return Splits(train, validation.subset(spaced) if count else None, test)

    def model_arguments(self) -> dict[str, object]:
        """``vocabulary`` (its size) and ``context``."""
        return {"vocabulary": self._facts()["vocabulary_size"], "context": self.context}

    def metric_arguments(self) -> dict[str, object]:
        """``token_bytes``; None where tokens are bytes."""
        return {"token_bytes": self._facts()["token_bytes"]}

    def _windows(self, part: str) -> int:
        return max(0, int(self._facts()["counts"][part]) - 1) // max(1, self.context)

    def _file(self, part: str) -> Path:
        return Path(self.path) / f"{part}.npy"

    def _facts(self) -> dict[str, Any]:
        """meta.json, once every array is seen to have the size that it states, and ``token_bytes`` made from it."""
        try:
            facts: dict[str, Any] = json.loads((Path(self.path) / "meta.json").read_bytes())
            vocabulary = facts["vocabulary"]
            size = 256 if vocabulary is None else len(vocabulary)
            facts["token_bytes"] = None if vocabulary is None else [len(token.encode()) for token in vocabulary]
            if facts["unit"] not in ("bytes", "characters") or facts["vocabulary_size"] != size:
                raise ValueError(f"it holds {facts['unit']}, {facts['vocabulary_size']} of {size} in the vocabulary")
            for part in _PARTS:
                file, count = self._file(part), facts["counts"][part]
                array = np.load(file, mmap_mode="r")  # reads the header, and whether the file is long enough
                if array.shape != (count,) or array.dtype.name != facts["dtype"] or array.dtype.kind != "u":
                    raise ValueError(f"{file.name} is {array.dtype} {array.shape}, not {facts['dtype']} ({count},)")
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {error} in meta.json" if isinstance(error, KeyError) else in_a_line(error)
            raise wrong(
                "data.path",
                repr(self.path),
                f"must be a folder made by `python data_prep/text.py --files FILE ... --out DIR` ({reason})",
            ) from None
        return facts


class Windows:
    """Windows of a stream of tokens.

    Args:
        tokens: whole numbers ``[T]``, in memory or mapped.
        context: tokens that a window shows, C; window i begins at token i·C.
        shift: move windows of training batches by 0 to C - 1 tokens, drawn from the batch's generator; the last one as
            far as the stream goes.
        index: the windows to see, int64; None for all ⌊(T - 1)/C⌋.
    """

    def __init__(self, tokens: NDArray[Any], context: int, shift: bool = False, index: Tensor | None = None) -> None:
        self.tokens, self.context, self.shift = tokens, context, shift
        self.index = torch.arange((len(tokens) - 1) // context) if index is None else index

    def __len__(self) -> int:
        """Number of windows, N."""
        return len(self.index)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, C]`` of the windows ``index`` ``[B]``, and the next token at each place ``[B, C]`` (int64)."""
        start = self.index[index] * self.context
        if self.shift and generator is not None:
            shift = torch.randint(self.context, start.shape, generator=generator)
            start = (start + shift).clamp(max=len(self.tokens) - 1 - self.context)
        places = start[:, None] + torch.arange(self.context + 1)
        taken = torch.from_numpy(self.tokens[places.numpy()].astype(np.int64))
        return taken[:, :-1].contiguous(), taken[:, 1:].contiguous()

    def subset(self, index: Tensor) -> Windows:
        """The windows ``index`` of these."""
        return Windows(self.tokens, self.context, self.shift, self.index[index])
