"""Digests of what every method makes of a small run, to compare before and after a change that is to change nothing.

    python tests/digests.py OUT.json                     on 1, 2, 3 and 4 simulated ranks
    mpirun -np 3 python tests/digests.py OUT.json        on ranks of MPI
    python tests/digests.py --compare A.json B.json      prints what differs; exit status 1 if anything does
        --rename PATTERN NEW    first rewrites A's keys (re.sub; again for each), where names have changed
        --except PATTERN        leaves out keys, where a change is meant (again for each)
    --only PATTERN              runs the cases whose names match

A file maps "case | rank | what" to the SHA-256 of a tensor's bytes, dtype and shape, or to a number itself.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn, optim

import hpc_grawa
from hpc_grawa import methods
from hpc_grawa.comm import Communicator, Meter, connect, simulate
from hpc_grawa.data import Data, Splits, TensorExamples

# What is not public, where it is and where it may be: all that has to follow when modules move.
try:
    from hpc_grawa.training.loop import fit
except ImportError:
    from hpc_grawa.train import fit
try:
    from hpc_grawa.cli.parsing import parse
except ImportError:
    from hpc_grawa.parsing import parse
try:
    from hpc_grawa.training import schedules
except ImportError:
    from hpc_grawa import schedules


def qsr(steps: int, lr: float) -> Any:
    """Under a constant learning rate so many steps; these themselves where periods are not classes yet."""
    for place in (getattr(hpc_grawa, "periods", hpc_grawa), methods, schedules):
        if hasattr(place, "QSR"):
            return place.QSR(steps, lr * math.sqrt(steps - 0.75))  # it does not grow: what is left does not shorten it
    return steps


def backward(run: Any, optimizer: optim.Optimizer, loss_of: Callable[[Any], Tensor], parts: list[Any]) -> Tensor:
    """The gradient that a run steps with, accumulated over parts of a batch; the only place that knows how."""
    if hasattr(run, "closure"):
        closure, total = run.closure(lambda part=(0, 1): loss_of(parts[part[0]])), 0.0
        for i in range(len(parts)):
            total = total + closure(share=i == len(parts) - 1, part=(i, len(parts)))
        return torch.as_tensor(total)
    run.aggregator.zero_grad(optimizer)
    total = torch.zeros(())
    for i, part in enumerate(parts):
        if i == len(parts) - 1:
            run.aggregator.start()
        loss = loss_of(part) / len(parts)
        loss.backward()
        total = total + loss.detach()
    run.aggregator.finish()
    return total


STEPS, PERIOD, LR, BATCH, WIDE, CLASSES = 14, 3, 0.05, 8, 6, 3
WORLDS = (1, 2, 3, 4)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Net(nn.Module):
    """BatchNorm and dropout; if rich, also an expert that not every step reaches, a codebook and a mean teacher."""

    def __init__(self, dtype: str = "float32", rich: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(WIDE, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.last = nn.Linear(8, CLASSES)
        self.rich, self.calls = rich, 0
        if rich:
            self.expert = nn.Linear(8, CLASSES)
            self.teacher = nn.Linear(8, CLASSES).requires_grad_(False)
            self.register_buffer("codes", torch.zeros(WIDE))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.to(DTYPES[dtype])

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.first.weight.dtype)
        h = self.dropout(torch.tanh(self.norm(self.first(x))))
        y: Tensor = self.last(h)
        if self.rich:
            if float(x.detach().double().sum()) > 0:
                y = y + self.expert(h)
            if self.training:
                self.codes.lerp_(x.detach().mean(0), 0.1)
                self.seen += len(x)
                for p, own in zip(self.teacher.parameters(), self.last.parameters(), strict=True):
                    p.data.lerp_(own.data, 0.2)
            y = y + 0.1 * self.teacher(h) + 0.01 * self.codes.mean()
        return y


@dataclass(kw_only=True)
class Few(Data):
    """Classes of random points."""

    batch_size: int = BATCH

    def size(self) -> int:
        return 100

    def load(self) -> Splits:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(n, WIDE, generator=generator) for n in (self.train_size(), self.validation, 30)]
        train, validation, test = (TensorExamples(x, x[:, :CLASSES].argmax(1)) for x in rows)
        return Splits(train, validation if self.validation else None, test)


class Cut(Exception):
    """The job ends here."""


#: The step at which training in this process is cut off.
CUT: list[int] = []


def cut_if_due(facts: Any) -> None:
    if CUT and facts.step >= CUT[0]:
        raise Cut


@dataclass
class Flat(schedules.Constant):  # type: ignore[misc, name-defined, unused-ignore]
    def factor(self, facts: Any) -> float:
        cut_if_due(facts)
        return float(super().factor(facts))


@dataclass
class Falling(schedules.Cosine):  # type: ignore[misc, name-defined, unused-ignore]
    def factor(self, facts: Any) -> float:
        cut_if_due(facts)
        return float(super().factor(facts))


def digests(value: Any, what: str) -> Iterator[tuple[str, Any]]:
    """What there is in a state, key by key, without what a clock says."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        t = value.detach().cpu().contiguous()
        held = hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode())
        held.update(t.flatten().view(torch.uint8).numpy().tobytes())
        yield what, held.hexdigest()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            if not str(key).endswith("seconds"):
                yield from digests(value[key], f"{what}/{key}")
    elif isinstance(value, list | tuple):
        yield f"{what}/length", len(value)
        for i, part in enumerate(value):
            yield from digests(part, f"{what}/{i}")
    elif isinstance(value, float):
        yield what, value.hex()
    elif isinstance(value, torch.dtype):
        yield what, str(value)
    elif value is None or isinstance(value, bool | int | str):
        yield what, value
    else:
        raise TypeError(f"{what} is a {type(value).__name__}, of which there is no digest")


def found(comm: Communicator, vector: Any, optimizer: optim.Optimizer, run: Any, **more: Any) -> dict[str, Any]:
    """What one rank has at the end."""
    model, meter = vector.model, comm.meter
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return dict(
        digests(
            {
                "parameters": vector.data,
                "center": run.center,
                "frozen": frozen,
                "buffers": dict(model.named_buffers()),
                "optimizer": optimizer.state_dict()["state"],
                "method": run.state_dict(),
                "calls": dict(meter.calls),
                "payload": dict(meter.payload_bytes),
                "sent": dict(meter.bytes_sent),
                **more,
            },
            "",
        )
    )


@dataclass
class Own:
    """A run in a loop of one's own.

    Attributes:
        method: makes it.
        dtype: of the parameters.
        resume: whether it is given up for a fresh build after 7 steps.
        adamw: instead of SGD with momentum.
        parts: that each batch is computed in.
        clip: largest norm of the gradient.
        rich: the model has more than BatchNorm and dropout.
        poison: "parameters" or "loss" of the last rank are NaN in step 5.
        start: of the ranks.
        control_every: as of ``build``.
        horovod: by ``DistributedOptimizer``.
        worlds: numbers of simulated ranks.
    """

    method: Callable[[], Any]
    dtype: str = "float32"
    resume: bool = True
    adamw: bool = False
    parts: int = 1
    clip: float | None = None
    rich: bool = False
    poison: str = ""
    start: str = "common"
    control_every: int = 2
    horovod: bool = False
    worlds: tuple[int, ...] = (3,)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Net(self.dtype, self.rich)

    def step_with(self, model: nn.Module) -> optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.adamw:
            return optim.AdamW(parameters, 0.01, weight_decay=0.05)
        return optim.SGD(parameters, LR, momentum=0.9, nesterov=True, weight_decay=1e-3)

    def build(self, comm: Communicator, seed: int) -> tuple[Any, optim.Optimizer, Any]:
        model = self.model(seed)
        optimizer = self.step_with(model)
        method = self.method()

        def probe() -> Tensor:
            x = torch.randn(BATCH, WIDE)
            return nn.functional.cross_entropy(model(x), x[:, :CLASSES].argmax(1))

        if self.horovod:
            wrapped = hpc_grawa.DistributedOptimizer(
                optimizer, model, method, probe=probe, comm=comm, backward_passes_per_step=self.parts
            )
            return wrapped.run.vector, wrapped, wrapped.run
        vector = hpc_grawa.ParameterVector(model)
        facts = schedules.RunFacts(peak_lr=LR, total_steps=STEPS)
        run = method.build(
            comm,
            vector,
            optimizer,
            probe=probe,
            facts=facts,
            clock=lambda: 0.0,
            control_every=self.control_every,
            start=self.start,
        )
        return vector, optimizer, run

    def __call__(self, comm: Communicator) -> dict[str, Any]:
        vector, optimizer, run = self.build(comm, comm.rank)
        torch.manual_seed(100 + comm.rank)
        made, losses = 0, []
        path = hashlib.sha256()

        def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = nn.functional.cross_entropy(vector.model(batch[0]), batch[1])
            return loss * math.nan if self.poison == "loss" and last and made == 5 else loss

        def ended() -> bool:
            return run.facts.step >= STEPS

        last = comm.rank == comm.size - 1 > 0  # one rank alone has nobody to heal it
        while not ended():
            if not self.horovod and not run.before_step():
                stepped = False
            else:
                batch = _batch(comm.rank, made)
                parts = list(zip(*(t.chunk(self.parts) for t in batch), strict=True))
                losses.append(self._step(run, optimizer, loss_of, parts, vector))
                if self.poison == "parameters" and last and made == 5:
                    vector.data[made] = math.nan
                if not self.horovod:
                    run.after_step(losses[-1])
                made += 1
                stepped = True
                if run.pooled and hasattr(comm, "elapse"):
                    comm.elapse(1 / (comm.rank + 1))
            path.update(vector.data.view(torch.uint8).numpy().tobytes())
            if self.resume and run.facts.step >= STEPS // 2 and not ended() and (not run.pooled or not stepped):
                self.resume, stream = False, torch.get_rng_state()
                states = copy.deepcopy((vector.model.state_dict(), optimizer.state_dict(), run.state_dict()))
                run.close()
                vector, optimizer, run = self.build(comm, 50 + comm.rank)
                vector.model.load_state_dict(states[0])
                optimizer.load_state_dict(states[1])
                run.load_state_dict(states[2])
                torch.set_rng_state(stream)
        run.finish()
        return found(comm, vector, optimizer, run, losses=torch.stack(losses), path=path.hexdigest(), steps=made)

    def _step(self, run: Any, optimizer: Any, loss_of: Any, parts: list[Any], vector: Any) -> Tensor:
        if not self.horovod:
            total = backward(run, optimizer, loss_of, parts).detach()
        else:

            def closure() -> Tensor:
                optimizer.zero_grad()
                losses = []
                for part in parts:
                    loss = loss_of(part) / len(parts)
                    loss.backward()
                    losses.append(loss.detach())
                return torch.stack(losses).sum()

            if self.method().needs_loss:
                return torch.as_tensor(optimizer.step(closure))
            total = closure()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(vector.parameters, self.clip)
        optimizer.step()
        return total


def _batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, WIDE, generator=torch.Generator().manual_seed(1000 * rank + step)) * (1 + 0.3 * rank)
    return x, x[:, :CLASSES].argmax(1)


#: What ``Method.build`` gave the trainer, by rank.
MADE: dict[int, tuple[Any, optim.Optimizer, Any]] = {}


def noted(build: Callable[..., Any]) -> Callable[..., Any]:
    def build_and_note(method: Any, comm: Communicator, vector: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        run = build(method, comm, vector, optimizer, *args, **kwargs)
        MADE[comm.rank] = vector, optimizer, run
        return run

    return build_and_note


@dataclass
class Trained:
    """A run by the trainer.

    Attributes:
        words: of its command line.
        cut: whether it is cut off at step 9 and resumed from its checkpoint.
        worlds: numbers of simulated ranks.
    """

    words: tuple[str, ...]
    cut: bool = False
    worlds: tuple[int, ...] = (3,)

    SAME: ClassVar = (
        "steps",
        "rounds",
        "healed",
        "epochs",
        "bytes_sent",
        "payload_bytes",
        "consensus_distance",
        "best_step",
    )
    SCORED: ClassVar = (
        "local_test_loss",
        "center_train_loss",
        "center_test_loss",
        "mean_test_loss",
        "final_center_accuracy",
    )
    RECORDS: ClassVar = (
        ("round", ("step", "round", "period", "lr", "weights", "leader", "healed")),
        ("train", ("step", "loss", "lr")),
        ("evaluate", ("step", "loss", "accuracy")),
    )

    def config(self, world: int) -> Any:
        often = ["--eval.unit=steps", "--eval.every=6", "--save.unit=steps", "--save.every=5", "--log.every=3"]
        small = ["--eval.bn_batches=2", "--eval.train_examples=40", "--log.tensorboard=false", "--device=cpu"]
        shape = ["--run.control_every=2", "--budget.seconds=null", f"--budget.steps={STEPS}", "--run.seed=36"]
        classes = ["--model=digests.Net", "--data=digests.Few", "--schedule=digests.Flat"]
        made = parse([*classes, *self.words, *often, *small, *shape])
        made.check(world)
        return made

    def train(self, comm: Communicator, config: Any, folder: Path) -> dict[str, Any]:
        def new_folder() -> Path:
            return folder

        summary = fit(config, comm, new_folder=None if comm.rank else new_folder, speaks=False)
        center = folder / "center.pt"
        more: dict[str, Any] = {"summary": {key: summary[key] for key in (*self.SAME, *self.SCORED)}}
        if comm.rank == 0:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            more["center.pt"] = torch.load(center, weights_only=True)
            for event, keys in self.RECORDS:
                kept = [{key: line[key] for key in keys if key in line} for line in lines if line["event"] == event]
                more[event] = kept
        return found(comm, *MADE[comm.rank], **more)


Case = Own | Trained
METHODS: dict[str, Callable[[], Any]] = {
    "GRAWA": lambda: hpc_grawa.GRAWA(period=PERIOD, prox=0.05),
    "MGRAWA": lambda: hpc_grawa.MGRAWA(period=PERIOD, prox=0.05),
    "LGRAWA": lambda: hpc_grawa.LGRAWA(period=PERIOD, prox=0.05),
    "LocalMGRAWA": lambda: hpc_grawa.LocalMGRAWA(period=PERIOD, prox=0.05),
    "LocalLGRAWA": lambda: hpc_grawa.LocalLGRAWA(period=PERIOD, prox=0.05),
    "EASGD": lambda: hpc_grawa.EASGD(period=PERIOD),
    "LSGD": lambda: hpc_grawa.LSGD(period=PERIOD),
    "LSGD of groups": lambda: hpc_grawa.LSGD(period=4, group_period=2, ranks_per_group=2, group_pull=0.3),
    "LSGD of hosts": lambda: hpc_grawa.LSGD(period=4, group_period=2),
    "LocalSGD": lambda: hpc_grawa.LocalSGD(period=PERIOD),
    "DataParallel": lambda: hpc_grawa.DataParallel(),
}
AVERAGING = {name: make for name, make in METHODS.items() if name != "DataParallel"}


def varied(name: str, **fields: Any) -> Callable[[], Any]:
    """A method with other settings."""

    def make() -> Any:
        return replace(METHODS[name](), **fields)

    return make


def own_cases() -> dict[str, Own]:
    cases = {}
    for name, make in METHODS.items():
        cases[f"{name}, float32"] = Own(make, resume=False, worlds=WORLDS)
        cases[f"{name}, float64, resumed"] = Own(make, dtype="float64", worlds=WORLDS)
        cases[f"{name}, a rich model, resumed"] = Own(make, rich=True)
        cases[f"{name}, AdamW in parts, clipped"] = Own(make, adamw=True, parts=2, clip=0.5)
        cases[f"{name}, by DistributedOptimizer"] = Own(make, horovod=True, parts=2, resume=False)
    for name, make in AVERAGING.items():
        cases[f"{name}, averaged momenta and buffers"] = Own(varied(name, local_momentum="average", buffers="average"))
        cases[f"{name}, momenta reset, local buffers"] = Own(varied(name, local_momentum="reset", buffers="local"))
        cases[f"{name}, independent starts"] = Own(make, start="independent", dtype="float64")
        cases[f"{name}, a rank healed"] = Own(make, poison="parameters")
        if " of " not in name:
            cases[f"{name}, QSR"] = Own(varied(name, period=qsr(PERIOD, LR)))
            cases[f"{name}, pooled"] = Own(varied(name, rounds="pooled"), worlds=WORLDS)
            cases[f"{name}, pooled, float64, averaged"] = Own(
                varied(name, rounds="pooled", local_momentum="average", buffers="average"), dtype="float64"
            )
    for name in ("GRAWA", "MGRAWA", "LGRAWA"):
        cases[f"{name}, two probes, power 2"] = Own(varied(name, probe_batches=2, power=2.0, score_momentum=0.0))
    for name in ("MGRAWA", "LGRAWA", "LocalMGRAWA", "LocalLGRAWA"):
        cases[f"{name}, modules"] = Own(varied(name, layers="module", score_momentum=0.6, pull=1.0, prox=0.2))
        cases[f"{name}, own groups"] = Own(varied(name, layers=[["first.*", "norm.*"], ["last.*"]]))
    for name in ("LGRAWA", "EASGD", "LSGD", "LocalSGD", "DataParallel"):
        cases[f"{name}, bfloat16"] = Own(METHODS[name], dtype="bfloat16")
        cases[f"{name}, seldom words"] = Own(METHODS[name], control_every=100)
    for name in ("LGRAWA", "EASGD", "LSGD", "LocalSGD"):
        cases[f"{name}, longer than words"] = Own(varied(name, period=5), control_every=2)
        cases[f"{name}, longer than the run"] = Own(varied(name, period=50), control_every=4)
    cases["DataParallel, small buckets"] = Own(varied("DataParallel", bucket_mb=1e-4), rich=True, parts=2)
    cases["DataParallel, a step skipped"] = Own(varied("DataParallel", on_nonfinite="skip"), poison="loss")
    return cases


def trained_cases() -> dict[str, Trained]:
    cases = {}
    wide = ("--model.dtype=float64",)
    adamw = ("--optimizer=AdamW", "--optimizer.clip_norm=0.5", "--optimizer.accumulate=2", "--schedule=digests.Falling")
    averaged = ("--method.local_momentum=average", "--method.buffers=average")
    for name in METHODS:
        method, _, groups = name.partition(" of ")
        words: tuple[str, ...] = (f"--method={method}",)
        if groups:
            words += ("--method.period=4", "--method.group_period=2")
            words += ("--method.ranks_per_group=2",) if groups == "groups" else ()
        elif method != "DataParallel":
            words += (f"--method.period={PERIOD}",)
        cases[f"{name}, float32, cut and resumed"] = Trained(words, cut=True, worlds=WORLDS)
        cases[f"{name}, float64"] = Trained((*words, *wide), worlds=WORLDS)
        cases[f"{name}, AdamW, parts, cosine"] = Trained((*words, *adamw))
        if method != "DataParallel":
            cases[f"{name}, averaged, rich"] = Trained((*words, *averaged, "--model.rich=true"))
            cases[f"{name}, local buffers"] = Trained((*words, "--method.buffers=local"))
            if not groups:
                cases[f"{name}, pooled, cut and resumed"] = Trained((*words, "--method.rounds=pooled"), cut=True)
    return cases


def results(case: Case, on_ranks: Callable[[Callable[[Communicator], Any]], Any], world: int, folder: Path) -> Any:
    """What each rank found; under MPI, this rank alone."""
    if isinstance(case, Own):
        return on_ranks(lambda comm: copy.copy(case)(comm))
    config = case.config(world)
    if case.cut:
        CUT[:] = [9]
        try:
            on_ranks(lambda comm: case.train(comm, config, folder))
        except Cut:
            pass
        else:
            raise AssertionError("training was not cut off")
        finally:
            CUT.clear()
    return on_ranks(lambda comm: case.train(comm, config, folder))


def collect(only: str) -> dict[str, Any] | None:
    """All digests by "case | rank | what"; None on ranks other than 0."""
    named: dict[str, Case] = {f"own, {name}": case for name, case in own_cases().items()}
    named |= {f"trained, {name}": case for name, case in trained_cases().items()}
    named = {name: case for name, case in named.items() if re.search(only, name)}
    hpc_grawa.Method.build = noted(hpc_grawa.Method.build)  # type: ignore[method-assign]
    launched = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"))
    world = connect("mpi") if launched else None
    whole: dict[str, Any] = {}

    def keep(name: str, rank: int, state: dict[str, Any]) -> None:
        whole.update({f"{name} | rank {rank} | {what.removeprefix('/')}": value for what, value in state.items()})

    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, case) in enumerate(named.items()):
            if world is None:
                for size in case.worlds:
                    torch.manual_seed(0)
                    folder = Path(temporary) / f"{number}-{size}"
                    folder.mkdir()

                    def simulated(body: Callable[[Communicator], Any], size: int = size) -> Any:
                        return simulate(size, body)

                    for rank, state in enumerate(results(case, simulated, size, folder)):
                        keep(f"{name}, W {size}", rank, state)
            elif "pooled" not in name:  # who makes which step is decided by speed there
                folder = Path(temporary) / str(number)
                folder.mkdir()
                world.meter = Meter()
                torch.manual_seed(0)

                def alone(body: Callable[[Communicator], Any], comm: Communicator = world) -> Any:
                    return body(comm)

                state = results(case, alone, world.size, folder)
                for rank, message in enumerate(world.gather_bytes(json.dumps(state).encode())):
                    keep(f"{name}, W {world.size}", rank, json.loads(message))
    return whole if world is None or world.rank == 0 else None


def compare(one: Path, other: Path, renames: list[list[str]], exceptions: list[str]) -> int:
    """Print what differs."""
    a, b = (json.loads(path.read_text()) for path in (one, other))
    for pattern, new in renames:
        a = {re.sub(pattern, new, key): value for key, value in a.items()}
    keys = [key for key in {**a, **b} if not any(re.search(pattern, key) for pattern in exceptions)]
    different = [key for key in keys if key not in a or key not in b or a[key] != b[key]]
    for key in different:
        print(key, *(str(held.get(key, "(none)"))[:16] for held in (a, b)), sep="  ")
    cases = {key.partition(" | ")[0] for key in different}
    print(f"{len(different)} of {len(keys)} differ, in {len(cases)} cases")
    return int(bool(different))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--rename", nargs=2, action="append", default=[])
    parser.add_argument("--except", dest="exceptions", action="append", default=[])
    parser.add_argument("--only", default="")
    words = parser.parse_args()
    if words.compare:
        return compare(*words.files, words.rename, words.exceptions)
    torch.set_num_threads(1)
    whole = collect(words.only)
    if whole is not None:
        words.files[0].write_text(json.dumps(whole, indent=0, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    import digests  # the module that the trainer finds by its path

    sys.exit(digests.main())
