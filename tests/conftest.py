"""Where the tests' ranks come from: simulated in this process, or processes that a launcher started.

    pytest                                          all tests; rank tests on 1, 2, 3 and 4 simulated ranks
    mpirun -np 3 pytest -m ranks --backend mpi      the rank tests alone; every process is one rank

A rank test takes the fixture `on_ranks` (or `on_several_ranks`, which leaves out worlds of one) and gives it a
function of a communicator. What that returned on each rank comes back in order of rank, on every backend:

    def test_sum(on_ranks):
        def body(comm):
            return comm.allreduce(torch.ones(1), "setup").wait().item()

        assert on_ranks(body) == [on_ranks.size] * on_ranks.size

In a launched job every rank runs every test in the same order over one communicator. Only rank 0 writes; a rank that
fails writes its report and ends the job. Property tests draw differently in every process, so they run on simulated
ranks only.

A test that hangs, here or on ranks, writes its stacks after faulthandler_timeout (setup.cfg) and ends its process.
Where tests run side by side (-n), the end of the report says which signal ended a worker, and what it wrote last.
"""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
import torch

from hpc_grawa.comm import Communicator, Meter, connect, simulate

# PyTorch asks the name server for the name of every address a rank connects to, 127.0.0.1 too: where it loses a
# question, the rank waits for a second, not for five.
os.environ.setdefault("RES_OPTIONS", "timeout:1")

T = TypeVar("T")
WORLD_SIZES = (1, 2, 3, 4)
BACKENDS = ("simulated", "mpi", "horovod", "gloo", "nccl", "single")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

hypothesis.settings.register_profile("same every time", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same every time")


class Ranks:
    """Runs a function on every rank. `size` is their number, `backend` their kind."""

    def __init__(self, size: int, backend: str, comm: Communicator | None) -> None:
        self.size, self.backend, self._comm = size, backend, comm

    def __call__(self, body: Callable[[Communicator], T]) -> list[T]:
        if self._comm is None:
            return simulate(self.size, body)
        self._comm.meter = Meter()
        message = pickle.dumps(body(self._comm))
        return [pickle.loads(result) for result in self._comm.gather_bytes(message)]


class Job:
    """This process as one rank of a launched job."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        # pytest replaces the descriptor 2 during tests; reports and stacks must get out.
        self._stderr = os.fdopen(os.dup(2), "w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._end_if(report.failed, f"{report.nodeid} failed in its {report.when}", report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._end_if(report.failed, f"{report.nodeid} cannot be collected", report)

    def pytest_internalerror(self, excrepr: object) -> None:
        self._end_if(True, "pytest has failed", excrepr)

    def _end_if(self, failed: bool, title: str, report: Any) -> None:
        if not failed or self.comm.size == 1:  # a world of one ends as pytest does
            return
        time.sleep(self.comm.rank)  # where all ranks fail alike, the lowest speaks for them
        text = getattr(report, "longreprtext", str(report))
        sections = "".join(f"\n--- {name}\n{content}" for name, content in getattr(report, "sections", ()))
        where = f"rank {self.comm.rank} of {self.comm.size}"
        print(f"\n=== {where}: {title}\n{text}{sections}", file=self._stderr, flush=True)
        time.sleep(0.2)  # for the launcher to pass it on
        self.comm.abort(1)

    def pytest_unconfigure(self) -> None:
        self.comm.close()


class Workers:
    """Of pytest-xdist: a worker's standard error, where its stacks go, is kept until its end is known."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._ended: list[str] = []

    def _errors(self, node: Any) -> Path:
        return Path(self._folder.name, node.gateway.id)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["errors"] = str(self._errors(node))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        if error:
            status = node.gateway._io.popen.wait(timeout=10)
            how = signal.strsignal(-status) if status < 0 else f"exit status {status}"
            wrote = "".join(self._errors(node).read_text().splitlines(keepends=True)[-200:])
            self._ended.append(f"{node.gateway.id}: {how}\n{wrote}")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for text in self._ended:
            terminalreporter.section("worker ended")
            terminalreporter.write(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", choices=("simulated", "mpi", "horovod", "gloo", "nccl", "single"), default="simulated"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Before pytest keeps where its standard error goes, for stacks."""
    if hasattr(config, "workerinput"):
        os.dup2(os.open(config.workerinput["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if config.getoption("numprocesses", None):
        config.pluginmanager.register(Workers())
    backend = config.getoption("--backend")
    if backend == "simulated":
        return
    job = Job(connect(backend))
    config.pluginmanager.register(job, "job")
    if job.comm.rank > 0:
        config.pluginmanager.unregister(name="terminalreporter")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """pytest writes the stacks of a test that hangs; the alarm, which no handler catches, comes when all ranks have."""
    limit = float(item.config.getini("faulthandler_timeout"))
    signal.alarm(int(limit) + 3 if limit else 0)
    result = yield
    signal.alarm(0)
    return result


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    job = metafunc.config.pluginmanager.get_plugin("job")
    sizes = WORLD_SIZES if job is None else (job.comm.size,)
    for fixture, least in (("on_ranks", 1), ("on_several_ranks", 2)):
        if fixture in metafunc.fixturenames:
            worlds = [pytest.param(n, id=f"W{n}", marks=pytest.mark.ranks) for n in sizes if n >= least]
            metafunc.parametrize(fixture, worlds, indirect=True)


@pytest.fixture
def on_ranks(request: pytest.FixtureRequest) -> Ranks:
    job = request.config.pluginmanager.get_plugin("job")
    return Ranks(request.param, request.config.getoption("--backend"), job and job.comm)


on_several_ranks = on_ranks


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The folder that the tests of slurm/ submit jobs from. (Of modules called conftest there can be one.)"""
    from jobs import Site

    made = Site(tmp_path / "a site")
    monkeypatch.chdir(made.folder)
    yield made
    made.cancel()
    print(made.logs())  # shown where the test failed
