"""Local optimizers: how a rank steps.

``--optimizer`` is ``SGD``, ``AdamW``, or the import path of any optimizer of torch (``torch.optim.RAdam``) or of one's
own that takes the parameters first and an ``lr``; its other arguments are its settings (``--optimizer.help
torch.optim.RAdam``). LBFGS trains where ranks average, Muon models of matrices only; SparseAdam is refused.

``--optimizer.groups`` gives parameters settings of their own, as ``[{match: "*.bias|ndim<2", weight_decay: 0}]``:
``match`` holds patterns of names, or ``ndim`` compared with a number, with ``|`` between them; ``lr_factor`` is of
``lr``, and what else the optimizer keeps for each of torch's ``param_groups`` may follow. A parameter belongs to the
first group that it matches; a pattern that matches none is an error.

A class derived from ``LocalOptimizer`` builds its optimizer itself, by ``build(vector, facts)``, and sees names,
parameters (``self.grouped(vector)``) and the run's progress.
"""

from .base import LocalOptimizer, build
from .builtin import SGD, AdamW

__all__ = ["SGD", "AdamW", "LocalOptimizer", "build"]
