"""What happens in a run, as records and as lines."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..averaging.synchronizer import Round
from ..buffers import as_bytes
from ..runs.log import Log, human_bytes
from ..screen import counted
from .worker import Worker


class Progress:
    """Turns what happens into records and lines."""

    def __init__(self, log: Log, worker: Worker) -> None:
        self._log, self._worker = log, worker
        self._comm, self._clock, self._facts = worker.comm, worker.clock, worker.facts
        self._examples, self._every = worker.comm.size * worker.config.data.batch_size, worker.config.log.every
        self._loss: Tensor | None = None
        self._count, self._rate = 0, 0.0
        self._since = (0, 0.0)
        self._shown = ""

    def state_dict(self) -> dict[str, Any]:
        """What it keeps between steps."""
        return {"loss": self._loss, "count": self._count, "rate": self._rate, "since": list(self._since)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        loss = state["loss"]
        self._loss = None if loss is None else loss.to(self._worker.device)
        self._count, self._rate, self._since = state["count"], state["rate"], (state["since"][0], state["since"][1])

    def on_step(self, loss: Tensor) -> None:
        """Add up the loss; write and show it now and then."""
        self._loss = loss.clone() if self._loss is None else self._loss.add_(loss)
        self._count += 1
        step, (since_step, since) = self._facts.step, self._since
        due = step // self._every > since_step // self._every
        if not due and not self._log.due:
            return
        seconds = self._clock.seconds
        mean = float(self._loss) / self._count
        if step > since_step:  # pooled steps are counted at rounds
            self._rate = (step - since_step) * self._examples / max(seconds - since, 1e-9)
        rate = self._rate
        epoch = self._facts.elapsed("epochs")
        if self._log.due:
            meter = self._comm.meter
            # This rank's own clock, for the screen only: the agreed one stands still between control words.
            now = replace(self._facts, seconds=seconds)
            used = min(1.0, self._worker.config.budget.used(now, self._worker.total_steps))
            spent = meter.loading_seconds, meter.communication_seconds, meter.waiting_seconds
            loading, communication, waiting = (100 * part / seconds for part in spent)
            eta = f"ETA {seconds * (1 - used) / used:.0f} s" if used else ""
            self._log.progress(
                used,
                f"{seconds:6.1f} s  step {step}  epoch {epoch:.2f}  loss {mean:.4f}  lr {self._facts.lr:.4g}  "
                f"{rate:,.0f}/s  compute {100 - loading - communication - waiting:.0f} %  load {loading:.0f} %  "
                f"communicate {communication:.0f} %  wait {waiting:.0f} %  "
                f"sent {human_bytes(meter.training_bytes_sent)}  {self._shown}{eta}",
            )
        if due:
            values = {"loss": mean, "lr": self._facts.lr, "examples_per_second": rate}
            memory = gpu_memory(self._worker.device)
            if memory is not None:
                values["gpu_memory"] = memory
            self._log.record("train", step=step, epoch=epoch, seconds=seconds, **values)
            self._loss, self._count, self._since = None, 0, (step, seconds)

    def on_round(self, event: Round) -> None:
        """Write a round; say so if a rank was healed."""
        self._log.record(
            "round",
            round=event.number,
            step=event.step,
            seconds=self._clock.seconds,
            period=event.period,
            lr=event.lr,
            ranks=list(event.ranks),
            made=list(event.made),
            weights=[[round(w, 6) for w in row] for row in event.weights.tolist()],
            leader=event.leader,
            effective_workers=round(event.effective_workers, 4),
            slowest=event.slowest,
            healed=list(event.healed),
        )
        if event.healed:
            ranks = ", ".join(map(str, event.healed))
            self._log.say(f"step {event.step}: parameters of rank {ranks} were not finite and became the center")

    def on_evaluation(self, part: str, scores: dict[str, float], consensus_distance: float | None) -> None:
        """Write an evaluation of the center, and how far ranks are from their mean."""
        facts, seconds = self._facts, self._clock.seconds
        epoch = facts.elapsed("epochs")
        apart = {} if consensus_distance is None else {"consensus_distance": consensus_distance}
        where = {"step": facts.step, "epoch": epoch, "seconds": seconds, "part": part, "model": "center"}
        self._log.record("evaluate", **where, **scores, **apart)
        self._shown = "".join(f"{part} {k} {v:.4f}  " for k, v in scores.items() if k != "loss")

    def on_flatness(self, found: dict[str, Any]) -> None:
        """Write how flat the loss is around the center."""
        self._log.record("flatness", step=self._facts.step, seconds=self._clock.seconds, model="center", **found)


def digest(x: Tensor) -> str:
    """What tells whether other numbers are the same."""
    return hashlib.sha256(as_bytes(x.detach().cpu()).numpy().tobytes()).hexdigest()


def greet(log: Log, worker: Worker, anew: bool) -> None:
    """Say what is going to be trained, on what and how; write it down where the run begins anew."""
    config, vector, size = worker.config, worker.vector, worker.comm.size
    layers = [s.averager.layers.names for s in worker.run.synchronizers if s.averager.layers is not None]
    if anew:
        log.record(
            "start",
            method=config.method_name,
            world_size=size,
            metric=config.metric.name,
            higher_is_better=config.metric.higher_is_better,
            layers=list(layers[0] if layers else vector.names),
            weights=digest(vector.data),
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
    train, test, batch = len(worker.splits.train), len(worker.splits.test), config.data.batch_size
    log.say(f"method     {config.method}")
    log.say(
        f"data       {type(config.data).__name__}, {train:,} training and {test:,} test examples; {batch} per rank x "
        f"{size} ranks = {batch * size} per step, {worker.sampler.steps_per_epoch} steps per epoch"
    )
    log.say(f"split      {worker.sampler}")
    log.say(f"budget     {config.budget}; the last step ends with a round")
    log.say(f"model      {config.model_name}, {len(vector):,} parameters in {len(vector.parameters)} tensors")
    if worker.device.type == "cuda":
        direct = worker.comm.carries(vector.data, "allreduce")
        by = f"{worker.comm.backend} reads its memory" if direct else "messages go by way of page-locked host memory"
        log.say(f"device     {worker.device}, {torch.cuda.get_device_name(worker.device)}; {by}")
    clipped = "" if config.clip_norm is None else f", clipped to norm {config.clip_norm:g}"
    parts = "" if config.accumulate == 1 else f", in {config.accumulate} parts"
    compiled = ", compiled" if config.compile else ""
    how = f"{config.precision}{compiled}{parts}{clipped}, {counted(torch.get_num_threads(), 'thread')}"
    groups = f", groups {config.optimizer.groups}" if config.optimizer.groups else ""
    told = config.schedule.told(worker.facts.peak_lr, size)
    log.say(f"optimizer  {config.optimizer}{groups}; {config.schedule}{told}; {how}")


def farewell(summary: dict[str, Any], name: str, folder: Path | None) -> str:
    """The last line, of a finished run whose metric is ``name``."""
    test, mean, train = (summary[f"{key}_{name}"] for key in ("center_test", "mean_test", "center_train"))
    where = f"; see {folder}" if folder else ""
    prefix = "center_test_"
    others = {key.removeprefix(prefix): value for key, value in summary.items() if key.startswith(prefix)}
    more = "".join(f", {key} {value:.4f}" for key, value in others.items() if key not in ("loss", name))
    work = f"{counted(summary['steps'], 'step')}, {counted(summary['rounds'], 'round')}"
    return (
        f"finished   test {name}: center {test:.4f}{more}, mean {mean:.4f}; training {train:.4f}; "
        f"{work}, {human_bytes(summary['bytes_sent'])} sent per rank in "
        f"{summary['training_seconds']:.1f} s{where}"
    )


def gpu_memory(device: torch.device) -> int | None:
    """Bytes that this process's tensors have taken at most on a GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
