"""Which optimizers, methods, periods and ways of sharing go together: ``hpc-grawa methods --combinations``.

Each pair is built and makes a step, so the table says what the code does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from ..comm.single import SingleCommunicator
from ..errors import ConfigError, in_a_line
from ..methods import AveragingMethod, Method, SharingMethod
from ..optim import LocalOptimizer, build
from ..optim.imported import Imported
from ..report.table import aligned
from ..schedules import RunFacts
from ..screen import columns, wrapped
from ..vector import ParameterVector
from .classes import find_class, known_classes, required, short

#: For settings that have no default.
_GIVEN = 0.5
_YES = "yes"


def combinations() -> str:
    """Two tables, and of each refusal why."""
    methods = [find_class("method", name) for name in known_classes("method")]
    averaging = [_made(kind) for kind in methods if issubclass(kind, AveragingMethod)]
    sharing = [_made(kind) for kind in methods if issubclass(kind, SharingMethod)]
    optimizers: dict[str, Callable[[], LocalOptimizer]] = {
        name: find_class("optimizer", name) for name in known_classes("optimizer")
    }
    optimizers["torch.optim.LBFGS"] = lambda: Imported(kind=optim.LBFGS, arguments={"lr": 0.1})
    reasons: dict[str, int] = {}

    def cell(method: Callable[[], Method], optimizer: str, **told: object) -> str:
        try:
            _step(method(), optimizers[optimizer]())
        except (ConfigError, ValueError, RuntimeError) as error:
            why = re.sub(
                f"the optimizer is a {short(optimizer)}", "the optimizer", in_a_line(error), flags=re.IGNORECASE
            )
            for name, value in told.items():
                why = why.replace(f"{value}", name)
            return f"no ({reasons.setdefault(why, len(reasons) + 1)})"
        return _YES

    def with_period(period: type, way: SharingMethod | None) -> str:
        """Of all averaging methods, the first that refuses."""
        every = _made(period)
        told = {"this": every} if way is None else {"this": every, "given": way}
        found = (cell(partial(dataclasses.replace, m, period=every, sharing=way), "SGD", **told) for m in averaging)
        return next((text for text in found if text != _YES), _YES)

    by_method = {
        type(method).__name__: [cell(partial(dataclasses.replace, method), name) for name in optimizers]
        for method in (*averaging, *sharing)
    }
    periods = [find_class("method.period", name) for name in known_classes("method.period")]
    ways: dict[str, SharingMethod | None] = {"null": None} | {type(m).__name__: m for m in sharing}
    by_way = {name: [with_period(period, way) for period in periods] for name, way in ways.items()}
    width = min(columns(), 120)
    return "\n\n".join(
        (
            _table("--optimizer", list(optimizers), by_method, width),
            "Of every averaging method by its period, and by --method.sharing, which shares gradients before a switch:",
            _table("--method.period", [kind.__name__ for kind in periods], by_way, width),
            "\n".join(wrapped(f"({number}) {reason}", width, "", "    ") for reason, number in reasons.items()),
        )
    )


def _made(kind: type) -> Any:
    return kind(**dict.fromkeys(required(kind), _GIVEN))


def _step(method: Method, settings: LocalOptimizer) -> None:
    """A short run of one rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(8, 4)
    facts = RunFacts(total_steps=2, steps_per_epoch=2)
    vector = ParameterVector(model)
    optimizer = build(settings, vector, facts)
    facts.lr = facts.peak_lr = settings.lr

    def loss(part: tuple[int, int] = (0, 1)) -> torch.Tensor:
        outputs: torch.Tensor = model(inputs.chunk(part[1])[part[0]])
        return outputs.square().mean()

    run = method.build(SingleCommunicator(), vector, optimizer, loss, facts=facts)
    try:
        closure = run.closure(loss)
        for _ in range(2):
            run.after_step(optimizer.step(closure))  # type: ignore[arg-type]
        run.finish()
    finally:
        run.close()


def _table(corner: str, rows: Sequence[str], by_column: dict[str, list[str]], width: int) -> str:
    """Markdown, columns that say the same in one."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, cells in by_column.items():
        alike.setdefault(tuple(cells), []).append(name)
    heads: list[str] = []
    legend: list[str] = []
    for names in alike.values():
        if len(names) < 4:
            heads.append(", ".join(names))
            continue
        letter = chr(ord("a") + len(legend))
        heads.append(f"{len(names)} methods ({letter})")
        legend.append(wrapped(f"({letter}) {', '.join(names)}", width, "", "    "))
    grid = [[corner, *heads], *([row, *(cells[at] for cells in alike)] for at, row in enumerate(rows))]
    return "\n".join([*aligned(grid), *([""] if legend else []), *legend])
