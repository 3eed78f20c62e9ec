"""`Run.closure`: the one way to a step's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from hpc_grawa import EASGD, LSGD, DataParallel, LocalLGRAWA, LocalSGD, Method, ParameterVector, Run, simulate
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError

STEPS = 6
METHODS: list[Method] = [DataParallel(), LocalSGD(period=2), EASGD(period=2), LSGD(period=2), LocalLGRAWA(period=2)]


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.Tanh(), nn.Linear(6, 3))


def examples(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * rank + step))
    return x, x[:, :3].argmax(1)


def built(comm: Communicator, method: Method, norm: bool = True) -> tuple[Run, optim.Optimizer]:
    model = network(norm)
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return method.build(comm, ParameterVector(model), optimizer), optimizer


def loss_of(run: Run, step: Callable[[], int]) -> Callable[..., Tensor]:
    def loss(part: tuple[int, int] = (0, 1)) -> Tensor:
        inputs, targets = (t.chunk(part[1])[part[0]] for t in examples(run.comm.rank, step()))
        return nn.functional.cross_entropy(run.vector.model(inputs), targets)

    return loss


def by_hand(
    run: Run, optimizer: optim.Optimizer, loss: Callable[..., Tensor], clip: float | None, parts: int
) -> Tensor:
    """What the aggregator's four calls do."""
    run.aggregator.zero_grad(optimizer)
    total = torch.zeros(())
    for i in range(parts):
        if i == parts - 1:
            run.aggregator.start()
        value = loss((i, parts)) / parts
        value.backward()
        total = total + value.detach()
    run.aggregator.finish()
    if clip is not None:
        nn.utils.clip_grad_norm_(run.vector.parameters, clip)
    optimizer.step()
    return total


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(("clip", "parts"), [(None, 1), (0.05, 2)])
def test_a_closure_does_what_the_four_calls_of_the_aggregator_do(
    method: Method, clip: float | None, parts: int
) -> None:
    def body(comm: Communicator, way: str) -> list[Tensor]:
        run, optimizer = built(comm, method)
        step = 0
        loss = loss_of(run, lambda: step)
        closure: Any = run.closure(loss, clip, parts)
        seen = []
        for step in range(STEPS):  # noqa: B007
            if way == "four calls":
                value = by_hand(run, optimizer, loss, clip, parts)
            elif way == "step(closure)":
                value = optimizer.step(closure)  # type: ignore[assignment]
            else:
                value = closure()
                optimizer.step()
            run.after_step(value)
            seen += [value, run.vector.data.clone()]
        return [*seen, *run.vector.model.buffers()]

    for world in (1, 2, 3, 4):
        expected = simulate(world, lambda comm: body(comm, "four calls"))
        for way in ("step(closure)", "closure()"):
            for ours, theirs in zip(simulate(world, lambda comm, way=way: body(comm, way)), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("asked", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_parts_add_up_to_the_batch_and_only_the_last_is_shared(asked: int, accumulate: int) -> None:
    """Each part that is asked for is computed in ``accumulate`` parts of its own."""

    def body(comm: Communicator, asked: int, accumulate: int) -> tuple[Tensor, Tensor, list[int]]:
        run, _ = built(comm, DataParallel(), norm=False)
        closure = run.closure(loss_of(run, lambda: 0), accumulate=accumulate)
        messages, total = [], torch.zeros(())
        for i in range(asked):
            total = total + closure(part=(i, asked))
            messages.append(comm.meter.calls["gradient"])
        return torch.cat([p.grad.flatten() for p in run.vector.parameters]), total, messages  # type: ignore[union-attr]

    whole = simulate(2, lambda comm: body(comm, 1, 1))
    for ours, theirs in zip(simulate(2, lambda comm: body(comm, asked, accumulate)), whole, strict=True):
        torch.testing.assert_close(ours[:2], theirs[:2])
        assert ours[2] == [0] * (asked - 1) + [1]


def test_the_gradient_is_clipped_after_sharing_and_only_then() -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
        run, _ = built(comm, DataParallel(), norm=False)
        loss = loss_of(run, lambda: 0)
        closure = run.closure(loss, clip_norm=1e-3)
        closure(share=False)
        own = torch.cat([p.grad.flatten() for p in run.vector.parameters])  # type: ignore[union-attr]
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), run.vector.parameters)])
        torch.testing.assert_close(own, exact)
        assert comm.meter.calls["gradient"] == 0
        closure(track=False)
        return own, torch.cat([p.grad.flatten() for p in run.vector.parameters]), run.vector.data  # type: ignore[union-attr]

    results = simulate(3, body)
    mean = torch.stack([own for own, _, _ in results]).mean(0)
    for _, clipped, _ in results:
        torch.testing.assert_close(clipped, mean * 1e-3 / mean.norm(), rtol=1e-3, atol=0)


class MadeAnew(nn.BatchNorm1d):
    """Puts new tensors in the place of its statistics."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if self.training:
            self.running_mean, self.running_var = self.running_mean.clone(), self.running_var.clone()  # type: ignore[union-attr]
        return output


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6, momentum=None),
        nn.InstanceNorm1d(6, track_running_stats=True),
        MadeAnew(6),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_without_track_running_statistics_stay_and_gradients_are_the_same(norm: nn.Module, training: bool) -> None:
    model = nn.Sequential(nn.Unflatten(1, (6, 4)), copy.deepcopy(norm).train(training))
    model[1].running_var.mul_(2)  # type: ignore[union-attr, operator]
    model.append(nn.Flatten()).append(nn.Linear(24, 1))
    optimizer = optim.SGD(model.parameters(), 0.1)
    run = LocalSGD().build(SingleCommunicator(), ParameterVector(model), optimizer)
    inputs = torch.randn(5, 24)
    closure = run.closure(lambda: model(inputs).square().mean())
    before = copy.deepcopy(dict(model.named_buffers()))
    quiet = closure(track=False)
    gradients = [p.grad.clone() for p in run.vector.parameters]  # type: ignore[union-attr]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(quiet, closure())
    assert all(torch.equal(p.grad, g) for p, g in zip(run.vector.parameters, gradients, strict=True))  # type: ignore[arg-type]
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert bool(changed) == training


class TwoPasses(optim.SGD):
    """Ascends by its own gradient, and steps with the shared one there, as SAM does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure(share=False)
        parameters = self.param_groups[0]["params"]
        there = [p.clone() for p in parameters]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.add_(p.grad, alpha=float(0.05 / norm))
        loss = closure(track=False)
        for p, before in zip(parameters, there, strict=True):
            p.copy_(before)
        super().step()
        return loss


def test_an_optimizer_of_two_passes_keeps_ranks_together_and_counts_statistics_once() -> None:
    def body(comm: Communicator) -> tuple[Tensor, int, float]:
        model = network()
        optimizer = TwoPasses(model.parameters(), 0.1)
        run = DataParallel().build(comm, ParameterVector(model), optimizer)
        step = 0
        closure: Any = run.closure(loss_of(run, lambda: step), accumulate=2)
        for step in range(STEPS):  # noqa: B007
            run.after_step(optimizer.step(closure))
        return run.vector.data, int(model[1].num_batches_tracked), comm.meter.calls["gradient"]  # type: ignore[index]

    for data, tracked, messages in (results := simulate(3, body)):
        assert torch.equal(data, results[0][0]) and (tracked, messages) == (2 * STEPS, STEPS)


def test_an_optimizer_that_evaluates_its_closure_again_is_refused_where_gradients_are_shared() -> None:
    def body(comm: Communicator, method: Method) -> Tensor:
        model = network(norm=False)
        optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        run = method.build(comm, ParameterVector(model), optimizer)
        step = 0
        closure: Any = run.closure(loss_of(run, lambda: step))
        losses = []
        for step in range(STEPS):  # noqa: B007
            losses.append(optimizer.step(closure))
            run.after_step(losses[-1])  # type: ignore[arg-type]
        return torch.stack(losses)  # type: ignore[arg-type]

    with pytest.raises(
        ConfigError, match=r"several times in a step .* take one that evaluates it once, or a method that"
    ):
        simulate(2, lambda comm: body(comm, DataParallel()))
    for losses in simulate(2, lambda comm: body(comm, LocalSGD(period=2))):
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_loss_may_make_backward_passes_of_its_own(everywhere: bool) -> None:
    """Of which nothing is shared once it has taken their gradients away, as adversarial examples do.

    If not everywhere, the loss of rank 1 reaches the last layer only.
    """

    def attacked(model: Any, rank: int, step: int) -> Tensor:
        x = examples(0, step)[0].requires_grad_()
        model(x).square().mean().backward()
        model.zero_grad()
        assert x.grad is not None
        hidden = model[:2](x.detach() + 0.1 * x.grad.sign())
        loss: Tensor = model[2](hidden if everywhere or not rank else hidden.detach()).square().mean()
        return loss

    def body(comm: Communicator) -> Tensor:
        run, optimizer = built(comm, DataParallel(bucket_mb=1e-5), norm=False)
        step = 0
        closure: Any = run.closure(lambda: attacked(run.vector.model, comm.rank, step))
        for step in range(STEPS):  # noqa: B007
            run.after_step(optimizer.step(closure))
        return run.vector.data

    model = network(norm=False)
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(STEPS):
        losses = [attacked(model, rank, step) for rank in range(2)]
        torch.stack(losses).mean().backward()
        optimizer.step()
    expected = nn.utils.parameters_to_vector(model.parameters())
    for ours in simulate(2, body):
        torch.testing.assert_close(ours, expected)


class Failing(torch.autograd.Function):
    """Is out of memory in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise MemoryError


def again(comm: Communicator, fails: str, bucket_mb: float = 1.0) -> Tensor:
    """Training in two parts, of which the second fails once on rank 1, and is made again."""
    run, optimizer = built(comm, DataParallel(bucket_mb=bucket_mb), norm=False)
    step = 0
    whole = loss_of(run, lambda: step)

    def loss(part: tuple[int, int]) -> Tensor:
        nonlocal fails
        if not fails or (comm.rank, step, part[0]) != (1, 2, 1):
            return whole(part)
        where, fails = fails, ""
        if where == "loss":
            raise MemoryError
        model: Any = run.vector.model
        inputs = examples(1, step)[0]
        return model[1:](Failing.apply(model[0](inputs))).sum()  # type: ignore[no-any-return, no-untyped-call]

    closure: Any = run.closure(loss, accumulate=2)
    for step in range(STEPS):  # noqa: B007
        try:
            value = optimizer.step(closure)
        except MemoryError:
            value = optimizer.step(closure)
        run.after_step(value)  # type: ignore[arg-type]
    return run.vector.data


@pytest.mark.parametrize("fails", ["loss", "backward"])
def test_a_step_that_failed_before_anything_was_sent_may_be_made_again(fails: str) -> None:
    expected = simulate(2, lambda comm: again(comm, ""))
    for ours, theirs in zip(simulate(2, lambda comm: again(comm, fails)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_that_failed_when_some_had_been_sent_cannot_be_made_again() -> None:
    """Other ranks would add what belongs to other buckets."""
    with pytest.raises(RuntimeError, match="failed when a part of its gradients had left for the other ranks"):
        simulate(2, lambda comm: again(comm, "backward", 1e-5))


@pytest.mark.parametrize("method", [DataParallel(), LSGD(period=2)], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model: model(torch.ones(2, 4)).mean(0), r"loss\(\) gave a tensor of shape \[3\]"),
        (lambda model: model(torch.ones(2, 4)).mean().item(), r"loss\(\) gave a float"),
        (lambda model: (model(torch.ones(2, 4)).mean(), 1), r"loss\(\) gave a tuple"),
        (lambda model: None, r"loss\(\) gave a NoneType.*the loss of the batch"),
        (lambda model: model(torch.ones(2, 4)).mean().detach(), r"loss\(\) gave a loss that depends on no trainable"),
    ],
)
def test_a_loss_that_is_none_is_told_so(method: Method, loss: Callable[[nn.Module], Any], message: str) -> None:
    run, _ = built(SingleCommunicator(), method, norm=False)
    with pytest.raises(ValueError, match=message):
        run.closure(lambda: loss(run.vector.model))()


def test_what_a_closure_returns_is_0d_whatever_shape_a_number_has_and_a_parameter_may_be_a_loss() -> None:
    run, _ = built(SingleCommunicator(), DataParallel(), norm=False)
    assert run.closure(lambda: run.vector.model(torch.ones(1, 4)).mean().view(1, 1))().shape == ()
    model = nn.ParameterList([torch.tensor(3.0)])
    run = DataParallel().build(SingleCommunicator(), ParameterVector(model), optim.SGD(model.parameters(), 0.1))
    assert run.closure(lambda: model[0])() == 3 and model[0].grad == 1


def test_a_closure_says_that_a_loop_has_not_counted_its_step_or_goes_on_after_the_end() -> None:
    run, optimizer = built(SingleCommunicator(), DataParallel(), norm=False)
    closure: Any = run.closure(loss_of(run, lambda: 0))
    value = optimizer.step(closure)
    with pytest.raises(ConfigError, match=r"call run\.after_step\(loss\) after every step"):
        optimizer.step(closure)
    run.after_step(value)  # type: ignore[arg-type]
    run.finish()
    messages = run.comm.meter.calls["gradient"]
    with pytest.raises(RuntimeError, match=r"a backward pass after the run has ended \(finish\(\) or close\(\)\)"):
        closure()
    assert run.comm.meter.calls["gradient"] == messages


@pytest.mark.parametrize("part", [(2, 2), (-1, 1), (0, 0)])
def test_a_part_is_one_of_those_there_are(part: tuple[int, int]) -> None:
    run, _ = built(SingleCommunicator(), DataParallel(), norm=False)
    closure = run.closure(loss_of(run, lambda: 0))
    with pytest.raises(ConfigError, match=r"part is \(.*\): must be \(i, M\), the i-th of M parts"):
        closure(part=part)


def test_parts_come_in_order() -> None:
    """Else one would be added to what is left of another gradient."""
    fails = False

    def loss(part: tuple[int, int]) -> Tensor:
        value = run.vector.model(torch.ones(2, 4)).mean()
        return value.detach() if fails else value  # type: ignore[no-any-return]

    run, _ = built(SingleCommunicator(), LocalSGD(period=2), norm=False)
    closure = run.closure(loss)
    for done in ([], [(0, 2)], [(0, 3), (1, 3), (2, 3)]):
        for part in done:
            closure(part=part)
        with pytest.raises(ConfigError, match=r"part is \(1, 3\): must come right after \(0, 3\)"):
            closure(part=(1, 3))
    closure(part=(0, 2))
    fails = True
    with pytest.raises(ValueError, match="depends on no"):
        closure(part=(1, 2))
    fails = False
    with pytest.raises(ConfigError, match="whose gradient it adds to"):  # a piece of it may be there already
        closure(part=(1, 2))


def test_what_a_closure_cannot_be_made_of() -> None:
    run, _ = built(SingleCommunicator(), LocalSGD())
    with pytest.raises(ConfigError, match=r"loss is a Tensor: must be a function"):
        run.closure(torch.zeros(()))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="clip_norm is 0: must be positive, or None"):
        run.closure(torch.zeros, clip_norm=0)
    with pytest.raises(ConfigError, match="accumulate is 0: must be at least 1 part"):
        run.closure(torch.zeros, accumulate=0)
