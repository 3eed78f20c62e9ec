"""The loss between models of runs, for ``hpc-grawa flatness --landscape``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..batchnorm import norms
from ..comm import Communicator
from ..errors import ConfigError
from ..flatness.landscape import Plane, line
from ..flatness.measure import Models
from ..flatness.objective import Objective
from ..runs.log import Log, write_atomically
from .finished import CENTER, FinishedRun
from .flatness import How, named

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
    BatchNorm has each batch's statistics, as no model between others has any.

    Raises:
        ConfigError: there is one model alone, runs have other parameters than the first, or no loss is finite.
    """
    if norms(first.model):
        how = how._replace(statistics="batch")
    first.put(CENTER)  # until then ranks have no model in common
    objective = how.objective(first, comm)
    names, models = _models(first, others, objective)
    if len(names) < 2:
        raise ConfigError(
            f"there is nothing between models of {first.run}, which has kept no rank's own: give further runs"
        )
    for _ in models:
        pass  # one that cannot be read is told before losses are computed
    log = Log(None, speaks=comm.rank == 0)
    done, total = 0, (len(names) - 1) * points + points**2

    def watch(batches: int) -> None:
        nonlocal done
        done += 1
        if log.due:
            log.progress(min(1.0, done / (total * batches)), f"the loss between models, {done // batches} of {total}")

    objective.watch = watch
    begin = models[0]
    at = np.linspace(FROM, TO, points).tolist()
    found: dict[str, Any] = {"how": how.said(objective, first), "from": names[0], "at": at, "lines": {}}
    for number, name in enumerate(names[1:], 1):
        end = models[number]
        distance = float((end.double() - begin.double()).norm())
        found["lines"][name] = {"distance": distance, "losses": line(objective, begin, end, at)}
    if len(names) > 2:
        try:
            plane = Plane((begin, models[1], models[2]))
        except ConfigError:
            log.say("landscape  without a plane: the models lie on one line")
        else:
            places = {name: plane.place(models[number]) for number, name in enumerate(names)}
            across, up = _sides(list(places.values()), points)
            losses = plane.losses(objective, across, up).tolist()
            found["plane"] = {"through": names[:3], "places": places, "across": across, "up": up, "losses": losses}
    log.close()
    if comm.rank == 0:
        from ..report.landscape import draw

        numbers = figure.with_name(f"{figure.name}.json")
        write_atomically(numbers, json.dumps(found) + "\n")
        draw(found, figure)
        log.say(f"\nlandscape  {figure}, {numbers.name}")


def _models(first: FinishedRun, others: Sequence[Path], objective: Objective) -> tuple[list[str], Models]:
    """Names, and parameters ``[P]``, lines' beginning first; reads leave its BatchNorm in place."""
    own = [CENTER, *(f"rank {m}" for m in range(first.ranks))]
    centers = named([first.run, *others])

    def read(number: int) -> Tensor:
        if others:
            first.put_center_of(list(centers)[number])
        else:
            first.put(own[number])
        found = objective.vector.data.clone()
        first.put(CENTER)
        return found

    names = list(centers.values()) if others else own
    return names, Models(len(names), read)


def _sides(places: Sequence[tuple[float, float]], points: int) -> tuple[list[float], list[float]]:
    """Coordinates of a grid around the models, as far apart on both axes as a square with them inside needs."""
    corners = np.array(places)
    low, high = corners.min(0), corners.max(0)
    half = (0.5 + MARGIN) * float((high - low).max())
    middle = (low + high) / 2
    across, up = (np.linspace(middle[i] - half, middle[i] + half, points).tolist() for i in (0, 1))
    return across, up
