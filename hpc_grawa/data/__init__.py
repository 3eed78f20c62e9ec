"""Data sets, how ranks share them, and how batches are made of them."""

from .arrays import ArraySplit, Augmentation
from .base import Data, Examples, ImageData, Splits
from .cifar import CIFAR
from .digits import Digits
from .sharding import Sampler, Split, held_out, shard_size
from .tensors import TensorExamples

__all__ = [
    "CIFAR",
    "ArraySplit",
    "Augmentation",
    "Data",
    "Digits",
    "Examples",
    "ImageData",
    "Sampler",
    "Split",
    "Splits",
    "TensorExamples",
    "held_out",
    "shard_size",
]
