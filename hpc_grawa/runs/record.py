"""Run folders, read back: what was set, what happened, what came of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Damaged
from .reading import parse_object, parse_settings, read_object, read_text

#: Beside a run: what ``hpc-grawa flatness`` has measured.
FLATNESS = "flatness.json"
#: What an ``evaluate`` event says besides the metric.
_EVALUATION = {"event", "step", "epoch", "seconds", "part", "model", "loss", "consensus_distance"}
#: Settings of measures of flatness.
_LETTERS = {
    "rho": "ρ",
    "epsilon": "ε",
    "sigma": "σ",
    "lpf_samples": "M",
    "kappa": "κ",
    "reach": "reach",
    "samples": "samples of the trace",
}
#: Settings that say where a run is made and how fast, but not what it trains.
PLACE = (
    *("run.resume", "run.dir", "run.control_every", "comm_timeout"),
    *("data.stage", "data.workers", "data.start_method"),
)
#: And those that tell repetitions of one experiment from each other, or are none (what is said of changed data).
_IDENTITY = {"run.name", "run.seed", "data.content", *PLACE}


@dataclass(frozen=True)
class RunRecord:
    """A run folder.

    Attributes:
        path: of the folder.
        summary: ``summary.json``, or None while the run is unfinished.
        events: of ``metrics.jsonl``, by kind (``start``, ``train``, ``round``, ``evaluate``, ``changed``), in order.
        config: ``config.yaml``, flat: ``{"method": "hpc_grawa.methods.LGRAWA", "method.period": 32, ...}``; of what
            ``--allow-change`` has changed all that it was: ``"90, then 200"``.
        flatness: what ``hpc-grawa flatness`` has measured, as of ``read_flatness``.
    """

    path: Path
    summary: dict[str, Any] | None
    events: dict[str, list[dict[str, Any]]]
    config: dict[str, Any]
    flatness: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def flatness_of(self) -> dict[str, str]:
        """By what the center's flatness, as ``status`` has it, was measured, for people: how, and each setting."""
        center = self.flatness.get("center", [{}])[-1]
        how, by = center.get("how"), center.get("measures")
        if not isinstance(how, dict):
            return {}
        batch = ", BatchNorm's statistics of each batch" if how.get("statistics") == "batch" else ""
        told = {"how": f"{how.get('examples')} of {how.get('of')} training examples, {how.get('dtype')}{batch}"}
        if "ritz_values" in center:
            told["steps"] = f"{center['ritz_values']} Ritz values"
        settings = [one for one in by.values() if isinstance(one, dict)] if isinstance(by, dict) else []
        known = {key: value for one in settings for key, value in one.items()}
        return told | {key: f"{letter} {_value(known[key])}" for key, letter in _LETTERS.items() if key in known}

    @cached_property
    def status(self) -> dict[str, Any]:
        """The summary; of an unfinished run, as much of it as its events tell."""
        summary = {"state": "finished", **self.summary} if self.summary is not None else {}
        if summary.get("state") == "finished":
            center = self.flatness.get("center", [{}])[-1]
            return {**summary, **{f"flatness_{key}": value for key, value in center.items() if is_number(value)}}
        happened = [event for events in self.events.values() for event in events]
        status: dict[str, Any] = {"state": "unfinished", "name": self.path.name, "metric": self.metric}
        status.update((key, value) for key, value in self._started.items() if key not in ("event", "layers"))
        status["steps"] = max((event["step"] for event in happened if "step" in event), default=0)
        status["rounds"] = max((event["round"] for event in self.events.get("round", [])), default=0)
        status["training_seconds"] = max((event["seconds"] for event in happened if "seconds" in event), default=0.0)
        if curve := self.curve("test"):
            status[f"center_test_{self.metric}"] = curve[-1][1]
        if is_number(self.config.get("run.seed")):
            status["seed"] = self.config["run.seed"]
        return status | summary

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.status.get("method") or last(self.config.get("method")) or self.path.name)

    @cached_property
    def metric(self) -> str:
        """The name of what the model is judged by."""
        return self.metric_told or "accuracy"

    @property
    def metric_told(self) -> str | None:
        """It, where the run has come as far as to say so."""
        told = self._told.get("metric")
        if told is None:
            keys = (key for event in self.events.get("evaluate", []) for key in event if key not in _EVALUATION)
            told = next(keys, None)
        return None if told is None else str(told)

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values of the metric are better."""
        told = self._told.get("higher_is_better")
        return self.metric.endswith("accuracy") if told is None else bool(told)

    @property
    def experiment(self) -> str:
        """All that makes a run another experiment, not another seed: what repetitions have in common."""
        return json.dumps([self.method, settings_of(self)], sort_keys=True, default=str)

    @property
    def ranks(self) -> str | None:
        """How many there were; all numbers, where a run went on on others; None where it does not say."""
        told = self.config.get("ranks", self.status.get("world_size"))
        return None if told is None else str(told)

    @property
    def network(self) -> str | None:
        """The network that was emulated, if any; all of them, where a run went on over another."""
        several = self.networks
        return several[0] if len(several) == 1 else ", then ".join(map(str, several))

    @property
    def networks(self) -> list[str | None]:
        """The networks that it went over, one after the other."""
        changes = [
            event["settings"]["network"] for event in self.events.get("changed", []) if "network" in event["settings"]
        ]
        if changes:
            return [changes[0][0], *(now for _, now in changes)]
        told = (self.summary or {}).get("network", self.config.get("network"))
        return [None if told is None else str(told)]

    @property
    def layers(self) -> list[str]:
        """The names of the layers that are weighted, from input to output."""
        return [str(name) for name in self._started.get("layers") or []]

    @property
    def weights(self) -> list[list[list[float]]]:
        """The weights of each round of all ranks, ``[R, W, K]``."""
        rounds = [event["weights"] for event in self.events.get("round", []) if event.get("weights")]
        shapes = [(len(weights), len(weights[0])) for weights in rounds]
        return [weights for weights, shape in zip(rounds, shapes, strict=True) if shape == max(shapes)]

    def curve(self, part: str) -> list[tuple[float, float]]:
        """(training seconds, metric of the center on ``part``) at each evaluation."""
        return [
            (float(event["seconds"]), float(event[self.metric]))
            for event in self.events.get("evaluate", [])
            if event["part"] == part and event["model"] == "center" and event.get(self.metric) is not None
        ]

    def course(self) -> dict[str, list[tuple[float, float]]]:
        """Over training seconds the learning rate, H of rounds of all ranks, and the ranks' consensus distance.

        Each under its name, if there is any.
        """
        rounds = self.events.get("round", [])
        widest = max((len(event.get("ranks") or ()) for event in rounds), default=0)
        rounds = [event for event in rounds if len(event.get("ranks") or ()) == widest]
        steps, evaluations = self.events.get("train", []), self.events.get("evaluate", [])
        found = {
            "learning rate": [(e["seconds"], e["lr"]) for e in rounds or steps if is_number(e.get("lr"))],
            "local steps of a round, H": [(e["seconds"], e["period"]) for e in rounds if is_number(e.get("period"))],
            "consensus distance": [
                (e["seconds"], e["consensus_distance"]) for e in evaluations if is_number(e.get("consensus_distance"))
            ],
        }
        return {name: points for name, points in found.items() if points}

    def time_to(self, target: float, part: str) -> float | None:
        """Training seconds at the first evaluation that meets the target, or None; nothing is interpolated."""
        sign = 1 if self.higher_is_better else -1
        return next((seconds for seconds, value in self.curve(part) if sign * value >= sign * target), None)

    @property
    def _told(self) -> dict[str, Any]:
        """What the run said when it began, and, of one that has ended, what came of it."""
        return {**self._started, **(self.summary or {})}

    @property
    def _started(self) -> dict[str, Any]:
        return self.events.get("start", [{}])[0]


def read_run(path: str | Path) -> RunRecord:
    """Read a run folder, finished or not.

    Raises:
        ConfigError: ``path`` is no run folder.
        Damaged: a file in it is.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is no run folder: {'it is a file' if path.exists() else 'there is no such folder'}")
    log, summary, config = path / "metrics.jsonl", path / "summary.json", path / "config.yaml"
    if not (log.is_file() or summary.is_file()):
        hint = f"; give the run folders in it: {path}/*/" if any(path.glob("*/metrics.jsonl")) else ""
        raise ConfigError(f"{path} is no run folder: it holds neither metrics.jsonl nor summary.json{hint}")
    settings = read_text(config)
    events = _read_events(log)
    return RunRecord(
        path=path,
        summary=_read_summary(summary),
        events=events,
        config={} if settings is None else flatten(parse_settings(settings, str(config))) | _changed(events),
        flatness=read_flatness(path),
    )


def group(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """The runs by experiment: those that differ only in seed and name, under a label that no other experiment has.

    The label is the method; where experiments share a method, it names the settings in which they differ.

    Raises:
        ConfigError: if there are no runs, or they are judged by different metrics.
    """
    if not records:
        raise ConfigError("there are no runs to report: give one or more run folders")
    first = judged(records)
    for record in records:
        if record.metric_told not in (None, first.metric):
            raise ConfigError(
                f"{first.path} is judged by {first.metric}, {record.path} by {record.metric}: "
                "runs that are reported together need one metric"
            )
    experiments: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        experiments.setdefault((record.experiment, record.status["state"]), []).append(record)
    leaders = [members[0] for members in experiments.values()]
    labels = [_label(leader, [other for other in leaders if other.method == leader.method]) for leader in leaders]
    repeated = Counter(labels)
    return {
        label if repeated[label] == 1 else f"{label} {members[0].path}": members
        for label, members in zip(labels, experiments.values(), strict=True)
    }


def judged(records: Sequence[RunRecord]) -> RunRecord:
    """The first that says by what it is judged, as one that ended before its start does not; else the first."""
    return next((record for record in records if record.metric_told is not None), records[0])


def evaluated_part(records: Iterable[RunRecord]) -> str:
    """The part of the data that the runs evaluated most often on their way: ``test``, or ``validation``."""
    parts = (event["part"] for record in records for event in record.events.get("evaluate", []))
    counts = Counter(part for part in parts if part != "train")
    return max(sorted(counts), key=counts.__getitem__, default="test")  # test comes before validation


def setting(records: Sequence[RunRecord]) -> str:
    """What the runs have in common, for people: "SmallCNN on Digits, 4 ranks, 20 s of training time each"."""
    worlds = sorted({ranks for record in records if (ranks := record.ranks)}, key=lambda told: (len(told), told))
    parts = []
    if (model := _common(records, "model")) and (data := _common(records, "data")):
        parts.append(f"{last(model)} on {last(data)}")
    if worlds:
        parts.append(f"{' and '.join(worlds)} rank{'' if worlds == ['1'] else 's'}")
    networks = {record.network for record in records}
    if len(networks) == 1 and (network := networks.pop()):
        parts.append(f"over an emulated network of {network}")
    units = {"seconds": "s of training time", "epochs": "epochs", "steps": "steps"}
    budgets = [{unit: record.config.get(f"budget.{unit}") for unit in units} for record in records]
    limits = [f"{limit:,g} {units[unit]}" for unit, limit in budgets[0].items() if is_number(limit)]
    if limits and all(budget == budgets[0] for budget in budgets):
        parts.append(" or ".join(limits) + (" each" if len(records) > 1 else ""))
    return ", ".join(parts)


def last(path: Any) -> str:
    """The class's name in an import path."""
    return str(path or "").rpartition(".")[2]


def _read_events(path: Path) -> dict[str, list[dict[str, Any]]]:
    events: dict[str, list[dict[str, Any]]] = {}
    lines = (read_text(path, errors="replace") or "").split("\n")
    lines.pop()  # empty, or half-written by a run that was killed
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number},"
        event = parse_object(line, where)
        kind = str(event.get("event"))
        for key, right in {"event": _is_word, **_EVENTS.get(kind, {})}.items():
            _check(event, key, right, where)
        for key in ("world_size", "slowest", *(event if kind == "evaluate" else ())):
            if key not in _WORDS and event.get(key) is not None:
                _check(event, key, is_number, where)
        events.setdefault(kind, []).append(event)
    return events


def read_flatness(run: Path) -> dict[str, list[dict[str, Any]]]:
    """``flatness.json``: by model what was measured of it, by other examples or numbers each; the latest last.

    Raises:
        Damaged: it is not that.
    """
    found = read_object(run / FLATNESS) or {}
    if not all(isinstance(x, list) and x and all(isinstance(one, dict) for one in x) for x in found.values()):
        raise Damaged(f"{run / FLATNESS} is damaged: it holds something else than lists of what was measured")
    return found


def _changed(events: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The settings that were changed when a run went on, each with all that it was."""
    values: dict[str, list[str]] = {}
    for event in events.get("changed", []):
        for key, (was, now) in event["settings"].items():
            seen = values.setdefault(key, [_value(was)])
            seen += [_value(now)] if _value(now) != seen[-1] else []
    return {key: ", then ".join(seen) for key, seen in values.items() if key not in _IDENTITY}


def _read_summary(path: Path) -> dict[str, Any] | None:
    summary = read_object(path)
    if summary is not None:
        _check(summary, "state", _is_word, str(path))
        for key in ("world_size", "seed"):
            if summary.get(key) is not None:
                _check(summary, key, is_number, str(path))
    return summary


def _check(found: dict[str, Any], key: str, right: Callable[[Any], bool], where: str) -> None:
    """Raise ``Damaged`` that names ``where`` it is unless ``found`` has a right value there."""
    if not right(found.get(key)):
        has = f"its {key} is {str(found[key])[:40]}" if key in found else f"it has no {key}"
        raise Damaged(f"{where} is damaged: {has}")


def is_number(value: object) -> bool:
    """Whether that is a number, perhaps NaN or infinite."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64)


def _is_time(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _is_word(value: Any) -> bool:
    return isinstance(value, str)


def _are_weights(value: Any) -> bool:
    """Whether these are ``[W, K]`` numbers, or none at all."""
    rows = value or []
    return isinstance(rows, list) and all(
        isinstance(row, list) and 0 < len(row) == len(rows[0]) and all(map(is_number, row)) for row in rows
    )


def _are_names(value: Any) -> bool:
    return value is None or isinstance(value, list)


def _are_changes(value: Any) -> bool:
    """Whether these are pairs by key."""
    return isinstance(value, dict) and all(isinstance(pair, list) and len(pair) == 2 for pair in value.values())


_WORDS = ("event", "part", "model")
#: What events must say, as reports rely on it.
_EVENTS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "start": {"layers": _are_names},
    "changed": {"step": _is_time, "settings": _are_changes},
    "train": {"step": _is_time, "seconds": _is_time},
    "evaluate": {"step": _is_time, "seconds": _is_time, "part": _is_word, "model": _is_word},
    "round": {"ranks": _are_names, "step": _is_time, "round": _is_time, "seconds": _is_time, "weights": _are_weights},
}


def settings_of(record: RunRecord) -> dict[str, Any]:
    """All that makes a run another experiment, not another seed."""
    settings = {key: value for key, value in record.config.items() if key not in _IDENTITY}
    return {**settings, "network": record.network, "ranks": record.ranks}


def _label(leader: RunRecord, same_method: list[RunRecord]) -> str:
    state = _state(leader)
    all_settings = [settings_of(record) for record in same_method]
    own = settings_of(leader)
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    differing = [key for key in keys if len({str(settings.get(key)) for settings in all_settings}) > 1]
    if len(differing) > 3:
        name = leader.path.name.removesuffix(f"-{leader.status.get('seed')}")
        return f"{leader.method} {name}{state}"
    told = [f"{last(key)}={_value(own[key])}" for key in differing if own.get(key) is not None]
    return " ".join([leader.method, *told]) + state


def _state(record: RunRecord) -> str:
    """What a label must add about a run that did not end as it should: `` (unfinished)``, or nothing."""
    return "" if record.status["state"] == "finished" else f" ({record.status['state']})"


def _value(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = str(value)
    return last(text) if all(part.isidentifier() for part in text.split(".")) else text


def _common(records: Sequence[RunRecord], key: str) -> Any:
    values = [record.config.get(key) for record in records]
    return values[0] if all(value == values[0] for value in values) else None


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; a section that is a class is its import path, its arguments follow as if they were the section's."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = prefix if key in ("class_path", "init_args") else f"{prefix}.{key}" if prefix else str(key)
        flat.update(flatten(inner, name) if isinstance(inner, dict) else {name: inner})
    return flat
