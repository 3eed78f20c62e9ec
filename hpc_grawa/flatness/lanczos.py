"""Eigenvalues of a Hessian by Lanczos's method: Golub and Welsch, 1969; Ghorbani, Krishnan and Xiao, ICML 2019."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..comm import Communicator
from ..comm.single import SingleCommunicator
from ..errors import NonFinite

#: H·v of ``[P]``.
Product = Callable[[Tensor], Tensor]
#: Ritz values and weights.
Ritz = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


class Lanczos:
    """k steps of Lanczos's method with full reorthogonalisation, from a random start.

    H is seen through T = QᵀHQ, which is tridiagonal: its eigenvalues are the Ritz values θ_i, with weights τ_i, the
    squares of the first components of its eigenvectors; Σ τ_i g(θ_i) estimates tr g(H) / P. After as many steps as H
    has distinct eigenvalues these are the θ_i, and τ_i the squared component of the start in each eigenspace.

    Every rank keeps its part of each of the k vectors, k·P/W numbers; all call every method together.

    Args:
        size: P.
        seed: of the start, N(0, 1) and normalised; the same on all ranks.
        comm: the ranks; None: this process alone.
        dtype: of the vectors.
        device: of the vectors.

    Example:
        >>> lanczos = Lanczos(3, seed=0, dtype=torch.float64)
        >>> while not lanczos.complete:
        ...     lanczos.advance(lambda v: torch.tensor([1.0, 2.0, 3.0]) * v)
        >>> lanczos.ritz()[0].round(9).tolist()
        [1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        size: int,
        seed: int,
        comm: Communicator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._comm = comm or SingleCommunicator()
        self._size, self._dtype, self._device = size, dtype, torch.device(device)
        self._width = -(-size // self._comm.size)  # of a rank's part; that of the last is filled up with zeros
        start = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self._next = (start / start.norm()).to(dtype).to(self._device)
        self._basis: list[Tensor] = []
        self._alpha: list[float] = []
        self._beta: list[float] = []

    @property
    def steps(self) -> int:
        """That were made."""
        return len(self._alpha)

    @property
    def complete(self) -> bool:
        """Whether all distinct eigenvalues are found: no direction is left but round-off, β ≤ 100·eps·max(|α|, |β|)."""
        if self.steps >= self._size:
            return True
        scale = max(map(abs, (*self._alpha, *self._beta)), default=0.0)
        return bool(self._beta) and self._beta[-1] <= 100 * torch.finfo(self._dtype).eps * scale

    def advance(self, product: Product) -> None:
        """One step: one H·v.

        Raises:
            NonFinite: it is not finite, on all ranks.
        """
        self._basis.append(self._part(self._next))
        part = self._part(product(self._next).to(self._dtype)).clone()
        alpha = self._take_away(part)
        self._take_away(part)  # what round-off has left
        square = float(self._sums(part.double().square().sum().reshape(1)))
        if not math.isfinite(alpha + square):
            self._basis.pop()
            raise NonFinite(f"the Hessian has no spectrum: its product of step {self.steps + 1} is not finite")
        beta = math.sqrt(square)
        self._alpha.append(alpha)
        self._beta.append(beta)
        whole = self._comm.allgather(part / beta if beta else part, "evaluate").wait()
        self._next = whole.flatten()[: self._size].clone()

    def _take_away(self, part: Tensor) -> float:
        """Make the vector orthogonal to the basis; returns how much of the last one there was."""
        along = self._sums(torch.stack([q @ part for q in self._basis])).tolist()
        for share, q in zip(along, self._basis, strict=True):
            part.sub_(q, alpha=share)
        return float(along[-1])

    def ritz(self) -> Ritz:
        """Ritz values, ascending, and their weights ``[k]``, which sum to 1."""
        values, vectors = self._eigenpairs()
        return values, vectors[0] ** 2

    def residuals(self) -> np.ndarray[Any, Any]:
        """‖Hy_i - θ_i y_i‖ = β_k|s_ki| of each Ritz value ``[k]``: an eigenvalue of H lies so near to it, or nearer."""
        _, vectors = self._eigenpairs()
        found: np.ndarray[Any, Any] = self._beta[-1] * np.abs(vectors[-1])
        return found

    def _eigenpairs(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """θ_i ``[k]`` and s_i ``[k, k]`` of T."""
        from scipy.linalg import eigh_tridiagonal

        values, vectors = eigh_tridiagonal(np.array(self._alpha), np.array(self._beta[:-1]))
        return values, vectors

    def state_dict(self, basis: bool = True) -> dict[str, Any]:
        """All there is to go on with, of this rank; without the basis what ``ritz`` needs."""
        kept = [q.cpu() for q in self._basis] if basis else []
        return {"alpha": [*self._alpha], "beta": [*self._beta], "basis": kept, "next": self._next.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, on as many ranks."""
        self._alpha, self._beta = list(state["alpha"]), list(state["beta"])
        self._basis = [q.to(self._device) for q in state["basis"]]
        self._next = state["next"].to(self._device)

    def _part(self, x: Tensor) -> Tensor:
        """This rank's part of ``[P]``."""
        first = self._comm.rank * self._width
        part = x[first : first + self._width]
        return torch.nn.functional.pad(part, (0, self._width - len(part)))

    def _sums(self, x: Tensor) -> Tensor:
        return self._comm.allreduce(x.contiguous(), "evaluate").wait()


def density(spectra: list[Ritz], grid: np.ndarray[Any, Any], width: float) -> np.ndarray[Any, Any]:
    """The spectral density on a grid ``[G]``: the mean over starts of Σ τ_i N(t; θ_i, width²).

    Source: Ghorbani, Krishnan and Xiao, An Investigation into Neural Net Optimization via Hessian Eigenvalue Density,
    ICML 2019, equation 8 (stochastic Lanczos quadrature).

    Args:
        spectra: Ritz values and weights of one start each.
        grid: where.
        width: of each bump.
    """
    bumps = [
        np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2) @ weights / (width * math.sqrt(2 * math.pi))
        for values, weights in spectra
    ]
    found: np.ndarray[Any, Any] = np.mean(bumps, axis=0)
    return found
