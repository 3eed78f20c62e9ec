"""Gradient sharing: what happens to gradients before the optimizer steps."""

from .base import Aggregator
from .buckets import Bucketed
from .codec import Bucket, Codec
from .mean import Mean

__all__ = ["Aggregator", "Bucket", "Bucketed", "Codec", "Mean"]
