"""Local optimizers: how a rank steps."""

from .base import LocalOptimizer, build
from .builtin import SGD, AdamW

__all__ = ["SGD", "AdamW", "LocalOptimizer", "build"]
