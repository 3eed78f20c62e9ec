"""Whether ranks can train here, and what is missing: ``hpc-grawa doctor``.

What may hang, abort or crash (MPI, Horovod, CUDA, a file system) is tried by a child process of each rank, which tells
what it finds as it goes: where it dies or falls silent, the rest is known.
"""

from __future__ import annotations

import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Any
from uuid import uuid4

import torch

from ..comm import Backend, Communicator, Library, choose, connect, libraries
from ..errors import ConfigError
from ..launch import Slot, default_threads, descriptors, local_device, own_slot, pmi, slurm_job
from ..network import host_identity, interfaces, interfaces_told, own_name_is_reachable
from ..runs.log import versions
from ..screen import say, wrapped
from .diagnosis import SEEN, Examination, Folder, Process, Speed, diagnose, verdict

#: Seconds of the test of messages, and for SLURM's programs.
MESSAGES, ASKED = 4.0, 10.0
#: Bytes of the largest message.
LARGEST = 2**26


def look_around(slot: Slot) -> Process:
    """What this process sees; asks CUDA."""
    shm = None
    with suppress(OSError):
        usage = shutil.disk_usage("/dev/shm")
        shm = usage.total, usage.free
    driver, error = "", ""
    gpus: dict[str, str] = {}
    with suppress(OSError):
        found = re.search(
            r"Kernel Module\D*\s([\d.]+)\s",
            Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace"),
        )
        driver = found[1] if found else ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev"))
    try:
        count = torch.cuda.device_count()
        properties = [torch.cuda.get_device_properties(index) for index in range(count)]
        gpus = {str(getattr(p, "uuid", f"{visible}:{index}")): p.name for index, p in enumerate(properties)}
        if there and not count:
            torch.cuda.init()  # type: ignore[no-untyped-call]  # says why
    except (RuntimeError, AssertionError) as refusal:
        error = str(refusal).partition("\n")[0]
    nccl = ""
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return Process(
        rank=slot.rank,
        host=platform.node(),
        identity=host_identity(),
        versions={**versions(), "torch": torch.__version__},
        cores=tuple(sorted(os.sched_getaffinity(0))),
        host_cores=os.cpu_count() or 1,
        threads=default_threads(slot) or torch.get_num_threads(),
        shm=shm,
        interfaces=interfaces(),
        name_is_reachable=own_name_is_reachable(),
        cuda=torch.version.cuda or torch.version.hip,
        nccl=nccl,
        driver=driver,
        gpus_there=there,
        gpus=gpus,
        gpu=list(gpus)[slot.local_rank % len(gpus)] if gpus else None,
        gpus_visible=visible,
        cuda_error=error,
    )


def try_folder(comm: Communicator, folder: Path) -> Folder:
    """Write a file on rank 0, under another name first, and look for it on all ranks; all must call it."""
    path, content, error, seconds, free = folder.absolute(), uuid4().hex, "", 0.0, 0
    file = Path()
    if comm.rank == 0:
        path = next(parent for parent in (path, *path.parents) if parent.is_dir())
        file = path / f".doctor-{content}"
        try:
            free, began = shutil.disk_usage(path).free, time.perf_counter()
            with file.with_suffix(".part").open("w", encoding="utf-8") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            file.with_suffix(".part").rename(file)
            seconds = time.perf_counter() - began
        except OSError as refusal:
            error = refusal.strerror or str(refusal)
    file, content, error = pickle.loads(comm.gather_bytes(pickle.dumps((file, content, error)))[0])
    seen, until = False, time.monotonic() + (0 if error else SEEN)
    while not seen and time.monotonic() < until:
        with suppress(OSError):
            seen = file.read_text(encoding="utf-8", errors="replace") == content
        if not seen:
            time.sleep(0.1)
    blind = tuple(rank for rank, found in enumerate(comm.gather_bytes(bytes([seen]))) if not found[0])
    if comm.rank == 0:
        for left in (file, file.with_suffix(".part")):
            with suppress(OSError):
                left.unlink()
    return Folder(str(path), seconds, free, blind if not error else (), error)


def measure(comm: Communicator, device: torch.device, seconds: float = MESSAGES) -> Speed | None:
    """Time small and large allreduces for so many seconds; None of one rank. All must call it."""
    if comm.size == 1:
        return None
    began = time.perf_counter()

    def send(x: torch.Tensor) -> float:
        start = time.perf_counter()
        comm.allreduce(x, "center").wait()
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def told(value: float) -> float:
        """Rank 0's, so that all ranks go on or end alike."""
        return comm.broadcast(torch.tensor([value], dtype=torch.float64), 0, "setup").wait().item()

    def left() -> float:
        return told(began + seconds - time.perf_counter())

    small = torch.zeros(1, device=device)
    for _ in range(3):
        send(small)  # connects
    times = [send(small) for _ in range(5)]
    while left() > seconds * 0.75 and len(times) < 1000:
        times += [send(small) for _ in range(10)]
    latency, size = median(times), 2**18
    while True:
        x = torch.zeros(size // 4, device=device)
        send(x)
        once = told(send(x))
        if size == LARGEST or left() < 12 * once:  # two messages of four times the size, and half as much in reserve
            break
        size *= 4
    times = [once]
    while len(times) < 20 and left() > 2 * once:
        times.append(send(x))
    return Speed(latency, size, median(times))


def examine(send: Callable[..., None], backend: Backend | None, folder: Path) -> None:
    """What a child of a rank does: tell of itself, then of all ranks; without a backend, of its libraries."""
    slot = own_slot()
    own = look_around(slot)
    send(ranks=(own,), stage="ranks look for each other")
    if backend is None:
        send(libraries=libraries())
    else:
        try:
            comm = connect(backend, slot)
            send(stage="ranks tell each other what they see")
            everyone = tuple(pickle.loads(told) for told in comm.gather_bytes(pickle.dumps(own)))
            send(ranks=everyone, stage="a file is written")
            send(folder=try_folder(comm, folder), stage="messages are sent")
            device = local_device(slot)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            send(speed=measure(comm, device), stage="ranks part")
            comm.barrier()
            comm.close()
        except ConfigError as error:
            send(failed=str(error))
        except Exception as error:  # whatever a backend raises
            send(failed=f"{type(error).__name__}: {error}".partition("\n")[0])
    send(stage="")


_CHILD = """
import os, sys; from multiprocessing.connection import Connection; from pathlib import Path
from hpc_grawa.doctor.examine import examine
for number in map(int, [sys.argv[1], *sys.argv[4:]]):
    os.set_inheritable(number, False)  # what MPI starts would keep it open
pipe = Connection(int(sys.argv[1]), readable=False)
examine(lambda **found: pipe.send(found), sys.argv[2] or None, Path(sys.argv[3]))
"""


def ask_child(backend: Backend | None, folder: Path, patience: float) -> dict[str, Any]:
    """What ``examine`` tells, and under ``failed`` why it tells no more.

    Args:
        backend: to try.
        folder: to write in.
        patience: seconds without a word after which the child is given up.
    """

    def end(number: int, frame: object) -> None:
        raise TimeoutError("the launcher ended the job")

    found: dict[str, Any] = {"stage": "torch is imported and looks for GPUs"}
    reader, writer = Pipe(duplex=False)
    before = signal.getsignal(signal.SIGTERM)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    with tempfile.TemporaryFile() as output:
        words = [sys.executable, "-c", _CHILD, str(writer.fileno()), backend or "", str(folder)]
        words += map(str, launchers := descriptors())
        passed = [writer.fileno(), *launchers]
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=passed)
        writer.close()
        try:
            with suppress(EOFError):
                while found["stage"]:
                    if not reader.poll(patience):
                        raise TimeoutError(f"no answer for {patience:.0f} s")
                    found.update(reader.recv())
            with suppress(subprocess.TimeoutExpired):
                child.wait(ASKED)  # MPI ends with the process
            if found["stage"]:
                raise TimeoutError(f"ended with status {child.returncode}")
        except TimeoutError as error:
            output.seek(0)
            told = shorten(re.sub("-{9,}|;", "", output.read().decode(errors="replace")), 320, placeholder=" ...")
            found["failed"] = f"{error} while {found['stage']}" + (f": {told}" if told else "")
        finally:
            child.kill()
            reader.close()
            signal.signal(signal.SIGTERM, before)
    return found


def ask_slurm() -> dict[str, Any]:
    """SLURM's release and what ``srun --mpi`` takes."""

    def told(*words: str) -> str:
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=ASKED)
            return "" if done.returncode else done.stdout + done.stderr
        return ""

    if shutil.which("srun") is None:
        return {}
    types = re.findall(r"^(?:srun:)?\s*(\w+)$", told("srun", "--mpi=list"), re.M)
    return {"slurm": told("srun", "--version").strip(), "mpi_types": tuple(types)}


def doctor(asked: Backend, folder: Path, patience: float, slot: Slot) -> int:
    """Examine on all ranks, and report on rank 0; returns the exit status.

    Args:
        asked: the backend to try.
        folder: where runs are to be written.
        patience: seconds to wait for a child that is silent.
        slot: of this process.
    """
    backend, why, refused, later = asked, "", "", None
    try:
        backend, why = choose(asked, slot)
    except ConfigError as error:
        refused = str(error)
    if slot.rank:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # rank 0 has spoken, its status is to count
        found = {} if refused else ask_child(backend, folder, patience)
        if found.get("failed") and slot.local_rank == 0 and slot.local_size < slot.size:
            time.sleep(10)  # what is wrong on every host rank 0 says
            say(f"hpc-grawa doctor: rank {slot.rank} on {platform.node()}: {found['failed']}", sys.stderr)
        return 0
    alone = ask_child(None, folder, patience)
    if asked == "auto" and backend == "single" and not refused:
        with suppress(ConfigError):
            taken = choose("auto", Slot("mpirun"))[0]
            later = taken, ask_child(taken, folder, patience).get("failed", "")
    slurm = ask_slurm()
    found = {} if refused else ask_child(backend, folder, patience)
    unknown = Library(error=alone.get("failed", ""))
    exam = Examination(
        slot=slot,
        backend=backend,
        why=why,
        refused=refused,
        failed=found.get("failed", ""),
        later=later,
        pmi=pmi(),
        job=slurm_job(),
        told=interfaces_told(),
        libraries=alone.get("libraries", {"mpi": unknown, "horovod": unknown}),
        ranks=found.get("ranks") or alone.get("ranks") or (Process(host=platform.node()),),
        folder=found.get("folder"),
        speed=found.get("speed"),
        **slurm,
    )
    return report(exam)


def report(exam: Examination) -> int:
    """Print what was found and what it means; returns the exit status."""
    findings = diagnose(exam)
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            say(section)
        lines = [(f"  {finding.mark:5}  {finding.name:11} ", finding.value)]
        if finding.fix:
            lines.append((" " * 21, f"fix: {finding.fix}"))
        for start, text in lines:
            for line in wrapped(text, 120, start, " " * 21).splitlines():
                say(line)
    line, status = verdict(exam, findings)
    say(line)
    return status
