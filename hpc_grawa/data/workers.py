"""Processes beside a rank that make its batches.

They know nothing of MPI or Horovod, and live as long as their rank: which signals mean what is its affair, and they end
when it does, however that happens.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from traceback import format_exception
from typing import Any, NamedTuple

import torch

from ..errors import in_a_line, wrong
from ..nests import Nest, leaves
from ..random_streams import seeded

#: Signals by which a rank is told to save, or to end.
_OF_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def make_batch(dataset: Any, collate: Callable[[list[Any]], Any], numbers: list[int], seed: int | None) -> Nest:
    """A batch of these examples of a data set.

    Args:
        dataset: has ``__getitem__``.
        collate: makes the batch.
        numbers: of the examples.
        seed: of all random streams; None: each example has streams of its own, whatever batch it is in.
    """
    if seed is not None:
        with seeded(seed):
            return collate([dataset[number] for number in numbers])
    examples = []
    for number in numbers:
        with seeded(0, number):
            examples.append(dataset[number])
    with seeded(0):
        return collate(examples)


class Workers:
    """So many processes; they start when the first batch is wanted.

    Args:
        count: of processes.
        start_method: ``forkserver`` or ``spawn``.
        content: data sets, and how they are collated; each process gets a copy.

    Raises:
        ConfigError: the content cannot be pickled.
    """

    def __init__(self, count: int, start_method: str, content: tuple[Any, ...]) -> None:
        try:
            pickled = pickle.dumps(content, protocol=5)
        except Exception as error:  # what an own class raises is its own affair
            what = in_a_line(error, named=True)
            raise wrong(
                "data.workers",
                count,
                f"must be 0, or data sets and collate such that other processes can unpickle "
                f"(no lambda, no open file); {what[:300]}",
            ) from None
        self.count = count
        context = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            context.set_forkserver_preload(["torch"])  # once for all
        self._pool = ProcessPoolExecutor(count, context, _begin, ([pickled],))

    def start(self, which: int, numbers: list[int], seed: int | None) -> Callable[[], Any]:
        """Begin to make a batch of the data set number ``which``; what is returned waits for it.

        Raises:
            RuntimeError: from what is returned: a process has ended.
        """
        # Processes may start here; they and the forkserver inherit that signals to all of the job's do not reach them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RANK)
        try:
            made = self._pool.submit(_make, which, numbers, seed)
        except BrokenProcessPool as error:
            raise self._killed(error) from error.__cause__
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

        def finish() -> Any:
            try:
                found = made.result()
                return pickle.loads(found.content) if isinstance(found, _Pickled) else found
            except BrokenProcessPool as error:
                raise self._killed(error) from error.__cause__

        return finish

    def _killed(self, error: BrokenProcessPool) -> RuntimeError:
        whom = f"one of the {self.count} processes of data.workers"
        if error.__cause__ is not None:  # what it sent could not be read here, for want of open files say
            last = str(error.__cause__).strip("'\" \n").splitlines()[-1]  # of a traceback in quotation marks
            return RuntimeError(f"{whom} is lost: {last}")
        return RuntimeError(f"{whom} was killed: too little memory, or shared memory (df -h /dev/shm)?")


class _Pickled(NamedTuple):
    """A batch of many tensors; in shared memory each of them would be an open file."""

    content: bytes


#: Tensors of a batch that travel in shared memory: with ten batches on their way, a sixth of the usual open files.
_SHARED = 16
#: Of a worker: what it was given, or why it could not take it.
_content: tuple[Any, ...] | Exception = ()


def _begin(given: list[bytes]) -> None:
    global _content
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RANK)
    threading.Thread(target=_end_with_the_rank, daemon=True).start()
    torch.set_num_threads(1)
    with suppress(ImportError):
        import mpi4py

        mpi4py.rc.initialize = False  # an own module may import it: this process is no rank
    try:
        _content = pickle.loads(given.pop())  # else the executor would hold it, as large as what is made of it
    except Exception as error:
        _content = error


def _end_with_the_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    rank.join()
    os._exit(1)


def _make(which: int, numbers: list[int], seed: int | None) -> Nest:
    if isinstance(_content, Exception):
        raise _content
    try:
        batch = make_batch(_content[which], _content[-1], numbers, seed)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some cannot, and would take the process for killed
            raise RuntimeError("".join(format_exception(error))) from None
        raise
    return _Pickled(pickle.dumps(batch, protocol=5)) if len(leaves(batch)) > _SHARED else batch
