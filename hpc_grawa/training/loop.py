"""The training loop, for every method alike."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..comm import Communicator, Meter, slowed
from ..comm.trace import Trace
from ..errors import NonFinite, RanksDisagree
from ..launch import signals_heeded
from ..runs.checkpoint import Checkpoints, Restored, bytes_of, check_world, model_state
from ..runs.heartbeat import Watch
from ..runs.log import Log, commit, open_run, versions, write_atomically
from ..runs.record import read_run
from ..screen import say
from .budget import Cadence
from .config import Config
from .ending import Ending, failure_recorded
from .examiner import Examiner
from .progress import Progress, farewell, gpu_memory, greet
from .resume import changed
from .worker import Worker

#: Seconds that the others give rank 0 to open the run's folder, however short the limit for messages is.
FOLDER = 120.0


def fit(
    config: Config,
    comm: Communicator,
    *,
    new_folder: Callable[[], Path | None] | None = None,
    speaks: bool | None = None,
    trace: bool = False,
    any_world: bool = False,
) -> dict[str, Any]:
    """Train until the budget is used, evaluate, and write the run's folder. All ranks must call it.

    Args:
        config: checked, the same on all ranks.
        comm: the ranks; between them the configuration's network, if any.
        new_folder: makes the run's folder, on rank 0, once nothing is left to go wrong before the first step; nothing
            is written without it. Where it gives None, the run was finished meanwhile, and nothing is done.
        speaks: whether this rank prints; by default rank 0 does.
        trace: whether to write ``trace.json``, where the time of all ranks went.
        any_world: whether the folder's checkpoint may be one of another number of ranks: all then start from its
            center, and share the data anew.

    Returns:
        The summary that ``summary.json`` holds.

    Raises:
        ConfigError: model, data, loss and metric do not fit together, or no folder can be made (on rank 0 alone).
        RanksDisagree: ranks do not have the same model, method, learning rate or period.
        NonFinite: training has diverged on all ranks.
    """
    comm = slowed(comm, config.network)
    comm.meter = Meter()
    speaks = comm.rank == 0 if speaks is None else speaks
    with comm.meter.busy("loads its data"):
        worker = Worker(config, comm)
        worker.splits = config.data.near(worker.splits, comm, config.run.seed, say if speaks else lambda _: None)
    comm.meter.said = worker.said
    if comm.watch is not None:  # rank 0 may have to wait until the lock of a job that died counts as left
        comm.watch.timeout = max(config.comm_timeout, FOLDER)
    folder = None if new_folder is None else new_folder()
    anew = folder is not None and not (folder / "config.yaml").exists()
    if folder is not None and anew:
        open_run(folder, config.text, comm.size, comm.backend, comm.network)
    # All ranks write their checkpoints into the folder that rank 0 has made or found. (No path holds a zero byte.)
    finished = new_folder is not None and folder is None
    told = b"\0" if finished else os.fsencode(folder.resolve()) if folder else b""
    place = os.fsdecode(comm.gather_bytes(told, "evaluate")[0])
    if place == "\0":
        return {"state": "finished"}
    if comm.watch is not None:
        comm.watch.timeout = config.comm_timeout
    # A start that is refused leaves a run that was there as it was: it leaves word of itself in a new one only.
    with failure_recorded(place if anew else "", comm, worker.facts):
        training = Training(worker, folder, place, speaks)
        restored = training.prepare(any_world)
    if folder is not None and not anew and restored is None:  # nothing is left of what it began with
        open_run(folder, config.text, comm.size, comm.backend, comm.network)
    # Simulated ranks wait for one another as they should, and cannot be lost.
    watch = comm.watch or Watch(comm.rank, comm.size, math.inf)
    watch.attach(comm)
    watch.begin(Path(place) if place else None)
    try:
        with failure_recorded(place, comm, worker.facts):
            found = training.run(restored, trace)
    except BaseException as error:
        what = "diverged" if isinstance(error, NonFinite) else f"failed: {type(error).__name__}"
        watch.end(f"{what}: {error}")
        raise
    else:
        watch.end(found["state"])
        return found
    finally:
        if comm.watch is None:
            watch.close()


class Training:
    """What a run does around its worker's local steps: evaluate, save, and write down.

    Args:
        worker: this rank's.
        folder: of the run, on the rank that writes there.
        place: of the checkpoints of all ranks; empty for none.
        speaks: whether this rank prints.
    """

    def __init__(self, worker: Worker, folder: Path | None, place: str, speaks: bool) -> None:
        config, comm = worker.config, worker.comm
        self.worker, self.folder, self.place = worker, folder, place
        self.checkpoints = Checkpoints(Path(place) / "checkpoints", comm, config.save.keep) if place else None
        self.log = Log(folder, speaks, config.log.tensorboard)
        self.examiner, self.progress = Examiner(worker), Progress(self.log, worker)
        worker.run.on_round = self.progress.on_round
        self.evaluations = Cadence(config.eval.every, config.eval.unit, worker.facts)
        self.saves = Cadence(config.save.every, config.save.unit, worker.facts)
        splits = worker.splits
        self.seen, self.part = (splits.test, "test") if splits.validation is None else (splits.validation, "validation")
        self.sign = 1 if config.metric.higher_is_better else -1
        #: The best evaluation so far, the larger the better, and its step.
        self.best = (-math.inf, 0)

    def run(self, restored: Restored | None, trace: bool) -> dict[str, Any]:
        """Train to the end of the budget, or until told to end; all ranks must call it.

        Args:
            restored: what ``prepare`` gave.
            trace: as of ``fit``.
        """
        worker, control, meter = self.worker, self.worker.run.control, self.worker.comm.meter
        meter.trace = Trace() if trace else None
        worker.clock.restart()
        if restored is None:
            self._evaluate()
        else:
            self._go_on(restored)
        ending = Ending(control, self.log, self.folder)
        try:
            self._train(ending)
        except NonFinite as error:
            return self._diverged(error, ending)
        if worker.used < 1:
            self._settle()
            if self.checkpoints is not None and self.checkpoints.saved != worker.facts.step:
                self._save()
                self._settle()
            return ending.summary(worker, None if self.checkpoints is None else self.checkpoints.saved)
        training_seconds = worker.clock.settled
        spans, meter.trace = meter.trace, None
        if spans is not None:
            self._write("trace.json", spans.gather(worker.comm))
        self._evaluate()
        with meter.busy("evaluates"):
            found = self.examiner.everything()
        self._write("center.pt", found.pop("center_state"))
        summary = _summary(worker, found | self._choice(found), self.folder, training_seconds)
        self._write("summary.json", json.dumps(summary, indent=1) + "\n")
        self._keep_models()  # what it cannot write costs nothing of the run
        self.log.close()
        self.log.say(farewell(summary, worker.config.metric.name, self.folder))
        return summary

    def _train(self, ending: Ending) -> None:
        """Make local steps until the budget is used, and the last round, or until told to end."""
        worker, control = self.worker, self.worker.run.control
        with signals_heeded(ending.heed):
            while worker.used < 1 and not control.stop:
                ending.poll()
                loss = worker.step()
                if loss is not None:
                    self.progress.on_step(loss)
                if worker.used < 1 and self.evaluations.due():
                    self._evaluate()
                if worker.used < 1 and self.saves.due():
                    self._save()
                if self.checkpoints is not None and self.checkpoints.step <= control.all_written:
                    self._settle()
        if worker.used >= 1:
            self._settle()
            worker.run.finish()

    def _diverged(self, error: NonFinite, ending: Ending) -> dict[str, Any]:
        """End what is under way and say so, on all ranks at one step: another run may begin on them.

        Returns:
            The summary of a run that was told to end: whoever goes on with it will see that it diverges.

        Raises:
            NonFinite: the one that it was given, if it was not told to end.
        """
        worker, control = self.worker, self.worker.run.control
        control.settle()
        told = worker.comm.gather_bytes(b"1" if control.wants_stop else b"", "evaluate")
        self._settle()
        worker.run.close()
        if any(told):
            return ending.summary(worker, None if self.checkpoints is None else self.checkpoints.saved)
        found = {
            "state": "diverged",
            "cause": f"{type(error).__name__}: {error}",
            "method": worker.config.method_name,
            "world_size": worker.comm.size,
            "steps": worker.facts.step,
        }
        with suppress(OSError):  # it is said on the screen too
            self._write("summary.json", json.dumps(found, indent=1) + "\n")
        self.log.close()
        raise error

    def prepare(self, any_world: bool) -> Restored | None:
        """Read the last checkpoint, and find out what else would keep the run from going on; all ranks must call it.

        Nothing in the folder has changed where an error is raised: what is wrong on any rank, rank 0 knows before it
        writes, and the others do not write before it has.

        Args:
            any_world: as of ``fit``.

        Returns:
            The checkpoint to go on from, or None.

        Raises:
            ConfigError: the run cannot go on; on all ranks, or on rank 0 alone.
        """
        worker, checkpoints = self.worker, self.checkpoints
        restored = None if checkpoints is None else checkpoints.load()
        if restored is not None and not any_world:
            check_world(worker.comm.size, restored.world_size, self.folder or self.place)
        if restored is not None and restored.world_size == worker.comm.size:
            worker.check_groups(restored.state["worker"])
        if checkpoints is not None and worker.config.save.every < math.inf:
            state = self._state()
            checkpoints.check(state)
            worker.run.control.written = checkpoints.written
            # What the first steps add: centers, and as much as AdamW keeps.
            coming = (2 + len(worker.run.synchronizers)) * worker.vector.data.nbytes
            models = 0
            if worker.config.save.ranks and worker.run.synchronizers:
                models = bytes_of(worker.model.state_dict())
            checkpoints.check_space(bytes_of(state) + coming, models)
        if self.folder is not None:
            (self.folder / "summary.json").unlink(missing_ok=True)
        # What a run wrote after its last checkpoint, or before its first one, it is to write again.
        self.log.go_on(*((0, -1) if restored is None else (restored.state["written"], restored.step)))
        greet(self.log, worker, anew=restored is None)
        worker.comm.barrier()
        return restored

    def _go_on(self, restored: Restored) -> None:
        """Go on where the last checkpoint was taken."""
        worker, size, state = self.worker, self.worker.comm.size, restored.state["worker"]
        start = ""
        if restored.world_size == size:
            worker.load_state_dict(state)
        else:
            start = f"; {size} ranks after {restored.world_size}, all from {worker.start_from(state)}"
        self.progress.load_state_dict(restored.state["progress"])
        self.best = restored.state["best"][0], restored.state["best"][1]
        self.evaluations.next, self.saves.next = restored.state["next"]
        for wrong in restored.skipped:
            self.log.say(f"damaged    {wrong}")
        self.log.say(f"resumed    at step {restored.step}, after {worker.facts.seconds:.1f} s of training{start}")
        if self.folder is None:
            return
        changes, networks = changed(self.folder, worker.config.text), read_run(self.folder).networks
        if networks[-1] != worker.comm.network:
            changes["network"] = [networks[-1], worker.comm.network]
        if restored.world_size != size:
            changes["ranks"] = [restored.world_size, size]
        if (then := state.get("data", worker.data_told)) != worker.data_told:
            changes["data.content"] = [then, worker.data_told]
        if changes:
            self.log.record("changed", step=restored.step, settings=changes)
            self.log.say("changed    " + ", ".join(f"{key} from {was} to {now}" for key, (was, now) in changes.items()))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Within the block no training time passes; all ranks must enter it.

        They meet before: standing still for slower ranks is training, and would be free while the clock does.
        """
        worker = self.worker
        worker.run.control.settle()
        if worker.facts.step:
            worker.clock.settle()
            worker.comm.meet()
        with worker.clock.paused():
            yield

    def _evaluate(self) -> None:
        worker = self.worker
        with self._aside(), worker.comm.meter.busy("evaluates"):
            apart = self.examiner.consensus_distance()
            with self.examiner.center() as own:
                scores = self.examiner.evaluate(self.seen)
                if (target := worker.config.budget.train_loss) is not None:
                    known = self.examiner.evaluate(worker.splits.train, worker.config.eval.train_examples)
                    worker.reached = known["loss"] <= target
                    self.progress.on_evaluation("train", known, None)
                try:
                    flat = None if own is None else self.examiner.flatness(own)
                except RanksDisagree as error:  # to which replicas on unlike GPUs may come, and train on
                    flat = None
                    self.log.say(f"flatness   not measured: {error}")
        self.best = max(self.best, (self.sign * scores[worker.config.metric.name], worker.facts.step))
        self.progress.on_evaluation(self.part, scores, apart)
        if flat is not None:
            self.progress.on_flatness(flat)

    def _save(self) -> None:
        """Begin to write a checkpoint."""
        if self.checkpoints is None:
            return
        with self._aside():
            facts = self.worker.facts
            for wrong in self.checkpoints.save(facts.step, self._state(), {"seconds": facts.seconds}):
                self.log.say(wrong)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds of this rank; all ranks must call it."""
        return {
            "worker": self.worker.state_dict(),
            "progress": self.progress.state_dict(),
            "best": list(self.best),
            "next": [self.evaluations.next, self.saves.next],
            "written": self.log.written,
        }

    def _settle(self) -> None:
        """Make the last checkpoint the one to go on from, once all ranks have written."""
        if self.checkpoints is None or self.checkpoints.step == math.inf:
            return
        with self._aside():
            for wrong in self.checkpoints.settle():
                self.log.say(wrong)

    def _keep_models(self) -> None:
        """Keep each rank's own model, where they differ."""
        worker = self.worker
        if self.checkpoints is None or not worker.config.save.ranks or not worker.run.synchronizers:
            return
        with worker.meant(), worker.vector.swapped(worker.run.local):
            state = model_state(worker.model)
        for wrong in self.checkpoints.keep_model(state):
            self.log.say(wrong)

    def _choice(self, found: dict[str, Any]) -> dict[str, Any]:
        """The best center and the last one."""
        name = self.worker.config.metric.name
        return {
            "gap": self.sign * (found[f"center_train_{name}"] - found[f"center_test_{name}"]),
            f"best_center_{name}": self.sign * self.best[0],
            "best_step": self.best[1],
            "best_part": self.part,
            f"final_center_{name}": found[f"center_test_{name}"],
        }

    def _write(self, name: str, content: str | dict[str, Tensor] | None) -> None:
        if self.folder is not None and content is not None:
            write_atomically(self.folder / name, content)


def _summary(worker: Worker, found: dict[str, Any], folder: Path | None, training_seconds: float) -> dict[str, Any]:
    """What ``summary.json`` says of a finished run.

    Args:
        worker: that has trained.
        found: by the evaluation of its models.
        folder: of the run.
        training_seconds: without evaluation and checkpoints.
    """
    config, comm, meter, facts, run = worker.config, worker.comm, worker.comm.meter, worker.facts, worker.run
    loading, communication, waiting = meter.loading_seconds, meter.communication_seconds, meter.waiting_seconds
    return {
        "state": "finished",
        "name": folder.name if folder else None,
        "method": config.method_name,
        "backend": comm.backend,
        "network": comm.network,
        "world_size": comm.size,
        "steps": facts.step,
        "rounds": sum(s.completed for s in run.synchronizers),
        "healed": sum(s.healed for s in run.synchronizers),
        "epochs": facts.elapsed("epochs"),
        "training_seconds": training_seconds,
        "compute_seconds": training_seconds - loading - communication - waiting,
        "loading_seconds": loading,
        "communication_seconds": communication,
        "waiting_seconds": waiting,
        "hidden_seconds": meter.hidden_seconds,
        "bytes_sent": meter.training_bytes_sent,
        "payload_bytes": meter.training_payload_bytes,
        "metric": config.metric.name,
        "higher_is_better": config.metric.higher_is_better,
        **found,
        "gpu_memory": gpu_memory(worker.device),
        "examples_per_second": facts.step * comm.size * config.data.batch_size / training_seconds,
        "parameters": len(worker.vector),
        "seed": config.run.seed,
        "versions": versions(),
        "commit": commit(),
    }
