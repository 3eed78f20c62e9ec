"""The models of a finished run, put in place again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import buffers, nests
from ..batchnorm import recalibrate
from ..comm import Communicator
from ..data import Splits
from ..errors import ConfigError, Damaged, in_a_line, wrong
from ..flatness.objective import in_dtype
from ..launch import Slot, local_device
from ..runs.checkpoint import model_file, saved_models
from ..runs.reading import parse_settings, read_text
from ..runs.record import read_run
from ..training.config import CLASS_SECTIONS, Config
from ..training.preflight import fail_together, new_model
from ..vector import ParameterVector
from .parsing import parse

#: The averaged model of the last round; the uniform mean of the ranks' own.
CENTER, MEAN = "center", "mean"

_NEEDED = ("config.yaml", "center.pt", "summary.json")  # written in this order


def is_finished(run: Path) -> bool:
    """Whether this is the folder of a finished run."""
    return all((run / name).is_file() for name in _NEEDED)


def check_seen_alike(runs: Iterable[Path], comm: Communicator) -> None:
    """Raise ``ConfigError`` on all ranks unless they see the same finished runs, which they look for on their own."""
    told = "\n".join(map(str, runs)).encode()
    same = told == comm.gather_bytes(told, "evaluate")[0]
    fail_together(comm, "" if same else "it sees other finished runs than rank 0: start again once none is written")


def finished_config(run: Path, program: str, backend: str, data_path: str | None) -> Config:
    """The configuration of a finished run, on the data where they are now.

    Raises:
        ConfigError: the folder is not one of a finished run.
        Damaged: its ``config.yaml`` is not whole.
    """
    if not is_finished(run):
        lacks = next(name for name in _NEEDED if not (run / name).is_file())
        raise ConfigError(f"{run} is not the folder of a finished run: it has no {lacks}")
    file = run / "config.yaml"
    settings = parse_settings(read_text(file) or "", str(file))
    if missing := CLASS_SECTIONS.keys() - settings:
        raise Damaged(f"{file} is not whole: it has no {min(missing)}")
    again = [f"--config={file}", f"--backend={backend}", "--network=null", "--compile=false"]
    if settings.get("device") == "cuda" and not torch.cuda.is_available():
        again.append("--device=auto")  # what was trained on GPUs may be looked at elsewhere
    workers, processors = settings["data"].get("init_args", {}).get("workers"), len(os.sched_getaffinity(0))
    if isinstance(workers, int) and workers > processors:  # as the trainer's machine had
        again.append(f"--data.workers={processors}")
    if data_path is not None:
        again.append(f"--data.path={data_path}")
    return parse(again, program)


def kept_models(run: Path) -> tuple[int, int]:
    """Of how many ranks a finished run has kept the models, and how many ranks have different ones: 0 or all."""
    summary = read_run(run).summary or {}
    return saved_models(run), summary.get("world_size", 0) if summary.get("rounds", 0) else 0


def not_kept(what: str, run: Path, kept: int, of: int) -> ConfigError:
    """That a run does not have all of its ranks' models."""
    return wrong("model", what, f"must be {CENTER}: {run} has kept the models of {kept} of {of} ranks")


class FinishedRun:
    """A finished run's data, and a model that takes the place of each of its models in turn.

    Args:
        run: the folder.
        config: as of ``finished_config``.
        comm: all ranks make it together.
        slot: of this rank.
        double: whether model and loss are to be in float64.
    """

    def __init__(self, run: Path, config: Config, comm: Communicator, slot: Slot, double: bool = False) -> None:
        self.run, self.config = run, config
        self._comm, self._device = comm, local_device(slot, config.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # events and random streams are those of the current device
        self.splits: Splits = config.data.load()
        self.model: nn.Module = new_model(config, self.splits, comm, self._device)
        if double:
            self.model.double()
            config.loss.double()
        # A file system may show them to others later.
        told = json.dumps(kept_models(run) if comm.rank == 0 else None)
        #: Of how many ranks the run has kept the models, of how many that differ.
        self.kept, self.of = json.loads(comm.gather_bytes(told.encode(), "evaluate")[0])
        #: How many ranks' models there are; none where all have one, or some are missing.
        self.ranks = self.kept if self.kept == self.of else 0

    def initial(self) -> nn.Module | None:
        """The model as it began, made again from the run's seed; None where it cannot be seen to be the same.

        Nor is there one where ranks began apart. All ranks must call it.
        """
        from ..training.progress import digest
        from ..training.worker import first_model

        model = first_model(self.config, self.splits, self._comm, self._device)
        told = read_run(self.run).events.get("start", [{}])[0].get("weights")
        same = self.config.run.start == "common" and told == digest(ParameterVector(model).data)
        same = self._comm.gather_bytes(b"1" if same else b"")[0] == b"1"
        return model if same else None

    def put(self, name: str) -> None:
        """Put a model in place: the ``center``, the ``mean`` of the ranks' models, or that of a rank (``rank 3``).

        The mean has BatchNorm statistics of its own, of as many training examples as the run's evaluations took, and
        the center's other buffers. Where all ranks have one model, as gradients are shared, it is this one.

        Raises:
            ConfigError: there is no such model, its file is damaged, or of another model.
        """
        if name == MEAN and self.ranks:
            self._put_mean()
        elif name == MEAN and self.of:
            raise not_kept(MEAN, self.run, self.kept, self.of)
        else:
            self._put(self._file(CENTER if name == MEAN else name))

    def _put_mean(self) -> None:
        parameters = dict(self.model.named_parameters())
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items() if p.requires_grad}
        for number in range(self.ranks):
            self.put(f"rank {number}")
            for name, total in sums.items():
                total += parameters[name].detach()
        self.put(CENTER)
        with torch.no_grad():
            for name, total in sums.items():
                parameters[name].copy_(total / self.ranks)
        train, size = self.splits.train, self.config.data.batch_size
        seen = min(len(train), self.config.eval.bn_batches * size * self.ranks)
        parts = torch.tensor_split(torch.arange(seen) * len(train) // seen, -(-seen // size))
        own, dtype = parts[self._comm.rank :: self._comm.size], next(self.model.parameters()).dtype
        batches = (nests.mapped(partial(in_dtype, dtype), train.batch(part, None)[0]) for part in own)
        recalibrate(self.model, batches, self._comm)

    def put_center_of(self, run: Path) -> None:
        """The same for the center of another run, whose model must be of the same kind."""
        self._put(run / "center.pt")

    def _put(self, file: Path) -> None:
        problem = ""
        try:
            self._load(file)
        except ConfigError as error:
            problem = str(error)
        fail_together(self._comm, problem)  # also where another rank alone cannot read it

    def _load(self, file: Path) -> None:
        state = _read(file)
        own = self.model.state_dict()
        floating = (k for k, t in state.items() if isinstance(t, Tensor) and t.is_floating_point())
        state |= {k: state[k].to(own[k].dtype) for k in floating if isinstance(own.get(k), Tensor)}
        try:
            # Before load_state_dict, which refuses those that have changed their shape in training.
            buffers.load_state(self.model, {key: state[key] for key in buffers.state(self.model) if key in state})
            self.model.load_state_dict(state)
        except Exception as error:  # a damaged file can raise anything
            raise _damaged(file, error) from None

    def _file(self, name: str) -> Path:
        if name == CENTER:
            return self.run / "center.pt"
        number = name.removeprefix("rank ")
        if not number.isdecimal() or int(number) >= self.ranks:
            kept = ", ".join([CENTER, MEAN, *(f"'rank {m}'" for m in range(self.ranks))])
            raise wrong("model", name, f"must be among {kept}, which {self.run} has kept")
        return model_file(self.run, int(number))


def _read(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True)
    except Exception as error:
        raise _damaged(file, error) from None
    return state


def _damaged(file: Path, error: Exception) -> ConfigError:
    why = in_a_line(error)[:200] or type(error).__name__
    return ConfigError(f"{file} is damaged, or of another model: {why}")
