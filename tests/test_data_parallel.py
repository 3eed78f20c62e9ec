"""Gradient sharing: the mean gradient whatever ranks use, in buckets that leave while backward runs, in one order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from torch import Tensor, nn

from hpc_grawa import LGRAWA, DataParallel, ParameterVector, simulate
from hpc_grawa.aggregation import Bucketed
from hpc_grawa.comm import Communicator, Work
from hpc_grawa.comm.single import SingleCommunicator

MIB = 2.0**20
TENSOR = 4 * 4 * 8  # bytes of one weight


class Branches(nn.Module):
    """Layers a, b, c, d, used in whatever order is asked for; c shares its weight with a, and one bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcd":
            self.add_module(name, nn.Linear(4, 4, dtype=torch.float64))
        self.c.weight = self.a.weight
        self.b.bias.requires_grad_(False)

    def forward(self, x: Tensor, order: str) -> Tensor:
        for name in order:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


def branches() -> Branches:
    torch.manual_seed(0)
    return Branches()


def loss_of(model: nn.Module, rank: int, step: int, part: int, order: str) -> Tensor:
    inputs = torch.from_numpy(np.random.default_rng((rank, step, part)).standard_normal((3, 4)))
    return (model(inputs, order) * inputs.roll(1)).sum()


#: (rank, step, part) -> the layers used, in their order.
Use = Callable[[int, int, int], str]
USES: dict[str, Use] = {
    "all in order": lambda r, s, i: "abcd",
    "in reverse order": lambda r, s, i: "dcba",
    "another order on each rank": lambda r, s, i: "abcd"[r % 4 :] + "abcd"[: r % 4],
    "unused on all ranks": lambda r, s, i: "bd",
    "unused on some ranks": lambda r, s, i: "abcd" if r == 0 else "ab",
    "used by turns": lambda r, s, i: ("ad", "cb", "d", "abc")[(r + s + i) % 4],
    "used only now and then": lambda r, s, i: "abcd" if s in (1, 4) else "b",
    "used in the first part only": lambda r, s, i: "adc" if i == 0 else "b",
    "one rank uses nothing": lambda r, s, i: "" if r == 0 else "abd",
    "nobody uses anything": lambda r, s, i: "",
}


def expected_run(world: int, use: Use, steps: int, parts: int) -> list[Tensor]:
    """One process that holds all batches: parameters after each step, with the mean gradient of all ranks."""
    model = branches()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.5)
    after = []
    for step in range(steps):
        sums: list[Tensor | None] = [None] * len(parameters)
        for rank in range(world):
            for part in range(parts):
                if order := use(rank, step, part):
                    loss = loss_of(model, rank, step, part, order)
                    for i, g in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                        if g is not None:
                            sums[i] = g / world if sums[i] is None else sums[i] + g / world
        for p, g in zip(parameters, sums, strict=True):
            p.grad = g
        optimizer.step()
        after.append(torch.cat([p.detach().flatten() for p in parameters]))
    return after


@pytest.mark.parametrize(
    ("parts", "bucket", "zeroing"),
    [
        (1, 1, "aggregator"),
        (1, 10**9, "to none"),
        (1, 2 * TENSOR, "to none"),
        (2, 2 * TENSOR, "aggregator"),
        (2, 2 * TENSOR, "to none"),
        (2, 2 * TENSOR, "to zero"),
    ],
)
@pytest.mark.parametrize("use", USES)
def test_every_step_is_that_of_the_mean_gradient(
    on_ranks: Ranks, use: str, parts: int, bucket: int, zeroing: str
) -> None:
    """Weight decay and momentum tell None from zero: what no rank has used does not move."""
    steps = 6

    def body(comm: Communicator) -> tuple[list[Tensor], int]:
        model = branches()
        vector = ParameterVector(model)
        optimizer = torch.optim.SGD(vector.parameters, 0.1, momentum=0.9, weight_decay=0.5)
        run = DataParallel(bucket_mb=bucket / MIB).build(comm, vector, optimizer)
        after = []
        for step in range(steps):
            if zeroing == "aggregator":
                run.aggregator.zero_grad(optimizer)
            else:
                optimizer.zero_grad(set_to_none=zeroing == "to none")
            for part in range(parts):
                if part == parts - 1:
                    run.aggregator.start()
                if order := USES[use](comm.rank, step, part):
                    loss_of(model, comm.rank, step, part, order).backward()
            run.aggregator.finish()
            optimizer.step()
            run.after_step()
            after.append(vector.data.clone())
        return after, comm.meter.calls["gradient"]

    results = on_ranks(body)
    expected = expected_run(on_ranks.size, USES[use], steps, parts)
    buckets = {1: 6, 2 * TENSOR: 3, 10**9: 1}[bucket]
    for after, messages in results:
        assert messages == steps * buckets
        for ours, theirs, first in zip(after, expected, results[0][0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            assert torch.equal(ours, first)


def test_gradients_keep_the_memory_format_and_live_in_one_buffer(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 5, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
        vector = ParameterVector(model)
        optimizer = torch.optim.SGD(vector.parameters, 0.1)
        run = DataParallel(bucket_mb=1e-4).build(comm, vector, optimizer)
        inputs = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(comm.rank), dtype=torch.float64)
        own = torch.autograd.grad(model(inputs).exp().sum(), vector.parameters)
        for zeroing in (run.aggregator.zero_grad, lambda optimizer: optimizer.zero_grad(set_to_none=True)):
            zeroing(optimizer)
            run.aggregator.start()
            model(inputs).exp().sum().backward()
            run.aggregator.finish()
            flat = run.aggregator.grad
            for p, view in zip(vector.parameters, vector.views(flat), strict=True):
                assert p.grad is not None and (p.grad.data_ptr(), p.grad.stride()) == (view.data_ptr(), p.stride())
        return [*own, *(p.grad.clone() for p in vector.parameters if p.grad is not None)]

    results = on_ranks(body)
    for i in range(2):
        mean = torch.stack([result[i] for result in results]).mean(0)
        for result in results:
            torch.testing.assert_close(result[2 + i], mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("none", [True, False])
def test_half_precision_gradients_are_summed_in_fp32(on_ranks: Ranks, dtype: torch.dtype, none: bool) -> None:
    """Ranks differ in the last place; the mean is rounded once. Momentum and an unused tensor as in fp32."""

    def body(comm: Communicator) -> list[Tensor | None]:
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 1)]).to(dtype)
        vector = ParameterVector(model)
        optimizer = torch.optim.SGD(vector.parameters, 0.0)
        run = DataParallel(bucket_mb=1e-9).build(comm, vector, optimizer)
        x = torch.full((1, 5), 1 + (comm.rank + 1) * 2**-7, dtype=dtype)
        for _ in range(2):
            optimizer.zero_grad() if none else run.aggregator.zero_grad(optimizer)
            run.aggregator.start()
            model[0](x).sum().backward()
            run.aggregator.finish()
            optimizer.step()
            run.after_step()
        return [p.grad for p in vector.parameters]

    exact = sum(1 + (rank + 1) * 2**-7 for rank in range(on_ranks.size)) / on_ranks.size
    for weight, bias, *unused in on_ranks(body):
        assert weight is not None and weight.dtype == dtype and (weight == torch.tensor(exact).to(dtype)).all()
        assert bias is not None and (bias == 1).all() and unused == [None, None]


def test_sparse_gradients_are_shared_as_dense_ones(on_ranks: Ranks) -> None:
    """Ranks use rows of their own of an embedding, whose gradient has no other."""

    def body(comm: Communicator, sparse: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Embedding(5, 3, sparse=sparse)
        vector = ParameterVector(model)
        optimizer = torch.optim.SGD(vector.parameters, 0.1)
        run = DataParallel().build(comm, vector, optimizer)
        step = 0
        closure: Any = run.closure(lambda: model(torch.tensor([comm.rank, step])).square().sum())
        for step in range(3):  # noqa: B007
            optimizer.step(closure)
            run.after_step()
        return vector.data.clone()

    expected = on_ranks(lambda comm: body(comm, False))
    for ours, theirs in zip(on_ranks(lambda comm: body(comm, True)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------------------------------------------
# The order of events.
# ---------------------------------------------------------------------------------------------------------


@contextmanager
def launches_recorded(comm: Communicator, events: list[str]) -> Iterator[None]:
    """Within the block each shared bucket is an event when it is launched, and when it is waited for.

    Buckets are counted from the first, as the numbers of others on the same communicator come before them.
    """
    start, numbers = comm._start, []

    def recorded(verb: Any, x: Tensor, purpose: Any, bucket: int, root: int = 0) -> Work:
        work = start(verb, x, purpose, bucket, root)
        if purpose != "gradient":
            return work
        numbers.append(bucket)
        events.append(f"launch {bucket - numbers[0]}")

        def wait() -> Tensor:
            events.append(f"wait {bucket - numbers[0]}")
            return work.wait()

        return Work(wait)

    comm._start = recorded
    try:
        yield
    finally:
        del comm._start


def record(comm: Communicator, use: Use, bucket: int) -> list[str]:
    """What happens in one shared backward, as `gradient NAME`, `launch B`, `backward ends` and `wait B`."""
    events: list[str] = []
    model = branches()
    vector = ParameterVector(model)
    for name, p in zip(vector.names, vector.parameters, strict=True):
        p.register_post_accumulate_grad_hook(lambda p, name=name: events.append(f"gradient {name}"))
    optimizer = torch.optim.SGD(vector.parameters, 0.1)
    run = DataParallel(bucket_mb=bucket / MIB).build(comm, vector, optimizer)
    with launches_recorded(comm, events):
        run.aggregator.zero_grad(optimizer)
        run.aggregator.start()
        loss_of(model, comm.rank, 0, 0, use(comm.rank, 0, 0)).backward()
        events.append("backward ends")
        run.aggregator.finish()
    return events


def test_smoke_buckets_leave_while_backward_runs(on_ranks: Ranks) -> None:
    """Each bucket, here of one tensor, leaves with its gradient if the earlier ones have left; nothing waits before."""
    names = [f"gradient {name}" for name in ("d.bias", "d.weight", "c.bias", "b.weight", "a.bias", "a.weight")]
    for events in on_ranks(lambda comm: record(comm, lambda r, s, i: "abcd", 1)):
        expected: list[str] = []
        for gradient in (e for e in events if "gradient" in e):
            expected.append(gradient)
            while (left := sum("launch" in e for e in expected)) < 6 and names[left] in expected:
                expected.append(f"launch {left}")
        assert events == [*expected, "backward ends", *(f"wait {bucket}" for bucket in range(6))]
        assert events.index("launch 0") < events.index("gradient b.weight") < events.index("gradient a.weight")


@pytest.mark.parametrize("use", ["in reverse order", "another order on each rank", "unused on some ranks"])
@pytest.mark.parametrize("bucket", [1, 2 * TENSOR])
def test_buckets_leave_in_one_order_whatever_order_gradients_come_in(on_ranks: Ranks, use: str, bucket: int) -> None:
    buckets = {1: 6, 2 * TENSOR: 3}[bucket]
    gradients = []
    for events in on_ranks(lambda comm: record(comm, USES[use], bucket)):
        assert [e for e in events if "launch" in e] == [f"launch {number}" for number in range(buckets)]
        gradients.append([e for e in events if "gradient" in e])
    if on_ranks.size > 1 and "rank" in use:
        assert gradients[0] != gradients[1]


def test_what_no_hook_launched_is_flushed_after_backward(on_ranks: Ranks) -> None:
    for events in on_ranks(lambda comm: record(comm, lambda r, s, i: "abc", 1)):
        assert events.index("backward ends") < events.index("launch 0")  # it holds d.bias, which has no gradient
        assert [e for e in events if "launch" in e] == [f"launch {number}" for number in range(6)]


def test_only_the_last_part_of_a_batch_is_shared(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[str]:
        events: list[str] = []
        model = branches()
        vector = ParameterVector(model)
        optimizer = torch.optim.SGD(vector.parameters, 0.1)
        run = DataParallel(bucket_mb=1e-9).build(comm, vector, optimizer)
        with launches_recorded(comm, events):
            run.aggregator.zero_grad(optimizer)
            for part in range(3):
                events.append(f"part {part}")
                if part == 2:
                    run.aggregator.start()
                loss_of(model, comm.rank, 0, part, "abcd").backward()
            run.aggregator.finish()
            events.append("after")
            loss_of(model, comm.rank, 1, 0, "abcd").backward()
        return events

    for events in on_ranks(body):
        first, last = events.index("part 2") + 1, events.index("after")
        assert not any("launch" in e for e in events[:first] + events[last:])
        assert sum("launch" in e for e in events[first:last]) == 6


def test_a_probe_beside_data_parallel_shares_nothing() -> None:
    """Two methods on one vector: the probe's backward runs on leaves of its own, so no hook of the buckets fires."""

    def body(comm: Communicator) -> int:
        model = branches()
        vector = ParameterVector(model)
        optimizer = torch.optim.SGD(vector.parameters, 0.1)
        shared = DataParallel(bucket_mb=1e-9).build(comm, vector, optimizer)
        averaged = LGRAWA(period=1).build(comm, vector, optimizer, lambda: loss_of(model, comm.rank, 0, 0, "abcd"))
        shared.aggregator.start()
        averaged.after_step()
        return comm.meter.calls["gradient"]

    assert simulate(2, body) == [0, 0]


def test_the_last_bucket_is_small_and_no_pass_holds_more_than_a_bucket_twice() -> None:
    """Of eight tensors of 512 KiB: two in the last bucket, three in each of the others."""
    model = nn.Sequential(*(nn.Linear(1, 2**17, bias=False) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = DataParallel(bucket_mb=1.6).build(SingleCommunicator(), ParameterVector(model), optimizer)
    assert isinstance(run.aggregator, Bucketed)
    buckets = run.aggregator._buckets
    assert [list(bucket.tensors) for bucket in buckets] == [[7, 6, 5], [4, 3, 2], [1, 0]]
    assert sum(bucket.message.numel() for bucket in buckets) == len(run.vector) + 32  # flags, place, and 23 zeros
    run.aggregator.zero_grad(optimizer)
    for layer in model:
        layer(torch.ones(1, 1)).sum().backward()
        flat = run.aggregator.grad.untyped_storage().data_ptr()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert sum(g.untyped_storage().data_ptr() != flat for g in grads) <= 3
    assert len(grads) == 8 and all(bool((g == 1).all()) for g in grads)
    # Also in the pass that shares, where no bucket may leave from a hook: its first tensors come last here.
    run.aggregator.zero_grad(optimizer)
    run.aggregator.start()
    for layer in model:
        layer(torch.ones(1, 1)).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert sum(g.untyped_storage().data_ptr() != flat for g in grads) <= 3
    run.aggregator.finish()
    assert len(grads) == 8 and all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)


def test_zero_grad_forgets_a_gradient_wherever_it_is() -> None:
    """One that was made outside the buffer and never shared, as a first pass of a two-pass optimizer makes it."""
    model = branches()
    vector = ParameterVector(model)
    optimizer = torch.optim.SGD(vector.parameters, 0.1, weight_decay=0.5)
    run = DataParallel().build(SingleCommunicator(), vector, optimizer)
    optimizer.zero_grad(set_to_none=True)
    loss_of(model, 0, 7, 0, "abcd").backward()
    run.aggregator.zero_grad(optimizer)
    run.aggregator.start()
    loss_of(model, 0, 0, 0, "bd").backward()
    run.aggregator.finish()
    optimizer.step()
    expected = expected_run(1, USES["unused on all ranks"], 1, 1)[0]
    torch.testing.assert_close(vector.data, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("zeroing", ["aggregator", "to none"])
def test_a_skipped_step_leaves_nothing_behind(zeroing: str) -> None:
    """After a step without finite gradient the next one is as if it had not been."""
    model = branches()
    vector = ParameterVector(model)
    optimizer = torch.optim.SGD(vector.parameters, 0.1, momentum=0.9, weight_decay=0.5)
    run = DataParallel(bucket_mb=1e-9, on_nonfinite="skip").build(SingleCommunicator(), vector, optimizer)
    before = vector.data.clone()
    for factor in (math.nan, 1.0):
        if zeroing == "aggregator":
            run.aggregator.zero_grad(optimizer)
        else:
            optimizer.zero_grad(set_to_none=True)
        run.aggregator.start()
        (factor * loss_of(model, 0, 0, 0, "abcd")).backward()
        run.aggregator.finish()
        optimizer.step()
        run.after_step()
        if math.isnan(factor):
            assert torch.equal(vector.data, before)
            assert all(p.grad is None for p in vector.parameters)
    torch.testing.assert_close(vector.data, expected_run(1, USES["all in order"], 1, 1)[0], rtol=1e-14, atol=1e-14)


def test_a_step_whose_gradients_were_not_shared_is_an_error() -> None:
    """A loop that forgets the aggregator would train apart without a word."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = DataParallel().build(SingleCommunicator(), ParameterVector(model), optimizer)

    def step(shared: bool) -> None:
        run.aggregator.zero_grad(optimizer)
        if shared:
            run.aggregator.start()
        model(torch.ones(1, 2)).sum().backward()
        if shared:
            run.aggregator.finish()
        optimizer.step()
        run.after_step()

    step(shared=True)
    with pytest.raises(RuntimeError, match=r"were not shared: .* run\.closure\(loss\)"):
        step(shared=False)
