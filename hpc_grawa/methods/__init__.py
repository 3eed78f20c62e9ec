"""The methods: one file per paper, each a dataclass of the paper's hyper-parameters and a few lines.

What holds for all of them:

- Evaluated models are named: ``center`` (of the last round), ``mean`` (of all ranks) and ``local`` (each rank). Their
  BatchNorm statistics are recalibrated on training batches (``--method.buffers recalibrate | average | local``).
- All other buffers belong to the weights (spectral norm's vectors, codebooks, moving averages) and stay together as one
  rank has them: at a round all ranks take over those of the rank that weighs most, an evaluation those of rank 0 (the
  next where it has NaN). They ride in the message; register constants and caches with ``persistent=False``, which do
  not. Frozen parameters that the model changes itself (momentum encoders, mean teachers) follow the same rule:
  evaluations share those in which ranks differ, and so do rounds, which look for them at rounds 1, 2, 4, 8, ...; a
  frozen backbone is not sent.
- Time is training time on rank 0; evaluation does not count. It is divided into computing, loading (the model has
  nothing to do until its next batch is there), communicating and waiting for the slowest rank (measured in the small
  gather before each round, evaluation and checkpoint; where gradients are shared, what is waited between these is part
  of communicating).
- A rank whose parameters become NaN gets weight 0 and is healed from the center; the run says so and goes on.
- A slow rank need not slow the others. With ``--method.rounds pooled`` all ranks together make W·τ local steps per
  round, each as many as it can, and a round waits for one step of the slowest at most. Steps, epochs, learning rate and
  budget then count what all ranks made divided by W, at rounds only.
- The last step ends with a round, shortened if need be, so that every run ends with a center.
- A wrong setting is one line that names key, value and what is allowed, exit status 2, before anything starts. (Under
  mpirun a few lines of its own follow; the first one counts.)
- A rank that fails ends the job on all ranks within seconds, with its traceback.
"""

from .averaging import AveragingMethod, Level
from .base import Method, Probe
from .data_parallel import DataParallel
from .deep_gradient_compression import DeepGradientCompression
from .diloco import DiLoCo
from .dppf import DPPF
from .easgd import EASGD
from .ef_sign import EFSign
from .grawa import GRAWA, LGRAWA, MGRAWA, LocalLGRAWA, LocalMGRAWA
from .local_sgd import LocalSGD
from .lsgd import LSGD
from .one_bit import OneBitSGD
from .parle import Parle
from .powersgd import PowerSGD
from .run import Run
from .sharing import SharingMethod
from .slowmo import SlowMo

__all__ = [
    "DPPF",
    "EASGD",
    "GRAWA",
    "LGRAWA",
    "LSGD",
    "MGRAWA",
    "AveragingMethod",
    "DataParallel",
    "DeepGradientCompression",
    "DiLoCo",
    "EFSign",
    "Level",
    "LocalLGRAWA",
    "LocalMGRAWA",
    "LocalSGD",
    "Method",
    "OneBitSGD",
    "Parle",
    "PowerSGD",
    "Probe",
    "Run",
    "SharingMethod",
    "SlowMo",
]
