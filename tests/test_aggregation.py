"""What buckets promise to any codec, and what a codec keeps: by two of them that live here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Ranks
from test_data_parallel import MIB, TENSOR, USES, branches, expected_run, launches_recorded, loss_of
from torch import Tensor, nn, optim

from hpc_grawa import DataParallel, DistributedOptimizer, ParameterVector, Run, simulate
from hpc_grawa.aggregation import Aggregator, Bucket, Bucketed, Codec
from hpc_grawa.comm import Communicator, Work
from hpc_grawa.comm.single import SingleCommunicator


class InTwo(Codec):
    """The mean: each rank sums a part, then all gather the sums."""

    messages = 2

    def __init__(self, vector: ParameterVector) -> None:
        pass

    def launch(self, bucket: Bucket) -> Work:
        size = bucket.comm.size
        whole = nn.functional.pad(bucket.gradient, (0, -len(bucket.gradient) % size))
        return bucket.comm.alltoall(whole.view(size, -1), "gradient", bucket.numbers[0])

    def follow(self, bucket: Bucket, work: Work) -> Work:
        return bucket.comm.allgather(work.wait().mean(0), "gradient", bucket.numbers[1])

    def land(self, bucket: Bucket, work: Work) -> None:
        bucket.gradient.copy_(work.wait().flatten()[: len(bucket.gradient)])


class Largest(Codec):
    """Of each tensor the largest entry, with what was left of it, and its index; the rest is kept."""

    def __init__(self, vector: ParameterVector) -> None:
        self.kept, self.sent = torch.zeros_like(vector.data), torch.zeros_like(vector.data)
        self._kept, self._sent = ([t.view(-1) for t in vector.views(whole)] for whole in (self.kept, self.sent))

    def launch(self, bucket: Bucket) -> Work:
        self.kept[bucket.span] += bucket.gradient
        rows = []
        for i in bucket.tensors:
            index = int(self._kept[i].abs().argmax())
            value = float(self._kept[i][index])
            rows.append((value, index))
            self._sent[i][index] += value
            self._kept[i][index] = 0
        message = torch.tensor(rows, dtype=bucket.gradient.dtype)
        return bucket.comm.allgather(message, "gradient", bucket.numbers[0])

    def land(self, bucket: Bucket, work: Work) -> None:
        bucket.gradient.zero_()
        for of_rank in work.wait().tolist():
            for view, (value, index) in zip(bucket.views, of_rank, strict=True):
                view.view(-1)[int(index)] += value / bucket.comm.size

    def reset(self) -> None:
        self.kept.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept.copy_(state["kept"])


@dataclass(kw_only=True)
class Coded(DataParallel):
    """Gradients are shared by a codec."""

    codec: Callable[[ParameterVector], Codec]
    bucket_mb: float = 2 * TENSOR / MIB

    def _assemble(self, run: Run, probe: Any) -> None:
        bucket_bytes = int(self.bucket_mb * MIB)
        run.aggregator = Bucketed(run.comm, run.vector, self.codec(run.vector), bucket_bytes, self.on_nonfinite)


def begin(comm: Communicator, method: DataParallel, model: nn.Module, lr: float = 0.1) -> tuple[Run, optim.Optimizer]:
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr, momentum=0.9, weight_decay=0.5)
    return method.build(comm, ParameterVector(model), optimizer), optimizer


def step(run: Run, optimizer: optim.Optimizer, step: int, order: str, parts: int = 1, factor: float = 1) -> None:
    run.aggregator.zero_grad(optimizer)
    for part in range(parts):
        if part == parts - 1:
            run.aggregator.start()
        if order:
            (factor * loss_of(run.vector.model, run.comm.rank, step, part, order)).backward()
    run.aggregator.finish()
    optimizer.step()
    run.after_step()


# ---------------------------------------------------------------------------------------------------------
# Two messages, one of which needs the other.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use", ["another order on each rank", "unused on some ranks", "used by turns", "one rank uses nothing"]
)
@pytest.mark.parametrize("bucket", [1, 2 * TENSOR])
def test_smoke_flags_and_what_nobody_used_are_the_buckets_own(on_ranks: Ranks, use: str, bucket: int) -> None:
    """Under a codec that does not sum; weight decay and momentum tell None from zero."""
    steps = 6

    def body(comm: Communicator) -> tuple[list[Tensor], int]:
        run, optimizer = begin(comm, Coded(codec=InTwo, bucket_mb=bucket / MIB), branches())
        after = []
        for number in range(steps):
            step(run, optimizer, number, USES[use](comm.rank, number, 0))
            after.append(run.vector.data.clone())
        return after, comm.meter.calls["gradient"]

    results = on_ranks(body)
    expected = expected_run(on_ranks.size, USES[use], steps, 1)
    buckets = {1: 6, 2 * TENSOR: 3}[bucket]
    for after, messages in results:
        assert messages == steps * (2 * buckets + 1)
        for ours, theirs, first in zip(after, expected, results[0][0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            assert torch.equal(ours, first)


def test_messages_leave_in_one_order_whatever_order_gradients_come_in(on_ranks: Ranks) -> None:
    """The first of every bucket, the flags, then the second of every bucket, when what it needs has arrived."""

    def body(comm: Communicator) -> list[str]:
        events: list[str] = []
        run, optimizer = begin(comm, Coded(codec=InTwo), branches())
        with launches_recorded(comm, events):
            step(run, optimizer, 0, USES["another order on each rank"](comm.rank, 0, 0))
        return events

    for events in on_ranks(body):
        assert [e for e in events if "launch" in e] == [f"launch {number}" for number in (0, 1, 2, 6, 3, 4, 5)]
        for bucket in range(3):
            assert events.index(f"wait {bucket}") < events.index(f"launch {bucket + 3}")
        assert events[-1] == "wait 6"


@pytest.mark.parametrize("first", [0, 1])
def test_two_aggregators_may_be_finished_in_any_order(on_ranks: Ranks, first: int) -> None:
    """Some of the later one's first messages have left then, on each rank perhaps others."""
    use, steps = USES["another order on each rank"], 4

    def body(comm: Communicator) -> tuple[Tensor, list[str]]:
        model = branches()
        trained = [p for p in model.parameters() if p.requires_grad]
        method = Coded(codec=InTwo, bucket_mb=1e-9)
        pairs = [begin(comm, method, nn.ParameterList(part)) for part in (trained[::2], trained[1::2])]
        events: list[str] = []
        with launches_recorded(comm, events):
            for number in range(steps):
                for run, optimizer in pairs:
                    run.aggregator.zero_grad(optimizer)
                    run.aggregator.start()
                loss_of(model, comm.rank, number, 0, use(comm.rank, number, 0)).backward()
                for run, optimizer in (pairs[first], pairs[1 - first]):
                    run.aggregator.finish()
                    optimizer.step()
                    run.after_step()
        return nn.utils.parameters_to_vector(trained).detach().clone(), [e for e in events if "launch" in e]

    results = on_ranks(body)
    expected = expected_run(on_ranks.size, use, steps, 1)[-1]
    for ours, launched in results:
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert launched == results[0][1]


# ---------------------------------------------------------------------------------------------------------
# What is kept.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_what_was_sent_and_what_is_kept_is_every_gradient(on_ranks: Ranks, parts: int) -> None:
    """On each rank and in the mean, also of tensors that nobody uses any more; these are then given back as None."""
    use, steps = USES["used only now and then"], 4 + 17

    def body(comm: Communicator) -> list[Tensor]:
        model = branches()
        run, optimizer = begin(comm, Coded(codec=Largest), model)
        unused = [p for p in run.vector.parameters if p is not model.b.weight]
        codec = run.aggregator._codec
        own, landed = torch.zeros_like(run.vector.data), torch.zeros_like(run.vector.data)
        for number in range(steps):
            order = use(comm.rank, number, 0)
            for part in range(parts):
                loss = loss_of(model, comm.rank, number, part, order)
                gradients = torch.autograd.grad(loss, run.vector.parameters, allow_unused=True)
                for total, gradient in zip(run.vector.views(own), gradients, strict=True):
                    total += 0 if gradient is None else gradient
            step(run, optimizer, number, order, parts)
            landed += run.aggregator.grad
            if number == 2:  # nobody has used them, but there is something left
                assert all(p.grad is not None and p.grad.any() for p in unused)
        assert all(p.grad is None for p in unused) and model.b.weight.grad is not None
        return [own, codec.sent, codec.kept, landed, run.vector.data.clone()]

    results = on_ranks(body)
    for own, sent, kept, landed, parameters in results:
        torch.testing.assert_close(sent + kept, own, rtol=1e-12, atol=1e-12)
        assert kept.any()
        assert torch.equal(landed, results[0][3]) and torch.equal(parameters, results[0][4])
    kept, own = (torch.stack([result[i] for result in results]).mean(0) for i in (2, 0))
    torch.testing.assert_close(results[0][3] + kept, own, rtol=1e-12, atol=1e-12)


def test_a_run_that_goes_on_still_has_what_was_kept(on_ranks: Ranks) -> None:
    """Bit for bit; a state of before there was any goes on without."""

    def body(comm: Communicator) -> list[Tensor]:
        run, optimizer = begin(comm, Coded(codec=Largest), branches())
        found = []
        for number in range(6):
            if number == 3:
                states = copy.deepcopy((run.vector.model.state_dict(), optimizer.state_dict(), run.state_dict()))
            step(run, optimizer, number, "abcd")
        found += [run.vector.data.clone(), run.aggregator.state_dict()["kept"].clone()]
        run.close()
        old = {key: value for key, value in states[2].items() if key != "aggregator"}
        for state in (states[2], old):
            run, optimizer = begin(comm, Coded(codec=Largest), branches())
            run.vector.model.load_state_dict(states[0])
            optimizer.load_state_dict(copy.deepcopy(states[1]))
            run.load_state_dict(state)
            for number in range(3, 6):
                step(run, optimizer, number, "abcd")
            found += [run.vector.data.clone(), run.aggregator.state_dict()["kept"].clone()]
            run.close()
        return found

    for parameters, kept, again, kept_again, without, kept_without in on_ranks(body):
        assert torch.equal(again, parameters) and torch.equal(kept_again, kept)
        assert not torch.equal(without, parameters) and not torch.equal(kept_without, kept)


def test_the_mean_keeps_nothing() -> None:
    run, _ = begin(SingleCommunicator(), DataParallel(), branches())
    assert run.state_dict()["aggregator"] == Aggregator().state_dict() == {}


def test_after_a_skipped_step_the_next_one_is_as_if_it_had_not_been(on_ranks: Ranks) -> None:
    """On one rank the gradient was not finite: all forget what they have kept of it."""

    def body(comm: Communicator, skipped: bool) -> Tensor:
        run, optimizer = begin(comm, Coded(codec=Largest, on_nonfinite="skip"), branches())
        if skipped:
            step(run, optimizer, 7, "abcd", factor=math.nan if comm.rank == comm.size - 1 else 1)
        for number in range(2):
            step(run, optimizer, number, "abcd")
        return run.vector.data.clone()

    for ours, expected in zip(on_ranks(lambda c: body(c, True)), on_ranks(lambda c: body(c, False)), strict=True):
        assert torch.equal(ours, expected)


def test_sharing_can_be_switched_off() -> None:
    """From then on each rank steps with its own gradient, and sends nothing."""

    def body(comm: Communicator) -> tuple[Tensor, Tensor, int]:
        model = branches()
        plain = optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        optimizer = DistributedOptimizer(plain, model, Coded(codec=InTwo), comm=comm)
        run = optimizer.run
        assert run.aggregator.shares and not Aggregator.shares
        states = []
        for number in range(3):
            if number == 2:
                before = comm.meter.calls["gradient"]
                run.aggregator.settle()
                run.aggregator.close()
                assert not run.aggregator.shares
                run.aggregator = Aggregator()
            optimizer.zero_grad()
            loss_of(model, comm.rank, number, 0, "abcd").backward()
            own = nn.utils.parameters_to_vector([p.grad for p in run.vector.parameters])
            expected = run.vector.data - 0.1 * own
            optimizer.step()
            torch.testing.assert_close(run.vector.data, expected)
            states.append(run.vector.data.clone())
        return states[1], states[2], comm.meter.calls["gradient"] - before

    (shared, apart, sent), (also_shared, also_apart, also_sent) = simulate(2, body)
    assert torch.equal(shared, also_shared) and not torch.equal(apart, also_apart) and sent == also_sent == 0


@pytest.mark.parametrize("layers", [1, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_begin_where_memory_is_aligned(layers: int, dtype: torch.dtype) -> None:
    """What is ahead of them, flags of 2, 32 and 40 tensors and the place, takes a multiple of 32 numbers."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers))).to(dtype)
    comm = SingleCommunicator()
    sgd = optim.SGD(model.parameters(), 0.1)
    run = DataParallel().build(comm, ParameterVector(model), sgd)
    aggregator = run.aggregator
    assert isinstance(aggregator, Bucketed)
    run.after_step(sgd.step(run.closure(lambda: model(torch.ones(2, 3, dtype=dtype)).sum())))
    [bucket] = aggregator._buckets
    ahead = len(bucket.message) - len(bucket.gradient)
    assert ahead % 32 == 0 and 0 <= ahead - (2 * layers + 1) < 32
    assert bucket.gradient.data_ptr() - bucket.message.data_ptr() == 4 * ahead
    assert not bucket.message[2 * layers + 1 : ahead].any()
    assert comm.meter.payload_bytes["gradient"] == 4 * (ahead + len(run.vector))
