"""Weighted averaging (GRAWA and its competitors) for training deep networks on HPC clusters.

Every method is a point on three independent axes: the local optimizer (``optim/``), gradient sharing
(``aggregation/``) and parameter averaging (``averaging/``; when: its ``synchronizer.py``). Imports run downward:
cli → training → methods → averaging, aggregation, optim → vector, comm. Only ``comm/`` knows MPI, Horovod or NCCL, only
``launch.py`` reads a launcher's variables, and nothing outside ``data/`` and ``metrics.py`` knows what an image or a
class is. Tests are written against ``simulate``, W ranks in one process that run one at a time, and repeated on real
ranks.

Example:
    >>> import torch, hpc_grawa
    >>> def train(comm):
    ...     model = torch.nn.Linear(2, 1)
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     batch = torch.ones(4, 2) * (comm.rank + 1)
    ...     loss = lambda: model(batch).square().mean()
    ...     run = hpc_grawa.LGRAWA(period=2).build(comm, hpc_grawa.ParameterVector(model), optimizer, probe=loss)
    ...     closure = run.closure(loss)
    ...     for _ in range(4):
    ...         run.after_step(optimizer.step(closure))
    ...     return run.synchronizers[0].completed
    >>> hpc_grawa.simulate(2, train)
    [2, 2]
"""

from .comm import Communicator, simulate
from .distributed_optimizer import DistributedOptimizer
from .methods import (
    DPPF,
    EASGD,
    GRAWA,
    LGRAWA,
    LSGD,
    MGRAWA,
    DataParallel,
    DiLoCo,
    LocalLGRAWA,
    LocalMGRAWA,
    LocalSGD,
    Method,
    Parle,
    Run,
    SlowMo,
)
from .vector import ParameterVector

__all__ = [
    "DPPF",
    "EASGD",
    "GRAWA",
    "LGRAWA",
    "LSGD",
    "MGRAWA",
    "Communicator",
    "DataParallel",
    "DiLoCo",
    "DistributedOptimizer",
    "LocalLGRAWA",
    "LocalMGRAWA",
    "LocalSGD",
    "Method",
    "ParameterVector",
    "Parle",
    "Run",
    "SlowMo",
    "simulate",
]
