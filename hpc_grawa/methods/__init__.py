"""The methods: one file per paper, each a dataclass of the paper's hyper-parameters with a short ``build``."""

from .base import AveragingMethod, Method, Probe
from .data_parallel import DataParallel
from .easgd import EASGD
from .grawa import GRAWA, LGRAWA, MGRAWA, LocalLGRAWA, LocalMGRAWA
from .local_sgd import LocalSGD
from .lsgd import LSGD
from .run import Run

__all__ = [
    "EASGD",
    "GRAWA",
    "LGRAWA",
    "LSGD",
    "MGRAWA",
    "AveragingMethod",
    "DataParallel",
    "LocalLGRAWA",
    "LocalMGRAWA",
    "LocalSGD",
    "Method",
    "Probe",
    "Run",
]
