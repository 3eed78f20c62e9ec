"""How flat the loss is around a model: spectra of its Hessian, and losses of neighbouring models.

Of any model, loss and examples, on one process or shared by ranks (``comm``)::

    examples = hpc_grawa.data.TensorExamples(images, labels)    # or any of one's own, see hpc_grawa.data.Examples
    objective = Objective(model, nn.CrossEntropyLoss(), examples, comm)
    lanczos = Lanczos(len(objective.vector), seed=0, comm=comm, device=objective.vector.data.device)
    for _ in range(100):
        lanczos.advance(objective.product)
    print(lanczos.ritz()[0][-1])    # the largest eigenvalue

All measures at once are ``measure(Subject(objective), Settings())``; ``hpc-grawa flatness RUN`` takes those of a run's
models. Products with the Hessian are made here, as curvlinops knows of no ranks; a test holds them against its own.
"""

from .estimators import Estimate, trace_and_square
from .lanczos import Lanczos, density
from .landscape import Plane, line
from .measure import Settings, Subject, measure
from .objective import Objective
from .perturbed import keskar_sharpness, lpf, sam_sharpness, valley_width

__all__ = [
    "Estimate",
    "Lanczos",
    "Objective",
    "Plane",
    "Settings",
    "Subject",
    "density",
    "keskar_sharpness",
    "line",
    "lpf",
    "measure",
    "sam_sharpness",
    "trace_and_square",
    "valley_width",
]
