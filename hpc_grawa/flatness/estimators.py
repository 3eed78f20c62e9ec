"""What random vectors say of a Hessian: its trace, and its Frobenius norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .lanczos import Product


@dataclass(frozen=True)
class Estimate:
    """A mean of independent samples.

    Attributes:
        value: the mean.
        error: its standard error; NaN of a single sample.
    """

    value: float
    error: float

    @classmethod
    def of(cls, samples: Tensor, offset: float = 0.0) -> Estimate:
        """Of ``samples`` ``[n]``, with what is known exactly beside."""
        error = float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else math.nan
        return cls(offset + float(samples.mean()), error)


def signs(size: int, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Rademacher vectors ``[P, count]``: 1 or -1, each as likely."""
    drawn = torch.randint(0, 2, (size, count), generator=generator, dtype=torch.int8)
    return (2 * drawn - 1).to(like)


def trace_and_square(
    product: Product, like: Tensor, samples: int, seed: int, watch: Callable[[int], None] = lambda done: None
) -> tuple[Estimate, Estimate]:
    """Trace H by Hutch++, and ‖H‖_F² = E‖Hz‖², with 3·samples products.

    tr H = tr(QᵀHQ) + E gᵀ(1 - QQᵀ)H(1 - QQᵀ)g, Q an orthonormal basis of H·S, S the same random signs as z. Its first
    term is exact, so that what is uncertain is what the sketch leaves.

    Args:
        product: H·v.
        like: ``[P]``, for size, dtype and device.
        samples: columns of the sketch S, and vectors g.
        seed: the same on all ranks.
        watch: told how many products there were.

    Source: Meyer, Musco, Musco and Woodruff, Hutch++: Optimal Stochastic Trace Estimation, SOSA 2021, algorithm 1.

    Example:
        >>> diagonal = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
        >>> trace, square = trace_and_square(lambda v: diagonal * v, diagonal, samples=4, seed=0)
        >>> round(trace.value, 9), square.value
        (6.0, 14.0)
    """
    size, generator = len(like), torch.Generator().manual_seed(seed)
    done = 0

    def times(columns: Tensor) -> Tensor:
        nonlocal done
        found = []
        for column in columns.T:
            found.append(product(column.contiguous()).to(like))
            watch(done := done + 1)
        return torch.stack(found, 1)

    sketched = times(signs(size, samples, generator, like))
    square = Estimate.of(sketched.double().square().sum(0))
    q = torch.linalg.qr(sketched).Q
    known = float((q * times(q)).sum(dtype=torch.float64))
    g = signs(size, samples, generator, like)
    g -= q @ (q.T @ g)
    rest = (g * times(g)).sum(0, dtype=torch.float64)
    return Estimate.of(rest, known), square
