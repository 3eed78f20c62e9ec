"""Gradient sharing: what happens to gradients before the optimizer steps."""

from .allreduce import AllreduceAggregator
from .base import Aggregator

__all__ = ["Aggregator", "AllreduceAggregator"]
