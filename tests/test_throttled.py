"""An emulated link: what messages cost, how they share it, what computing hides of them, and who says so."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own
import pytest
import torch
from conftest import Ranks
from launcher import called
from torch import Tensor

from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator, connect, slowed
from hpc_grawa.comm.meter import Meter
from hpc_grawa.comm.throttled import Line, Network, Pair, cost
from hpc_grawa.errors import ConfigError
from hpc_grawa.training.loop import fit

LINK, A, B = "10mbit,4ms", 0.004, 8 / 10e6
NUMBERS = 1200  # of a message, each of 4 bytes
N = 4 * NUMBERS

#: Verb, ranks, own payload in bytes: latencies and bytes one after the other, by hand.
COSTS = {
    ("allreduce", 2, 1000): (2, 1000),
    ("allreduce", 4, 1000): (6, 1500),
    ("allreduce", 5, 1000): (8, 1600),
    ("broadcast", 2, 1000): (1, 1000),
    ("broadcast", 4, 1000): (2, 2000),
    ("broadcast", 5, 1000): (3, 3000),
    ("allgather", 4, 1000): (3, 3000),
    ("alltoall", 4, 1000): (3, 750),
    ("barrier", 4, 0): (4, 0),
    ("barrier", 5, 0): (6, 0),
    ("counter", 4, 0): (2, 0),
}


@pytest.mark.parametrize(("verb", "ranks", "payload"), COSTS)
def test_messages_cost_what_the_table_says(verb: str, ranks: int, payload: int) -> None:
    assert cost(verb, payload, ranks) == COSTS[verb, ranks, payload]  # type: ignore[arg-type]
    assert cost(verb, payload, 1) == (0, 0)  # type: ignore[arg-type]


def test_a_link_is_read_from_text() -> None:
    network = Network.read("1gbit,100us")
    assert (network.between, network.within, network.ranks_per_host) == (Pair(1e-4, 8e-9), None, None)
    assert Network.read("100Mbit, 20ms").between == Pair(pytest.approx(0.02), 8e-8)
    network = Network.read("2.5kbit,1s,100gbit,.5us,4")
    assert network.between == Pair(1.0, 8 / 2500)
    assert network.within == Pair(pytest.approx(5e-7), 8e-11)
    assert network.ranks_per_host == 4


@pytest.mark.parametrize(
    "text",
    [
        *(
            "1foo",
            "1gbit",
            "1foo,1us",
            "-1gbit,1us",
            "1gbit,-1us",
            "nangbit,1us",
            "1gbit,nan",
            "infgbit,1us",
            "0gbit,1us",
        ),
        *("1gbit,0us", "1us,1gbit", "1gbit,1us,1gbit", "1gbit,1us,1gbit,1us,0", "1gbit,1us,1gbit,1us,x", "", "gbit,us"),
        "1gbit,1us,1gbit,1us,2,2",
        *(f"{'9' * 400}gbit,1us", f"1gbit,{'9' * 400}s"),
    ],
)
def test_another_text_is_one_line_and_status_2(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("train", "--config", "digits"), ("compare", "--config", "digits", "--methods", "EASGD")):
        ended = called(capsys, *words, f"--network={text}")
        assert ended.status == 2
        assert len(ended.errors.splitlines()) == 1
        assert f"error: network{f' is {text}' if text else ''}: must be the bandwidth and latency" in ended.errors
    with pytest.raises(ConfigError, match="network"):
        connect("single", network=text)


def test_messages_under_way_at_once_share_the_line() -> None:
    line = Line()
    first = line.send(3.0, at=10.0)
    assert line.through(first) == 13.0
    second = line.send(1.0, at=11.0)  # the first has 2 left
    assert (line.through(first), line.through(second)) == (14.0, 13.0)
    third = line.send(0.0, at=12.0)  # the first has 1.5 left, the second 0.5
    assert (line.through(first), line.through(second), line.through(third)) == (14.0, 13.0, 12.0)
    later = line.send(2.0, at=20.0)
    assert [line.through(each) for each in (first, second, third, later)] == [14.0, 13.0, 12.0, 22.0]


def test_what_a_link_takes_of_a_control_word_is_communication() -> None:
    meter = Meter()
    meter.waited("control", began=1.0, waited_from=1.0, waited_until=4.0, done=4.0, sent=2.0)
    meter.waited("control", began=5.0, waited_from=6.0, waited_until=6.5, done=6.5, sent=5.5)  # before the wait
    assert meter.waiting_seconds == 1.0
    assert meter.communication_seconds == 2.0 + 0.5


def test_links_are_not_put_one_behind_another() -> None:
    with pytest.raises(ConfigError, match=r"network is 1mbit,1s: must be null where .* of 1gbit,1us"):
        slowed(connect("single", network="1gbit,1us"), "1mbit,1s")


# On real ranks, whose launches run these tests (simulated ones refuse a link). No time has an upper bound that a busy
# machine breaks.


def on_a_link(
    on_ranks: Ranks, body: Callable[[Communicator, Communicator], Any], network: str = LINK
) -> list[dict[str, Any]]:
    """What `body(comm, slow)` finds on all ranks; nothing on simulated ranks."""

    def both(comm: Communicator) -> Any:
        found = body(comm, slowed(comm, network))
        comm.barrier()
        return found

    if on_ranks.backend == "simulated":
        with pytest.raises(ConfigError, match=f"network is {network}: must be null on simulated ranks"):
            on_ranks(both)
        return []
    return on_ranks(both)


def send(comm: Communicator, verb: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = (torch.arange(NUMBERS) / 3 + 10 * comm.rank).to(dtype)
    if verb == "broadcast":
        return comm.broadcast(x, comm.size - 1, "center").wait()
    if verb == "alltoall":
        x = x.reshape(comm.size, -1)
    result: Tensor = getattr(comm, verb)(x, "center").wait()
    return result


def seconds(comm: Communicator, act: Callable[[], Any]) -> float:
    """That this rank takes for it, from when all are there."""
    comm.barrier()
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def test_every_verb_brings_the_same_and_takes_its_time(on_ranks: Ranks) -> None:
    w = on_ranks.size
    doublings = (w - 1).bit_length()
    least = {
        "allreduce": 2 * (w - 1) * A + 2 * N * B * (w - 1) / w,
        "broadcast": doublings * (A + N * B),
        "allgather": (w - 1) * (A + N * B),
        "alltoall": (w - 1) * A + N * B * (w - 1) / w,
        "barrier": 2 * doublings * A,
        "counter": 2 * A if w > 1 else 0.0,
    }

    def body(comm: Communicator, slow: Communicator) -> dict[str, float]:
        assert (slow.backend, slow.network, slow.meter) == (comm.backend, LINK, comm.meter)
        took = {}
        for verb in ("allreduce", "broadcast", "allgather", "alltoall"):
            took[verb] = seconds(comm, lambda verb=verb: send(slow, verb))  # type: ignore[misc]
            for dtype in (torch.float32, torch.float64, torch.int64):
                assert torch.equal(send(slow, verb, dtype), send(comm, verb, dtype))
        took["barrier"] = seconds(comm, slow.barrier)
        counter = slow.counter()
        took["counter"] = seconds(comm, lambda: counter.add(1))
        assert sorted(slow.gather_bytes(str(counter.add(1)).encode())) == [b"%d" % (w + m + 1) for m in range(w)]
        return took

    for took in on_a_link(on_ranks, body):
        for verb, bound in least.items():
            assert took[verb] >= bound, verb


def test_messages_under_way_at_once_take_the_sum_of_their_bytes(on_several_ranks: Ranks) -> None:
    w = on_several_ranks.size

    def body(comm: Communicator, slow: Communicator) -> float:
        def two() -> None:
            works = [slow.allreduce(torch.zeros(NUMBERS), "gradient", bucket) for bucket in (0, 1)]
            for work in works:
                work.wait()

        return seconds(comm, two)

    for took in on_a_link(on_several_ranks, body):
        assert took >= 2 * (w - 1) * A + 2 * (2 * N * B * (w - 1) / w)


def test_what_a_rank_computes_meanwhile_is_hidden(on_several_ranks: Ranks) -> None:
    w, numbers = on_several_ranks.size, 80_000
    whole = 2 * (w - 1) * A + 2 * 4 * numbers * B * (w - 1) / w

    def body(comm: Communicator, slow: Communicator) -> tuple[float, float, float]:
        slow.meter = Meter()
        comm.barrier()
        began = time.perf_counter()
        work = slow.allreduce(torch.zeros(numbers), "gradient")
        time.sleep(whole / 2)  # as one that computes
        work.wait()
        return time.perf_counter() - began, slow.meter.state_dict()["seconds"]["gradient"], slow.meter.hidden_seconds

    for took, waited, hidden in on_a_link(on_several_ranks, body):
        assert took >= whole
        assert waited < 0.9 * whole
        assert whole / 2 <= hidden <= took - waited


def test_a_verb_begins_when_its_last_rank_has_called_it_and_who_is_late_is_waited_for(on_several_ranks: Ranks) -> None:
    w = on_several_ranks.size

    def body(comm: Communicator, slow: Communicator) -> tuple[float, float, float, float]:
        slow.meter = Meter()
        comm.barrier()
        if comm.rank == w - 1:
            time.sleep(0.1)
        began = time.perf_counter()
        work = slow.allgather(torch.zeros(2, dtype=torch.float64), "control")
        hidden = time.perf_counter() - began  # under way, and not waited for yet
        work.wait()
        took = time.perf_counter() - began
        return took, hidden, slow.meter.waiting_seconds, slow.meter.communication_seconds

    link = (w - 1) * (A + 16 * B)
    for rank, (took, hidden, waiting, communication) in enumerate(on_a_link(on_several_ranks, body)):
        assert hidden + communication >= link * 0.99
        assert waiting + communication == pytest.approx(took, abs=0.05)
        if rank < w - 1:
            assert waiting >= 0.09


def test_parts_take_the_pair_of_their_host_and_share_its_line(on_several_ranks: Ranks) -> None:
    """Hosts of two ranks; a part of one host is fast, parts that cross hosts leave each of them at the same time."""
    w = on_several_ranks.size

    def body(comm: Communicator, slow: Communicator) -> dict[str, float]:
        took = {}
        for name, colors in (("inside", [m // 2 for m in range(w)]), ("across", [m % 2 for m in range(w)])):
            part = slow.split(colors)
            x = torch.full((1000,), float(comm.rank))
            took[name] = seconds(comm, lambda part=part, x=x: part.allreduce(x, "center").wait())  # type: ignore[misc]
            assert x.unique().tolist() == [float(sum(part.ranks))]
            took[f"{name}, ranks"] = part.size
        assert [*slow.node().ranks] == [m for m in range(w) if m // 2 == comm.rank // 2]  # as methods see it
        return took

    for rank, took in enumerate(on_a_link(on_several_ranks, body, f"{LINK},100gbit,1us,2")):
        if took["inside, ranks"] == 2:
            assert took["inside"] < 2 * A + 0.5
        if took["across, ranks"] == 2:
            streams = 2 if w == 4 else 1
            assert took["across"] >= 2 * A + streams * 4000 * B, rank


def test_a_run_learns_the_same_over_a_link_and_says_what_it_took(
    on_several_ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.plain_process(monkeypatch)
    words = ["--model=own.Line", "--data=own.Numbers", "--loss=own.Cubic", "--metric=own.R2", "--method=LGRAWA"]
    words += ["--method.period=4", "--budget.steps=8", "--log.tensorboard=false", "--optimizer.lr=0.01"]
    rounds, world = 2, on_several_ranks.size
    message = 2 * (world - 1) * A

    def body(comm: Communicator, slow: Communicator) -> list[dict[str, Any]]:
        found = []
        for network in ("null", LINK):
            folder = tmp_path / network

            def make(folder: Path = folder) -> Path:
                folder.mkdir()
                return folder

            config = parse([*words, f"--network={network}"])
            new = None if comm.rank else make
            found.append(fit(config, comm, new_folder=new, speaks=False, trace=True))
            if comm.rank == 0:
                assert json.loads((folder / "summary.json").read_text())["network"] == config.network
                assert json.loads((folder / "environment.json").read_text())["network"] == config.network
        if comm.rank == 0:
            plain, link = (torch.load(tmp_path / name / "center.pt") for name in ("null", LINK))
            assert all(torch.equal(plain[key], link[key]) for key in plain)
            events = json.loads((tmp_path / LINK / "trace.json").read_text())["traceEvents"]
            wires = [event["dur"] / 1e6 for event in events if event["name"] == "wire center"]
            assert len(wires) >= rounds * world
            assert sum(wire >= 0.99 * message for wire in wires) >= rounds * world
        return found

    for plain, link in on_a_link(on_several_ranks, body):
        assert (plain["network"], link["network"]) == (None, LINK)
        same = ("steps", "rounds", "bytes_sent", "payload_bytes", "center_test_loss", "center_train_r2")
        assert [plain[key] for key in same] == [link[key] for key in same]
        assert link["communication_seconds"] >= rounds * message
        assert link["training_seconds"] >= link["communication_seconds"] + link["waiting_seconds"]


def test_the_first_line_of_output_says_the_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train", "--config=digits", "--budget.seconds=null", "--budget.steps=2", "--method=LocalSGD")
    ended = called(capsys, *words, f"--run.dir={tmp_path}", "--run.name=a", "--network", "1gbit,100us", "--device=cpu")
    assert ended.status == 0, ended.said
    first = ended.output.splitlines()[0]
    assert first.startswith("backend    single")
    assert first.endswith(", over an emulated network of 1gbit,100us")
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["network"] == "1gbit,100us"


def test_runs_over_another_network_go_on_but_are_not_compared_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.plain_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(
        "{model: own.Line, data: own.Numbers, loss: MSELoss, metric: own.R2, budget: {steps: 4}, run: {name: study},"
        " log: {tensorboard: false}, eval: {unit: steps, every: 1},"
        " compare: {methods: [LocalSGD, EASGD], seeds: [1, 2], networks: {'1gbit,.5us': [EASGD]}}}"
    )
    words = ("compare", "--config=study.yaml", "--device=cpu")
    ended = called(capsys, *words)
    assert ended.status == 0, ended.said
    names = ["LocalSGD-1", "EASGD-1", "LocalSGD-2", "EASGD-2", "EASGD-1-1gbit,.5us", "EASGD-2-1gbit,.5us"]
    assert sorted(path.name for path in Path("runs/study").iterdir() if path.is_dir()) == sorted(names)
    assert "\nEASGD-2-1gbit,.5us (6 of 6) over an emulated network of 1gbit,.5us\n" in ended.output
    with Path("runs/study/table.csv").open() as file:
        rows = [(row["experiment"], row["seeds"]) for row in csv.DictReader(file)]
    assert rows == [("LocalSGD", "1 2"), ("EASGD", "1 2"), ("EASGD network=1gbit,.5us", "1 2")]
    from matplotlib.image import imread

    assert imread("runs/study/figure.png").shape[:2] == (1080 + 780, 2400)  # a row for the other network
    assert called(capsys, *words).output.count(" already\n") == 6
    assert called(capsys, *words, "--methods=LocalSGD").output.count(" already\n") == 2

    # Made over none, it cannot go on as one of a comparison over another once it has gone on by itself.
    summary = Path("runs/study/EASGD-1/summary.json")
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "network": "1mbit,1s"}))
    ended = called(capsys, *words)
    assert ended.status == 2
    assert "runs/study/EASGD-1 was made with 'network: 1mbit,1s', now it is 'network: None'" in ended.errors


def test_a_run_goes_on_over_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.plain_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    words = ("train", "--model=own.Line", "--data=own.Numbers", "--loss=MSELoss", "--metric=own.R2", "--device=cpu")
    words += ("--run.name=a", "--run.resume=auto", "--save.unit=steps", "--save.every=2", "--log.tensorboard=false")
    words += ("--method=LocalSGD", "--budget.steps=4", "--optimizer.lr=0.01")
    assert called(capsys, *words, "--network=1gbit,1us").status == 0
    Path("runs/a/summary.json").unlink()  # as if it had been cut off
    ended = called(capsys, *words, "--network=null")
    assert ended.status == 0 and "resumed    at step 2" in ended.output, ended.said
    assert json.loads(Path("runs/a/summary.json").read_text())["network"] is None
    assert called(capsys, "evaluate", "runs/a").status == 0
