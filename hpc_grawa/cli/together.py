"""Ranks that work on one command: what they say first, and how they end when one fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..comm import Communicator, choose, connect
from ..errors import ConfigError, Damaged, NonFinite, RanksDisagree
from ..launch import Slot, default_threads, local_device
from ..screen import counted, say
from ..training.config import Config


def backend_line(config: Config, slot: Slot) -> str:
    """Which backend and why; raises ``ConfigError`` where it cannot run."""
    backend, why = choose(config.backend, slot)
    where = ", on GPUs" if local_device(slot, config.device).type == "cuda" else ""
    link = f", over an emulated network of {config.network}" if config.network else ""
    return f"backend    {backend} ({why}), {counted(slot.size, 'rank')}{where}{link}"


def set_threads(slot: Slot) -> None:
    """Give this rank its share of the host's processors, unless OMP_NUM_THREADS says otherwise."""
    threads = default_threads(slot)
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def together(program: str, config: Config, slot: Slot, first_line: str) -> Iterator[Communicator]:
    """Within the block ranks communicate; an exception on one ends the job on all, with that rank's traceback."""
    if slot.rank == 0:
        say(first_line)
    comm = connect(config.backend, slot, config.comm_timeout, device=config.device)
    try:
        yield comm
    except (RanksDisagree, NonFinite, ConfigError, KeyboardInterrupt) as error:
        # Raised on all ranks alike or on rank 0 alone: it speaks; the others give it time before they pull the job
        # down. (Whatever else is raised on a rank ends the job through the hook that the communicator has set.)
        if comm.rank:
            time.sleep(10)
        interrupted = isinstance(error, KeyboardInterrupt)
        if comm.rank == 0:
            report = f"\n{program}: interrupted" if interrupted else f"{program}: error: {error}"
            say(report, sys.stderr)
        comm.abort(130 if interrupted else 2 if isinstance(error, ConfigError) else 1)
        raise
    except Damaged as error:  # on the rank that has read it, which speaks
        say(f"{program}: error: rank {comm.rank}: {error}", sys.stderr)
        comm.abort(2)
        raise
    except SystemExit as error:  # of the user's classes: the interpreter would leave without a word
        raise RuntimeError(f"rank {comm.rank} was told to leave in mid-work: sys.exit({error.code!r})") from error
    comm.close()
