"""Where backward passes end, and which parameters they reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpc_grawa.hooks import AfterBackward


class Broken(torch.autograd.Function):
    """Has no backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ZeroDivisionError


X = torch.ones(2, 3, requires_grad=True)


def layers() -> tuple[nn.ModuleList, list[list[bool]], set[int]]:
    """Four layers; which of their eight tensors have a gradient whenever a pass has ended; the tensors reached."""
    model, ends = nn.ModuleList(nn.Linear(3, 3) for _ in range(4)), []
    parameters = list(model.parameters())
    passes = AfterBackward(parameters, lambda: ends.append([p.grad is not None for p in parameters]))
    model.passes = passes  # type: ignore[assignment] # which hears of them as long as it lives
    return model, ends, passes.reached


def test_every_pass_ends_once_when_all_its_gradients_are_there() -> None:
    model, ends, reached = layers()
    for number in (1, 2):
        model[1](model[0](X)).sum().backward()
        assert ends == [[True] * 4 + [False] * 4] * number and reached == {0, 1, 2, 3}
    reached.clear()
    model[2](X).sum().backward()
    assert len(ends) == 3 and ends[-1] == [True] * 6 + [False] * 2 and reached == {4, 5}
    X.sum().backward()  # reaches none
    assert len(ends) == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_passes_within_a_pass_are_parts_of_it(reentrant: bool) -> None:
    model, ends, reached = layers()
    hidden = model[0](X)
    for layer in (model[1], model[2]):
        hidden = checkpoint(layer, hidden, use_reentrant=reentrant)
    model[3](hidden).sum().backward()
    assert ends == [[True] * 8] and reached == set(range(8))


@pytest.mark.filterwarnings("ignore:None of the inputs have")
def test_a_pass_that_reaches_parameters_in_passes_within_it_only_has_one_end() -> None:
    model, ends, reached = layers()

    def two(x: Tensor) -> Tensor:
        return checkpoint(model[1], model[0](x), use_reentrant=True)

    hidden = checkpoint(two, X, use_reentrant=True)
    for layer in (model[2], model[3]):
        hidden = checkpoint(layer, hidden, use_reentrant=True)
    hidden.sum().backward()
    assert ends == [[True] * 8] and reached == set(range(8))


def test_functions_are_called_in_one_order_until_they_are_taken_back() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    called: list[str] = []
    one = AfterBackward(list(first.parameters()), lambda: called.append("one"))
    two = AfterBackward(list(second.parameters()), lambda: called.append("two"))
    for outer, inner in ((first, second), (second, first)):
        outer(inner(X)).sum().backward()
    assert called == ["two", "one"] * 2
    one.close()
    first(second(X)).sum().backward()
    assert called == ["two", "one"] * 2 + ["two"]
    two.close()
    first(second(X)).sum().backward()
    assert called == ["two", "one"] * 2 + ["two"]


def test_a_pass_that_fails_has_no_end_and_the_next_one_has() -> None:
    model, ends, _ = layers()
    for number in range(3):
        try:
            model[1](Broken.apply(model[0](X))).sum().backward()
        except ZeroDivisionError as error:
            kept = error  # with its frames
        assert len(ends) == number
        model[0](X).sum().backward()
        assert len(ends) == number + 1
    assert kept is not None
