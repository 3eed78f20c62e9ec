"""Models measured: what own loops need of it."""

from .batchnorm import recalibrate

__all__ = ["recalibrate"]
