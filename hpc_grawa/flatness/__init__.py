"""How flat the loss is around a model: spectra of its Hessian, and losses of neighbouring models.

Of any model, loss and examples, on one process or shared by ranks (``comm``)::

    objective = Objective(model, nn.CrossEntropyLoss(), examples, comm)
    lanczos = Lanczos(len(objective.vector), seed=0, comm=comm)
    for _ in range(100):
        lanczos.advance(objective.product)
    print(lanczos.ritz()[0][-1])    # the largest eigenvalue

``hpc-grawa flatness RUN`` does so for the models of a run.
"""

from .estimators import Estimate, trace_and_square
from .lanczos import Lanczos, density
from .landscape import Plane, line
from .objective import Objective
from .perturbed import keskar_sharpness, lpf, sam_sharpness, valley_width

__all__ = [
    "Estimate",
    "Lanczos",
    "Objective",
    "Plane",
    "density",
    "keskar_sharpness",
    "line",
    "lpf",
    "sam_sharpness",
    "trace_and_square",
    "valley_width",
]
