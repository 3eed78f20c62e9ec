"""Gradient sharing: what happens to gradients before the optimizer steps."""

from .base import Aggregator
from .buckets import Bucketed
from .codec import Bucket, Codec
from .mean import Mean
from .powersgd import LowRank
from .signs import OneBit, ScaledSigns
from .topk import TakenOver, TopK
from .wires import ReducedWire

__all__ = [
    "Aggregator",
    "Bucket",
    "Bucketed",
    "Codec",
    "LowRank",
    "Mean",
    "OneBit",
    "ReducedWire",
    "ScaledSigns",
    "TakenOver",
    "TopK",
]
