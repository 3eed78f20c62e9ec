"""The settings of a run as jsonargparse knows them: names, types, defaults and what they are for."""

from __future__ import annotations

from argparse import Action
from typing import Any, get_type_hints

import torch
from jsonargparse import ArgumentParser

from ..comm import Backend
from ..errors import ConfigError, in_a_line
from ..forward import Precision
from ..launch import Wanted
from ..optim import LocalOptimizer
from ..training.config import GROUPS

#: Settings without a section: type, default, help.
PLAIN: dict[str, tuple[Any, Any, str]] = {
    "clip_norm": (float | None, None, "Largest norm of the gradient, after sharing; null: any."),
    "accumulate": (int, 1, "Equal parts the batch is computed in, to save memory."),
    "precision": (Precision, "fp32", "bf16 computes under autocast."),
    "compile": (
        bool,
        False,
        "Local steps by torch.compile, before the clock starts; rounds' probes and evaluations not.",
    ),
    "backend": (Backend, "auto", "How ranks communicate."),
    "network": (
        str | None,
        None,
        "Bandwidth and latency of a link that messages are to take as long as over, as 1gbit,100us; with a second pair "
        "for ranks that share a host, as 1gbit,100us,100gbit,1us, and as a fifth how many share one; null: none.",
    ),
    "device": (Wanted, "auto", "Where ranks compute; auto: on GPUs if any."),
    "comm_timeout": (
        float,
        600.0,
        "Longest wait for a message in seconds; then the job ends and says which ranks did not come.",
    ),
}


def add_other(parser: ArgumentParser, name: str) -> None:
    """Add a group of settings, or one outside of groups and classes."""
    if name in GROUPS:
        parser.add_class_arguments(GROUPS[name], name)
    else:
        kind, default, text = PLAIN[name]
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def add_class(parser: ArgumentParser, found: type, key: str) -> None:
    """Add a class's settings; of an optimizer of torch's, all but the parameters, and groups of them.

    Raises:
        ConfigError: one has no type, or one that cannot be told from YAML.
    """
    torchs = issubclass(found, torch.optim.Optimizer)
    skip: set[str | int] = {1, "groups"} if torchs else set()
    try:
        parser.add_class_arguments(found, key, skip=skip, instantiate=False, fail_untyped=not torchs)
    except ValueError as error:
        raise ConfigError(f"{found.__name__} cannot be set up from a configuration: {in_a_line(error)}") from None
    if torchs:
        kind = get_type_hints(LocalOptimizer)["groups"]
        text = "Parameters with settings of their own, as of LocalOptimizer."
        parser.add_argument(f"--{key}.groups", type=kind, default=None, help=text)


def actions(parser: ArgumentParser, section: str) -> dict[str, Action]:
    """A section's settings by name."""
    inside = ((action.dest.removeprefix(f"{section}."), action) for action in parser._actions)
    return {name: action for name, action in inside if name != action.dest and "." not in name}
