"""The training loop, for every method alike."""

from __future__ import annotations

import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from . import random_streams
from .budget import Clock
from .checkpoint import Checkpoints
from .comm import Communicator, Meter
from .config import Config
from .control import Control
from .data import Examples, in_advance
from .errors import ConfigError
from .evaluate import Judge, autocast, recalibrate, undisturbed, uniform_mean
from .launch import local_device, signals_heeded
from .log import Log, commit, human_bytes, open_run, say, versions, write_atomically
from .schedules import RunFacts
from .synchronizer import Round
from .trace import Trace
from .trial import try_out
from .vector import ParameterVector
from .watch import Watch

#: Seconds between looks for a file ``STOP``.
POLL_EVERY = 1.0


class Worker:
    """One rank's share of a run: its data, model, optimizer and method, one local step at a time.

    Args:
        config: checked, the same on all ranks.
        comm: the ranks; all must make a worker.

    Raises:
        ConfigError: model, data, loss and metric do not fit together; on rank 0 alone, which tries them out.
        RanksDisagree: ranks do not have the same model or method.
    """

    def __init__(self, config: Config, comm: Communicator) -> None:
        self.config, self.comm = config, comm
        self.device = local_device(wanted=config.device)
        self.clock = Clock(self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # events and random streams are those of the current device
        seed = config.run.seed
        self.splits = config.data.load()
        self.sampler = config.data.sampler(comm.rank, comm.size, seed)
        # One stream for the common start, then one per rank (dropout, and starts that are to differ).
        _seed_all(seed if config.run.start == "common" else _own_seed(seed, comm.rank))
        self.model = config.build_model()
        _seed_all(_own_seed(seed, comm.rank))
        self.model.to(self.device)
        config.loss.to(self.device)
        config.data.prepare_model(self.model)
        if comm.rank == 0:
            try_out(config, self.model, self.splits)
        self.vector = ParameterVector(self.model)
        self.optimizer = config.optimizer.build(self.vector.parameters)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.total_steps = config.budget.total_steps(self.sampler.steps_per_epoch)
        #: Local steps of this rank; under pooled rounds not those that ``facts`` counts.
        self.local_steps = 0
        self._batches = self._in_order()
        self.facts = RunFacts(
            lr=self._peaks[0],
            peak_lr=self._peaks[0],
            warmup_steps=config.schedule.warmup,
            total_steps=self.total_steps,
            steps_per_epoch=self.sampler.steps_per_epoch,
        )
        self.run = config.method.build(
            comm,
            self.vector,
            self.optimizer,
            self._probe,
            facts=self.facts,
            clock=lambda: self.clock.seconds,
            control_every=config.run.control_every,
            start=config.run.start,
        )

    def step(self) -> Tensor | None:
        """One local step, and the round if one is due; returns its loss, a 0-d tensor.

        Under pooled rounds it may be the round alone, without a step and a loss.
        """
        facts = self.facts
        factor = self.config.schedule(facts)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        loss: Tensor | None = None
        if self.run.before_step():
            with self.comm.meter.span("compute", "local step"):
                self._batch = self._to_device(next(self._batches))
                loss = self.optimizer.step(self._closure)  # type: ignore[assignment, arg-type]
            self.local_steps += 1
            self.run.after_step(loss)
        facts.progress = min(1.0, self.used)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """All that survives a step; all ranks must call it, between steps."""
        return {
            "parameters": self.vector.data,
            "outside": [tensor.detach() for _, tensor in self.vector.outside],
            "optimizer": self.optimizer.state_dict(),
            "run": self.run.state_dict(),
            "local_steps": self.local_steps,
            "seconds": self.clock.settled,
            "meter": self.comm.meter.state_dict(),
            "random": random_streams.packed(random_streams.streams()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken: the same model, method, data and ranks."""
        self.vector.data.copy_(state["parameters"])
        for (_, tensor), saved in zip(self.vector.outside, state["outside"], strict=True):
            tensor.detach().copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.local_steps = state["local_steps"]
        self.clock.restart(state["seconds"])
        self.comm.meter.load_state_dict(state["meter"])
        self.run.load_state_dict(to_device(state["run"], self.device))
        random_streams.set_streams(random_streams.unpacked(state["random"]))

    def start_from(self, state: dict[str, Any]) -> None:
        """Go on from another world's center, which all ranks start from; the data are shared anew."""
        centers = [s["averager"]["center"] for s in state["run"]["synchronizers"]]
        center = centers[-1] if centers and centers[-1] is not None else state["parameters"]
        self.vector.data.copy_(center)
        for (_, tensor), saved in zip(self.vector.outside, state["outside"], strict=True):
            tensor.detach().copy_(saved)
        self.local_steps = state["run"]["facts"]["step"]
        self.clock.restart(state["seconds"])
        self.comm.meter.load_state_dict(state["meter"])
        self.run.start_from(state["run"]["facts"])

    def _in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches from that of the present step on; begins when the first is asked for."""
        sampler = self.sampler
        numbers = count(self.local_steps)
        yield from in_advance(self.splits.train, ((sampler.indices(n), sampler.generator(n)) for n in numbers))

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        if self.device.type == "cuda":  # from page-locked memory the copy does not stop the host
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def said(self) -> dict[str, Any]:
        """What a sign of life says of this rank; asked for by another thread."""
        return {"step": self.facts.step, "used": min(1.0, self.used), "training": self.clock.seconds}

    @property
    def used(self) -> float:
        """The share of the budget used, 1 or more at the end; the same on all ranks."""
        return self.config.budget.used(self.facts, self.total_steps)

    def _closure(self) -> Tensor:
        aggregator, parts = self.run.aggregator, self.config.optimizer.accumulate
        aggregator.zero_grad(self.optimizer)
        inputs, targets = self._batch
        total = torch.zeros((), device=self.vector.data.device)
        for i, part in enumerate(zip(inputs.chunk(parts), targets.chunk(parts), strict=True)):
            if i == parts - 1:
                aggregator.start()
            loss = self._loss(part) / parts
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        aggregator.finish()
        if self.config.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.vector.parameters, self.config.optimizer.clip_norm)
        return total

    def _probe(self) -> Tensor:
        method, number = self.config.method, sum(s.rounds for s in self.run.synchronizers)
        source: Literal["all", "shard"] = "shard" if method.probe_from == "shard" else "all"
        index = self.sampler.probe_indices(number, method.probe_batches, source)
        return self._loss(self._to_device(self.splits.train.batch(index.flatten())))

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        with autocast(self.config.precision, self.vector.data.device):
            loss: Tensor = self.config.loss(self.model(inputs), targets)
        return loss


def fit(
    config: Config,
    comm: Communicator,
    new_folder: Callable[[], Path] | None = None,
    speaks: bool | None = None,
    trace: bool = False,
    any_world: bool = False,
) -> dict[str, Any]:
    """Train until the budget is used, evaluate, and write the run's folder. All ranks must call it.

    Args:
        config: checked, the same on all ranks.
        comm: the ranks.
        new_folder: makes the run's folder, on rank 0, once nothing is left to go wrong before the first step; nothing
            is written without it.
        speaks: whether this rank prints; by default rank 0 does.
        trace: whether to write ``trace.json``, where the time of all ranks went.
        any_world: whether the folder's checkpoint may be one of another number of ranks: all then start from its
            center, and share the data anew.

    Returns:
        The summary that ``summary.json`` holds.

    Raises:
        ConfigError: model, data, loss and metric do not fit together (on rank 0 alone), or no folder can be made.
        RanksDisagree: ranks do not have the same model, method, learning rate or period.
        NonFinite: training has diverged on all ranks.
    """
    comm.meter = Meter()
    worker = Worker(config, comm)
    speaks = comm.rank == 0 if speaks is None else speaks
    worker.splits = config.data.near(worker.splits, comm, config.run.seed, say if speaks else lambda _: None)
    folder = None if new_folder is None else new_folder()
    if folder is not None and not (folder / "config.yaml").exists():
        open_run(folder, config.text, comm.size, comm.backend)
    # All ranks write their checkpoints into the folder that rank 0 has made or found.
    place = comm.gather_bytes(str(folder.resolve() if folder else "").encode(), "evaluate")[0].decode()
    watch = Watch(Path(place) if place else None, comm, worker.said, config.run.comm_timeout)
    with failure_recorded(place, comm, worker.facts):
        try:
            found = _train(worker, folder, place, speaks, trace, any_world)
        except BaseException as error:
            watch.close(f"failed: {type(error).__name__}: {error}")
            raise
        watch.close(found["state"])
        return found


def _train(
    worker: Worker, folder: Path | None, place: str, speaks: bool, trace: bool, any_world: bool
) -> dict[str, Any]:
    config, comm = worker.config, worker.comm
    meter = comm.meter
    checkpoints = Checkpoints(Path(place) / "checkpoints", comm, config.save.keep) if place else None
    log = Log(folder, speaks, config.log.tensorboard)
    facts, clock, run, splits = worker.facts, worker.clock, worker.run, worker.splits
    examiner = Examiner(worker)
    progress = Progress(log, worker)
    for synchronizer in run.synchronizers:
        synchronizer.on_round = progress.on_round
    restored = None if checkpoints is None else checkpoints.load()
    # What a run wrote after its last checkpoint, or before its first one, it is to write again.
    log.go_on(*((0, -1) if restored is None else (restored.state["written"], restored.step)))
    _greet(log, worker, anew=restored is None)
    seen, part = (splits.test, "test") if splits.validation is None else (splits.validation, "validation")
    best = (-math.inf, 0)
    name, sign = config.metric.name, 1 if config.metric.higher_is_better else -1

    def evaluate() -> None:
        nonlocal best
        with clock.paused(), examiner.center():
            scores = examiner.judge(seen)
        best = max(best, (sign * scores[name], facts.step))
        progress.on_evaluation(part, scores)

    def save() -> None:
        if checkpoints is None:
            return
        with clock.paused():
            state = {
                "worker": worker.state_dict(),
                "progress": progress.state_dict(),
                "best": list(best),
                "next": [next_evaluation, next_save],
                "written": log.written,
            }
            wrong = checkpoints.save(facts.step, state, {"seconds": facts.seconds})
            if wrong is not None:
                log.say(f"step {facts.step}: not saved, the checkpoints before stay: {wrong}")

    if checkpoints is not None and config.save.every < math.inf:
        width = worker.vector.data.element_size() * len(worker.vector)
        # Parameters, center, and as much as AdamW keeps.
        checkpoints.check_space(4 * width + sum(t.nbytes for _, t in worker.vector.outside))
    comm.barrier()
    meter.trace = Trace() if trace else None
    clock.restart()
    next_evaluation, next_save = config.eval.every, config.save.every
    if restored is None:
        evaluate()
    else:
        if restored.world_size == comm.size:
            worker.load_state_dict(restored.state["worker"])
            progress.load_state_dict(restored.state["progress"])
        elif any_world:
            worker.start_from(restored.state["worker"])
        else:
            raise ConfigError(
                f"the launcher started {comm.size} ranks: must be {restored.world_size}, as when {place} was saved; "
                f"or go on from its center with --resume-world any"
            )
        best = restored.state["best"][0], restored.state["best"][1]
        next_evaluation, next_save = restored.state["next"]
        for wrong in restored.skipped:
            log.say(f"resumed    not from the newest checkpoint: {wrong}")
        log.say(f"resumed    at step {restored.step}, after {facts.seconds:.1f} s of training")
    ending = Ending(run.control, log, folder)
    with signals_heeded(ending.heed):
        while worker.used < 1 and not run.control.stop:
            ending.poll()
            loss = worker.step()
            if loss is not None:
                progress.on_step(loss)
            if worker.used < 1 and facts.elapsed(config.eval.unit) >= next_evaluation:
                next_evaluation = config.eval.every * (1 + facts.elapsed(config.eval.unit) // config.eval.every)
                evaluate()
            if worker.used < 1 and facts.elapsed(config.save.unit) >= next_save:
                next_save = config.save.every * (1 + facts.elapsed(config.save.unit) // config.save.every)
                save()
    if run.control.stop and worker.used < 1:
        save()
        return ending.summary(worker, folder)
    run.finish()
    training_seconds = clock.settled
    spans, meter.trace = meter.trace, None
    if spans is not None:
        text = spans.gather(comm)
        if folder is not None and text is not None:
            write_atomically(folder / "trace.json", text)
    evaluate()
    final = examiner.everything()
    center = final.pop("center_state")
    if folder is not None:
        write_atomically(folder / "center.pt", center)
    waiting, communication = meter.waiting_seconds, meter.communication_seconds
    summary: dict[str, Any] = {
        "state": "finished",
        "name": folder.name if folder else None,
        "method": type(config.method).__name__,
        "backend": comm.backend,
        "world_size": comm.size,
        "steps": facts.step,
        "rounds": sum(s.rounds for s in run.synchronizers),
        "healed": sum(s.healed for s in run.synchronizers),
        "epochs": facts.step / worker.sampler.steps_per_epoch,
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
        "gpu_memory": gpu_memory(worker.device),
        "gap": sign * (final[f"center_train_{name}"] - final[f"center_test_{name}"]),
        f"best_center_{name}": sign * best[0],
        "best_step": best[1],
        "best_part": part,
        f"final_center_{name}": final[f"center_test_{name}"],
        "examples_per_second": facts.step * comm.size * config.data.batch_size / training_seconds,
        "parameters": len(worker.vector),
        "seed": config.run.seed,
        "versions": versions(),
        "commit": commit(),
    }
    if folder is not None:
        write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    log.close()
    log.say(_farewell(summary, name, folder))
    return summary


class Ending:
    """A run's early end: what is wished for on one rank, all do at the same step.

    Args:
        control: carries the wish to all ranks.
        log: says so.
        folder: of the run, on rank 0; a file ``STOP`` in it is a wish.
    """

    def __init__(self, control: Control, log: Log, folder: Path | None) -> None:
        self._control, self._log = control, log
        self._file = None if folder is None else folder / "STOP"
        self._polled = time.monotonic()
        #: What ends the run, on the rank that noticed it.
        self.cause: str | None = None
        self._told = False

    def heed(self, cause: str) -> None:
        """Have all ranks save and end with the next control word."""
        self.cause = self.cause or cause
        self._control.wants_stop = True

    def poll(self) -> None:
        """Look for the file now and then, and say once what is going to happen."""
        if self._file is not None and time.monotonic() - self._polled > POLL_EVERY:
            self._polled = time.monotonic()
            if self._file.exists():
                self.heed("STOP")
        if self.cause is not None and not self._told:
            self._told = True
            again = ", Ctrl-C again: now" if self.cause == "SIGINT" else ""
            self._log.say(f"ending     {self.cause}: all ranks save at the next control word, then end{again}")

    def summary(self, worker: Worker, folder: Path | None) -> dict[str, Any]:
        """What there is to say of a run that is to go on later, written to ``summary.json``; all ranks must call it."""
        causes = [found.decode() for found in worker.comm.gather_bytes((self.cause or "").encode(), "evaluate")]
        rank, cause = next((m, found) for m, found in enumerate(causes) if found)
        facts = worker.facts
        found = {
            "state": "preempted",
            "cause": cause,
            "rank": rank,
            "name": folder.name if folder else None,
            "method": type(worker.config.method).__name__,
            "world_size": worker.comm.size,
            "steps": facts.step,
            "training_seconds": worker.clock.seconds,
        }
        if self._file is not None and folder is not None:
            self._file.unlink(missing_ok=True)
            write_atomically(folder / "summary.json", json.dumps(found, indent=1) + "\n")
        self._log.close()
        self._log.say(f"preempted  by {cause} (rank {rank}), saved at step {facts.step}; --run.resume auto goes on")
        return found


@contextmanager
def failure_recorded(place: str, comm: Communicator, facts: RunFacts) -> Iterator[None]:
    """Within the block the first rank that fails leaves word of it in ``summary.json``."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if place:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            found = {
                "state": state,
                "cause": f"{type(error).__name__}: {error}",
                "rank": comm.rank,
                "host": platform.node(),
                "world_size": comm.size,
                "steps": facts.step,
            }
            with suppress(OSError), (Path(place) / "summary.json").open("x") as file:
                file.write(json.dumps(found, indent=1) + "\n")
        raise


class Examiner:
    """Puts the evaluated models in place, one after the other, and judges them; training notices nothing of it."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._config, self._comm = worker, worker.config, worker.comm
        self._model = worker.model
        self._judge = Judge(
            self._config.loss, self._config.metric, self._config.precision, self._config.eval.batch_size
        )

    @contextmanager
    def center(self) -> Iterator[None]:
        """Within the block the model is the center; before the first round, the mean of all ranks."""
        with self._in_place(self._center()):
            yield

    def _center(self) -> Tensor:
        run = self._worker.run
        if run.synchronizers and run.synchronizers[-1].averager.center is None:
            return uniform_mean(self._comm, self._worker.vector)[0]
        return run.center

    @contextmanager
    def _in_place(self, parameters: Tensor) -> Iterator[None]:
        train, sampler = self._worker.splits.train, self._worker.sampler
        with undisturbed(self._model), self._worker.vector.swapped(parameters):
            if self._config.method.buffers == "recalibrate":
                wanted = ((sampler.indices(b), None) for b in range(self._config.eval.bn_batches))
                batches = (inputs for inputs, _ in in_advance(train, wanted))
                recalibrate(self._model, batches, self._comm, self._config.precision)
            yield

    def judge(self, examples: Examples, limit: int | None = None) -> dict[str, float]:
        """Loss and metric of the model that is in place; all ranks share the work."""
        return self._judge.judge(self._model, examples, self._comm, limit)

    def everything(self) -> dict[str, Any]:
        """Center and mean on test and training examples, each rank's model on test examples, and ``center_state``."""
        splits = self._worker.splits
        mean, consensus = uniform_mean(self._comm, self._worker.vector)
        found: dict[str, Any] = {"consensus_distance": consensus}
        for title, parameters in (("center", self._center()), ("mean", mean)):
            with self._in_place(parameters):
                test = self.judge(splits.test)
                train = self.judge(splits.train, self._config.eval.train_examples)
                if title == "center":
                    state = self._model.state_dict()
                    found["center_state"] = {k: t.detach().to("cpu", copy=True) for k, t in state.items()}
            for key in test:
                found |= {f"{title}_test_{key}": test[key], f"{title}_train_{key}": train[key]}
        local = self._judge.judge(self._model, splits.test)
        row = torch.tensor(list(local.values()), dtype=torch.float64)
        table = self._comm.allgather(row, "evaluate").wait()
        return found | {f"local_test_{key}": table[:, column].tolist() for column, key in enumerate(local)}


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
        epoch = step / (self._facts.steps_per_epoch or 1)
        if self._log.due:
            meter = self._comm.meter
            # This rank's own clock, for the screen only: the agreed one stands still between control words.
            now = replace(self._facts, seconds=seconds)
            used = min(1.0, self._worker.config.budget.used(now, self._worker.total_steps))
            waiting, communication = (100 * s / seconds for s in (meter.waiting_seconds, meter.communication_seconds))
            eta = f"ETA {seconds * (1 - used) / used:.0f} s" if used else ""
            self._log.progress(
                used,
                f"{seconds:6.1f} s  step {step}  epoch {epoch:.2f}  loss {mean:.4f}  lr {self._facts.lr:.4g}  "
                f"{rate:,.0f}/s  compute {100 - waiting - communication:.0f} %  communicate {communication:.0f} %  "
                f"wait {waiting:.0f} %  sent {human_bytes(meter.training_bytes_sent)}  {self._shown}{eta}",
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

    def on_evaluation(self, part: str, scores: dict[str, float]) -> None:
        """Write an evaluation of the center."""
        facts, seconds = self._facts, self._clock.seconds
        epoch = facts.step / (facts.steps_per_epoch or 1)
        self._log.record("evaluate", step=facts.step, epoch=epoch, seconds=seconds, part=part, model="center", **scores)
        self._shown = "".join(f"{part} {k} {v:.4f}  " for k, v in scores.items() if k != "loss")


def to_device(state: Any, device: torch.device) -> Any:
    """The same nested lists and dictionaries with their tensors on a device; float64 ones, which are scores, stay."""
    if isinstance(state, Tensor):
        return state if state.dtype == torch.float64 else state.to(device)
    if isinstance(state, dict):
        return {key: to_device(value, device) for key, value in state.items()}
    return [to_device(value, device) for value in state] if isinstance(state, list) else state


def gpu_memory(device: torch.device) -> int | None:
    """Bytes that this process's tensors have taken at most on a GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _own_seed(seed: int, rank: int) -> int:
    return (seed * 1_000_003 + rank + 1) % 2**63


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _greet(log: Log, worker: Worker, anew: bool) -> None:
    config, vector, size = worker.config, worker.vector, worker.comm.size
    layers = [s.averager.layers.names for s in worker.run.synchronizers if s.averager.layers is not None]
    if anew:
        log.record(
            "start",
            method=type(config.method).__name__,
            world_size=size,
            layers=list(layers[0] if layers else vector.names),
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
    train, test, batch = len(worker.splits.train), len(worker.splits.test), config.data.batch_size
    log.say(f"method     {config.method}")
    log.say(
        f"data       {type(config.data).__name__}, {train:,} training and {test:,} test examples; {batch} per rank x "
        f"{size} ranks = {batch * size} per step, {worker.sampler.steps_per_epoch} steps per epoch"
    )
    log.say(f"budget     {config.budget}; the last step ends with a round")
    log.say(f"model      {config.model_name}, {len(vector):,} parameters in {len(vector.parameters)} tensors")
    if worker.device.type == "cuda":
        direct = worker.comm.carries(vector.data, "allreduce")
        by = f"{worker.comm.backend} reads its memory" if direct else "messages go by way of page-locked host memory"
        log.say(f"device     {worker.device}, {torch.cuda.get_device_name(worker.device)}; {by}")
    log.say(f"optimizer  {config.optimizer}; {config.schedule}; {config.precision}, {torch.get_num_threads()} threads")


def _farewell(summary: dict[str, Any], name: str, folder: Path | None) -> str:
    test, mean, train = (summary[f"{key}_{name}"] for key in ("center_test", "mean_test", "center_train"))
    where = f"; see {folder}" if folder else ""
    prefix = "center_test_"
    others = {key.removeprefix(prefix): value for key, value in summary.items() if key.startswith(prefix)}
    more = "".join(f", {key} {value:.4f}" for key, value in others.items() if key not in ("loss", name))
    return (
        f"finished   test {name}: center {test:.4f}{more}, mean {mean:.4f}; training {train:.4f}; "
        f"{summary['steps']} steps, {summary['rounds']} rounds, {human_bytes(summary['bytes_sent'])} sent per rank in "
        f"{summary['training_seconds']:.1f} s{where}"
    )
