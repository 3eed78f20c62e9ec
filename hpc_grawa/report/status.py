"""What a run is doing, or how it ended, in a few lines."""

from __future__ import annotations

from pathlib import Path

from ..watch import Sign, read_signs
from .runs import RunRecord, read_run
from .table import aligned


def describe(folder: Path) -> str:
    """State, progress, ETA, last metrics of a run, and what each of its ranks does or did last.

    Raises:
        ConfigError: ``folder`` holds no run.
    """
    record, signs = read_run(folder), read_signs(folder)
    state = _state(record, signs)
    lines = [f"{folder}: {state}", *_progress(record, signs, state), *_last(record)]
    if signs and state != "finished":
        slowest = [event["slowest"] for event in record.events.get("round", []) if "slowest" in event]
        if slowest:
            rank = max(set(slowest), key=slowest.count)
            lines.append(f"slowest    rank {rank}, in {slowest.count(rank)} of {len(slowest)} rounds")
        rows = [["rank", "host", "step", "does, or did last", "heard of"]]
        for sign in signs:
            since = f" {sign.seconds:.0f} s" if sign.seconds else ""
            rows.append([str(sign.rank), sign.host, str(sign.step), sign.activity + since, f"{sign.age:.0f} s ago"])
        lines += aligned(rows)
    return "\n".join(lines)


def _state(record: RunRecord, signs: list[Sign]) -> str:
    if record.summary is not None:
        summary = record.facts
        cause = f" by {summary['cause']}" if "cause" in summary else ""
        where = f" (rank {summary['rank']}{' on ' + summary['host'] if 'host' in summary else ''})" if cause else ""
        return f"{summary['state']}{cause}{where}"
    if any(sign.alive for sign in signs):
        gone = [sign for sign in signs if not sign.alive]
        return "running" + "".join(f"; rank {s.rank} on {s.host} not heard of for {s.age:.0f} s" for s in gone)
    if not signs:
        return "not begun, or without signs of life"
    first = max(signs, key=lambda sign: sign.age)
    return f"dead without a word; the first to fall silent was rank {first.rank} on {first.host} at step {first.step}"


def _progress(record: RunRecord, signs: list[Sign], state: str) -> list[str]:
    if state.startswith("finished") or not signs:
        return []
    sign = signs[0]
    eta = f", ETA {sign.training * (1 - sign.used) / sign.used:.0f} s" if sign.used and state == "running" else ""
    return [f"progress   step {sign.step}, {sign.training:.1f} s of training, {sign.used:.0%} of the budget{eta}"]


def _last(record: RunRecord) -> list[str]:
    lines = []
    for event, title in (("train", "training"), ("evaluate", "evaluated")):
        found = record.events.get(event, [])[-1:]
        for last in found:
            left_out = ("event", "step", "epoch", "seconds", "part", "model")
            values = {k: v for k, v in last.items() if k not in left_out}
            numbers = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, int | float))
            lines.append(f"{title:10} step {last['step']}: {numbers}")
    return lines
