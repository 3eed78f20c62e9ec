"""Which models of a run are evaluated: center, mean, and each rank's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..batchnorm import pool, recalibrate
from ..buffers import shared
from ..data import Examples, in_advance
from ..flatness.measure import CHEAP, Models, Settings, Subject, measure
from ..flatness.objective import Objective
from ..forward import undisturbed
from ..runs.checkpoint import model_state
from .evaluate import Evaluator, uniform_mean
from .worker import Worker


class Examiner:
    """Puts the evaluated models in place, one after the other, and evaluates them; training notices nothing of it.

    A model in place has one set of buffers on all ranks: running statistics as ``method.buffers`` says, all others (and
    ``local`` statistics) and frozen parameters as they are now on rank 0, or the first rank where none is NaN.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker, self._config, self._comm = worker, worker.config, worker.comm
        self._model = worker.model
        self._evaluator = Evaluator(
            self._config.loss, self._config.metric, self._config.precision, self._config.eval.batch_size
        )

    @contextmanager
    def center(self) -> Iterator[Tensor | None]:
        """Within the block the model is the center; before the first round, the mean of all ranks.

        Yields this rank's own model ``[P]``, which ``flatness`` wants, where that is measured.
        """
        with self._worker.meant():
            own = self._worker.run.local.clone() if self._config.eval.flatness else None
            with self._in_place(self._center()):
                yield own

    def _center(self) -> Tensor:
        run = self._worker.run
        if run.synchronizers and run.synchronizers[-1].averager.center is None:
            return uniform_mean(self._comm, run.local)[0]
        return run.center

    @contextmanager
    def _in_place(self, parameters: Tensor) -> Iterator[None]:
        train, sampler = self._worker.splits.train, self._worker.sampler
        policy = self._config.method.buffers
        with undisturbed(self._model), self._worker.vector.swapped(parameters):
            if policy == "average":
                pool(self._model, self._comm)
            with shared(self._model, self._comm):
                if policy == "recalibrate":
                    wanted = ((sampler.indices(b), None) for b in range(self._config.eval.bn_batches))
                    batches = (inputs for inputs, _ in in_advance(train, wanted, self._worker.device))
                    recalibrate(self._model, batches, self._comm, self._config.precision)
                yield

    def consensus_distance(self) -> float | None:
        """sqrt(mean_m ‖x_m - x̄‖²) of the ranks' models; None where all have one, as gradients are shared."""
        run = self._worker.run
        return uniform_mean(self._comm, run.local)[1] if run.synchronizers else None

    def evaluate(self, examples: Examples, limit: int | None = None) -> dict[str, float]:
        """Loss and metric of the model that is in place; all ranks share the work."""
        return self._evaluator.evaluate(self._model, examples, self._comm, limit)

    def flatness(self, own: Tensor) -> dict[str, Any]:
        """What is cheap to say of the loss around the model that is in place, towards each rank's ``own`` among it."""
        config, vector = self._config, self._worker.vector
        limit = config.eval.flatness
        batch_size = min(config.eval.batch_size, max(1, config.data.batch_size // config.accumulate))  # with gradients
        objective = Objective(vector, config.loss, self._worker.splits.train, self._comm, limit, batch_size)
        ranks = Models(
            self._comm.size if self._worker.run.synchronizers else 0,
            lambda rank: self._comm.broadcast(own.clone(), rank, "evaluate").wait(),
        )
        found = measure(Subject(objective, ranks), Settings(measures=CHEAP))
        return {"examples": objective.examples} | {k: v for k, v in found.items() if isinstance(v, float)}

    def everything(self) -> dict[str, Any]:
        """Center and mean on test and training examples, each rank's model on test examples, and ``center_state``."""
        with self._worker.meant():
            return self._everything()

    def _everything(self) -> dict[str, Any]:
        splits = self._worker.splits
        mean, consensus = uniform_mean(self._comm, self._worker.run.local)
        found: dict[str, Any] = {"consensus_distance": consensus}
        for title, parameters in (("center", self._center()), ("mean", mean)):
            with self._in_place(parameters):
                test = self.evaluate(splits.test)
                train = self.evaluate(splits.train, self._config.eval.train_examples)
                if title == "center":
                    found["center_state"] = model_state(self._model)
            for key in test:
                found |= {f"{title}_test_{key}": test[key], f"{title}_train_{key}": train[key]}
        with self._worker.vector.swapped(self._worker.run.local):
            local = self._evaluator.evaluate(self._model, splits.test)
        row = torch.tensor(list(local.values()), dtype=torch.float64)
        table = self._comm.allgather(row, "evaluate").wait()
        return found | {f"local_test_{key}": table[:, column].tolist() for column, key in enumerate(local)}
