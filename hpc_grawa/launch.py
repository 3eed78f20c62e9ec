"""What the launcher says about this process. The only place that reads a scheduler's or launcher's variables."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from .errors import ConfigError

Wanted = Literal["auto", "cpu", "cuda"]
Launcher = Literal["horovodrun --gloo", "horovodrun", "mpirun", "srun", "torchrun"]


@dataclass(frozen=True)
class Slot:
    """A process's place in its job, before any communicator exists.

    Attributes:
        launcher: who started it, or None for a plain process.
        rank: among all processes of the job.
        size: number of processes in the job.
        local_rank: among those on this host.
        local_size: number of processes on this host.
        job: tells this job apart from others on its hosts; empty where the launcher does not.
        tasks: of a plain process: that its SLURM job is to have.
        placed: whether the launcher has said the place on this host.
    """

    launcher: Launcher | None = None
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    job: str = ""
    tasks: int = 1
    placed: bool = field(default=True, repr=False, compare=False)


# The inner launcher first: under SLURM, mpirun starts one srun task per host, whose variables its ranks inherit.
_VARIABLES: tuple[tuple[Launcher, tuple[str, str, str, str]], ...] = (
    ("horovodrun --gloo", ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")),
    (
        "mpirun",
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
    ),
    ("mpirun", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    # HPE's mpiexec (PALS), MVAPICH's launchers.
    ("mpirun", ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")),
    (
        "mpirun",
        (
            "MV2_COMM_WORLD_RANK",
            "MV2_COMM_WORLD_SIZE",
            "MV2_COMM_WORLD_LOCAL_RANK",
            "MV2_COMM_WORLD_LOCAL_SIZE",
        ),
    ),
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
    ("srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")),
)


#: What numbers are read from.
_NUMBERS = tuple(dict.fromkeys([*(name for _, names in _VARIABLES for name in names), "SLURM_NTASKS", "SLURM_NODEID"]))

#: What a launcher names its jobs by.
_JOB = (
    ("TORCHELASTIC_RUN_ID", "MASTER_PORT"),
    ("PMIX_NAMESPACE",),
    ("OMPI_MCA_ess_base_jobid",),
    ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"),
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
)


def own_slot(environment: Mapping[str, str] = os.environ) -> Slot:
    """Read the launcher's variables.

    Raises:
        ConfigError: one of them is no number.

    Example:
        >>> own_slot({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"})
        Slot(launcher='mpirun', rank=3, size=4, local_rank=0, local_size=1, job='', tasks=1)
    """
    environment = {name: value for name, value in environment.items() if value}
    try:
        return _slot(environment)
    except ValueError as error:
        told = ", ".join(f"{name}={environment[name]}" for name in _NUMBERS if name in environment)
        raise ConfigError(f"the launcher's variables say {told}: must be numbers ({error})") from None


def _slot(environment: Mapping[str, str]) -> Slot:
    job = next((".".join(environment[v] for v in names) for names in _JOB if all(v in environment for v in names)), "")
    launcher, names = _said(environment)
    if launcher is None:
        return Slot(tasks=int(environment.get("SLURM_NTASKS", 1)))
    rank, size, local_rank, local_size = names
    if launcher == "mpirun" and environment.get("_", "").endswith("horovodrun"):
        launcher = "horovodrun"
    return Slot(
        launcher,
        int(environment[rank]),
        int(environment[size]),
        int(environment.get(local_rank, 0)),
        _tasks_here(environment.get(local_size, "1"), int(environment.get("SLURM_NODEID", 0))),
        job,
        placed=local_rank in environment,
    )


def _said(environment: Mapping[str, str]) -> tuple[Launcher | None, tuple[str, ...]]:
    """The launcher of this process, and the names of its variables; None where there is none."""
    # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE as Hydra does, but not its local ones: srun's own say all.
    complete = [row for row in _VARIABLES if all(v in environment for v in row[1])]
    known = [row for row in (*complete, *_VARIABLES) if all(v in environment for v in row[1][:2])]
    if environment.get("SLURM_STEP_NUM_TASKS") == "1":
        # It may be a shell or a notebook, where MPI cannot start; in a job of several tasks it is no rank.
        known = [row for row in known if row[0] != "srun"]
    inner = None
    if "TORCHELASTIC_RUN_ID" in environment:  # torchrun's workers inherit those of the srun or mpirun around it
        inner = "torchrun"
    elif "PMI_LOCAL_RANK" in environment and _same(environment, "PMI_RANK", "SLURM_PROCID"):
        # As on Cray's systems, whose srun sets both; not Hydra, whose local rank has another name.
        inner = "srun" if _same(environment, "PMI_SIZE", "SLURM_STEP_NUM_TASKS") else None
    return min(known, key=lambda row: row[0] != inner, default=(None, ()))


def _same(environment: Mapping[str, str], *names: str) -> bool:
    return len({environment.get(name) for name in names}) == 1


def descriptors(environment: Mapping[str, str] = os.environ) -> list[int]:
    """Open files through which MPI speaks with its launcher (Hydra, SLURM's pmi2, PALS).

    A child that is to start MPI in this rank's place needs them.
    """
    found = [int(value) for name in ("PMI_FD", "PALS_FD") if (value := environment.get(name, "")).isdecimal()]
    return [number for number in found if Path(f"/proc/self/fd/{number}").exists()]


def _tasks_here(text: str, node: int) -> int:
    """A number, or SLURM's tasks of each node: ``4(x2),3``."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[node] if len(counts) > 1 else counts[0]


def first_process(environment: Mapping[str, str] = os.environ) -> int:
    """The uppermost process of this rank: this one, or a shell, say, that the launcher has started around it."""
    launcher, names = _said(environment)
    if launcher is None:
        return os.getpid()
    own, process = f"{names[0]}={environment[names[0]]}".encode(), os.getpid()
    while (above := parent_of(process)) > 1:
        try:
            if own not in Path(f"/proc/{above}/environ").read_bytes().split(b"\0"):
                break
        except OSError:  # another user's, or no Linux
            break
        process = above
    return process


def parent_of(process: int) -> int:
    """The process that has started this one; another, or none (0), where that is gone."""
    if process == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def job_name(environment: Mapping[str, str] = os.environ) -> str | None:
    """The same for a job of SLURM (of an array: a task) and its restarts; None outside of SLURM.

    Example:
        >>> job_name({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"})
        '17_2'
    """
    if environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    return environment.get("SLURM_JOB_ID") or None


def pmi(environment: Mapping[str, str] = os.environ) -> str:
    """What an MPI library finds the other ranks by, as the launcher has set it up: PMIx, PMI (1 or 2), or nothing."""
    return "PMIx" if "PMIX_RANK" in environment else "PMI" if "PMI_RANK" in environment else ""


def slurm_job(environment: Mapping[str, str] = os.environ) -> str:
    """The SLURM job of this process in words; empty outside of SLURM.

    Example:
        >>> slurm_job({"SLURM_JOB_ID": "19", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "8"})
        'job 19, nodes 2, tasks 8'
    """
    names = {"job": "JOB_ID", "nodes": "JOB_NUM_NODES", "tasks": "NTASKS", "of this step": "STEP_NUM_TASKS"}
    found = {word: environment.get(f"SLURM_{name}") for word, name in names.items()}
    return ", ".join(f"{word} {value}" for word, value in found.items() if value)


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often SLURM has started this job again.

    Example:
        >>> restarts({"SLURM_RESTART_COUNT": "2"})
        2
    """
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def limit_near(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether SLURM's time limit ends this job within a minute, or has: when, ``slurm/common.sh`` says.

    Example:
        >>> limit_near({"HPC_GRAWA_ENDS": "0"}), limit_near({})
        (True, False)
    """
    ends = environment.get("HPC_GRAWA_ENDS", "")
    return ends.isdecimal() and time.time() > int(ends) - 60


def local_device(slot: Slot | None = None, wanted: Wanted = "auto") -> torch.device:
    """This rank's device: of all GPUs of the node that of its local rank; of a single visible one, that.

    With more ranks than GPUs they share them in turn.

    Args:
        slot: of this process.
        wanted: ``auto``: CUDA where there is one.

    Raises:
        ConfigError: CUDA was asked for, and this process sees none; or it sees several, and does not know which is its.
    """
    slot = slot or own_slot()
    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not count:
        raise ConfigError(
            f"device is cuda: rank {slot.rank} on {socket.gethostname()} sees no GPU; must be cpu or auto, or ask the "
            f"scheduler for GPUs and look at torch.cuda.is_available()"
        )
    if count > 1 and slot.size > 1 and not slot.placed:
        raise ConfigError(
            f"rank {slot.rank} on {socket.gethostname()} sees {count} GPUs, and its launcher does not say which one of "
            f"its host's ranks it is: must see its own GPU alone (CUDA_VISIBLE_DEVICES), or be started by srun, "
            f"torchrun, or the mpirun of Open MPI, MPICH or HPE"
        )
    return torch.device("cuda", slot.local_rank % count) if count else torch.device("cpu")


def take_gpu(slot: Slot, wanted: Wanted = "auto") -> None:
    """Make this rank's GPU the current device, unless none is wanted or the program has taken one already.

    Where it cannot be told which one that is, nothing is done: ``local_device`` tells those who ask for it.
    """
    if wanted != "cpu" and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with suppress(ConfigError, RuntimeError):  # as where it is another's alone
            device = local_device(slot, wanted)
            if device.type == "cuda":
                torch.cuda.set_device(device)


@contextmanager
def signals_heeded(heed: Callable[[str], None]) -> Iterator[None]:
    """Within the block USR2, TERM and the first Ctrl-C call ``heed`` with their name; a second Ctrl-C interrupts.

    USR1 is left alone: NCCL may catch it. In a thread (simulated ranks) nothing is heeded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        heed(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_threads(slot: Slot) -> int | None:
    """Threads for this rank's share of the processors it may run on; None where OMP_NUM_THREADS decides."""
    return None if "OMP_NUM_THREADS" in os.environ else own_processors(slot)


def own_processors(slot: Slot | None = None) -> int:
    """This rank's share of the processors it may run on, at least 1."""
    own = launchers = len(os.sched_getaffinity(0))
    with suppress(OSError):
        launchers = len(os.sched_getaffinity(os.getppid()))
    return processor_share(slot or own_slot(), own, launchers)


def processor_share(slot: Slot, own: int, launchers: int, environment: Mapping[str, str] = os.environ) -> int:
    """The processors that a rank need not share: of all those that it may run on, if each rank is bound to its own.

    SLURM says how many a task has, bound or not. Other launchers bind each rank to a core, a socket or nothing: then
    their own process, which starts the ranks, may run on all that the ranks have together.

    Args:
        slot: of this process.
        own: processors that this rank may run on.
        launchers: that the process that has started it may run on.
        environment: SLURM's part of it counts under srun.

    Example:
        >>> processor_share(Slot("mpirun", size=4, local_size=4), own=32, launchers=64)
        16
    """
    told = {name: environment.get(f"SLURM_{name}") for name in ("CPUS_PER_TASK", "CPUS_ON_NODE")}
    share = max(own, launchers) // slot.local_size
    by_srun = slot.launcher == "srun" or (slot.launcher is None and "SLURM_STEP_NUM_TASKS" in environment)
    if by_srun and (each := told["CPUS_PER_TASK"]):
        share = int(each)
    elif by_srun and (together := told["CPUS_ON_NODE"]):
        share = int(together) // slot.local_size
    return max(1, min(own, share))
