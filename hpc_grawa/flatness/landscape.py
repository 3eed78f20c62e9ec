"""The loss along a line between two models, and on the plane through three."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import ConfigError
from .objective import Objective

Array = npt.NDArray[np.float64]


def line(objective: Objective, begin: Tensor, end: Tensor, at: Sequence[float]) -> list[float]:
    """f(begin + t·(end - begin)) at each t.

    Args:
        objective: f.
        begin: a model ``[P]``, where t is 0.
        end: another one, where t is 1.
        at: the t.
    """
    start, way = begin.double(), end.double() - begin.double()
    return [objective.value((start + float(t) * way).to(begin)) for t in at]


class Plane:
    """The plane through three models, in orthogonal coordinates (a, b) of the parameter space's lengths.

    The first model is the origin, the second lies on the first axis.

    Args:
        corners: the models ``[P]``.

    Raises:
        ConfigError: they lie on one line.
    """

    def __init__(self, corners: tuple[Tensor, Tensor, Tensor]) -> None:
        origin, other, third = (corner.double() for corner in corners)
        u, v = other - origin, third - origin
        length = u.norm()
        if length:
            u = u / length
            v = v - (v @ u) * u
            v = v - (v @ u) * u  # once more, for what the first rounding has left
        height = v.norm()
        if not (length > 0 and height > 1e-5 * (third - origin).norm()):
            raise ConfigError("three models lie on one line, so there is no plane through them: take others")
        self._origin, self._u, self._v, self._like = origin, u, v / height, corners[0]

    def place(self, model: Tensor) -> tuple[float, float]:
        """Where a model ``[P]``, or the nearest point of the plane to it, lies."""
        x = model.double() - self._origin
        return float(x @ self._u), float(x @ self._v)

    def model(self, a: float, b: float) -> Tensor:
        """The model ``[P]`` there."""
        there: Tensor = self._origin + a * self._u + b * self._v
        return there.to(self._like)

    def losses(self, objective: Objective, across: Sequence[float], up: Sequence[float]) -> Array:
        """The losses ``[b, a]`` at all pairs of coordinates, a of ``across`` and b of ``up``."""
        return np.array([[objective.value(self.model(a, b)) for a in across] for b in up])
