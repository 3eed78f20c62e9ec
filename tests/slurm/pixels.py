"""Data whose ranks start a second sooner than with Digits, which import scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpc_grawa.data import Data, Splits, TensorExamples


@dataclass(kw_only=True)
class Pixels(Data):
    """Random images in ten classes, as many and as large as Digits'."""

    def size(self) -> int:
        return 1437

    def load(self) -> Splits:
        generator = torch.Generator().manual_seed(0)

        def images(count: int) -> TensorExamples:
            inputs = torch.randn(count, 1, 8, 8, generator=generator)
            return TensorExamples(inputs, torch.randint(10, (count,), generator=generator))

        return Splits(images(self.train_size()), images(self.validation) if self.validation else None, images(360))
