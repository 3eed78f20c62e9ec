"""Batches of any shape: moved, cut, probed, evaluated as a tensor is; what cannot be is refused by name."""

from __future__ import annotations

import re
from collections import UserDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import own
import pytest
import torch
from conftest import DEVICES
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from hpc_grawa import simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.data import Nest, Splits, TensorExamples
from hpc_grawa.errors import ConfigError
from hpc_grawa.nests import kind, leaves, mapped, moved, parts
from hpc_grawa.training.loop import fit
from hpc_grawa.training.worker import Worker

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "x mask")


class Doubled(Pair):
    """Makes its second item itself."""

    def __new__(cls, x: Tensor) -> Doubled:
        return super().__new__(cls, x, 2 * x)


@dataclass
class Partial:
    x: Tensor
    unset: Any = field(init=False)


@dataclass(frozen=True)
class Record:
    x: Any
    note: str = "a note"


class Graph:
    """Knows how to move, and nothing else."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Graph:
        return Graph(self.x.to(device))


class Sealed(MutableMapping[str, Any]):
    """Keeps its items in a dict that a shallow copy would share."""

    def __init__(self, **items: Any) -> None:
        self.items_, self.note = items, "a note"

    def __getitem__(self, name: str) -> Any:
        return self.items_[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.items_[name] = value

    def __delitem__(self, name: str) -> None:
        del self.items_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


def jagged(x: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor(list(x), layout=torch.jagged)


#: Ways to give a batch ``[B, 6]``, and to have it back.
FORMS: dict[str, tuple[Callable[[Tensor], Nest], Callable[[Nest], Tensor]]] = {
    "tensor": (lambda x: x, lambda nest: nest),
    "dict": (lambda x: {"x": x, "mask": torch.ones(len(x)), "scale": torch.ones(3)}, lambda nest: nest["x"]),
    "UserDict": (lambda x: UserDict(x=x), lambda nest: nest["x"]),
    "own mapping": (lambda x: Sealed(x=x, mask=None), lambda nest: nest["x"]),
    "mapping": (lambda x: MappingProxyType({"x": x}), lambda nest: nest["x"]),
    "tuple": (lambda x: (x, None, "a note", 1.5), lambda nest: nest[0]),
    "namedtuple": (lambda x: Pair(x, torch.ones(len(x), 2)), lambda nest: nest.x),
    "namedtuple with a constructor": (lambda x: Doubled(x), lambda nest: nest.mask / 2),
    "dataclass with a field unset": (lambda x: Partial(x), lambda nest: nest.x),
    "dataclass": (lambda x: Record({"deep": [[x]]}), lambda nest: nest.x["deep"][0][0]),
    "list of examples": (lambda x: list(x), lambda nest: torch.stack(nest)),
    "tuple of dicts": (lambda x: tuple({"x": row} for row in x), lambda nest: torch.stack([e["x"] for e in nest])),
    "ragged": (
        lambda x: [row[: 2 + i % 3].clone() for i, row in enumerate(x)],
        lambda nest: torch.stack([nn.functional.pad(row, (0, 6 - len(row))) for row in nest]),
    ),
    "packed": (
        lambda x: pack_sequence([row[: 2 + i % 3, None] for i, row in enumerate(x)], enforce_sorted=False),
        lambda nest: pad_packed_sequence(nest, batch_first=True, total_length=6)[0][..., 0],
    ),
    "jagged": (
        lambda x: jagged(x[..., None]),
        lambda nest: torch.stack(nest.unbind())[..., 0],
    ),
}
RAGGED = ("ragged", "packed")


class FormedExamples(TensorExamples):
    def __init__(self, inputs: Tensor, targets: Tensor, form: str) -> None:
        super().__init__(inputs, targets)
        self.form = form

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Nest, Nest]:
        inputs, targets = super().batch(index, generator)
        return FORMS[self.form][0](inputs), {"y": [targets, targets]}


@dataclass(kw_only=True)
class Formed(own.Numbers):
    """Six numbers, of which the first is wanted; inputs in a form, targets in a list in a dict."""

    form: str = "tensor"

    def load(self) -> Splits:
        x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
        train, test = (FormedExamples(part, part[:, :1], self.form) for part in (x[:64], x[64:]))
        return Splits(train, None, test)


class Taking(nn.Module):
    """Takes a batch in its form; has a BatchNorm, which evaluation recalibrates."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form = form
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, batch: Nest) -> Nest:
        return {"y": self.layers(FORMS[self.form][1](batch))}


class DictLoss(nn.Module):
    def forward(self, output: Nest, target: Nest) -> Tensor:
        return nn.functional.mse_loss(output["y"], target["y"][1])


class DictR2(own.R2):
    def sums(self, output: Nest, target: Nest) -> Tensor:
        return super().sums(output["y"], target["y"][0])


def words(form: str, **options: object) -> list[str]:
    settings = {
        "model": "test_nests.Taking",
        "model.form": form,
        "data": "test_nests.Formed",
        "data.form": form,
        "loss": "test_nests.DictLoss",
        "metric": "test_nests.DictR2",
        "method": "LGRAWA",
        "method.period": 2,
        "optimizer.lr": 0.05,
        "budget.steps": 6,
        "eval.batch_size": 5,
    }
    return [f"--{key.replace('__', '.')}={value}" for key, value in {**settings, **options}.items()]


@cache
def trained(form: str, **options: object) -> dict[str, Any]:
    config = parse(words(form, **options))
    config.check(2)
    return simulate(2, lambda comm: fit(config, comm, speaks=False))[0]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("tensor", *RAGGED)])
def test_training_probe_recalibration_and_evaluation_take_a_batch_in_any_form(form: str, accumulate: int) -> None:
    ours, plain = (trained(f, optimizer__accumulate=accumulate) for f in (form, "tensor"))
    for key in ("center_test_loss", "center_test_r2", "mean_train_loss", "local_test_loss", "consensus_distance"):
        assert ours[key] == pytest.approx(plain[key], rel=1e-5), key


@pytest.mark.parametrize("form", RAGGED)
def test_parts_of_a_ragged_batch_give_the_gradient_of_the_whole(form: str) -> None:
    settings = {"method": "LocalSGD", "model": "test_nests.Straight"}
    whole, *others = (trained(form, optimizer__accumulate=parts, **settings) for parts in (1, 2, 8))
    for ours in others:
        assert ours["center_test_loss"] == pytest.approx(whole["center_test_loss"], rel=1e-5)


class Straight(Taking):
    """Without BatchNorm, whose statistics are those of the part."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__(form)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_parts_in_a_row_are_the_whole_and_of_its_type(form: str, count: int, device: str) -> None:
    make, back = FORMS[form]
    whole, y = moved((make(torch.randn(6, 6)), torch.arange(6)), torch.device(device))
    cut = parts((whole, y), 6, count)
    assert len(cut) == count
    assert torch.equal(torch.cat([back(inputs) for inputs, _ in cut]), back(whole))
    assert torch.equal(torch.cat([targets for _, targets in cut]), y)
    assert {type(inputs) for inputs, _ in cut} <= {type(whole), dict}
    assert torch.equal(back(moved(whole, CPU)), back(whole).cpu())


def test_what_does_not_grow_with_the_batch_goes_to_every_part() -> None:
    scale, graph = torch.ones(3), {"count": 4, "name": "abcd", "nothing": None}
    cut = parts(((torch.zeros(4, 2), scale), graph), 4, 2)
    for (x, same), others in cut:
        assert len(x) == 2 and same is scale and others == graph


def test_a_nest_keeps_its_types_and_what_was_given_is_left_alone() -> None:
    counts = defaultdict(list, a=torch.ones(2))
    nest = [Pair(torch.ones(1), Record(torch.ones(3))), UserDict(b=counts), torch.Size([2])]
    twice = mapped(lambda leaf: leaf * 2, nest)
    assert [type(leaf) for leaf in (twice[0], twice[0].mask, twice[1], twice[1]["b"])] == [
        Pair, Record, UserDict, defaultdict,
    ]  # fmt: skip
    assert twice[1]["b"].default_factory is list and twice[0].mask.note == "a notea note"
    assert [float(t.sum()) for t in leaves(nest)[:1]] == [1.0] and counts["a"].sum() == 2
    assert twice[1]["b"]["a"].sum() == 4 and twice[2] == (4,)


def test_a_packed_sequence_is_one_leaf_in_the_order_in_which_it_was_given() -> None:
    sequences = [torch.randn(n, 2) for n in (3, 1, 5, 2)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    assert leaves({"x": packed}) == [packed] and isinstance(moved(packed, CPU), PackedSequence)
    for (part, _), own_sequences in zip(parts((packed, 0), 4, 2), (sequences[:2], sequences[2:]), strict=True):
        for ours, theirs in zip(torch.nn.utils.rnn.unpack_sequence(part), own_sequences, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("nest", "described"),
    [
        (torch.zeros(8, 6), "[8, 6] (float32)"),
        ({"x": torch.zeros(2, dtype=torch.int64), "none": None}, "{x: [2] (int64), none: None}"),
        ((torch.zeros(2), "text"), "([2] (float32), of type str)"),
        ([torch.zeros(1)] * 9, "[[1] (float32), and 8 more]"),
        (Record(torch.zeros(1)), "{x: [1] (float32), note: of type str}"),
        (jagged(torch.zeros(3, 2)), "[3] (float32, nested)"),
        ({i: None for i in range(9)}, "{0: None, 1: None, 2: None, 3: None, 4: None, 5: None, and 3 more}"),
        (object(), "of type object"),
    ],
)
def test_messages_say_what_a_nest_is(nest: Nest, described: str) -> None:
    assert kind(nest) == described


@dataclass(kw_only=True)
class Odd(own.Numbers):
    """Batches that are not what they should be."""

    how: str = "numpy"

    def load(self) -> Splits:
        splits = super().load()
        return replace(splits, train=OddExamples(splits.train, self.how))  # type: ignore[arg-type]


class OddExamples(TensorExamples):
    def __init__(self, examples: TensorExamples, how: str) -> None:
        super().__init__(examples.inputs, examples.targets)
        self.how = how

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Any:
        x, y = super().batch(index, generator)
        made: dict[str, Any] = {
            "numpy": ({"x": x.numpy()}, y),
            "one": {"x": x, "labels": y},
            "three": (x, y, y),
            "time first": (x.T, y),
            "a pair of pairs": ((x[:, 0], x[:, 0]), y),
            "graph": (Graph(x), y),
            "broken": 1 / 0 if self.how == "broken" else None,
        }
        return made[self.how]


class GraphLine(own.Line):
    def forward(self, graph: Any) -> Tensor:
        return super().forward(graph.x if isinstance(graph, Graph) else graph)


class AnyLine(own.Line):
    """Takes whatever holds eight numbers."""

    def forward(self, batch: Nest) -> Tensor:
        return super().forward(leaves(batch)[0].reshape(-1, 1))


def odd(how: str, *more: str) -> list[str]:
    line = ["--data=test_nests.Odd", "--loss=MSELoss", "--metric=own.R2", "--optimizer.lr=0.05", "--budget.steps=2"]
    return [*line, "--model=test_nests.AnyLine", f"--data.how={how}", *more]


MUST = "data is Odd: must give inputs and targets, tensors or tuples, lists, dicts of them; "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (odd("numpy"), MUST + r"TypeError: of type ndarray is in it: must be tensors, or tuples, lists and dicts .*"),
        (odd("one"), MUST + r"TypeError: a batch is {x: \[8, 1\] \(float32\), labels: \[8, 1\] \(float32\)}"),
        (odd("three"), MUST + r"TypeError: a batch is \(\[8, 1\] \(float32\), .*\)"),
        (odd("broken"), MUST + r"ZeroDivisionError: division by zero \(test_nests.py, line \d+\)"),
        (
            odd("time first", "--optimizer.accumulate=2"),
            r"optimizer.accumulate is 2: must be 1, as batches \(\[1, 8\] .*\) cannot be cut by examples; "
            r"ValueError: of 4 examples alone it is \(\[1, 4\] .*, cut it is \(\[1, 8\] .*",
        ),
        (
            odd("a pair of pairs", "--optimizer.accumulate=2", "--data.batch_size=2"),
            r"optimizer.accumulate is 2: .* cannot be cut by examples; ValueError: .*",
        ),
        (
            odd("graph", "--optimizer.accumulate=2", "--model=test_nests.GraphLine"),
            r"optimizer.accumulate is 2: .* cannot be cut by examples; TypeError: of type Graph cannot be cut",
        ),
    ],
)
def test_what_no_batch_can_be_is_one_line_on_every_rank(words: list[str], message: str) -> None:
    config = parse(words)
    config.check(2)

    def body(comm: Any) -> str:
        with pytest.raises(ConfigError) as error:
            Worker(config, comm)
        return str(error.value)

    for found in simulate(2, body):
        assert re.fullmatch(message, found), found


def test_what_knows_how_to_move_trains() -> None:
    config = parse(odd("graph", "--model=test_nests.GraphLine"))
    assert simulate(2, lambda comm: fit(config, comm, speaks=False))[0]["steps"] == 2
