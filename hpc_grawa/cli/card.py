"""What is to be known of one method: ``hpc-grawa methods NAME``, made from its class and from what it does."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import docstring_parser  # comes with jsonargparse[signatures]
import torch
from torch import Tensor, nn, optim

from ..aggregation import Aggregator, Codec
from ..averaging import Averager, Score
from ..comm.meter import TRAINING_PURPOSES, bytes_sent
from ..comm.mirror import Message, MirrorCommunicator
from ..methods import AveragingMethod, Method, Run, SharingMethod
from ..models import ResNet20
from ..runs.checkpoint import bytes_of
from ..runs.log import human_bytes
from ..schedules import RunFacts
from ..screen import columns, wrapped
from ..vector import ParameterVector
from .classes import find_class, required
from .parsing import parse

#: What one of W ranks sends for a message of n bytes.
_FORMULA = {
    "allreduce": "2n(W-1)/W",
    "allgather": "n(W-1)",
    "alltoall": "n(W-1)/W",
    "broadcast": "n(W-1)/W",
}


def card(name: str, words: Sequence[str], world_size: int, program: str) -> str:
    """A method's equation, settings, messages, memory, limits and source.

    Args:
        name: of the method, or its import path.
        words: a configuration whose model the numbers are for; none: ResNet-20's.
        world_size: W of the numbers.
        program: whose errors are told.
    """
    found = find_class("method", name)
    about = docstring_parser.parse(found.__doc__ or "")
    width = min(columns(), 120)
    parts = [wrapped(f"{found.__name__}: {_joined(about.short_description)}", width, "", "")]
    paragraphs = (about.long_description or "").split("\n\n")
    parts += [wrapped(_joined(text), width, "", "") for text in paragraphs if text]
    module = inspect.getdoc(inspect.getmodule(found)) or ""
    source = " ".join(_joined(text) for text in module.split("\n\n")[1:])
    if source:
        parts.append(wrapped(f"Source: {source}", width, "", ""))
    parts.append("\n".join(["Settings:", *_settings(found, width)]))
    config = parse([*words, f"--method={name}"], program) if words else None
    if config is None and required(found):
        given = " ".join(f"--method.{name} ..." for name in required(found))
        parts.append(f"What it sends and keeps is said with what is to be given: --config digits {given}")
    else:
        run, step = _from_config(config, world_size) if config is not None else _of_resnet(found(), world_size)
        if issubclass(found, SharingMethod):
            run.facts.step = 1_000_000  # behind every warm-up
        parts.append("\n".join(_numbers(run, step, world_size)))
    return "\n\n".join(parts)


def _joined(text: str | None) -> str:
    return " ".join((text or "").replace("``", "").split())


def _settings(method: type, width: int) -> Iterator[str]:
    """Each with its default and what it is: the method's own first, then in a sentence those of all of its kind."""
    said: dict[str, str] = {}
    shared: set[str] = set()
    for base in reversed(method.__mro__):
        params = docstring_parser.parse(base.__doc__ or "").params
        said |= {p.arg_name: _joined(p.description) for p in params}
        if base in (AveragingMethod, SharingMethod):
            shared = set(said)
        else:
            shared -= {p.arg_name for p in params}
    for field in sorted(dataclasses.fields(method), key=lambda f: f.name in shared):
        default = "to be given" if field.name in required(method) else _shown(field.default)
        text = said.get(field.name, "")
        if field.name in shared:
            text = text.partition(". ")[0].removesuffix(".") + "."
        yield wrapped(f"--method.{field.name} ({default}): {text}", width, "  ", "      ")


def _shown(value: object) -> str:
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _from_config(config: Any, world_size: int) -> tuple[Run, Callable[[], object]]:
    from ..training.worker import Worker

    worker = Worker(config, MirrorCommunicator(world_size, world_size))
    return worker.run, worker.step


def _of_resnet(method: Method, world_size: int) -> tuple[Run, Callable[[], object]]:
    model = ResNet20()
    optimizer = optim.SGD(model.parameters(), 1e-4, momentum=0.9, nesterov=True)
    images, classes = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(images), classes)

    comm = MirrorCommunicator(world_size, world_size)
    run = method.build(comm, ParameterVector(model), optimizer, loss, facts=RunFacts(steps_per_epoch=100))
    closure = run.closure(loss)
    return run, lambda: run.after_step(optimizer.step(closure))


def _numbers(run: Run, step: Callable[[], object], world_size: int) -> list[str]:
    """What a step and a round send, and what is kept."""
    comm, vector = run.comm, run.vector
    assert isinstance(comm, MirrorCommunicator)
    sent: list[Message] = []
    comm.messages = sent

    def sent_by(act: Callable[[], object]) -> str:
        sent.clear()
        act()
        return _messages(sent)

    step()  # the first makes what lasts
    lines = [("each step", sent_by(step))]
    run.begin_averaging()
    if run.synchronizers:
        step()
    for synchronizer in run.synchronizers:  # likewise
        synchronizer.round()
    for synchronizer in run.synchronizers:
        step()
        among = f" among {synchronizer.averager.comm.size}" if len(run.synchronizers) > 1 else ""
        lines.append((f"each round{among}", sent_by(synchronizer.round)))
    kept, state = _kept(run), bytes_of(run.state_dict())
    size, width = vector.data.nbytes, vector.data.element_size()
    title = (
        f"With {type(vector.model).__name__}: P = {len(vector):,} parameters of {width} bytes in {len(vector.names)} "
        f"tensors, W = {world_size} ranks. A rank sends"
    )
    lines += [
        ("memory", f"{human_bytes(kept)} = {kept / size:.3g} x parameters, beside model, gradient and optimizer"),
        (
            "checkpoint",
            f"{human_bytes(state)} = {state / size:.3g} x parameters of each rank, beside model and optimizer",
        ),
    ]
    return [title, *(f"  {what:12} {text}" for what, text in lines)]


def _messages(messages: Sequence[Message]) -> str:
    """Those of a step or round, alike ones together."""
    alike: dict[tuple[str, str], list[Message]] = {}
    for message in messages:
        if message.purpose in TRAINING_PURPOSES:
            alike.setdefault((message.purpose, message.verb), []).append(message)
    texts = []
    for (purpose, verb), found in alike.items():
        payload = sum(m.bytes for m in found)
        sent = sum(bytes_sent(m.verb, m.bytes, m.size) for m in found)
        count = f"{len(found)} x " if len(found) > 1 else ""
        texts.append(f"{count}{verb} ({purpose}), n = {human_bytes(payload)}: {_FORMULA[verb]} = {human_bytes(sent)}")
    return f";\n{'':15}".join(texts) or "nothing"


#: What sharing and averaging keep their tensors in; a score's probe, say, leads to all of a training program.
_OURS = ("hpc_grawa.aggregation.", "hpc_grawa.averaging.", "hpc_grawa.methods.")
_HOLDERS = (Aggregator, Averager, Codec, Score)


def _kept(run: Run) -> int:
    """Bytes of memory that what shares and what averages hold, beside what a lone rank has."""
    model, state = run.vector.model, run.optimizer.state
    alone = [run.vector.data, *model.parameters(), *model.buffers(), *(p.grad for p in run.vector.parameters)]
    alone += [t for of_parameter in state.values() for t in of_parameter.values()]
    known = {t.untyped_storage().data_ptr() for t in alone if isinstance(t, Tensor)}
    found: dict[int, int] = {}
    seen: set[int] = set()
    left: list[object] = [run.aggregator, [s.averager for s in run.synchronizers], [s.score for s in run.synchronizers]]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, Run):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
        elif isinstance(value, _HOLDERS) or type(value).__module__.startswith(_OURS):
            left += vars(value).values()
    return sum(found.values())
