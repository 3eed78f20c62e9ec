"""The training loop, for every method alike."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .budget import Clock
from .comm import Communicator, Meter
from .config import Config
from .data import Examples
from .evaluate import Judge, autocast, buffers_kept, recalibrate, uniform_mean
from .log import Log, commit, human_bytes, versions, write_atomically
from .methods import Run
from .schedules import RunFacts
from .synchronizer import Round
from .vector import ParameterVector


@dataclass
class Result:
    """What ``fit`` leaves on every rank: the summary, the model, and its own parameters as views of ``vector``."""

    summary: dict[str, Any]
    model: nn.Module
    vector: ParameterVector


def fit(config: Config, comm: Communicator, folder: Path | None = None, speaks: bool | None = None) -> Result:
    """Train until the budget is used, evaluate, and write the run's folder. All ranks must call it.

    Args:
        config: checked, the same on all ranks.
        comm: the ranks.
        folder: the run's folder on rank 0; nothing is written without one.
        speaks: whether this rank prints; by default rank 0 does.

    Raises:
        RanksDisagree: ranks do not have the same model, method, learning rate or period.
        NonFinite: training has diverged on all ranks.
    """
    rank, size = comm.rank, comm.size
    comm.meter = Meter()
    log = Log(folder, speaks=rank == 0 if speaks is None else speaks)
    splits = config.data.load()
    sampler = config.data.sampler(rank, size, config.run.seed)
    # One stream for the common start, then one per rank (dropout, and starts that are to differ).
    torch.manual_seed(config.run.seed if config.run.start == "common" else _own_seed(config.run.seed, rank))
    model = config.build_model()
    torch.manual_seed(_own_seed(config.run.seed, rank))
    config.data.prepare_model(model)
    vector = ParameterVector(model)
    optimizer = config.optimizer.build(vector.parameters)
    peaks = [group["lr"] for group in optimizer.param_groups]
    total_steps = config.budget.total_steps(sampler.steps_per_epoch)
    facts = RunFacts(
        lr=peaks[0],
        peak_lr=peaks[0],
        warmup_steps=config.schedule.warmup,
        steps_left=total_steps,
        steps_per_epoch=sampler.steps_per_epoch,
    )
    device = vector.data.device

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        with autocast(config.precision, device):
            loss: Tensor = config.loss(model(inputs), targets)
        return loss

    def probe() -> Tensor:
        number = run.synchronizers[0].rounds
        index = sampler.probe_indices(number, config.method.probe_batches, config.method.probe_from)
        return loss_of(splits.train.batch(index.flatten()))

    clock = Clock()
    run = config.method.build(
        comm,
        vector,
        optimizer,
        probe,
        facts=facts,
        clock=lambda: clock.seconds,
        control_every=config.run.control_every,
        start=config.run.start,
    )
    examiner = Examiner(config, comm, run, splits.train, sampler.indices)
    progress = Progress(log, comm, clock, facts, size * config.data.batch_size, config.log.every)
    for synchronizer in run.synchronizers:
        synchronizer.on_round = progress.on_round
    _greet(config, log, comm, vector, run, len(splits.train), len(splits.test), sampler.steps_per_epoch)
    seen, part = (splits.test, "test") if splits.validation is None else (splits.validation, "validation")
    best = (-math.inf, 0)
    next_evaluation = config.eval.every

    def closure() -> Tensor:
        run.aggregator.zero_grad(optimizer)
        inputs, targets = batch
        parts = config.optimizer.accumulate
        total = torch.zeros((), device=device)
        for i, micro in enumerate(zip(inputs.chunk(parts), targets.chunk(parts), strict=True)):
            if i == parts - 1:
                run.aggregator.start()
            loss = loss_of(micro) / parts
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        run.aggregator.finish()
        if config.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(vector.parameters, config.optimizer.clip_norm)
        return total

    def evaluate() -> None:
        nonlocal best
        with clock.paused(), examiner.center():
            scores = examiner.judge(seen)
        value = scores[config.metric.name]
        best = max(best, (value if config.metric.higher_is_better else -value, facts.step))
        progress.on_evaluation(part, scores)

    comm.barrier()
    clock.restart()
    used = 0.0
    while used < 1:
        factor = config.schedule(facts)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        batch = splits.train.batch(sampler.indices(facts.step), sampler.generator(facts.step))
        loss = optimizer.step(closure)  # type: ignore[arg-type]
        if total_steps is not None:
            facts.steps_left = total_steps - facts.step - 1
        run.after_step(loss)
        used = config.budget.used(facts, total_steps)
        facts.progress = min(1.0, used)
        progress.on_step(loss, used)
        if run.control.stop:
            break
        if used < 1 and facts.elapsed(config.eval.unit) >= next_evaluation:
            next_evaluation = config.eval.every * (1 + facts.elapsed(config.eval.unit) // config.eval.every)
            evaluate()
    run.finish()
    training_seconds = clock.seconds
    meter = comm.meter
    waiting, communication = meter.waiting_seconds, meter.communication_seconds
    with clock.paused():
        evaluate()
        final, consensus = examiner.everything(splits.test)
        with examiner.center():
            if folder is not None:
                torch.save({k: v.detach().clone() for k, v in model.state_dict().items()}, folder / "center.pt")
    name = config.metric.name
    sign = 1 if config.metric.higher_is_better else -1
    examples = facts.step * size * config.data.batch_size
    summary: dict[str, Any] = {
        "state": "finished",
        "name": folder.name if folder else None,
        "method": type(config.method).__name__,
        "backend": comm.backend,
        "world_size": size,
        "steps": facts.step,
        "rounds": sum(s.rounds for s in run.synchronizers),
        "healed": sum(s.healed for s in run.synchronizers),
        "epochs": facts.step / sampler.steps_per_epoch,
        "training_seconds": training_seconds,
        "compute_seconds": training_seconds - waiting - communication,
        "communication_seconds": communication,
        "waiting_seconds": waiting,
        "hidden_seconds": meter.hidden_seconds,
        "bytes_sent": meter.training_bytes_sent,
        "payload_bytes": meter.training_payload_bytes,
        "metric": name,
        "higher_is_better": config.metric.higher_is_better,
        **final,
        "gap": sign * (final[f"center_train_{name}"] - final[f"center_test_{name}"]),
        f"best_center_{name}": sign * best[0],
        "best_step": best[1],
        "best_part": part,
        f"final_center_{name}": final[f"center_test_{name}"],
        "consensus_distance": consensus,
        "images_per_second": examples / training_seconds,
        "parameters": len(vector),
        "seed": config.run.seed,
        "versions": versions(),
        "commit": commit(),
    }
    if folder is not None:
        write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    log.close()
    log.say(_farewell(summary, name, folder))
    return Result(summary, model, vector)


class Examiner:
    """Puts the evaluated models in place, one after the other, and judges them.

    Args:
        config: loss, metric, and how BatchNorm statistics are made.
        comm: the ranks.
        run: whose center and parameters are evaluated.
        train: training examples, for recalibration and training accuracy.
        indices: of the rank's n-th training batch.
    """

    def __init__(self, config: Config, comm: Communicator, run: Run, train: Examples, indices: Any) -> None:
        self._config, self._comm, self._run, self._train, self._indices = config, comm, run, train, indices
        self._judge = Judge(config.loss, config.metric, config.precision)
        self._model = run.vector.model

    @contextmanager
    def center(self) -> Iterator[None]:
        """Within the block the model is the center."""
        with self._in_place(self._run.center):
            yield

    @contextmanager
    def _in_place(self, parameters: Tensor) -> Iterator[None]:
        with buffers_kept(self._model), self._run.vector.swapped(parameters):
            if self._config.method.buffers == "recalibrate":
                batches = (self._train.batch(self._indices(b))[0] for b in range(self._config.eval.bn_batches))
                recalibrate(self._model, batches, self._comm, self._config.precision)
            yield

    def judge(self, examples: Examples, limit: int | None = None) -> dict[str, float]:
        """Loss and metric of the model that is in place; all ranks share the work."""
        return self._judge.judge(self._model, examples, self._comm, limit)

    def everything(self, test: Examples) -> tuple[dict[str, Any], float]:
        """Center, mean and local models on the test set, the center on training examples; the consensus distance."""
        name = self._config.metric.name
        mean, consensus = uniform_mean(self._comm, self._run.vector)
        found: dict[str, Any] = {}
        with self.center():
            center = self.judge(test)
            train = self.judge(self._train, self._config.eval.train_examples)
        with self._in_place(mean):
            averaged = self.judge(test)
        local = self._judge.judge(self._model, test)
        row = torch.tensor([local["loss"], local[name]], dtype=torch.float64)
        table = self._comm.allgather(row, "evaluate").wait()
        for key in ("loss", name):
            found |= {f"center_test_{key}": center[key], f"center_train_{key}": train[key]}
            found |= {f"mean_test_{key}": averaged[key]}
        found |= {"local_test_loss": table[:, 0].tolist(), f"local_test_{name}": table[:, 1].tolist()}
        return found, consensus


class Progress:
    """Turns what happens into records and lines.

    Args:
        log: where they go.
        comm: whose meter is reported.
        clock: training seconds.
        facts: step, learning rate and the like.
        examples: of all ranks in one step.
        every: steps between training records.
    """

    def __init__(
        self, log: Log, comm: Communicator, clock: Clock, facts: RunFacts, examples: int, every: int
    ) -> None:
        self._log, self._comm, self._clock, self._facts = log, comm, clock, facts
        self._examples, self._every = examples, every
        self._loss: Tensor | None = None
        self._since = (0, 0.0)
        self._shown = ""

    def on_step(self, loss: Tensor, used: float) -> None:
        """Add up the loss; write and show it now and then."""
        self._loss = loss.clone() if self._loss is None else self._loss.add_(loss)
        step = self._facts.step
        if step % self._every and not self._log.due:
            return
        seconds = self._clock.seconds
        since_step, since = self._since
        count = step - since_step
        mean = float(self._loss) / count
        rate = count * self._examples / max(seconds - since, 1e-9)
        epoch = step / (self._facts.steps_per_epoch or 1)
        if self._log.due:
            meter = self._comm.meter
            waiting, communication = (100 * s / seconds for s in (meter.waiting_seconds, meter.communication_seconds))
            self._log.progress(
                used,
                f"{seconds:6.1f} s  step {step}  epoch {epoch:.2f}  loss {mean:.4f}  lr {self._facts.lr:.4g}  "
                f"{rate:,.0f}/s  compute {100 - waiting - communication:.0f} %  communicate {communication:.0f} %  "
                f"wait {waiting:.0f} %  sent {human_bytes(meter.training_bytes_sent)}  {self._shown}"
                f"ETA {seconds * (1 - used) / max(used, 1e-9):.0f} s",
            )
        if step % self._every == 0:
            lr = self._facts.lr
            self._log.record(
                "train", step=step, epoch=epoch, seconds=seconds, loss=mean, lr=lr, images_per_second=rate
            )
            self._loss, self._since = None, (step, seconds)

    def on_round(self, event: Round) -> None:
        """Write a round; say so if a rank was healed."""
        self._log.record(
            "round",
            round=event.number,
            step=event.step,
            seconds=self._clock.seconds,
            period=event.period,
            lr=event.lr,
            weights=[[round(w, 6) for w in row] for row in event.weights.tolist()],
            leader=event.leader,
            healed=list(event.healed),
        )
        if event.healed:
            ranks = ", ".join(map(str, event.healed))
            self._log.say(f"step {event.step}: parameters of rank {ranks} were not finite and became the center")

    def on_evaluation(self, part: str, scores: dict[str, float]) -> None:
        """Write an evaluation of the center."""
        facts, seconds = self._facts, self._clock.seconds
        epoch = facts.step / (facts.steps_per_epoch or 1)
        self._log.record("evaluate", step=facts.step, epoch=epoch, seconds=seconds, part=part, model="center", **scores)
        self._shown = "".join(f"{part} {k} {v:.4f}  " for k, v in scores.items() if k != "loss")


def _own_seed(seed: int, rank: int) -> int:
    return (seed * 1_000_003 + rank + 1) % 2**63


def _greet(
    config: Config, log: Log, comm: Communicator, vector: ParameterVector, run: Run, train: int, test: int, epoch: int
) -> None:
    layers = next((s.averager.layers for s in run.synchronizers if s.averager.layers is not None), None)
    log.record(
        "start",
        method=type(config.method).__name__,
        world_size=comm.size,
        layers=list(layers.names) if layers else list(vector.names),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    batch = config.data.batch_size
    log.say(f"method     {config.method}")
    log.say(
        f"data       {type(config.data).__name__}, {train:,} training and {test:,} test examples; {batch} per rank x "
        f"{comm.size} ranks = {batch * comm.size} per step, {epoch} steps per epoch"
    )
    log.say(f"model      {config.model_name}, {len(vector):,} parameters in {len(vector.parameters)} tensors")
    log.say(f"optimizer  {config.optimizer}; {config.schedule}; {config.precision}, {torch.get_num_threads()} threads")


def _farewell(summary: dict[str, Any], name: str, folder: Path | None) -> str:
    test, mean, train = (summary[f"{key}_{name}"] for key in ("center_test", "mean_test", "center_train"))
    where = f"; see {folder}" if folder else ""
    return (
        f"finished   test {name}: center {test:.4f}, mean {mean:.4f}; training {train:.4f}; {summary['steps']} steps, "
        f"{summary['rounds']} rounds, {human_bytes(summary['bytes_sent'])} sent per rank in "
        f"{summary['training_seconds']:.1f} s{where}"
    )
