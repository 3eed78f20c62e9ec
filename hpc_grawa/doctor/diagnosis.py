"""What ``hpc-grawa doctor`` has found, and what it means: `diagnose`, a function of the examination alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, Literal

from ..comm import Backend, Library
from ..launch import Slot
from ..runs.log import human_bytes
from ..screen import counted

#: Seconds for a file to be seen by other ranks.
SEEN = 5.0
#: Bytes of a ResNet-50's parameters.
RESNET50 = 102_228_128
#: Bytes of /dev/shm below which data loaders and NCCL soon lack memory; containers start with 64 MiB.
SHM = 2**28


@dataclass(frozen=True)
class Process:
    """A rank, as it sees its host."""

    rank: int = 0
    host: str = ""
    identity: str = ""  # of the host, whatever its name
    versions: dict[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = (0,)  # that it may run on
    host_cores: int = 1
    threads: int = 1
    shm: tuple[int, int] | None = None  # bytes, and those that are free
    interfaces: dict[str, tuple[str, str]] = field(default_factory=dict)
    name_is_reachable: bool = True
    cuda: str | None = None  # that torch was built for
    nccl: str = ""
    driver: str = ""
    gpus_there: int = 0  # device files
    gpus: dict[str, str] = field(default_factory=dict)  # that it sees: names, by what all ranks know them by
    gpu: str | None = None  # that it takes
    gpus_visible: str | None = None  # CUDA_VISIBLE_DEVICES
    cuda_error: str = ""


@dataclass(frozen=True)
class Folder:
    """A file written by rank 0: how long that took, which ranks do not see it."""

    path: str
    seconds: float = 0.0
    free: int = 0
    blind: tuple[int, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Speed:
    """Seconds of an allreduce of one number, and of one of so many bytes."""

    latency: float
    size: int
    seconds: float


@dataclass(frozen=True)
class Examination:
    """All that was found; of several ranks where they could be asked, else of rank 0."""

    slot: Slot = field(default_factory=Slot)
    backend: Backend = "single"
    why: str = ""
    refused: str = ""  # why this backend is not even tried
    failed: str = ""  # what came of trying
    later: tuple[Backend, str] | None = None  # what auto takes under a launcher, and what came of trying
    pmi: str = ""
    slurm: str | None = None  # release
    mpi_types: tuple[str, ...] = ()  # of srun
    job: str = ""
    told: dict[str, str] = field(default_factory=dict)  # variables that name an interface
    libraries: dict[Backend, Library] = field(default_factory=dict)
    ranks: tuple[Process, ...] = ()
    folder: Folder | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class Finding:
    """A line of the report. ``note``: may be as meant; ``lack``: to be mended; ``fails``: the backend cannot start."""

    section: str
    name: str
    value: str
    mark: Literal["", "note", "lack", "fails"] = ""
    fix: str = ""


def diagnose(exam: Examination) -> list[Finding]:
    """What was found and what it means, in the order of the report."""
    parts = {
        "software": _software,
        "launcher and ranks": _ranks,
        "GPUs": _gpus,
        "network": _network,
        "files": _files,
        "messages": _messages,
    }
    return [Finding(section, *line) for section, part in parts.items() for line in part(exam)]


def verdict(exam: Examination, findings: list[Finding]) -> tuple[str, int]:
    """The last line, and the exit status."""
    broken = next((f for f in findings if f.mark == "fails"), None)
    if broken is not None:
        why = shorten(broken.value.removeprefix(f"{exam.backend}: "), 120, placeholder=" ...")
        return f"backend {exam.backend} would fail: {why}", 1
    ranks = counted(len(exam.ranks), "rank")
    later = f"; under mpirun or srun auto takes {exam.later[0]}" if exam.later else ""
    return f"backend {exam.backend} works here, on {ranks}{later}", 0


_Lines = Iterator[tuple[Any, ...]]


def _software(exam: Examination) -> _Lines:
    first = exam.ranks[0]
    for name in ("hpc-grawa", "python", "torch"):
        yield name, first.versions.get(name, "not installed, used from a checkout")
    yield "CUDA", f"torch is built for {first.cuda}, NCCL {first.nccl or 'none'}" if first.cuda else "torch has none"
    for name in sorted({name for rank in exam.ranks for name in rank.versions}):
        found: dict[str, list[int]] = {}
        for rank in exam.ranks:
            found.setdefault(rank.versions.get(name, "none"), []).append(rank.rank)
        if len(found) > 1:
            told = "; ".join(f"{version} on {_numbers(ranks)}" for version, ranks in found.items())
            yield name, f"differs: {told}", "lack", "activate the same environment on all nodes, before the ranks start"
    mpi, horovod = (exam.libraries.get(backend, Library()) for backend in ("mpi", "horovod"))
    gpus = any(rank.gpus for rank in exam.ranks)
    slow = "; GPU tensors go through page-locked host memory"
    if not mpi.release:
        again = " --force-reinstall --no-deps --no-cache-dir --no-binary mpi4py" if mpi.error else ""
        fix = f"pip install{again} 'mpi4py>=4', with your site's mpicc on PATH"
        yield "MPI", mpi.error or "no mpi4py", "note", fix
    elif gpus and exam.backend == "mpi" and not mpi.has.get("CUDA"):
        yield (
            "MPI",
            _library(mpi) + slow,
            "note",
            "load a CUDA-aware MPI; ompi_info says whether one is; or backend nccl",
        )
    else:
        yield "MPI", _library(mpi)
    build = "python -m hpc_grawa.install.horovod"
    if horovod.error:
        yield (
            "Horovod",
            horovod.error,
            "lack",
            f"build it for this torch: {build}; or remove it, or take another backend",
        )
    elif not horovod.release:
        yield "Horovod", "not built (optional)", "note", build
    elif gpus and exam.backend == "horovod" and not horovod.has.get("NCCL"):
        yield "Horovod", _library(horovod) + slow, "note", f"HOROVOD_GPU_OPERATIONS=NCCL {build}"
    else:
        yield "Horovod", _library(horovod)


def _library(library: Library) -> str:
    has, lacks = ([name for name, there in library.has.items() if there is wanted] for wanted in (True, False))
    parts = [f"{word} {' and '.join(names)}" for word, names in (("with", has), ("without", lacks)) if names]
    return ", ".join([library.release, *parts])


def _ranks(exam: Examination) -> _Lines:
    slot = exam.slot
    yield "started by", f"{slot.launcher}, {counted(slot.size, 'rank')}" if slot.launcher else "no launcher"
    if exam.slurm == "":
        yield "SLURM", "srun is on PATH, and no controller answers it", "note", "outside a cluster none is needed"
    elif exam.slurm is not None:
        types = f"srun --mpi={'|'.join(exam.mpi_types)}" if exam.mpi_types else "srun names no --mpi types"
        value = ", ".join(filter(None, (exam.slurm, types, exam.job)))
        direct = "pmix" in " ".join(exam.mpi_types) or "Open MPI" not in exam.libraries.get("mpi", Library()).release
        if exam.mpi_types and not direct:
            yield (
                "SLURM",
                value,
                "note",
                "Open MPI needs pmix: LAUNCHER=mpirun, or BACKEND=gloo or nccl, in slurm/site.sh",
            )
        else:
            yield "SLURM", value
    alone = slot.launcher == "srun" and slot.size > 1 and not exam.pmi
    if alone and exam.backend in ("mpi", "horovod"):
        what = f"none: srun started {slot.size} tasks of which MPI learns nothing: each is a world of one, or ends"
        yield "PMI", what, "fails", _cure("mpi", "srun")
    elif slot.launcher:
        yield "PMI", exam.pmi or "none"
    if exam.refused or exam.failed:
        what, fix = _split(exam.refused or exam.failed)
        yield "backend", f"{exam.backend}: {what}", "fails", fix or _cure(exam.backend, slot.launcher)
    else:
        yield "backend", f"{exam.backend} ({exam.why})"
    if exam.later and exam.later[1]:
        what, fix = _split(exam.later[1])
        yield "later", f"under a launcher, {exam.later[0]}: {what}", "lack", fix or _cure(exam.later[0], None)
    if exam.failed or exam.refused:
        yield "rank 0", f"on {exam.ranks[0].host}; of the others nothing is known"
    else:
        hosts = _hosts(exam)
        told = [f"{len(ranks)} on {ranks[0].host}" for ranks in hosts[:8]]
        yield "ranks", ", ".join(told) + (f" and {len(hosts) - 8} more hosts" if hosts[8:] else "")
    yield from _each_host(exam, _cores)


def _each_host(exam: Examination, part: Callable[[Examination, list[Process]], _Lines]) -> _Lines:
    """The lines of every host; what is the same on several of them once."""
    merged: dict[tuple[Any, ...], list[str]] = {}
    hosts = _hosts(exam)
    for ranks in hosts:
        for line in part(exam, ranks):
            merged.setdefault(line, []).append(ranks[0].host)
    for (name, value, *rest), names in merged.items():
        where = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
        where = "every host" if len(names) == len(hosts) else where
        yield name, value if len(hosts) == 1 else f"on {where}: {value}", *rest


def _cores(exam: Examination, ranks: list[Process]) -> _Lines:
    first, threads = ranks[0], sum(rank.threads for rank in ranks)
    own = {core for rank in ranks for core in rank.cores}
    value = f"{len(own)} of {first.host_cores}, for {counted(threads, 'computing thread')}"
    crowded = [rank.rank for rank in ranks if rank.threads > len(rank.cores)]
    fix = "give each rank cores of its own: srun --cpus-per-task=N, mpirun --bind-to none; or a smaller OMP_NUM_THREADS"
    if crowded:
        yield "cores", f"{value}; {_numbers(crowded)}: more threads than cores to run on", "lack", fix
    elif threads > len(own):
        if len(own) == first.host_cores:
            fewer = ", or a smaller OMP_NUM_THREADS" if threads > len(ranks) else ""
            yield "cores", value, "note", f"fewer ranks on a host{fewer}"
        else:
            yield "cores", value, "lack", fix
    elif exam.slot.launcher and len(first.cores) == 1 and first.host_cores > len(ranks):
        yield "cores", f"{value}; ranks are bound to one each", "note", fix
    else:
        yield "cores", value


def _gpus(exam: Examination) -> _Lines:
    yield from _each_host(exam, _gpus_of_host)


def _gpus_of_host(exam: Examination, ranks: list[Process]) -> _Lines:
    first = ranks[0]
    seen = {gpu: name for rank in ranks for gpu, name in rank.gpus.items()}
    there = max(first.gpus_there, len(seen))
    driver = f", driver {first.driver}" if first.driver else ""
    ask = "ask for them: --gpus-per-node=N" if exam.job else ""
    blind = [rank for rank in ranks if not rank.gpus]
    if not there:
        yield "GPUs", "none", "note", ask or "none is needed on a login node or to train on CPUs"
    elif first.cuda is None:
        what = f"{there} there{driver}, but torch {first.versions.get('torch')} is built without CUDA"
        yield "GPUs", what, "lack", "install a CUDA build of torch (https://pytorch.org), then build Horovod anew"
    elif blind:
        what = f"{there} there{driver}, but none to be seen by {_numbers([rank.rank for rank in blind])}"
        if blind[0].gpus_visible in ("", "-1", "NoDevFiles"):
            what += f" (CUDA_VISIBLE_DEVICES is {blind[0].gpus_visible!r})"
            yield "GPUs", what, "lack", "unset it, or ask for GPUs for every task: srun --gpus-per-node=N"
        else:
            what += f" ({blind[0].cuda_error or 'torch gives no reason'})"
            fix = f"a driver for CUDA {blind[0].cuda} or later, or a torch for an earlier CUDA; nvidia-smi tells both"
            yield "GPUs", what, "lack", f"{ask}; else {fix}" if ask else fix
    else:
        names = ", ".join(f"{count} x {name}" for name, count in Counter(seen.values()).items())
        yield "GPUs", f"{names}{driver}"
    taken = Counter(rank.gpu for rank in ranks if rank.gpu is not None)
    shared = {gpu: [rank.rank for rank in ranks if rank.gpu == gpu] for gpu, count in taken.items() if count > 1}
    for sharing in shared.values():
        if len(seen) > len(taken):
            what = f"{_numbers(sharing)} share a GPU while {len(seen) - len(taken)} are free"
            fix = "let ranks see all GPUs of their node (srun --gpu-bind=none), or each one of its own"
            yield "binding", what, "lack", fix
        else:
            yield "binding", f"{_numbers(sharing)} share a GPU", "note", "one rank per GPU; nccl refuses more"
    if taken and not shared:
        yield "binding", "a GPU for each rank that sees any"


def _network(exam: Examination) -> _Lines:
    yield from _each_host(exam, _interfaces)
    if exam.told:
        yield "chosen", ", ".join(f"{name}={value}" for name, value in exam.told.items())


def _interfaces(exam: Examination, ranks: list[Process]) -> _Lines:
    there = ranks[0].interfaces
    yield "interfaces", ", ".join(" ".join(filter(None, (name, *told))) for name, told in there.items()) or "none found"
    for variable, value in exam.told.items():
        if value.startswith(("^", "=")) or "/" in value:
            continue  # all but these, or networks
        # NCCL's and Gloo's may be the beginning of a name
        if not all(any(name.startswith(named) for name in there) for named in value.split(",")):
            yield "chosen", f"{variable} is {value}, which is not there", "lack", f"one of {', '.join(there)}"
    if len(_hosts(exam)) > 1 and not ranks[0].name_is_reachable and not exam.told:
        what = "the host's own name stands for a loopback address, where others cannot reach it"
        yield "name", what, "note", "where ranks do not find each other: GLOO_SOCKET_IFNAME, or NET_IF in slurm/site.sh"


def _files(exam: Examination) -> _Lines:
    folder, hosts = exam.folder, len(_hosts(exam))
    if folder is not None:
        if folder.error:
            yield (
                "folder",
                f"{folder.path}: {folder.error}",
                "lack",
                "--folder, for runs --run.dir: where you may write",
            )
        elif folder.blind:
            what = f"{folder.path}: rank 0's file was not seen within {SEEN:.0f} s by {_numbers(folder.blind)}"
            yield "folder", what, "lack", "--folder, for runs --run.dir: a folder that all nodes share"
        else:
            seen = f"seen on {hosts} hosts" if hosts > 1 else "one host"
            written = f"a file written and renamed in {folder.seconds * 1000:.1f} ms, {seen}"
            yield "folder", f"{folder.path}: {written}, {human_bytes(folder.free)} free"
    yield from _each_host(exam, _shared_memory)


def _shared_memory(exam: Examination, ranks: list[Process]) -> _Lines:
    container = "in a container: docker run --shm-size=8g or --ipc=host, apptainer --bind /dev/shm"
    if ranks[0].shm is None:
        yield "/dev/shm", "not there", "lack", container
        return
    size, free = ranks[0].shm
    value = f"{human_bytes(size)}, {human_bytes(free)} free"
    if free < SHM:
        yield "/dev/shm", value, "lack", f"{container}; else remove what is left there"
    else:
        yield "/dev/shm", value


def _messages(exam: Examination) -> _Lines:
    if exam.speed is None:
        if len(exam.ranks) == 1 and not (exam.refused or exam.failed):
            yield "speed", "one rank sends nothing"
        return
    latency, size, seconds = exam.speed.latency, exam.speed.size, exam.speed.seconds
    yield "latency", f"{latency * 1e6:.0f} us, allreduce of one number (median)"
    yield "bandwidth", f"{size / seconds / 1e9:.3g} GB/s, allreduce of {human_bytes(size)} in {seconds:.3g} s"
    yield "a round", f"of ResNet-50 (25.6 M parameters, 102 MB) sends for about {RESNET50 / size * seconds:.2g} s"


def _hosts(exam: Examination) -> list[list[Process]]:
    """The ranks by host."""
    hosts: dict[str, list[Process]] = {}
    for rank in exam.ranks:
        hosts.setdefault(rank.identity, []).append(rank)
    return list(hosts.values())


def _numbers(ranks: list[int] | tuple[int, ...]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:8])) + (", ..." if ranks[8:] else "")


def _split(message: str) -> tuple[str, str]:
    """An error of this package as what is wrong and the fix, which stands behind a semicolon or in parentheses."""
    message = re.sub(r"^backend is \w+:? ", "", message)
    found = re.fullmatch(r"(.*?); (.*)", message) or re.fullmatch(r"(.*?) \((.*)\)", message)
    return (found[1], found[2]) if found else (message, "")


def _cure(backend: Backend, launcher: str | None) -> str:
    """What helps where a backend does not start."""
    if backend in ("gloo", "nccl"):
        logs = "; NCCL_DEBUG=INFO tells more" if backend == "nccl" else ""
        return f"GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME (NET_IF in slurm/site.sh), MASTER_ADDR on rank 0's host{logs}"
    if launcher == "srun":
        return "srun --mpi=pmix (srun --mpi=list); LAUNCHER=mpirun in slurm/site.sh; or backend gloo, on GPUs nccl"
    if backend == "horovod":
        return "build it anew for this torch and MPI: python -m hpc_grawa.install.horovod; or backend mpi"
    return "the mpirun of the MPI that mpi4py was built with; MPI=system make env builds both on yours; or backend gloo"
