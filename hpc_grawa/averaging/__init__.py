"""Parameter averaging: scores, weights, one allreduce, a center, a pull; and when."""

from .averager import Averager, WeightRule, argmin, inverse, pull
from .scores import Equal, GradientNorm, RunningGradientNorm, Score, TrainingLoss
from .synchronizer import Pool, Round, Synchronizer

__all__ = [
    "Averager",
    "Equal",
    "GradientNorm",
    "Pool",
    "Round",
    "RunningGradientNorm",
    "Score",
    "Synchronizer",
    "TrainingLoss",
    "WeightRule",
    "argmin",
    "inverse",
    "pull",
]
