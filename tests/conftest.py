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
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
import torch

from hpc_grawa import cli
from hpc_grawa.comm import Communicator, Meter, connect, simulate
from hpc_grawa.comm.single import SingleCommunicator

T = TypeVar("T")
WORLD_SIZES = (1, 2, 3, 4)
BACKENDS = ("simulated", "mpi", "horovod", "gloo", "nccl", "single")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
BIN = Path(sys.executable).parent
MPIRUN = str(BIN / "mpirun") if (BIN / "mpirun").exists() else shutil.which("mpirun")
launched = pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun beside this Python, nor on PATH")
#: Seconds that a program may take: for those that hang, not for slow machines.
LIMIT = 300.0

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


def environment() -> dict[str, str]:
    """Of a program that these tests start: ranks may outnumber cores, and be root's."""
    tests = Path(__file__).parent
    return {
        **os.environ,
        "PYTHONPATH": f"{tests.parent}:{tests}",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }


def start(*words: str, ranks: int | None = None, **options: Any) -> subprocess.Popen[str]:
    """Run `python *words`, alone or on ranks of MPI."""
    if ranks is not None and MPIRUN is None:
        pytest.skip("there is no mpirun beside this Python, nor on PATH")
    launcher = [] if ranks is None else [str(MPIRUN), "-np", str(ranks)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **options}
    return subprocess.Popen([*launcher, sys.executable, *words], text=True, **pipes)


def launch(*words: str, ranks: int | None = None) -> tuple[int, str, str]:
    """Exit status, output and errors of `python *words`."""
    process = start(*words, ranks=ranks)
    try:
        output, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return process.returncode, output, errors


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, output and errors of the program, in this process."""

    def end(_: object, status: int = 1) -> None:
        raise SystemExit(status)

    capsys.readouterr()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SingleCommunicator, "abort", end)  # else it would end the tests
        try:
            cli.main(words)
        except SystemExit as ended:
            status = int(ended.code or 0)
    return (status, *capsys.readouterr())


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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", choices=("simulated", "mpi", "horovod", "gloo", "nccl", "single"), default="simulated"
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
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
