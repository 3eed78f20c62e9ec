"""The verbs on every backend, what simulated ranks refuse, and how a job ends when a rank fails."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference as ref
import torch
from conftest import DEVICES, Ranks
from launcher import launch
from torch import Tensor, nn

from hpc_grawa.comm import Communicator, simulate, simulated
from hpc_grawa.comm.base import sharing
from hpc_grawa.comm.horovod import HorovodCommunicator
from hpc_grawa.comm.meter import Meter
from hpc_grawa.comm.mpi import MPICommunicator
from hpc_grawa.comm.simulated import SimulatedCommunicator
from hpc_grawa.comm.store import StoreCounter
from hpc_grawa.errors import LostContact, Unmatched
from hpc_grawa.launch import local_device
from hpc_grawa.methods import DataParallel, LocalSGD
from hpc_grawa.random_streams import Streams, streams
from hpc_grawa.vector import ParameterVector

DTYPES = (torch.float32, torch.float64, torch.int64, torch.uint8)
SHAPES = ((), (1,), (7,), (3, 5), (0,), (2, 0))


def own(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small whole numbers, different on each rank and in each place: sums are exact in every dtype."""
    count = int(np.prod(shape))
    return (torch.arange(count).reshape(shape) % 5 + 10 * rank + 1).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smoke_verbs(on_ranks: Ranks, dtype: torch.dtype, device: str) -> None:
    world = on_ranks.size

    def body(comm: Communicator) -> list[list[Tensor]]:
        assert (comm.size, comm.backend) == (world, on_ranks.backend)
        results = []
        for shape in SHAPES:
            x = own(comm.rank, shape, dtype).to(local_device(wanted=device))  # type: ignore[arg-type]
            total = x.clone() if dtype != torch.uint8 else x.long()  # Horovod cannot add bytes
            assert comm.allreduce(total, "center").wait().data_ptr() == total.data_ptr()
            kept = x.clone()
            rows = comm.allgather(kept, "center").wait()
            assert torch.equal(kept, x)
            last = x.clone()
            comm.broadcast(last, world - 1, "center").wait()
            to_all = torch.stack([x + m for m in range(world)])
            mine = comm.alltoall(to_all, "center").wait()
            results.append([t.cpu() for t in (total, rows, last, mine)])
        return results

    for rank, results in enumerate(on_ranks(body)):
        for shape, (total, rows, last, mine) in zip(SHAPES, results, strict=True):
            x = [own(m, shape, dtype) for m in range(world)]
            assert torch.equal(total, torch.stack(x).sum(0))
            assert torch.equal(rows, torch.stack(x))
            assert torch.equal(last, x[-1])
            assert torch.equal(mine, torch.stack([y + rank for y in x]))
            assert {t.dtype for t in (rows, last, mine)} == {dtype}


def test_broadcast_from_every_root_and_from_none(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[int]:
        for root in (-1, comm.size):
            with pytest.raises(ValueError, match=rf"rank {root}.*0\.\.{comm.size - 1}"):
                comm.broadcast(torch.zeros(1), root, "setup")
        received = [comm.broadcast(torch.tensor([10 + comm.rank]), root, "setup").wait() for root in range(comm.size)]
        return [int(x) for x in received]

    assert on_ranks(body) == [[10 + root for root in range(on_ranks.size)]] * on_ranks.size


def test_messages_under_way_at_once_arrive_each_in_its_own_tensor(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[list[float]]:
        sums = [torch.full((size,), float(size * (comm.rank + 1))) for size in (3, 1, 1000, 2)]
        works = [comm.allreduce(x, "gradient", bucket=b) for b, x in enumerate(sums)]
        rows = comm.allgather(torch.tensor([comm.rank]), "control")
        center = torch.tensor([float(comm.rank)])
        moved = comm.broadcast(center, 0, "center")
        for work in reversed(works):  # waited for in another order than started
            work.wait()
        assert rows.wait().flatten().tolist() == list(range(comm.size))
        assert rows.wait() is rows.wait()
        assert moved.wait().item() == 0
        return [x.unique().tolist() for x in sums]

    ranks = sum(m + 1 for m in range(on_ranks.size))
    assert on_ranks(body) == [[[3.0 * ranks], [ranks], [1000.0 * ranks], [2.0 * ranks]]] * on_ranks.size


def test_a_sum_s_bits_do_not_depend_on_what_is_under_way_beside_it(on_ranks: Ranks) -> None:
    """Horovod would add messages that are there at once as one, in another order."""

    def body(comm: Communicator) -> bool:
        generator = torch.Generator().manual_seed(comm.rank)
        own = [torch.randn(size, generator=generator) for size in (250_000, 70_000, 30_000)]
        alone = [comm.allreduce(x.clone(), "center", b).wait() for b, x in enumerate(own)]
        same = True
        for _ in range(5):
            sums = [x.clone() for x in own]
            works = [comm.allreduce(x, "gradient", b) for b, x in enumerate(sums)]
            for work in works:
                work.wait()
            same &= all(torch.equal(x, y) for x, y in zip(sums, alone, strict=True))
        return same

    assert all(on_ranks(body))


def test_every_rank_tells_of_its_gpu_also_that_it_has_none(on_ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """On hosts without one, too, so that no rank waits for a message that another does not send."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))

    def body(comm: Communicator) -> tuple[list[bool], tuple[int, int] | None, bool | None]:
        last = comm.rank == comm.size - 1
        some, all_ = comm.gather_gpus(None if last else 0), comm.gather_gpus(0)
        sends = comm._send_from_gpus(able=not last) if isinstance(comm, HorovodCommunicator) else None
        comm.barrier()
        return [gpu is None for gpu in some], sharing(all_), sends

    none = [False] * (on_ranks.size - 1) + [True]
    shared = (0, 1) if on_ranks.size > 1 else None
    sends = False if on_ranks.backend == "horovod" else None
    assert on_ranks(body) == [(none, shared, sends)] * on_ranks.size


def test_an_error_of_mpi_is_a_lost_rank_unless_the_call_is_wrong(on_ranks: Ranks) -> None:
    if on_ranks.backend != "mpi":
        pytest.skip("of MPI")
    from mpi4py import MPI

    def lose(*_: object) -> None:
        raise MPI.Exception(MPI.ERR_OTHER)  # as MPICH does, and Open MPI where it is told to go on

    def body(comm: Communicator) -> None:
        assert isinstance(comm, MPICommunicator)
        with pytest.raises(MPI.Exception, match="MPI_ERR_ROOT"):
            comm._launch("broadcast", torch.ones(1), "center", 0, comm.size).wait()
        whole = comm._comm
        comm._comm = SimpleNamespace(Allreduce=lose)
        try:
            with pytest.raises(LostContact, match="MPI_ERR_OTHER"):
                comm.allreduce(torch.ones(1), "center").wait()
        finally:
            comm._comm = whole
        comm.barrier()

    on_ranks(body)


def test_what_is_not_contiguous_is_refused(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        x = torch.zeros(comm.size, 4)[:, ::2]
        for verb in (comm.allreduce, comm.allgather, comm.alltoall):
            with pytest.raises(ValueError, match=r"needs a contiguous tensor, got strides \(4, 2\)"):
                verb(x, "setup")
        with pytest.raises(ValueError, match="contiguous"):
            comm.broadcast(x, 0, "setup")
        with pytest.raises(ValueError, match=f"one row per rank: {comm.size} rows"):
            comm.alltoall(torch.zeros(comm.size + 1), "setup")
        comm.barrier()

    on_ranks(body)


def test_gather_bytes_of_any_length(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[list[bytes]]:
        return [comm.gather_bytes(bytes(range(256)) * (n * comm.rank)) for n in (0, 1, 3)]

    for gathered in on_ranks(body):
        assert gathered == [[bytes(range(256)) * (n * m) for m in range(on_ranks.size)] for n in (0, 1, 3)]


def test_the_meter_counts_bytes_as_specified(on_ranks: Ranks) -> None:
    world = on_ranks.size

    def body(comm: Communicator) -> Meter:
        comm.meter = Meter()
        comm.allreduce(torch.zeros(31), "gradient").wait()
        comm.allgather(torch.zeros(5, dtype=torch.float64), "control").wait()
        comm.broadcast(torch.zeros(7, dtype=torch.uint8), 0, "center").wait()
        comm.alltoall(torch.zeros(world, 3), "center").wait()
        comm.allreduce(torch.zeros(1000), "evaluate").wait()
        comm.barrier()
        return comm.meter

    for meter in on_ranks(body):
        sent = {
            "gradient": ref.bytes_sent("allreduce", 124, world),
            "control": ref.bytes_sent("allgather", 40, world),
            "center": ref.bytes_sent("broadcast", 7, world) + ref.bytes_sent("alltoall", 12 * world, world),
        }
        assert {purpose: meter.bytes_sent[purpose] for purpose in sent} == pytest.approx(sent)
        assert meter.training_bytes_sent == round(sum(sent.values()))
        assert meter.training_payload_bytes == 124 + 40 + 7 + 12 * world
        assert dict(meter.calls) == {"gradient": 1, "control": 1, "center": 2, "evaluate": 1, "setup": 1}
        assert meter.waiting_seconds == meter.seconds["control"]
        assert meter.communication_seconds == meter.seconds["center"] + meter.seconds["gradient"]


def test_hidden_seconds_are_those_between_start_and_wait_counted_once() -> None:
    meter = Meter()
    meter.waited("gradient", began=1.0, waited_from=3.0, waited_until=3.5, done=2.0)
    meter.waited("gradient", began=1.5, waited_from=3.5, waited_until=4.0, done=3.25)
    meter.waited("evaluate", began=4.0, waited_from=9.0, waited_until=9.0, done=8.0)
    assert meter.hidden_seconds == pytest.approx((2.0 - 1.0) + (3.25 - 2.0))
    assert meter.communication_seconds == pytest.approx(1.0)


def test_loading_is_counted_and_a_rank_that_waits_for_its_data_says_so() -> None:
    meter = Meter()
    for _ in range(2):
        with meter.loading(torch.device("cpu")):
            assert meter.activity == "loads its next batch"
            time.sleep(0.01)
        assert meter.activity == "computes"
    assert 0.02 <= meter.loading_seconds == meter.seconds["load"]
    assert meter.communication_seconds == meter.waiting_seconds == 0


PARTITIONS = {
    "all in one": lambda rank, world: 0,
    "each alone": lambda rank, world: rank,
    "even and odd": lambda rank, world: rank % 2,
    "first and rest, colors descending": lambda rank, world: 9 if rank == 0 else -3,
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_smoke_a_part_is_a_communicator_of_its_own(on_ranks: Ranks, name: str) -> None:
    """Every verb among the ranks of one color, roots and rows counted within the part; the parts do not wait for
    each other, messages of the whole may be under way meanwhile, and the whole goes on as before."""
    world = on_ranks.size
    colors = [PARTITIONS[name](m, world) for m in range(world)]

    def body(comm: Communicator) -> tuple[list[int], list[Tensor], float]:
        part = comm.split(colors)
        whole = comm.allreduce(torch.ones(3), "center")
        own = torch.tensor([float(comm.rank)])
        results = []
        for _ in range(1 + comm.rank * (name == "each alone")):
            total = part.allreduce(own.clone(), "center").wait()
            rows = part.allgather(own, "control").wait()
            last = part.broadcast(own.clone(), part.size - 1, "center").wait()
            swapped = part.alltoall(torch.arange(part.size) + 10 * part.rank, "center").wait()
            results = [total, rows, last, swapped]
        part.barrier()
        assert part.ranks[part.rank] == comm.rank and part.size == len(part.ranks) and part.meter is comm.meter
        assert whole.wait().tolist() == [world] * 3
        again = part.split([0] * part.size)  # a part of the part
        return list(part.ranks), results, again.allreduce(own.clone(), "center").wait().item()

    for rank, (ranks, (total, rows, last, swapped), nested) in enumerate(on_ranks(body)):
        assert ranks == [m for m in range(world) if colors[m] == colors[rank]]
        assert total.item() == sum(ranks) == nested
        assert rows.flatten().tolist() == ranks
        assert last.item() == ranks[-1]
        assert swapped.tolist() == [10 * m + ranks.index(rank) for m in range(len(ranks))]


def test_split_wants_a_color_per_rank(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=f"one color per rank: {comm.size}, got {comm.size + 1}"):
            comm.split([0] * (comm.size + 1))

    on_ranks(body)


def test_the_node_is_the_ranks_of_this_host(on_ranks: Ranks) -> None:
    """All ranks of a test are on one host."""

    def body(comm: Communicator) -> tuple[tuple[int, ...], bool, float]:
        node = comm.node()
        return node.ranks, node is comm.node(), node.allreduce(torch.ones(1), "center").wait().item()

    world = on_ranks.size
    assert on_ranks(body) == [(tuple(range(world)), True, world)] * world


def test_hosts_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 2 on one host, 1 on another: what gather_bytes of the hosts' names comes to."""
    names = {0: b"a", 1: b"b", 2: b"a"}
    monkeypatch.setattr(Communicator, "gather_bytes", lambda comm, message, purpose="setup": list(names.values()))
    assert simulate(3, lambda comm: comm.node().ranks) == [(0, 2), (1,), (0, 2)]


def test_smoke_a_counter_gives_every_number_once(on_ranks: Ranks) -> None:
    """Ranks add as often as they like without waiting for each other."""
    world = on_ranks.size

    def body(comm: Communicator) -> tuple[list[int], list[int]]:
        one, other = comm.counter(), comm.counter()
        inner = one._counter
        if isinstance(inner, StoreCounter):  # a new store may take seconds
            assert inner._store is other._counter._store
        comm.barrier()
        drawn = [one.add(1) for _ in range(50 * (comm.rank + 1))]
        twos = [other.add(2) for _ in range(3)]
        comm.barrier()
        return drawn, twos

    results = on_ranks(body)
    assert sorted(n for drawn, _ in results for n in drawn) == list(range(1, 50 * world * (world + 1) // 2 + 1))
    assert sorted(n for _, twos in results for n in twos) == list(range(2, 6 * world + 1, 2))
    assert all(drawn == sorted(drawn) for drawn, _ in results)


def test_tensors_that_a_backend_cannot_read_travel_by_way_of_the_host(
    on_ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA tensors do on MPI, done with the CPU's: the messages arrive, in the caller's tensor."""
    world = on_ranks.size

    def body(comm: Communicator) -> list[list[float]]:
        monkeypatch.setattr(type(comm), "carries", lambda comm, x, verb: False)
        results = []
        for turn in range(2):  # the second turn uses the first one's buffers
            x = torch.tensor([1.0 + comm.rank + turn])
            total, last = x.clone(), x.clone()
            assert comm.allreduce(total, "center").wait().data_ptr() == total.data_ptr()
            rows = comm.allgather(x, "control").wait()
            assert comm.broadcast(last, world - 1, "center").wait().data_ptr() == last.data_ptr()
            mine = comm.alltoall(x.expand(world).contiguous(), "center").wait()
            results.append([*total.tolist(), *last.tolist(), *rows.flatten().tolist(), *mine.tolist()])
        return results

    for results in on_ranks(body):
        for turn, result in enumerate(results):
            x = [1.0 + m + turn for m in range(world)]
            assert result == [sum(x), x[-1], *x, *x]


def test_what_messages_of_a_run_went_through_is_freed_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run after run over one communicator, each with messages of its own numbers; of groups, too."""

    def body(comm: Communicator) -> None:
        monkeypatch.setattr(type(comm), "carries", lambda comm, x, verb: False)
        for method in (LocalSGD(period=2), LocalSGD(period=4, group_period=2, ranks_per_group=2), DataParallel()):
            model = nn.Linear(4, 1)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            run = method.build(comm, ParameterVector(model), optimizer)
            closure = run.closure(lambda model=model: model(torch.ones(2, 4)).mean())
            for _ in range(4):
                run.after_step(optimizer.step(closure))
            comms = [comm, *(s.averager.comm for s in run.synchronizers)]
            assert all(comm._buffers for comm in comms)
            run.finish()
            assert not any(comm._buffers for comm in comms)

    simulate(4, body)


# ---------------------------------------------------------------------------------------------------------
# Simulated ranks.
# ---------------------------------------------------------------------------------------------------------


def test_unmatched_calls_name_ranks_and_calls() -> None:
    def body(comm: Communicator) -> None:
        comm.allreduce(torch.zeros(3 if comm.rank == 2 else 4), "center").wait()

    with pytest.raises(Unmatched, match=r"rank 2 is allreduce 'center'.*\(3,\).*rank 0 is allreduce.*\(4,\)"):
        simulate(3, body)


@pytest.mark.parametrize("waits", [True, False])
def test_a_rank_that_ends_early_is_named(waits: bool) -> None:
    def body(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank != 1:
            work = comm.allgather(torch.zeros(2), "control")
            if waits:
                work.wait()

    with pytest.raises(Unmatched, match="rank 1 has ended after 1 calls") as error:
        simulate(3, body)
    assert ("rank 0 waits in call 1, allgather 'control'" in str(error.value)) == waits


def test_a_rank_that_raises_ends_all() -> None:
    ended = []

    def body(comm: Communicator) -> None:
        try:
            comm.barrier()
            if comm.rank == 1:
                raise ZeroDivisionError("on rank 1")
            comm.barrier()
            ended.append(comm.rank)
        finally:
            ended.append(-1)

    with pytest.raises(ZeroDivisionError, match="on rank 1"):
        simulate(3, body)
    assert ended == [-1] * 3


def test_ranks_that_another_has_ended_leave_the_random_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run at once, and two that ask torch for its stream at once may hang (a garbage collection decides)."""
    failed: list[bool] = []
    asked_after: list[bool] = []

    def asked() -> Streams:
        asked_after.extend(failed)
        return streams()

    def body(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == 1:
            failed.append(True)
            raise ZeroDivisionError
        comm.barrier()

    monkeypatch.setattr(simulated, "streams", asked)
    with pytest.raises(ZeroDivisionError):
        simulate(3, body)
    assert failed and not asked_after


def test_an_interrupted_world_ends_before_its_caller_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), []

    def body(comm: Communicator) -> None:
        try:
            if comm.rank == 0:
                begun.wait()
                time.sleep(0.1)  # computes
            comm.barrier()
        finally:
            ended.append(comm.rank)

    join = threading.Thread.join

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.name == "rank 0" and not begun.is_set():
            begun.set()
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(2, body)
    assert ended == [0]


def test_ranks_have_random_streams_of_their_own_and_the_callers_is_kept() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def body(comm: Communicator) -> list[list[float]]:
        random.seed(comm.rank)
        np.random.seed(comm.rank)
        torch.manual_seed(comm.rank)
        drawn = []
        for _ in range(3):
            drawn.append(draw())
            comm.barrier()
        return drawn

    def alone(seed: int) -> list[list[float]]:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return [draw() for _ in range(3)]

    expected = [alone(m) for m in range(4)]
    alone(99)
    following = draw()
    alone(99)
    assert simulate(4, body) == expected
    assert draw() == following


def test_a_rank_with_the_earlier_clock_adds_first() -> None:
    """Rank m needs 1/(m+1) seconds between two numbers: of the first 20 it gets 2, 4, 6, 8; rank 0 waits for none."""

    def body(comm: Communicator) -> list[int]:
        assert isinstance(comm, SimulatedCommunicator)
        counter, drawn = comm.counter(), []
        while not drawn or drawn[-1] < 20:
            drawn.append(counter.add(1))
            comm.elapse(1 / (comm.rank + 1))
        return [number for number in drawn if number <= 20]

    assert [len(drawn) for drawn in simulate(4, body)] == [2, 4, 6, 8]


def test_a_message_arrives_when_its_last_rank_has_sent_it() -> None:
    def body(comm: Communicator) -> float:
        assert isinstance(comm, SimulatedCommunicator)
        comm.elapse(comm.rank)
        comm.split([0, 0, 1]).barrier()
        return comm.clock

    assert simulate(3, body) == [1.0, 1.0, 2.0]


def test_a_rank_starts_from_the_callers_random_stream() -> None:
    torch.manual_seed(5)
    first = torch.rand(()).item()
    torch.manual_seed(5)
    assert simulate(2, lambda comm: torch.rand(()).item()) == [first, first]


# ---------------------------------------------------------------------------------------------------------
# Launched jobs.
# ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch
from hpc_grawa.comm import connect
comm = connect("{backend}")
comm.barrier()
if comm.rank in {failing}:
    work = comm.allreduce(torch.zeros(10), "center")
    raise ZeroDivisionError("deliberate")
comm.allgather(torch.zeros(10), "control").wait()
comm.barrier()
print("reached the end")
"""


@pytest.mark.parametrize(
    ("backend", "failing"),
    [
        ("mpi", (1,)),
        ("mpi", (0, 1)),
        pytest.param("horovod", (1,), marks=pytest.mark.slow),
        pytest.param("gloo", (1,), marks=pytest.mark.slow),
    ],
    ids=["mpi", "mpi, all", "horovod", "gloo"],
)
def test_a_rank_that_raises_ends_the_job(backend: str, failing: tuple[int, ...]) -> None:
    if backend == "horovod":
        pytest.importorskip("horovod.torch")
    ended = launch(program=("-c", PROGRAM.format(backend=backend, failing=failing)), ranks=2)
    status, output = ended.status, ended.said
    assert status != 0
    assert "ZeroDivisionError: deliberate" in output
    assert f"rank {failing[0]} of 2 failed" in output
    assert "reached the end" not in output


HARNESS = {
    "fails": "def test_case(on_ranks):\n    on_ranks(lambda comm: 1 // (1 - comm.rank))",
    "hangs": "def test_case(on_ranks):\n    on_ranks(lambda comm: comm.rank == 1 or comm.barrier())",
    "cannot be collected": "1 // 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HARNESS)
def test_how_a_launched_test_ends_that(case: str, tmp_path: Path) -> None:
    (tmp_path / "test_case.py").write_text(HARNESS[case])
    pytest_ = ("-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-q", "--rootdir", str(tmp_path))
    limit = ("-o", f"faulthandler_timeout={2 if case == 'hangs' else 0}")
    ended = launch(*limit, "--backend", "mpi", str(tmp_path), program=pytest_, ranks=2)
    status, output = ended.status, ended.said
    assert status != 0
    assert "passed" not in output
    if case == "hangs":
        assert output.count("in test_case") == 2, output  # the stack of each rank
    else:
        assert f"=== rank {int(case == 'fails')} of 2: test_case.py" in output, output
        assert "ZeroDivisionError" in output
