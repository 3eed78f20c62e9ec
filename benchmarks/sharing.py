"""A step of each way to share gradients beside DataParallel's, and beside what PyTorch and accelerate offer.

    mpirun -np 2 python benchmarks/sharing.py [mpi | gloo]
    sudo python benchmarks/sharing.py --links 1000,100 --ranks 2       real links of so many Mbit/s (see links.py)

Runs take turns, each built anew, on random images of 32 x 32. Shown are medians of rank 0's milliseconds a step, and of
them how long it packs what it sends, stands still for messages, and unpacks them; what is left is computing, which
hides messages. ``sent`` is what this rank sends in a step; of others it is what has passed the link's interface. Local
methods average once in ``--steps``, over which their step is the mean.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torchvision
from links import hosts, leave, shape, start
from torch import nn

import hpc_grawa
from hpc_grawa import methods
from hpc_grawa.comm import Communicator, Meter, connect
from hpc_grawa.comm.trace import Trace

RANK, RATIO = 2, 0.001
OURS: dict[str, methods.Method] = {
    "DataParallel": methods.DataParallel(),
    "DataParallel, bf16": methods.DataParallel(wire="bf16"),
    "DataParallel, fp16": methods.DataParallel(wire="fp16"),
    f"PowerSGD, rank {RANK}": methods.PowerSGD(rank=RANK, warmup_steps=0),
    f"DeepGradientCompression, {RATIO}": methods.DeepGradientCompression(ratio=RATIO, warmup_epochs=0),
    "OneBitSGD": methods.OneBitSGD(),
    "EFSign": methods.EFSign(),
}
REFERENCE = "DataParallel"


class Setting(NamedTuple):
    """What all ways train: a model, with as many images in a step, and how many steps are timed."""

    model: str
    batch: int
    steps: int


class Way(NamedTuple):
    """One way to train: makes a step, and ends; the first ``warm`` steps are not timed."""

    step: Callable[[], object]
    close: Callable[[], object]
    warm: int = 1


class Found(NamedTuple):
    """Of a step: seconds in all, packing, waiting for messages, unpacking; bytes sent."""

    step: float
    pack: float
    wait: float
    unpack: float
    sent: float


def parts(setting: Setting) -> tuple[nn.Module, torch.optim.Optimizer, Callable[..., torch.Tensor]]:
    """A new model, the same on all ranks, its optimizer, and the loss of a batch, made by it or by what wraps it."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, setting.model)(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, labels = torch.randn(setting.batch, 3, 32, 32), torch.randint(0, 10, (setting.batch,))
    return model, optimizer, lambda wrapped=model: nn.functional.cross_entropy(wrapped(images), labels)


def ours(comm: Communicator, setting: Setting, method: methods.Method) -> Way:
    model, optimizer, loss = parts(setting)
    run = method.build(comm, hpc_grawa.ParameterVector(model), optimizer, probe=loss, start="independent")
    closure = run.closure(loss)
    warm = setting.steps if isinstance(method, methods.AveragingMethod) else 1
    return Way(lambda: run.after_step(optimizer.step(closure)), run.close, warm)


def ddp(setting: Setting, hook: Callable[..., object] | None = None, state: Callable[[], object] | None = None) -> Way:
    """PyTorch's DistributedDataParallel, with a communication hook; one that keeps a state has one bucket.

    PowerSGD's hook sends its later messages as earlier ones arrive, which with several buckets on Gloo is another order
    on each rank, and fails.
    """
    model, optimizer, loss = parts(setting)
    bucket_mb = None if state is None else 10_000
    wrapped = nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, init_sync=False, bucket_cap_mb=bucket_mb
    )
    if hook is not None:
        wrapped.register_comm_hook(None if state is None else state(), hook)

    def step() -> None:
        optimizer.zero_grad()
        loss(wrapped).backward()
        optimizer.step()

    return Way(step, lambda: None, 3)  # of PowerSGD's hook two share the plain mean


def torchs_local_sgd(setting: Setting) -> Way:
    """PyTorch's averager around an optimizer, once in as many steps as are timed."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    _, inner, loss = parts(setting)
    optimizer = PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=setting.steps, warmup_steps=0))

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return Way(step, lambda: None, setting.steps)


def accelerates_local_sgd(setting: Setting) -> Way:
    """The same by accelerate, where it is installed."""
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    model, optimizer, loss = parts(setting)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == dist.get_world_size()
    wrapped = accelerator.prepare(model)
    averaging = LocalSGD(accelerator=accelerator, model=wrapped, local_sgd_steps=setting.steps, enabled=True)
    averaging.__enter__()

    def step() -> None:
        optimizer.zero_grad()
        accelerator.backward(loss(wrapped))
        optimizer.step()
        averaging.step()

    return Way(step, lambda: averaging.__exit__(None, None, None), setting.steps)


def peers(setting: Setting) -> dict[str, Callable[[], Way]]:
    """What others offer on Gloo."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    def state() -> object:
        return PowerSGDState(None, matrix_approximation_rank=RANK, start_powerSGD_iter=2, min_compression_rate=2)

    found: dict[str, Callable[[], Way]] = {
        "PyTorch DDP": lambda: ddp(setting),
        "PyTorch DDP, fp16 hook": lambda: ddp(setting, default_hooks.fp16_compress_hook),
        f"PyTorch DDP, PowerSGD hook, rank {RANK}": lambda: ddp(setting, powerSGD_hook, state),
        f"PyTorch PostLocalSGDOptimizer, period {setting.steps}": lambda: torchs_local_sgd(setting),
    }
    try:
        import accelerate  # noqa: F401
    except ImportError:
        return found
    return {**found, f"accelerate LocalSGD, period {setting.steps}": lambda: accelerates_local_sgd(setting)}


def passed() -> int | None:
    """Bytes that have left by this rank's link, where it has one of its own."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return None if interface == "lo" else int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def measure(comm: Communicator, way: Way, steps: int) -> Found:
    for _ in range(way.warm):
        way.step()
    comm.barrier()
    comm.meter = Meter()
    trace = comm.meter.trace = Trace()
    before, began = passed(), time.perf_counter()
    for _ in range(steps):
        way.step()
    seconds, after = time.perf_counter() - began, passed()
    sent = float(comm.meter.training_bytes_sent)
    if not sent and before is not None and after is not None:
        sent = float(after - before)
    way.close()
    of_all = seconds, trace.seconds("pack"), comm.meter.communication_seconds, trace.seconds("unpack"), sent
    return Found(*(part / steps for part in of_all))


def table(found: dict[str, Found]) -> str:
    width = max(map(len, found))
    lines = [f"  {'':{width}}  {'step':>9} {'ratio':>6} {'packing':>9} {'waiting':>9} {'unpacking':>9} {'sent':>10}"]
    for name, one in found.items():
        ratio = one.step / found[REFERENCE].step
        inside = (one.pack, one.wait, one.unpack)
        cells = [f"{1000 * part:6.1f} ms" if any(inside) else " " * 9 for part in inside]
        sent = f"{one.sent / 1e6:7.2f} MB" if one.sent else ""
        lines.append(f"  {name:{width}}  {1000 * one.step:6.1f} ms {ratio:6.2f} {' '.join(cells)} {sent:>10}".rstrip())
    return "\n".join(lines)


def pays(fast: int, slow: int, found: dict[int, dict[str, Found]]) -> str:
    """Below which bandwidth each way is faster than DataParallel, from a + b / bandwidth through a step's two times."""

    def line(name: str) -> tuple[float, float]:
        steps = found[fast][name].step, found[slow][name].step
        b = (steps[1] - steps[0]) / (1 / slow - 1 / fast)
        return steps[0] - b / fast, b

    width = max(map(len, found[fast]))
    lines = [f"faster than {REFERENCE} below, where a step is a + b / bandwidth through both links"]
    a, b = line(REFERENCE)
    for name in found[fast]:
        more, less = line(name)[0] - a, b - line(name)[1]
        if name != REFERENCE:
            at = "any bandwidth" if more <= 0 < less else f"{less / more:,.0f} Mbit/s" if less > 0 else "none"
            lines.append(f"  {name:{width}}  {at}")
    return "\n".join(lines)


def rank(backend: str, setting: Setting, repeats: int) -> tuple[str, dict[str, Found]]:
    """Run on every rank; what was measured, and the medians of this rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    comm = connect(backend)
    local = methods.LocalSGD(period=setting.steps)
    ways: dict[str, Callable[[], Way]] = {
        name: functools.partial(ours, comm, setting, method)
        for name, method in {**OURS, f"LocalSGD, period {setting.steps}": local}.items()
    }
    if backend == "gloo":
        ways |= peers(setting)
    found: dict[str, list[Found]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, build in ways.items():
            one = measure(comm, build(), setting.steps)
            if turn or not repeats:  # the first turn warms up
                found[name].append(one)
    size = sum(p.numel() for p in parts(setting)[0].parameters())
    title = (
        f"a step of {setting.model}, {size:,} parameters, {setting.batch} images per rank, {comm.size} ranks on "
        f"{os.cpu_count()} cores, {backend}, median of {max(repeats, 1)}, load {os.getloadavg()[0]:.1f}"
    )
    comm.barrier()
    is_first = comm.rank == 0
    comm.close()
    medians = {name: Found(*map(statistics.median, zip(*some, strict=True))) for name, some in found.items()}
    return title, medians if is_first else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", default="mpi", choices=["mpi", "gloo"])
    parser.add_argument("--model", default="resnet18", help="of torchvision (resnet18)")
    parser.add_argument("--batch", type=int, default=8, help="images of a rank's step, 2 or more (8)")
    parser.add_argument("--steps", type=int, default=4, help="timed in each turn, and the period of local methods (4)")
    parser.add_argument("--repeats", type=int, default=5, help="turns after a first (5)")
    parser.add_argument("--links", help="Mbit/s, separated by commas: ranks in network namespaces, on Gloo, as root")
    parser.add_argument("--ranks", type=int, default=2, help="of --links (2)")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.links is None:
        title, found = rank(words.backend, Setting(words.model, words.batch, words.steps), words.repeats)
        if found:
            print(json.dumps([title, found]) if words.json else f"{title}\n{table(found)}", flush=True)
        return
    signal.signal(signal.SIGTERM, leave)
    options = [
        "gloo",
        "--json",
        *(f"--{name}={getattr(words, name)}" for name in ("model", "batch", "steps", "repeats")),
    ]
    by_link: dict[int, dict[str, Found]] = {}
    with hosts(words.ranks):
        for mbit in map(int, words.links.split(",")):
            shape(words.ranks, mbit)
            title, numbers = json.loads(start(words.ranks, [__file__, *options]).splitlines()[-1])
            by_link[mbit] = {name: Found(*one) for name, one in numbers.items()}
            print(f"{mbit} Mbit/s, {title}", table(by_link[mbit]), sep="\n", flush=True)
    if len(by_link) > 1:
        print(pays(max(by_link), min(by_link), by_link))


if __name__ == "__main__":
    main()
