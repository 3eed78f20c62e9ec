"""Data sets, how ranks share them, and how batches are made of them."""

from ..nests import Nest
from .arrays import ArraySplit, Augmentation
from .base import Ahead, Data, Examples, ImageData, Splits, in_advance
from .cifar import CIFAR
from .datasets import Datasets
from .digits import Digits
from .imagenet import ImageNet
from .sharding import Sampler, Split, held_out, shard_size
from .tensors import TensorExamples
from .text import Text

__all__ = [
    "CIFAR",
    "Ahead",
    "ArraySplit",
    "Augmentation",
    "Data",
    "Datasets",
    "Digits",
    "Examples",
    "ImageData",
    "ImageNet",
    "Nest",
    "Sampler",
    "Split",
    "Splits",
    "TensorExamples",
    "Text",
    "held_out",
    "in_advance",
    "shard_size",
]
