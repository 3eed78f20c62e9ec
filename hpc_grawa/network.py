"""Network interfaces and addresses: how ranks on other hosts reach this one."""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from .launch import Slot


def interfaces_told(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that say which interface Gloo, NCCL, Horovod or Open MPI take, where they are set."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "OMPI_MCA_btl_tcp_if_include")
    return {name: environment[name] for name in names if environment.get(name)}


def interfaces() -> dict[str, tuple[str, str]]:
    """The network interfaces that have an address: that, and their speed where the system knows it."""
    megabits = {name: about.speed for name, about in psutil.net_if_stats().items()}
    return {
        name: (addresses[0], f"{megabits[name] / 1000:g} Gbit/s" if megabits.get(name) else "")
        for name, addresses in _addresses().items()
        if addresses
    }


def first_host(slot: Slot, environment: Mapping[str, str] = os.environ) -> str | None:
    """The host of rank 0, where variables say it: MASTER_ADDR, this host if the job has no other, the first of srun's.

    Example:
        >>> first_host(Slot("srun", size=9), {"SLURM_STEP_NODELIST": "gpu[007-009,012],cpu1"})
        'gpu007'
    """
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    if slot.job and slot.local_size == slot.size:
        return "127.0.0.1"
    nodes = environment.get("SLURM_STEP_NODELIST") if slot.launcher == "srun" else None
    if environment.get("SLURM_DISTRIBUTION", "").startswith("arbitrary"):
        nodes = None  # in order of their names, whatever the ranks' order
    return None if nodes is None else re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])


def first_port(slot: Slot, environment: Mapping[str, str] = os.environ) -> int:
    """Where rank 0 listens if nothing else does: MASTER_PORT, else from the job's name, below the ports of clients."""
    if "MASTER_PORT" in environment:
        return int(environment["MASTER_PORT"])
    return 20_000 + zlib.crc32(slot.job.encode()) % 12_000


def host_identity() -> str:
    """The same for all processes of one host, and for no other host's: its name and what its kernel drew at start."""
    drawn = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {drawn.read_text(encoding='utf-8').strip() if drawn.exists() else ''}"


def own_addresses(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Where other hosts may reach this one: the interface that was chosen for Gloo or NCCL, its name, its addresses."""
    found = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        name = environment.get(variable, "").lstrip("=^").split(",")[0]
        if name and not environment[variable].startswith("^"):
            found += _addresses().get(name, [])
    host = socket.gethostname()
    found.append(host)
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)]
    found += way_to("192.0.2.1")  # asks for the address of the default route
    return list(dict.fromkeys(found))


def way_to(host: str) -> list[str]:
    """The address from which this host's messages to another leave, if any do."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return [str(probe.getsockname()[0])]
    return []


def interface_of(address: str) -> str | None:
    """The network interface that has this address."""
    return next((name for name, addresses in _addresses().items() if address in addresses), None)


def own_name_is_reachable() -> bool:
    """Whether this host's name stands for an address that others may reach; Debian's 127.0.1.1 is none."""
    try:
        return not socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return False


def _addresses() -> dict[str, list[str]]:
    """The addresses of each network interface (IPv4)."""
    found = psutil.net_if_addrs().items()
    return {name: [entry.address for entry in entries if entry.family == socket.AF_INET] for name, entries in found}
