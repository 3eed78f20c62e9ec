"""Seconds of communication over an emulated link beside those over a real one of the same figures.

    sudo python benchmarks/links.py                                    needs ip (netns, veth) and tc (tbf)
    sudo python benchmarks/links.py PowerSGD --ranks 2 --mbit 5 --network 5mbit,50us

Every rank lives in a network namespace of its own; all are on one bridge. For each method ranks train a network of
four million parameters over Gloo: once with a token bucket (``tbf``) of that rate in front of every rank, once without
it and with ``--network``. Shown is the time of a step that is communication, or waiting, and the whole of it, on rank 0
in the fastest of 5 repeats. Namespaces and processes are gone at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

SIDE, LAYERS, STEPS, REPEATS, PERIOD = 1000, 4, 8, 5, 1
BRIDGE, NET, PORT = "grawabr", "10.88.7", "29517"


def rank(method: str, network: str) -> None:
    """Train, as one rank; rank 0 prints seconds per step."""
    import torch

    import hpc_grawa
    from hpc_grawa import methods
    from hpc_grawa.comm import Meter, connect

    torch.set_num_threads(1)
    comm = connect("gloo", network=None if network == "real" else network)
    torch.manual_seed(comm.rank)
    model = torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE) for _ in range(LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss() -> torch.Tensor:
        return model(torch.randn(8, SIDE)).square().mean()

    kind = getattr(methods, method)
    settings = {"period": PERIOD, "warmup_steps": 0}
    own = {key: settings[key] for key in settings.keys() & {field.name for field in fields(kind)}}
    run = kind(**own).build(comm, hpc_grawa.ParameterVector(model), optimizer, probe=loss)
    closure = run.closure(loss)

    def train(steps: int) -> None:
        for _ in range(steps):
            run.after_step(optimizer.step(closure))

    train(2 * PERIOD)
    found = []
    for _ in range(REPEATS):
        comm.barrier()
        comm.meter = Meter()
        began = time.perf_counter()
        train(STEPS)
        meter = comm.meter
        seconds = meter.communication_seconds, meter.waiting_seconds, time.perf_counter() - began
        found.append([part / STEPS for part in seconds])
    if comm.rank == 0:
        print(json.dumps(min(found, key=lambda parts: parts[-1])), flush=True)
    comm.barrier()
    comm.close()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def hosts(count: int) -> Iterator[None]:
    """Namespaces ``grawa0`` ..., each with an interface ``eth0`` on one bridge."""
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for n in range(count):
            ip("netns", "add", f"grawa{n}")
            ip("link", "add", f"grawav{n}", "type", "veth", "peer", "name", "eth0", "netns", f"grawa{n}")
            ip("link", "set", f"grawav{n}", "master", BRIDGE, "up")
            ip("-n", f"grawa{n}", "addr", "add", f"{NET}.{n + 1}/24", "dev", "eth0")
            for name in ("lo", "eth0"):
                ip("-n", f"grawa{n}", "link", "set", name, "up")
        yield
    finally:
        for n in range(count):
            subprocess.run(["ip", "netns", "del", f"grawa{n}"], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


def shape(count: int, mbit: int | None) -> None:
    """Put a token bucket in front of every rank, or take it away."""
    for n in range(count):
        tc = ["ip", "netns", "exec", f"grawa{n}", "tc", "qdisc"]
        subprocess.run([*tc, "del", "dev", "eth0", "root"], check=False, stderr=subprocess.DEVNULL)
        if mbit is not None:
            bucket = ["rate", f"{mbit}mbit", "burst", f"{max(4, mbit // 8)}kb", "latency", "1s"]
            subprocess.run([*tc, "add", "dev", "eth0", "root", "tbf", *bucket], check=True)


def start(count: int, words: list[str]) -> str:
    """Start a Python program in each namespace, a rank each; what rank 0 prints."""
    processes = []
    for n in range(count):
        environment = {
            **os.environ,
            **{"RANK": str(n), "WORLD_SIZE": str(count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            **{"MASTER_ADDR": f"{NET}.1", "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
        }
        command = ["ip", "netns", "exec", f"grawa{n}", sys.executable, *words]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit(f"{' '.join(words)} failed")
    return outputs[0]


def measure(count: int, method: str, network: str) -> list[float]:
    """What rank 0 finds."""
    parts: list[float] = json.loads(start(count, [__file__, "--rank", network, method]).splitlines()[-1])
    return parts


def leave(*_: object) -> None:
    """End by way of what cleans up, told so once or twice (by timeout, which tells the whole group)."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=["LGRAWA", "DataParallel"])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--mbit", type=int, default=1000, help="of the real link")
    parser.add_argument("--network", default="1gbit,50us", help="the emulated one")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.rank is not None:
        rank(words.methods[0], words.rank)
        return
    signal.signal(signal.SIGTERM, leave)
    print("method        link                    communicating    waiting       step")
    with hosts(words.ranks):
        for method in words.methods:
            shape(words.ranks, words.mbit)
            real = measure(words.ranks, method, "real")
            shape(words.ranks, None)
            emulated = measure(words.ranks, method, words.network)
            for link, parts in ((f"{words.mbit} Mbit/s, real", real), (words.network, emulated)):
                print(f"{method:13} {link:20}", *(f"{1000 * part:12.1f} ms" for part in parts))
            ratios = (f"{a / b:13.2f} x" if b else "" for a, b in zip(emulated, real, strict=True))
            print(f"{'':13} {'emulated / real':20}", *ratios, flush=True)


if __name__ == "__main__":
    main()
