"""What ``hpc-grawa doctor`` makes of an examination; what it finds alone, under launchers, and where it is broken."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import own
import pytest
import torch
from conftest import Ranks
from launcher import HOROVOD, Ended, called, environment, launch, launched, mpirun, ours, torchrun
from test_cli import LINE

from hpc_grawa import cli
from hpc_grawa.comm import Communicator, Library, choose, connect
from hpc_grawa.doctor.diagnosis import Examination, Finding, Folder, Process, Speed, diagnose, verdict
from hpc_grawa.doctor.examine import look_around, measure, try_folder
from hpc_grawa.errors import ConfigError
from hpc_grawa.launch import Slot, own_slot

SECTIONS = ["software", "launcher and ranks", "GPUs", "network", "files", "messages"]
GPU = {"gpus_there": 4, "gpus": dict.fromkeys("0123", "H100"), "cuda": "12.8", "driver": "570.1", "nccl": "2.26"}
NO_GPU = GPU | {"gpus": {}}
X = GPU | {"gpu": "0"}


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "on_several_ranks" not in request.fixturenames:
        own.plain_process(monkeypatch)
        monkeypatch.chdir(tmp_path)


def world(*ranks: dict[str, Any], **found: Any) -> Examination:
    """Ranks under mpirun that lack nothing, but for what is given; two on each of the hosts a, b, ..."""
    sound: dict[str, Any] = {
        "versions": {"hpc-grawa": "0.1.0", "python": "3.12", "torch": "2.9"},
        "cores": (0, 1),
        "host_cores": 2,
        "shm": (2**35, 2**34),
        "interfaces": {"lo": ("127.0.0.1", ""), "ib0": ("10.0.0.1", "100 Gbit/s")},
        "cuda": "12.8",
    }
    processes = tuple(
        Process(**{**sound, "rank": m, "host": "abcdef"[m // 2], "identity": "abcdef"[m // 2], **rank})
        for m, rank in enumerate(ranks)
    )
    have: dict[str, Any] = {
        "slot": Slot("mpirun", 0, len(ranks), 0, 2),
        "backend": "mpi",
        "why": "started by mpirun",
        "pmi": "PMIx",
        "libraries": {"mpi": Library("Open MPI v4.1.8", {"CUDA": True}), "horovod": Library("0.28.1", {"MPI": True})},
        "folder": Folder("/scratch/runs", 0.001, 10**12),
        "speed": Speed(1e-5, 2**26, 0.02),
        "ranks": processes,
    }
    return Examination(**{**have, **found})


def only(exam: Examination, name: str) -> Finding:
    """The finding of this name, which is to be the only one with a mark; that there are no GPUs is none."""
    marked = [f for f in diagnose(exam) if f.mark and (f.name == name or not f.value.endswith("none"))]
    assert [f.name for f in marked] == [name], marked
    assert marked[0].fix
    return marked[0]


def test_where_nothing_lacks_nothing_is_marked() -> None:
    exam = world(*(GPU | {"gpu": str(m)} for m in range(4)))
    findings = diagnose(exam)
    assert [f for f in findings if f.mark or f.fix] == []
    assert list(dict.fromkeys(f.section for f in findings)) == SECTIONS
    lines = {f.name: f.value for f in findings}
    assert lines["ranks"] == "2 on a, 2 on b"
    assert lines["GPUs"] == "on every host: 4 x H100, driver 570.1"
    assert lines["CUDA"] == "torch is built for 12.8, NCCL 2.26"
    assert lines["binding"] == "on every host: a GPU for each rank that sees any"
    assert lines["folder"] == "/scratch/runs: a file written and renamed in 1.0 ms, seen on 2 hosts, 1 TB free"
    assert lines["latency"].startswith("10 us") and lines["bandwidth"].startswith("3.36 GB/s, ")
    assert "about 0.03 s" in lines["a round"]
    assert verdict(exam, findings) == ("backend mpi works here, on 4 ranks", 0)


SRUN = Slot("srun", 0, 4, 0, 2)
NO_CUDA = {"libraries": {"mpi": Library("Open MPI v4.1.8", {"CUDA": False}), "horovod": Library("0.28.1", {})}}


@pytest.mark.parametrize(
    ("exam", "name", "mark", "value", "fix"),
    [
        # GPUs
        (world(NO_GPU | {"cuda": None}), "GPUs", "lack", "4 there, .* torch 2.9 is built without CUDA", "CUDA build"),
        (world(NO_GPU | {"gpus_visible": ""}), "GPUs", "lack", "none to be seen by rank 0 .*_DEVICES is ''", "unset"),
        (world(NO_GPU | {"cuda_error": "too old"}), "GPUs", "lack", r"\(too old\)", "^a driver for CUDA 12.8"),
        (world(NO_GPU, job="job 7"), "GPUs", "lack", "none to be seen", "^ask for them: --gpus-per-node=N; else"),
        (world(X, X), "binding", "lack", "ranks 0, 1 share a GPU while 3 are free", "--gpu-bind=none"),
        (
            world(*[X | {"gpus": {"0": "H100"}}] * 2),  # though the node has more
            *("binding", "note", "^ranks 0, 1 share a GPU$", "one rank per GPU"),
        ),
        (world(X, **NO_CUDA), "MPI", "note", "page-locked host memory", "CUDA-aware"),
        (
            world(X, backend="horovod", **NO_CUDA),
            *("Horovod", "note", "page-locked host memory", "HOROVOD_GPU_OPERATIONS=NCCL python -m"),
        ),
        (world({}, job="job 7"), "GPUs", "note", "none", "--gpus-per-node"),
        # software
        (world({}, {}, libraries={"mpi": Library("MPICH")}), "Horovod", "note", r"not built \(optional\)", "python -m"),
        (
            world({}, libraries={"mpi": Library("MPICH"), "horovod": Library(error="ImportError: undefined symbol")}),
            *("Horovod", "lack", "undefined symbol", "build it for this torch"),
        ),
        (world({}, {}, libraries={"horovod": Library("0.28.1")}), "MPI", "note", "no mpi4py", "install 'mpi4py>=4'"),
        (
            world({}, {}, libraries={"horovod": Library("0.28.1"), "mpi": Library(error="ImportError: libmpi.so.12")}),
            *("MPI", "note", "libmpi.so.12", "install --force-reinstall .*--no-binary mpi4py"),
        ),
        (
            world({}, {}, {"versions": {"hpc-grawa": "0.1.0", "python": "3.12", "torch": "2.4"}}),
            *("torch", "lack", "differs: 2.9 on ranks 0, 1; 2.4 on rank 2", "same environment"),
        ),
        # launcher and ranks
        (world({}, {}, {}, {}, slot=SRUN, pmi=""), "PMI", "fails", "srun started 4 tasks", "srun --mpi=pmix"),
        (
            world({}, {}, {}, {}, slot=SRUN, slurm="slurm 23", mpi_types=("none", "pmi2")),
            *("SLURM", "note", "slurm 23, srun --mpi=none|pmi2", "LAUNCHER=mpirun"),
        ),
        (world({}, {}, slurm=""), "SLURM", "note", "no controller", "none is needed"),
        (world({}, {}, failed="worlds of one; use srun"), "backend", "fails", "^mpi: worlds of one$", "^use srun$"),
        (
            world({}, {}, backend="horovod", failed="ImportError: no"),
            *("backend", "fails", "^horovod: ImportError: no$", "build it anew"),
        ),
        (
            world({}, {}, backend="nccl", refused="backend is nccl: no GPU; must be gloo"),
            *("backend", "fails", "^nccl: no GPU$", "^must be gloo$"),
        ),
        (world({}, {}, later=("horovod", "OSError: no")), "later", "lack", "horovod: OSError: no", "build it anew"),
        (world({"threads": 4, "cores": (0,)}, {}), "cores", "lack", "rank 0: more threads than", "--cpus-per-task"),
        (world({"cores": (0,)}), "cores", "note", "1 of 2, for 1 .*; ranks are bound to one each", "--bind-to none"),
        (world({"cores": (0,)}, {"cores": (0,)}), "cores", "lack", "1 of 2, for 2 computing threads", "--bind-to none"),
        (world({"threads": 2}, {"threads": 2}), "cores", "note", "2 of 2, for 4 computing threads", "or a smaller OMP"),
        (world(*[{"cores": (0,), "host_cores": 1}] * 2), "cores", "note", "1 of 1, for 2", "^fewer ranks on a host$"),
        # network
        (world({}, {}, told={"GLOO_SOCKET_IFNAME": "eth1"}), "chosen", "lack", "eth1, which is not", "one of lo, ib0"),
        (world({}, {}, {"name_is_reachable": False}), "name", "note", "on b: .*loopback address", "GLOO_SOCKET_IFNAME"),
        # files
        (world({}, {}, folder=Folder("/x", error="Read-only")), "folder", "lack", "/x: Read-only", "--run.dir"),
        (world({}, {}, {}, folder=Folder("/x", blind=(2,))), "folder", "lack", "seen within 5 s by rank 2", "share"),
        (world({"shm": (2**26, 2**26)}, {}), "/dev/shm", "lack", "67.1 MB, 67.1 MB free", "--shm-size"),
        (world({"shm": None}, {}), "/dev/shm", "lack", "not there", "apptainer --bind /dev/shm"),
    ],
)  # fmt: skip
def test_each_lack_has_a_fix(exam: Examination, name: str, mark: str, value: str, fix: str) -> None:
    found = only(exam, name)
    assert found.mark == mark and re.search(value, found.value) and re.search(fix, found.fix), found
    line, status = verdict(exam, diagnose(exam))
    assert status == (mark == "fails") and line.startswith(f"backend {exam.backend} ")
    assert ("would fail: " in line) == bool(status)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_without_pmi_gloo_and_nccl_start(backend: str) -> None:
    assert verdict(f := world({}, {}, slot=SRUN, pmi="", backend=backend), diagnose(f))[1] == 0


def test_many_hosts_are_one_line_where_they_are_alike() -> None:
    findings = [f for f in diagnose(world(*[{}] * 12)) if f.name in ("interfaces", "/dev/shm", "cores", "GPUs")]
    assert len(findings) == 4 and all(f.value.startswith("on every host: ") for f in findings)
    few = world({}, {}, {}, {}, {"shm": (2**20, 2**20)}, {})
    assert [f.value[:10] for f in diagnose(few) if f.name == "/dev/shm"] == ["on a, b: 3", "on c: 1.05"]


def test_a_rank_sees_gpus_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: SimpleNamespace(name="H100", uuid=f"GPU-{i}"))
    found = look_around(Slot("srun", 6, 8, 2, 4))
    assert (found.rank, found.gpu, list(found.gpus)) == (6, "GPU-2", ["GPU-0", "GPU-1", "GPU-2", "GPU-3"])

    def broken() -> int:
        raise RuntimeError("The NVIDIA driver on your system is too old\nand more")

    monkeypatch.setattr("torch.cuda.device_count", broken)
    found = look_around(Slot())
    assert (found.gpu, found.gpus, found.cuda_error) == (None, {}, "The NVIDIA driver on your system is too old")


# On ranks


def test_a_file_that_all_ranks_see(on_several_ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> tuple[str, Folder, Folder]:
        where = comm.gather_bytes(str(tmp_path).encode())[0].decode()
        return where, try_folder(comm, Path(where, "runs", "new")), try_folder(comm, Path("/proc/self"))

    where, good, bad = on_several_ranks(body)[0]
    assert (good.path, good.blind, good.error) == (where, (), "") and good.free > 0 and good.seconds > 0
    assert bad.error and list(Path(where).iterdir()) == []


def test_the_test_of_messages_ends_in_time_and_on_all_ranks_alike(on_several_ranks: Ranks) -> None:
    def body(comm: Communicator) -> tuple[Speed | None, int, float]:
        began = time.monotonic()
        speed = measure(comm, torch.device("cpu"), 0.4)
        return speed, comm.meter.calls["center"], time.monotonic() - began

    results = on_several_ranks(body)
    assert len({calls for _, calls, _ in results}) == 1
    assert all(seconds < 4 for _, _, seconds in results)
    assert all(s is not None and 0 < s.latency < 1 and s.size >= 2**18 and s.seconds > 0 for s, _, _ in results)


# As it is used


def run(*words: str, by: tuple[str, ...], **variables: str) -> Ended:
    return launch(*words, by=by, env=environment(**variables))


def sections(output: str) -> list[str]:
    return [line for line in output.splitlines() if line in SECTIONS]


def test_a_plain_process(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, errors = called(capsys, "doctor")
    assert (status, errors) == (0, ""), output + errors
    assert sections(output) == SECTIONS
    assert re.search(r"^ +torch +" + re.escape(torch.__version__), output, re.M)
    assert re.search(r"^ +backend +single \(no launcher\)$", output, re.M)
    taken = "horovod" if HOROVOD else "mpi"
    last = output.splitlines()[-1]
    assert last == f"backend single works here, on 1 rank; under mpirun or srun auto takes {taken}"
    assert list(Path().iterdir()) == []


@pytest.mark.slow
@launched
@pytest.mark.parametrize(("ranks", "backend"), [(2, "mpi"), (4, "auto")])
def test_ranks_of_mpirun(ranks: int, backend: str) -> None:
    status, output, errors = run("doctor", "--backend", backend, "--folder", "some/runs", by=mpirun(ranks))
    assert status == 0, output + errors
    assert sections(output) == SECTIONS  # one report
    assert re.search(rf"^ +started by +mpirun, {ranks} ranks$", output, re.M)
    assert re.search(rf"^ +ranks +{ranks} on ", output, re.M)
    assert re.search(r"^ +a round +of ResNet-50 .* for about [\d.]+ s$", output, re.M)
    taken = backend if backend != "auto" else "horovod" if HOROVOD else "mpi"
    assert output.splitlines()[-1] == f"backend {taken} works here, on {ranks} ranks"
    assert list(Path().iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not HOROVOD, reason="Horovod is not built")
def test_ranks_of_horovodrun() -> None:
    status, output, errors = run("doctor", by=("horovodrun", "--gloo", "-np", "2", "-H", "localhost:2"))
    assert status == 0 and output.count("launcher and ranks") == 1, output + errors
    assert "started by  horovodrun --gloo, 2 ranks" in output and "backend horovod works here, on 2 ranks" in output


@pytest.mark.slow
def test_ranks_of_torchrun() -> None:
    status, output, errors = run("doctor", by=torchrun(2))
    assert status == 0 and sections(output) == SECTIONS, output + errors
    assert re.search("backend (gloo|nccl) works here, on 2 ranks$", output)


@pytest.mark.slow
@launched
def test_a_horovod_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text("")
    (tmp_path / "horovod" / "torch.py").write_text("raise ImportError('libtorch: undefined symbol')")
    status, output, errors = run("doctor", by=mpirun(1), PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}")
    assert status == 1, output + errors
    assert re.search("^  lack   Horovod +ImportError: libtorch: undefined symbol$", output, re.M), output
    assert output.splitlines()[-1] == "backend horovod would fail: ImportError: libtorch: undefined symbol"
    assert output.count("python -m hpc_grawa.install.horovod") == 2


TASK = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the first of four tasks that srun has started."""
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_mpi_worlds_of_one_under_srun(task: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mpi4py")
    status, output, errors = called(capsys, "doctor", "--backend=mpi")
    assert status == 1, output + errors
    assert re.search("^  fails  PMI +none: srun started 4 tasks", output, re.M)
    assert re.search("^  fails  backend +mpi: ", output, re.M)
    assert output.count("fix: srun --mpi=pmix (srun --mpi=list)") >= 1
    assert output.splitlines()[-1].startswith("backend mpi would fail: none: srun started 4 tasks")


@pytest.mark.slow
def test_ranks_that_never_come_are_given_up(
    task: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    status, output, _ = called(capsys, "doctor", "--backend=gloo", "--patience=12")
    assert status == 1 and time.monotonic() - began < 100
    assert "backend gloo would fail: no answer for 12 s while ranks look for each other" in output
    assert re.search("^ +fix: GLOO_SOCKET_IFNAME", output, re.M)


# A world of one in a job of several tasks


def test_a_plain_process_in_a_job_of_several_tasks_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    words = ["train", *LINE, "--budget.steps=3", "--run.name=a"]

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 2 and not (tmp_path / "runs").exists()
        return capsys.readouterr().err

    assert refused(*words) == (
        "hpc-grawa train: error: backend is auto in a SLURM job of 4 tasks, but no launcher started this process: it "
        "would train alone; start it by srun --mpi=pmix or mpirun, or, if one process is meant, with backend single or "
        "by srun --ntasks=1\n"
    )
    assert "backend is mpi in a SLURM job of 4 tasks" in refused(*words, "--backend=mpi")
    assert "backend is auto in a SLURM job of 4 tasks" in refused("compare", *words[1:], "--methods=EASGD")
    cli.main([*words, "--dry_run"])
    cli.main([*words, "--backend=single"])
    for command in ("evaluate", "status", "table"):
        cli.main([command, "runs/a"])
    by_srun = own_slot(TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"})  # --ntasks=1
    assert choose("gloo", by_srun)[0] == "gloo" and choose("auto", by_srun)[0] == "single"


def test_doctor_says_that_a_plain_process_in_a_job_of_several_tasks_would_not_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    status, output, _ = called(capsys, "doctor")
    assert status == 1 and "in a SLURM job of 4 tasks" in output.splitlines()[-1]
    assert re.search("^ +fix: start it by srun --mpi=pmix or mpirun, or", output, re.M)


@launched
@pytest.mark.slow
def test_one_rank_that_mpirun_was_told_to_start_trains() -> None:
    status, _, errors = run(*("train", *LINE, "--budget.steps=3", "--backend=mpi"), by=mpirun(1), SLURM_NTASKS="4")
    assert (status, ours(errors)) == (0, []), errors


def test_a_program_of_ones_own_is_refused_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ConfigError, match="backend is auto in a SLURM job of 4 tasks"):
        connect()
    assert connect("single").size == 1
