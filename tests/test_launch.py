"""What launchers' variables say about a process, and the backend that follows from it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpc_grawa import comm
from hpc_grawa.cli.finished import FinishedRun
from hpc_grawa.comm import Backend, choose, connect
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.comm.torch_dist import TorchCommunicator
from hpc_grawa.doctor import examine
from hpc_grawa.errors import ConfigError
from hpc_grawa.launch import (
    Slot,
    Wanted,
    default_threads,
    descriptors,
    job_name,
    local_device,
    own_slot,
    pmi,
    processor_share,
    restarts,
)

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
GLOO = {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        (OPEN_MPI, "mpirun"),
        (MPICH, "mpirun"),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}, "mpirun"),  # HPE's
        (GLOO, "horovodrun --gloo"),
        (OPEN_MPI | {"_": "/usr/bin/horovodrun"}, "horovodrun"),
        (TORCHRUN, "torchrun"),
        (SLURM, "srun"),
        # srun --mpi=pmi2
        (SLURM | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "srun"),
        # Cray's srun
        (SLURM | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}, "srun"),
        # torchrun on each of two hosts, started by mpirun or Cray's srun
        (OPEN_MPI | dict.fromkeys(OPEN_MPI, "1") | TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "0", "PMI_LOCAL_SIZE": "1"}
            | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
            | TORCHRUN
            | {"TORCHELASTIC_RUN_ID": "none"},
            "torchrun",
        ),
        # A job of SLURM whose one task per host was started by mpirun's daemons: the ranks are mpirun's.
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI, "mpirun"),
    ],
)
def test_each_launcher_tells_rank_and_size(variables: dict[str, str], launcher: str) -> None:
    assert own_slot(variables) == Slot(launcher, rank=3, size=4, local_rank=1, local_size=2)  # type: ignore[arg-type]


def test_a_plain_process_is_a_world_of_one() -> None:
    assert own_slot({}) == Slot(None, 0, 1, 0, 1)
    # The script of a batch job, before any srun.
    assert own_slot({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}) == Slot(tasks=4)
    # srun -n1; and a shell that srun has started in a job of several.
    alone = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    for tasks in (1, 8):
        assert own_slot(alone | {"SLURM_NTASKS": f"{tasks}"}) == Slot(tasks=tasks)
        inside = own_slot(alone | {"SLURM_NTASKS": f"{tasks}", "PMI_RANK": "3", "PMI_SIZE": "8"})  # an mpiexec in it
        assert (inside.launcher, inside.rank, inside.size) == ("mpirun", 3, 8)


def test_variables_that_are_empty_say_nothing_and_others_must_be_numbers() -> None:
    assert own_slot(dict.fromkeys([*SLURM, *TORCHRUN, "SLURM_NTASKS", "PMI_RANK", "PMI_SIZE"], "")) == Slot()
    assert (
        job_name({"SLURM_ARRAY_JOB_ID": "", "SLURM_JOB_ID": "7"}) == "7" and restarts({"SLURM_RESTART_COUNT": ""}) == 0
    )
    with pytest.raises(ConfigError, match=r"^the launcher's variables say RANK=0, WORLD_SIZE=two: must be numbers"):
        own_slot({"RANK": "0", "WORLD_SIZE": "two"})


def test_a_child_in_a_rank_s_place_has_its_launcher_s_files() -> None:
    """As Hydra's, without which MPI cannot start."""
    own, other = os.pipe()
    try:
        assert descriptors({"PMI_FD": str(other), "PALS_FD": "99999"}) == [other] and descriptors({}) == []
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("PMI_FD", str(other))
            patched.setattr(examine, "_CHILD", _TELLS)
            found = examine.ask_child(None, Path(), 60)
        assert found["files"] == os.fstat(other).st_ino
    finally:
        os.close(own)
        os.close(other)


_TELLS = """
import os, sys; from multiprocessing.connection import Connection
Connection(int(sys.argv[1]), readable=False).send({"stage": "", "files": os.fstat(int(os.environ["PMI_FD"])).st_ino})
"""


def test_what_an_mpi_library_finds_the_others_by() -> None:
    assert pmi({"PMIX_RANK": "0", "PMIX_MCA_gds": "hash"}) == "PMIx"
    assert pmi({"PMI_RANK": "0"}) == "PMI"
    assert pmi({"PMIX_MCA_gds": "hash", "SLURM_PROCID": "0"}) == ""


def test_threads_are_the_ranks_share_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    processors = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_threads(Slot()) == processors
    assert default_threads(Slot("mpirun", 0, 8, 0, 2 * processors)) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert default_threads(Slot()) is None


MPIRUN, SRUN = Slot("mpirun", 0, 4, 0, 4), Slot("srun", 0, 4, 0, 4)


@pytest.mark.parametrize(
    ("slot", "own", "launchers", "variables", "share"),
    [
        (Slot(), 64, 64, {}, 64),
        (Slot(), 2, 64, {}, 2),  # taskset
        (Slot(), 8, 1, {}, 8),
        (Slot(), 8, 64, {"SLURM_CPUS_PER_TASK": "2"}, 8),  # no srun: all of the job's
        (MPIRUN, 64, 64, {}, 16),  # --bind-to none
        (MPIRUN, 1, 64, {}, 1),  # --bind-to core
        (MPIRUN, 8, 64, {}, 8),  # --map-by slot:PE=8
        (MPIRUN, 32, 64, {}, 16),  # --bind-to socket, two ranks on each
        (MPIRUN, 8, 8, {}, 2),  # a container of 8 processors, which all ranks share
        (MPIRUN, 2, 2, {}, 1),  # more ranks than processors
        (MPIRUN, 64, 64, {"SLURM_CPUS_PER_TASK": "2"}, 16),  # SLURM's tasks are not mpirun's ranks
        (SRUN, 4, 64, {"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "16"}, 4),  # task/affinity
        (SRUN, 16, 16, {"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "16"}, 4),  # task/cgroup alone
        (SRUN, 64, 64, {"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "16"}, 4),  # task/none
        (SRUN, 2, 64, {"SLURM_CPUS_PER_TASK": "4"}, 2),  # sbatch's, which this srun did not heed
        (SRUN, 4, 64, {"SLURM_CPUS_ON_NODE": "16"}, 4),  # bound, without -c
        (SRUN, 16, 64, {"SLURM_CPUS_ON_NODE": "16"}, 4),  # task/cgroup alone, without -c
        (SRUN, 2, 2, {"SLURM_CPUS_ON_NODE": "2"}, 1),  # --overcommit
        (Slot(), 64, 64, {"SLURM_CPUS_PER_TASK": "4", "SLURM_STEP_NUM_TASKS": "1"}, 4),  # srun -n1 -c4, task/none
        (SRUN, 16, 64, {}, 16),
    ],
)
def test_a_ranks_share_of_processors_bound_or_not(
    slot: Slot, own: int, launchers: int, variables: dict[str, str], share: int
) -> None:
    assert processor_share(slot, own, launchers, variables) == share


@pytest.mark.parametrize(
    ("asked", "slot", "built", "expected", "why"),
    [
        ("auto", Slot(), True, "single", "no launcher"),
        ("auto", MPIRUN, True, "horovod", "started by mpirun, Horovod is built"),
        ("auto", MPIRUN, False, "mpi", "started by mpirun, Horovod is not built"),
        ("auto", SRUN, True, "horovod", "started by srun, Horovod is built"),
        ("auto", SRUN, False, "mpi", "started by srun, Horovod is not built"),
        ("auto", Slot("horovodrun --gloo", 0, 4), True, "horovod", "started by horovodrun --gloo"),
        ("auto", Slot("torchrun", 0, 4, 0, 4), True, "gloo", "started by torchrun, 0 GPUs for 4 ranks"),
        ("gloo", SRUN, True, "gloo", "started by srun, asked for"),
        ("mpi", MPIRUN, True, "mpi", "started by mpirun, asked for"),
        ("horovod", SRUN, True, "horovod", "started by srun, asked for"),
        ("single", Slot(), True, "single", "no launcher, asked for"),
        ("single", Slot(tasks=4), True, "single", "no launcher, asked for"),
    ],
)
def test_the_backend_that_is_chosen_and_why(
    asked: Backend, slot: Slot, built: bool, expected: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "_built", lambda module: built)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    backend, reason = choose(asked, slot)
    assert backend == expected and reason.startswith(why)


@pytest.mark.parametrize(
    ("asked", "slot", "built", "message"),
    [
        ("mpi", Slot("torchrun", 0, 4), True, "backend is mpi under torchrun: .*use gloo or nccl"),
        ("horovod", Slot("torchrun", 0, 4), True, "backend is horovod under torchrun: .*use gloo or nccl"),
        ("auto", Slot("horovodrun --gloo", 0, 4), False, "backend is auto under horovodrun --gloo: needs Horovod"),
        ("mpi", Slot("horovodrun --gloo", 0, 4), True, "backend is mpi under horovodrun --gloo: .*use mpirun"),
        ("single", MPIRUN, True, "backend is single under mpirun with 4 ranks: .*must be another"),
        ("horovod", MPIRUN, False, "backend is horovod: .*not installed"),
        ("auto", Slot(tasks=4), True, "backend is auto in a SLURM job of 4 tasks, .*start it by srun --mpi=pmix"),
        (
            "mpi",
            Slot(tasks=4),
            True,
            "backend is mpi in a SLURM job of 4 tasks, .*if one process is meant, with backend single",
        ),
    ],
)
def test_a_backend_that_cannot_run_there_is_refused(
    asked: Backend, slot: Slot, built: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "_built", lambda module: built)
    with pytest.raises(ConfigError, match=message):
        choose(asked, slot)


@pytest.mark.parametrize(
    ("gpus", "wanted", "device"),
    [(4, "auto", "cuda:2"), (4, "cuda", "cuda:2"), (1, "auto", "cuda:0"), (2, "auto", "cuda:0"), (0, "auto", "cpu")],
)
def test_a_rank_takes_the_gpu_of_its_local_rank(
    gpus: int, wanted: Wanted, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that the node has, or the only one that it sees; ranks that outnumber GPUs share them in turn."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    slot = Slot("srun", 6, 8, 2, 4)
    assert str(local_device(slot, wanted)) == device
    assert str(local_device(slot, "cpu")) == "cpu"
    if not gpus:
        with pytest.raises(ConfigError, match=r"device is cuda: rank 6 on .* sees no GPU; must be cpu or auto"):
            local_device(slot, "cuda")


def test_ranks_that_do_not_know_their_place_on_a_host_take_no_gpu_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would all take the first."""
    slot = own_slot({"PMI_RANK": "3", "PMI_SIZE": "8"})
    for gpus, device in ((0, "cpu"), (1, "cuda:0")):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert str(local_device(slot)) == device
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"rank 3 on .* sees 4 GPUs, .*CUDA_VISIBLE_DEVICES"):
        local_device(slot)
    assert str(local_device(slot, "cpu")) == "cpu"


def test_ranks_that_would_share_a_gpu_under_nccl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the ranks tell each other; NCCL itself would only hang or abort."""
    comm = object.__new__(TorchCommunicator)
    comm.backend, device = "nccl", torch.device("cuda", 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda gpu: SimpleNamespace(uuid={device: "GPU-2"}[gpu]))
    told = [b"a GPU-1", b"b GPU-1", b"a GPU-2"]

    def gather_bytes(message: bytes) -> list[bytes]:
        assert message.endswith(b" GPU-2")  # that of the device, not of the current one
        return told

    monkeypatch.setattr(comm, "gather_bytes", gather_bytes, raising=False)
    comm.check_device(device)
    told = [b"a GPU-1", b"a GPU-2", b"a GPU-1"]
    with pytest.raises(ConfigError, match="ranks 0 and 2 would share a GPU, which NCCL cannot; must be gloo, mpi"):
        comm.check_device(device)
    comm.check_device(torch.device("cpu"))


class Began(Exception):
    """MPI was to start."""


@pytest.mark.parametrize(
    ("wanted", "gpus", "slot", "taken", "expected"),
    [
        ("auto", 4, Slot("mpirun", 1, 2, 1, 2), False, ["cuda:1"]),
        ("cuda", 4, Slot("mpirun", 1, 2, 1, 2), False, ["cuda:1"]),
        ("cpu", 4, Slot("mpirun", 1, 2, 1, 2), False, []),
        ("auto", 0, Slot("mpirun", 1, 2, 1, 2), False, []),
        ("auto", 4, Slot("mpirun", 1, 2, 1, 2), True, []),  # the program has chosen its own
        ("auto", 4, Slot("mpirun", 1, 2, placed=False), False, []),  # which is its own, nobody knows
    ],
)
@pytest.mark.parametrize("backend", ["mpi", "horovod"])
def test_mpi_starts_with_the_rank_s_gpu_as_the_current_device(
    backend: Backend,
    wanted: Wanted,
    gpus: int,
    slot: Slot,
    taken: bool,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To which MPI libraries tie what they set up."""
    current: list[str] = []
    monkeypatch.setenv("OPAL_PREFIX", "")  # to be as it was, afterwards

    def begin(*_: object, **__: object) -> None:
        raise Began

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: taken)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr("hpc_grawa.comm.mpi._started", begin)
    monkeypatch.setattr("hpc_grawa.comm.horovod.HorovodCommunicator.__init__", begin)
    monkeypatch.setattr(comm, "_built", lambda module: True)
    with pytest.raises(Began):
        connect(backend, slot, device=wanted)
    assert current == expected


def test_a_finished_run_is_looked_at_on_the_rank_s_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model, and what else uses the current device."""

    class Taken(Exception):
        pass

    def take(device: torch.device) -> None:
        raise Taken(str(device))

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", take)
    config: Any = SimpleNamespace(device="auto")
    with pytest.raises(Taken, match="cuda:1"):
        FinishedRun(Path(), config, SingleCommunicator(), Slot("mpirun", 1, 2, 1, 2))


def test_horovod_counts_as_built_where_it_can_be_imported() -> None:
    assert (choose("auto", MPIRUN)[0] == "horovod") == (find_spec("horovod") is not None)


def test_only_launch_reads_launchers_variables() -> None:
    package = Path(comm.__file__).parents[1]
    readers = {
        path.name
        for path in package.rglob("*.py")
        if any(name in path.read_text() for name in (*OPEN_MPI, *MPICH, *GLOO, *SLURM, "LOCAL_WORLD_SIZE"))
    }
    assert readers == {"launch.py"}
