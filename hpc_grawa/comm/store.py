"""A key-value store that rank 0 serves, where ranks find each other: PyTorch's, in a thread of its own."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from uuid import uuid4
from weakref import WeakKeyDictionary

from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

from ..errors import LostContact
from ..network import own_addresses
from .base import Communicator

#: Ports that rank 0 tries, one after the other.
PORTS = 16
#: Seconds until ranks that cannot find rank 0 give up; the first of a big job may start minutes before the last.
PATIENCE = 300.0
_PATIENCE = timedelta(seconds=PATIENCE)
#: Seconds in which what listens at a port has to answer as a store does.
ANSWER = 20.0
_NAME = "hpc_grawa job"


def serve(port: int, name: str) -> TCPStore:
    """Serve a store at ``port``, or at one of the next where something else listens there (0: at any).

    Raises:
        OSError: all of them are taken.
    """
    candidates = range(port, port + PORTS) if port else (0,)
    for candidate in candidates:
        try:
            store = TCPStore("0.0.0.0", candidate, None, True, _PATIENCE, wait_for_workers=False)
        except (OSError, RuntimeError) as error:  # DistNetworkError is a RuntimeError
            if candidate == candidates[-1]:
                tried = f"{candidates[0]}-{candidates[-1]}"
                raise OSError(f"rank 0 cannot listen at ports {tried}: set MASTER_PORT to a free one") from error
            continue
        store.set(_NAME, name)
        return store
    raise AssertionError


def join(addresses: Sequence[str], port: int, name: str, ports: int = PORTS, seconds: float = PATIENCE) -> TCPStore:
    """The store of this ``name`` at one of the addresses and ports, once rank 0 serves it.

    Raises:
        TimeoutError: nothing of this name was found there.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for candidate in range(port, port + ports):
            for address in addresses:
                store = _knock(address, candidate, name)
                if store is not None:
                    return store
        time.sleep(0.1)
    where = f"{' or '.join(addresses)}, port {port}" + (f" to {port + ports - 1}" if ports > 1 else "")
    raise TimeoutError(
        f"rank 0 was not found at {where} within {seconds:.0f} s: set MASTER_ADDR to the host of rank 0 and "
        f"MASTER_PORT to a port that is free there, or GLOO_SOCKET_IFNAME to the network interface that the hosts share"
    )


def _knock(address: str, port: int, name: str) -> TCPStore | None:
    # A store's own constructor retries a closed port until its time is over.
    try:
        socket.create_connection((address, port), 2).close()
    except OSError:
        return None
    found: list[TCPStore] = []

    def look() -> None:
        with suppress(OSError, RuntimeError):
            store = TCPStore(address, port, None, False, _PATIENCE, wait_for_workers=False)
            if store.get(_NAME).decode() == name:
                found.append(store)

    # Where something else listens and never answers, the constructor waits for ever, and its thread is left to itself.
    # Not one that will be answered: it would come back to a Python that is ending, which aborts the process.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(ANSWER)
    return found[0] if found else None


def shared_store(comm: Communicator) -> TCPStore:
    """A store that rank 0 of ``comm`` serves and announces; all its ranks must call it."""
    message = b""
    if comm.rank == 0:
        store = serve(0, uuid4().hex)
        message = json.dumps([own_addresses(), store.port, store.get(_NAME).decode()]).encode()
    addresses, port, name = json.loads(comm.gather_bytes(message)[0])
    if comm.rank:
        store = join(["127.0.0.1", *addresses], port, name, ports=1, seconds=60)
    comm.barrier()  # rank 0 may drop it from here on
    return store


#: Each communicator's store, and numbers for the counters in it.
_stores: WeakKeyDictionary[Communicator, tuple[TCPStore, Iterator[int]]] = WeakKeyDictionary()


class StoreCounter:
    """A counter of all ranks of ``comm``, which must make it together; all counters of one ``comm`` share a store.

    A new store may take seconds: PyTorch asks the name server for the name of each address, which may lose a question.
    """

    def __init__(self, comm: Communicator) -> None:
        if comm not in _stores:
            _stores[comm] = shared_store(comm), itertools.count()
        self._store, numbers = _stores[comm]
        self._key = f"sum {next(numbers)}"

    def add(self, amount: int) -> int:
        try:
            total: int = self._store.add(self._key, amount)
        except DistNetworkError as error:  # rank 0, which serves the store, is gone
            raise LostContact(str(error)) from error
        return total
