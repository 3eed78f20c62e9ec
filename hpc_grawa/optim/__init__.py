"""Local optimizers: how a rank steps.

``--optimizer`` is one of this package (``SGD``, ``AdamW``, ...), or the import path of any optimizer of torch
(``torch.optim.RAdam``) or of one's own that takes the parameters first and an ``lr``; its other arguments are its
settings (``--optimizer.help torch.optim.RAdam``). LBFGS trains where ranks average; SparseAdam is refused.

- ``SAM``, ``ASAM`` and ``LPFSGD`` make another gradient, by which ``base`` steps: any optimizer that steps once by the
  gradient it is given (``--optimizer SAM --optimizer.base AdamW --optimizer.base.lr 1e-3``; ``SGD`` where none is
  named). lr, weight decay, momentum and groups are the base's.
- ``EntropySGD`` trains other parameters than those that are evaluated and saved, which its ``eval()`` puts in place,
  and ``train()`` back; so do schedule-free optimizers (``--optimizer schedulefree.AdamWScheduleFree``). They train
  where gradients are shared; a loop of one's own makes these calls itself.
- ``Muon`` steps matrices, and the rest by AdamW. ``Lion``, ``LARS`` and ``LAMB`` are timm's
  (``pip install 'hpc-grawa[optim]'``).

``--optimizer.groups`` gives parameters settings of their own, as ``[{match: "*.bias|ndim<2", weight_decay: 0}]``:
``match`` holds patterns of names, or ``ndim`` compared with a number, with ``|`` between them; ``lr_factor`` is of
``lr``, and what else the optimizer keeps for each of torch's ``param_groups`` may follow. A parameter belongs to the
first group that it matches; a pattern that matches none is an error.

A class derived from ``LocalOptimizer`` builds its optimizer itself, by ``build(vector, facts)``, and sees names,
parameters (``self.grouped(vector)``) and the run's progress. In a loop of one's own all of them are built so, and given
the closure of ``Run.closure``, which they ask for what they need::

    vector, facts = hpc_grawa.ParameterVector(model), hpc_grawa.schedules.RunFacts(total_steps=steps)
    optimizer = hpc_grawa.optim.SAM(rho=0.05, base=hpc_grawa.optim.SGD(lr=0.1)).build(vector, facts)
    run = hpc_grawa.DataParallel().build(comm, vector, optimizer, facts=facts)
    closure = run.closure(loss)           # for LPFSGD loss((i, M)) is that of the i-th of M parts of the batch
    for batch in batches:                 # which loss() is of, however often SAM calls it
        run.after_step(optimizer.step(closure))
"""

from .base import LocalOptimizer, build
from .builtin import SGD, AdamW
from .entropy_sgd import EntropySGD
from .lamb import LAMB
from .lars import LARS
from .lion import Lion
from .lpf_sgd import LPFSGD
from .muon import Muon
from .sam import ASAM, SAM

__all__ = [
    "ASAM",
    "LAMB",
    "LARS",
    "LPFSGD",
    "SAM",
    "SGD",
    "AdamW",
    "EntropySGD",
    "Lion",
    "LocalOptimizer",
    "Muon",
    "build",
]
