"""The loss between models of runs, for ``hpc-grawa flatness --landscape``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..comm import Communicator
from ..errors import ConfigError
from ..flatness.landscape import Plane, line
from ..flatness.objective import Objective
from ..runs.log import Log, write_atomically
from .finished import CENTER, FinishedRun
from .flatness import How, named, weights

#: Where a line begins and ends: before the first model and beyond the second.
FROM, TO = -0.5, 1.5
#: Around the models, in parts of the longer side of the box that holds them.
MARGIN = 0.4


def landscape(
    first: FinishedRun, others: Sequence[Path], how: How, comm: Communicator, points: int, figure: Path
) -> None:
    """Draw the loss along lines and on a plane, and write its numbers beside the figure; all ranks must call it.

    Of one run lines go from its center to each rank's model; of several, from the first run's center to the others'.
    The plane goes through the first three of these models; there is none where they are fewer or lie on one line.
    BatchNorm has the statistics of the first center, or a batch's.

    Raises:
        ConfigError: there is one model alone, runs have other parameters than the first, or no loss is finite.
    """
    objective = how.objective(first, comm)
    models = _models(first, others, objective)
    if len(models) < 2:
        raise ConfigError(
            f"there is nothing between models of {first.run}, which has kept no rank's own: give further runs"
        )
    first.put(CENTER)
    log = Log(None, speaks=comm.rank == 0)
    done, total = 0, (len(models) - 1) * points + points**2

    def watch(batches: int) -> None:
        nonlocal done
        done += 1
        if log.due:
            log.progress(min(1.0, done / (total * batches)), "the loss between models")

    objective.watch = watch
    (start, begin), *ends = models.items()
    at = np.linspace(FROM, TO, points).tolist()
    found: dict[str, Any] = {"how": how.said(objective, first), "from": start, "at": at, "lines": {}}
    for name, end in ends:
        distance = float((end.double() - begin.double()).norm())
        found["lines"][name] = {"distance": distance, "losses": line(objective, begin, end, at)}
    chosen = list(models)[:3]
    if len(chosen) == 3:
        try:
            plane = Plane((models[chosen[0]], models[chosen[1]], models[chosen[2]]))
        except ConfigError:
            log.say("landscape  without a plane: the models lie on one line")
        else:
            places = {name: plane.place(model) for name, model in models.items()}
            across, up = _sides(list(places.values()), points)
            losses = plane.losses(objective, across, up).tolist()
            found["plane"] = {"through": chosen, "places": places, "across": across, "up": up, "losses": losses}
    log.close()
    if comm.rank == 0:
        from ..report.landscape import draw

        numbers = figure.with_name(f"{figure.name}.json")
        write_atomically(numbers, json.dumps(found) + "\n")
        draw(found, figure)
        log.say(f"\nlandscape  {figure}, {numbers.name}")


def _models(first: FinishedRun, others: Sequence[Path], objective: Objective) -> Mapping[str, Tensor]:
    """Parameters ``[P]`` by name, the center from which lines go first."""
    if not others:
        names = (CENTER, *(f"rank {m}" for m in range(first.ranks)))
        return {name: weights(first, objective, name) for name in names}
    found = {}
    for run, title in named([first.run, *others]).items():
        first.put_center_of(run)
        found[title] = objective.vector.data.clone()
    return found


def _sides(places: Sequence[tuple[float, float]], points: int) -> tuple[list[float], list[float]]:
    """Coordinates of a grid around the models, as far apart on both axes as a square with them inside needs."""
    corners = np.array(places)
    low, high = corners.min(0), corners.max(0)
    half = (0.5 + MARGIN) * float((high - low).max())
    middle = (low + high) / 2
    across, up = (np.linspace(middle[i] - half, middle[i] + half, points).tolist() for i in (0, 1))
    return across, up
