"""What a run is doing, or how it ended, in a few lines."""

from __future__ import annotations

from pathlib import Path

from ..runs.heartbeat import Heartbeat, ending_of, read_heartbeats
from ..runs.record import RunRecord, read_run
from .table import aligned


def describe(folder: Path) -> str:
    """State, progress, ETA, last metrics of a run, and what each of its ranks does or did last.

    Raises:
        ConfigError: ``folder`` holds no run.
        Damaged: a file in it is.
    """
    record, beats = read_run(folder), read_heartbeats(folder)
    state = _state(record, beats)
    lines = [f"{folder}: {state}", *_progress(record, beats, state), *_last(record)]
    if beats and state != "finished":
        slowest = [event["slowest"] for event in record.events.get("round", []) if "slowest" in event]
        if slowest:
            rank = max(set(slowest), key=slowest.count)
            lines.append(f"slowest    rank {rank}, in {slowest.count(rank)} of {len(slowest)} rounds")
        rows = [["rank", "host", "step", "does, or did last", "heard of"]]
        for beat in beats:
            since = f" {beat.seconds:.0f} s" if beat.seconds else ""
            rows.append([str(beat.rank), beat.host, str(beat.step), beat.activity + since, f"{beat.age:.0f} s ago"])
        lines += aligned(rows)
    known = {beat.rank for beat in beats}
    for file in sorted((folder / "ranks").glob("[0-9]*.json")):
        if file.stem.isdecimal() and int(file.stem) not in known:
            lines.append(f"damaged    {file}: no sign of life")
    return "\n".join(lines)


def _state(record: RunRecord, beats: list[Heartbeat]) -> str:
    if record.summary is None and any(beat.alive for beat in beats):
        gone = [beat for beat in beats if not beat.alive]
        told = next((f"told to end by {beat.told}" for beat in beats if beat.told), "running")
        return told + "".join(f"; rank {s.rank} on {s.host} not heard of for {s.age:.0f} s" for s in gone)
    summary = None if record.summary is None else record.status
    return ending_of(summary, beats) or "not begun, or without signs of life"


def _progress(record: RunRecord, beats: list[Heartbeat], state: str) -> list[str]:
    if state.startswith("finished") or not beats:
        return []
    beat = beats[0]
    eta = f", ETA {beat.training * (1 - beat.used) / beat.used:.0f} s" if beat.used and state == "running" else ""
    return [f"progress   step {beat.step}, {beat.training:.1f} s of training, {beat.used:.0%} of the budget{eta}"]


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
