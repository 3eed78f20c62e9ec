"""Local optimizers: how a rank steps."""

from .base import LocalOptimizer
from .builtin import SGD, AdamW

__all__ = ["SGD", "AdamW", "LocalOptimizer"]
