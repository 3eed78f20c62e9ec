"""Whether model, data, loss and metric fit together, seen on a few examples before anything is made of them."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from . import losses
from .config import Config
from .data import Splits
from .errors import ConfigError
from .evaluate import autocast, eval_mode, undisturbed

EXAMPLES = 32


def try_out(config: Config, model: nn.Module, splits: Splits) -> None:
    """Pass a few training examples through model, loss and metric; nothing of it remains.

    Args:
        config: says the loss and the metric.
        model: in training mode or not; its parameters, buffers and modes, and all random streams stay as they are.
        splits: what ``config.data`` loaded.

    Raises:
        ConfigError: one of them does not fit; the message names it, and what it was given.
    """
    data, count = config.data, len(splits.train)
    found = count, 0 if splits.validation is None else len(splits.validation)
    if found != (data.train_size(), data.validation):
        raise ConfigError(
            f"data is {_name(data)}: must load as many examples as it says it has, {data.train_size()} to train on and "
            f"{data.validation} for validation; found {found[0]} and {found[1]}"
        )
    few = min(EXAMPLES, data.batch_size, count)
    device = next(model.parameters()).device
    with eval_mode(model), undisturbed(model), torch.no_grad(), autocast(config.precision, device):
        # Evenly spaced, as the examples of a class may lie side by side.
        inputs, targets = (t.to(device) for t in splits.train.batch(torch.arange(few) * count // few))
        with _named(f"model is {config.model_name}: must take inputs {_kind(inputs)}"):
            output = model(inputs)
        what = f"outputs of {config.model_name} {_kind(output)} and targets of {_name(data)} {_kind(targets)}"
        with _named(f"loss is {_name(config.loss)}: must make one number of {what}"):
            loss = config.loss(output, targets)
            if loss.numel() != 1:
                raise ValueError(f"it made {_kind(loss)}")
            pair = losses.sums(config.loss, output, targets, few, few)
            if pair.shape != (2,):
                raise ValueError(f"its sums are {_kind(pair)}, not [2]")
        with _named(f"metric is {_name(config.metric)}: must take {what}"):
            config.metric.values(config.metric.sums(output, targets).double().cpu())


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Within the block errors become one line: what is wrong, the error, and where in the user's files it arose."""
    try:
        with warnings.catch_warnings():
            # Targets [B, 1] beside outputs [B] would be compared each with each.
            warnings.filterwarnings("error", message="Using a target size")
            yield
    except Exception as error:  # what an own class raises is its own affair
        message = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
        place = f" ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else ""
        raise ConfigError(f"{what}; {message[:300]}{place}") from error


def _is_own(file: str) -> bool:
    packages = Path(__file__).parent, Path(torch.__file__).parent
    return not any(Path(file).is_relative_to(package) for package in packages)


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    return f"{list(value.shape)} ({str(value.dtype).removeprefix('torch.')})"


def _name(thing: object) -> str:
    return type(thing).__name__
