"""How tests start programs: in this process, alone, on ranks of MPI, or by whatever launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hpc_grawa import cli
from hpc_grawa.comm.single import SingleCommunicator

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
MPIRUN = str(BIN / "mpirun") if (BIN / "mpirun").exists() else shutil.which("mpirun")
HOROVOD = find_spec("horovod") is not None
launched = pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun beside this Python, nor on PATH")


#: What Python runs, but for tests that say otherwise: the program of the package.
PROGRAM = ("-m", "hpc_grawa")


class Ended(NamedTuple):
    status: int
    output: str
    errors: str

    @property
    def said(self) -> str:
        return self.output + self.errors


def environment(**more: str) -> dict[str, str]:
    """This process's, in which programs find the package, the tests, and what makes MPI start them here."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        **more,
    }


def mpirun(ranks: int) -> tuple[str, ...]:
    return str(MPIRUN), "-np", str(ranks)


def torchrun(ranks: int) -> tuple[str, ...]:
    words = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--no-python")
    return sys.executable, "-m", *words


def start(
    *words: str, program: tuple[str, ...] = PROGRAM, ranks: int | None = None, by: tuple[str, ...] = (), **options: Any
) -> subprocess.Popen[str]:
    """Start a program of Python with these words, on so many ranks of MPI, or behind another launcher's words."""
    if ranks is not None:
        if MPIRUN is None:
            pytest.skip("there is no mpirun")
        by = mpirun(ranks)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **options}
    return subprocess.Popen([*by, sys.executable, *program, *words], text=True, **pipes)


def launch(*words: str, **options: Any) -> Ended:
    """`start` it and wait for its end: so long that only one that hangs is given up, on slow machines too."""
    process = start(*words, **options)
    try:
        output, errors = process.communicate(timeout=400)
    finally:
        process.kill()
    return Ended(process.returncode, output, errors)


def called(capsys: pytest.CaptureFixture[str], *words: str) -> Ended:
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
    return Ended(status, *capsys.readouterr())


def ours(errors: str) -> list[str]:
    """What the program wrote, without what a launcher adds."""
    return [line for line in errors.splitlines() if line.startswith("hpc-grawa")]
