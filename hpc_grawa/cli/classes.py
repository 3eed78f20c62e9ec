"""What class a name means, for the sections of a configuration that hold one."""

from __future__ import annotations

from dataclasses import MISSING, fields
from importlib import import_module
from inspect import isabstract
from types import GenericAlias

import torch
from torch import nn

from .. import data, methods, metrics, models, optim, periods, schedules
from ..errors import in_a_line, wrong
from ..methods import SharingMethod
from ..optim import LocalOptimizer
from ..periods import Period
from ..training.config import CLASS_SECTIONS

#: Settings within a section that may hold a class: its type, and the class where none is given but settings are.
HELD: dict[str, tuple[type, str | None]] = {
    "method.period": (Period, None),
    "method.sharing": (SharingMethod, None),
    "optimizer.base": (LocalOptimizer, "SGD"),
}
_SOURCES = (methods, optim, schedules, models, data, nn.modules.loss, metrics, periods, methods, optim)
#: Where the classes of each section are, and of these settings.
_SOURCE = dict(zip((*CLASS_SECTIONS, *HELD), _SOURCES, strict=True))
#: What a class is that has no short name.
PATH = "the import path of a class (package.module.Class)"


def known_classes(section: str) -> dict[str, str]:
    """The classes of a section, or of a setting that holds one, that need no import path, and their import paths."""
    if section not in _SOURCE:
        return {}
    source, base = _SOURCE[section], _base(section)
    return {
        name: f"{source.__name__.removesuffix('.modules.loss')}.{name}"
        for name, found in sorted(vars(source).items())
        if is_class(found, base) and found.__module__.startswith(source.__name__)
        if not isabstract(found) and not name.startswith("_")
    }


def import_path(section: str, name: str) -> str:
    """One import path for each class of this package and each loss of torch, whatever it was called by."""
    known = known_classes(section).get(short(name), name)
    root, dots, _ = name.partition(".")
    same = root in ("hpc_grawa", "torch") and known.startswith(f"{root}.")
    return known if not dots or same else name


def find_class(section: str, name: str) -> type:
    """The class of a section that ``name`` or import path means.

    Raises:
        ConfigError: there is none, it cannot be imported, or it is no class of that section.
    """
    base, path = _base(section), import_path(section, name)
    if "." not in path:
        raise wrong(section, name, f"must be {choice(section)}")
    found, why = imported(path)
    if why:
        raise wrong(section, name, why)
    optimizers = base is LocalOptimizer
    torchs = optimizers and is_class(found, torch.optim.Optimizer)
    stepless = torchs and found.step is torch.optim.Optimizer.step  # type: ignore[attr-defined]
    if not (torchs or is_class(found, base)) or isabstract(found) or stepless:
        either = " or torch.optim.Optimizer" if optimizers else ""
        raise wrong(section, name, f"must be a class derived from {base.__name__}{either}, and not abstract")
    return found  # type: ignore[return-value]


def imported(path: str) -> tuple[object, str]:
    """What an import path leads to; else None and why it does not."""
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(import_module(module), attribute), ""
    except (ImportError, AttributeError) as error:
        return None, in_a_line(error)
    except Exception as error:  # of a module of the user's
        return None, f"{module} cannot be imported ({in_a_line(error, named=True)})"


def choice(section: str) -> str:
    """What names a class of a section."""
    names = ", ".join(known_classes(section))
    return f"{names} or {PATH}" if names else PATH


def required(kind: type) -> list[str]:
    """The settings of a dataclass that have no default."""
    return [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]


def short(path: str) -> str:
    """A class's own name."""
    return path.rpartition(".")[2]


def is_class(found: object, base: type) -> bool:
    """Whether ``found`` is a class derived from ``base`` (a generic alias passes for a class on Python 3.10)."""
    return isinstance(found, type) and not isinstance(found, GenericAlias) and issubclass(found, base)


def _base(section: str) -> type:
    return {**CLASS_SECTIONS, **HELD}[section][0]
