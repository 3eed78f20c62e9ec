"""Models measured: what own loops need of it."""

from .training.evaluate import recalibrate

__all__ = ["recalibrate"]
