"""Whether model, data, loss and metric fit together, seen on a few examples before anything is made of them."""

from __future__ import annotations

import hashlib
import json
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import losses
from ..attributes import with_extra_state
from ..buffers import check_kinds, checksum, state, values_kept
from ..comm import Communicator
from ..data import Nest, Splits, in_advance
from ..data.base import CPU
from ..errors import ConfigError, RanksDisagree, in_a_line, wrong
from ..forward import autocast, eagerly, eval_mode, training_mode, undisturbed
from ..lazy import completing, unfinished
from ..nests import kind, leaves, moved, parts, same_shape
from ..runs.checkpoint import copied
from .config import Config

EXAMPLES = 32
#: Of which targets are compared between ranks.
_COMPARED = 8
_TRAINING = " in training mode"


def new_model(config: Config, splits: Splits, comm: Communicator, device: torch.device) -> nn.Module:
    """A new model on its device, tried out, and completed by that if it is lazy; all ranks must call it.

    Args:
        config: says model and loss.
        splits: what ``config.data`` loaded.
        comm: the ranks.
        device: of this rank.

    Raises:
        ConfigError: as ``try_out`` does, on all ranks if it does on one.
    """
    model = config.build_model().to(device)
    config.loss.to(device)
    problem = ""
    try:
        try_out(config, model, splits, device)
    except ConfigError as error:
        problem = str(error)
    fail_together(comm, problem)
    config.data.prepare_model(model)
    return model


def data_told(config: Config, splits: Splits, comm: Communicator) -> str:
    """How many examples there are, and whole numbers in the targets of a few of them; all ranks must call it.

    Raises:
        ConfigError: an example cannot be read; on all ranks.
        RanksDisagree: ranks that share examples by number do not have the same.
    """
    held = "" if splits.validation is None else f"{len(splits.validation):,} for validation, "
    sizes = f"{len(splits.train):,} training examples, {held}{len(splits.test):,} for testing"
    digests, problem = ["", ""], ""
    try:
        digests = [_digest(config, splits) for _ in range(2)]
    except ConfigError as error:
        problem = str(error)
    fail_together(comm, problem)
    # Of unlike ones each reading draws anew, by a generator of the data set's own.
    own = [sizes, digests[0] if digests[0] == digests[1] else ""]
    found = [json.loads(message) for message in comm.gather_bytes(json.dumps(own).encode())]
    compared = all(digest for _, digest in found)
    of_ranks: list[str] = [size + (f", targets {digest}" if compared else "") for size, digest in found]
    rank = next((m for m, one in enumerate(of_ranks) if one != of_ranks[0]), None)
    if rank is not None and config.data.split != "full":
        raise RanksDisagree(
            f"data is {_name(config.data)}: rank {rank} has {of_ranks[rank]}, rank 0 has {of_ranks[0]}; ranks share "
            f"examples by number, so all must have the same in the same order (sort what is listed)"
        )
    return of_ranks[comm.rank]


def _digest(config: Config, splits: Splits) -> str:
    """Of whole numbers among the targets of a few training examples, one by one: they may be of different sizes."""
    few, digest = min(_COMPARED, len(splits.train)), hashlib.sha256()
    for i in torch.arange(few) * len(splits.train) // few:
        _, targets = _batch(config, splits, i.reshape(1))
        for t in leaves(targets):
            exact = isinstance(t, Tensor) and not (t.is_floating_point() or t.is_complex())
            if exact and t.layout == torch.strided and not t.is_nested:
                digest.update(t.contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def fail_together(comm: Communicator, problem: str) -> None:
    """Raise ``ConfigError`` on all ranks if one has a problem; all come here, so none waits for one that gave up."""
    problems = comm.gather_bytes(problem.encode())
    rank = next((rank for rank, found in enumerate(problems) if found), None)
    if rank is not None:
        raise ConfigError(problems[rank].decode() + (f" (on rank {rank})" if rank else ""))


def try_out(config: Config, model: nn.Module, splits: Splits, device: torch.device = CPU) -> None:
    """Pass a few training examples through model, loss and metric; nothing of it remains but a lazy model's shapes.

    First in eval mode; then up to the loss as a step does it, in training mode, and of no more than its examples.

    Args:
        config: says the loss and the metric.
        model: in training mode or not; its parameters, buffers and modes, and all random streams stay as they are.
        splits: what ``config.data`` loaded.
        device: of the model.

    Raises:
        ConfigError: one of them does not fit; the message names it, and what it was given.
    """
    data, count = config.data, len(splits.train)
    found = count, 0 if splits.validation is None else len(splits.validation)
    if found != (data.train_size(), data.validation):
        raise wrong(
            "data",
            _name(data),
            f"must load as many examples as it says it has, {data.train_size()} to train on and "
            f"{data.validation} for validation; found {found[0]} and {found[1]}",
        )
    check_kinds(model)
    trained = next((name for name, p in config.loss.named_parameters() if p.requires_grad), None)
    if trained is not None:
        fix = f"its parameter '{trained}', which nothing would train, must be one of the model, or frozen"
        raise wrong("loss", _name(config.loss), fix)
    few, cuts = min(EXAMPLES, data.batch_size, count), config.accumulate * config.optimizer.parts
    with eval_mode(model), completing(model), torch.no_grad(), autocast(config.precision, device):
        inputs, targets = _spread(config, splits, few, device)
        output = _output(config, model, inputs)
        if (name := unfinished(model)) is not None:
            raise wrong(
                "model",
                config.model_name,
                f"'{name}' must get its shape in the first forward pass, and has none "
                f"after one (a lazy module that is not used in eval mode?)",
            )
        what, _ = _try_loss(config, output, targets)
        with _named(f"loss is {_name(config.loss)}: must make one number of {what}"):
            pair = losses.sums(config.loss, output, targets, few, few)
            if pair.shape != (2,):
                raise ValueError(f"its sums are {kind(pair)}, not [2]")
        with _named(f"metric is {_name(config.metric)}: must take {what}"):
            _check_values(config, config.metric.values(config.metric.sums(output, targets).double().cpu()))
        if cuts > 1:
            _try_to_cut(config, splits)
    with undisturbed(model), values_kept(model.parameters()), undisturbed(config.loss), eagerly():
        if cuts > 1 and few > 1:
            with eval_mode(model), torch.no_grad(), autocast(config.precision, device):
                _refuse_a_sum(config, model, splits, few // 2, device)
        part = max(1, min(few, data.batch_size // cuts))
        batch = (inputs, targets) if part == few else _spread(config, splits, part, device)
        with training_mode(model), autocast(config.precision, device):
            output = _output(config, model, batch[0], _TRAINING)
            _try_loss(config, output, batch[1], _TRAINING)
            _check_keeps_nothing(config, output, batch[1])
        _check_extra_state(config, model)


def _output(config: Config, model: nn.Module, inputs: Nest, mode: str = "") -> Nest:
    with _named(f"model is {config.model_name}: must take inputs {kind(inputs)}{mode}"):
        return model(inputs)


def _try_loss(config: Config, output: Nest, targets: Nest, mode: str = "") -> tuple[str, Tensor]:
    """What the loss is made of, in words, and the loss, which must be one number."""
    what = f"outputs of {config.model_name} {kind(output)} and targets of {_name(config.data)} {kind(targets)}{mode}"
    with _named(f"loss is {_name(config.loss)}: must make one number of {what}"):
        loss = config.loss(output, targets)
        if loss.numel() != 1:
            raise ValueError(f"it made {kind(loss)}")
    return what, loss


def _check_keeps_nothing(config: Config, output: Nest, targets: Nest) -> None:
    """Raise ``ConfigError`` where a loss that was called once changes its buffers when it is called again."""

    def held() -> dict[str, object]:
        plain = {k: t for k, t in state(config.loss).items() if t is not None and t.layout == torch.strided}
        return {name: (t.shape, checksum(t)) for name, t in plain.items()}

    before = held()
    if before:
        config.loss(output, targets)
    changed = next((name for name, now in held().items() if before.get(name) != now), None)
    if changed is not None:
        fix = f"its buffer '{changed}', which changes from batch to batch, must be one of the model, or in eval mode"
        raise wrong("loss", _name(config.loss), fix)


def _check_extra_state(config: Config, model: nn.Module) -> None:
    for name, module in with_extra_state(model).items():
        if type(module).set_extra_state is nn.Module.set_extra_state:
            fix = f"{_name(module)} must have set_extra_state beside get_extra_state, or neither"
            raise wrong("model", config.model_name, fix)
        where = f"{name}._extra_state".removeprefix(".")
        copied(module.get_extra_state(), f"model is {config.model_name}: {where}", tensors=False)


def _check_values(config: Config, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float):
            raise TypeError(f"its '{name}' is {kind(value)}: must be a number, float(...)")
    if config.metric.name not in values:
        raise ValueError(f"its values lack '{config.metric.name}', which is its name")


def _spread(config: Config, splits: Splits, count: int, device: torch.device) -> tuple[Nest, Nest]:
    """So many training examples, evenly spaced, as those of a class may lie side by side."""
    return _batch(config, splits, torch.arange(count) * len(splits.train) // count, device)


def _batch(config: Config, splits: Splits, index: Tensor, device: torch.device = CPU) -> tuple[Nest, Nest]:
    with _named(f"data is {_name(config.data)}: must give inputs and targets, tensors or tuples, lists, dicts of them"):
        batch = next(in_advance(splits.train, [(index, None)], device))
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"a batch is {kind(batch)}")
        inputs, targets = moved(tuple(batch), device)
    return inputs, targets


def _try_to_cut(config: Config, splits: Splits) -> None:
    """Whether the first of a batch's parts is what a batch of its examples alone would be."""
    length, count = config.data.batch_size, config.accumulate * config.optimizer.parts
    key, number = _cutting(config)
    whole, alone = (_batch(config, splits, torch.arange(n)) for n in (length, length // count))
    with _named(f"{key} is {number}: must be 1, as batches {kind(whole)} cannot be cut by examples"):
        part = parts(whole, length, count)[0]
        if not same_shape(part, alone, whole):
            raise ValueError(f"of {length // count} examples alone it is {kind(alone)}, cut it is {kind(part)}")


def _refuse_a_sum(config: Config, model: nn.Module, splits: Splits, half: int, device: torch.device) -> None:
    """Raise ``ConfigError`` for a loss that adds up over examples: of its parts a batch's gradient is the mean."""
    index = torch.arange(2 * half) * len(splits.train) // (2 * half)
    values: list[float] = []
    for own in (index, *torch.split(index, half)):
        inputs, targets = _batch(config, splits, own, device)
        values.append(float(_try_loss(config, _output(config, model, inputs), targets)[1]))
    whole, *halves = values
    # A mean of both, however they weigh, is less than their sum by what the smaller one has.
    if abs(sum(halves) - whole) < 0.02 * abs(whole) and min(map(abs, halves)) > 0.1 * abs(whole):
        key, number = _cutting(config)
        raise wrong(key, number, f"must be 1, or {_name(config.loss)} a mean: it adds up over a batch's examples")


def _cutting(config: Config) -> tuple[str, int]:
    """The setting by which batches are cut into parts."""
    if config.optimizer.parts > 1:
        return "optimizer.parts", config.optimizer.parts
    return config.name("accumulate"), config.accumulate


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Within the block errors become one line: what is wrong, the error, and where in the user's files it arose."""
    try:
        with warnings.catch_warnings():
            # Targets [B, 1] beside outputs [B] would be compared each with each.
            warnings.filterwarnings("error", message="Using a target size")
            yield
    except Exception as error:  # what an own class raises is its own affair
        message = in_a_line(error, named=True).removesuffix(":")
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
        place = f" ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else ""
        raise ConfigError(f"{what}; {message[:300]}{place}") from error


def _is_own(file: str) -> bool:
    packages = Path(__file__).parents[1], Path(torch.__file__).parent
    return not any(Path(file).is_relative_to(package) for package in packages)


def _name(thing: object) -> str:
    return type(thing).__name__
