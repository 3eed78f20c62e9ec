"""What ``hpc-grawa methods --combinations`` says: of every optimizer, method, period and way of sharing, by trying."""

from __future__ import annotations

import re

import own
import pytest
from table import having, is_, plain

from hpc_grawa import cli
from hpc_grawa.cli.classes import known_classes

#: What trains only where gradients are shared, and what only where ranks average.
SHARES_ONLY, AVERAGES_ONLY = ("EntropySGD",), ("torch.optim.LBFGS",)


def test_the_tables_are_those_of_the_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)
    cli.main(["methods", "--combinations"])
    out = capsys.readouterr().out
    assert all(len(line) <= 120 for line in out.splitlines())
    legend = {
        letter: names.split(", ")
        for letter, names in re.findall(r"^\(([a-z])\) (.*)$", out.partition("Of every")[0], re.M)
    }
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    second = next(i for i, row in enumerate(rows) if row[0] == "--method.period")
    optimizers, periods = rows[:second], rows[second:]

    columns = [legend[head[-2]] if head.endswith(")") else head.split(", ") for head in optimizers[0][1:]]
    assert sorted(name for names in columns for name in names) == sorted(plain())
    assert {row[0] for row in optimizers[2:]} == {*known_classes("optimizer"), *AVERAGES_ONLY}
    for name, *cells in optimizers[2:]:
        for methods, cell in zip(columns, cells, strict=True):
            for method in methods:
                refused = name in (SHARES_ONLY if is_(method, "averages") else AVERAGES_ONLY)
                own_momentum = is_(method, "momentum") and name not in ("SGD", "SAM", "ASAM", "LPFSGD")
                assert (cell == "yes") is not (refused or own_momentum), (name, method)

    sharing = [name for name in plain() if name in having("shares")]
    assert set(periods[0][1:]) == {"null", *sharing} or "methods (" in periods[0][2]
    for name, none, *cells in periods[2:]:
        switches = name in ("PostLocal", "SWAP")
        assert (none == "yes") is not switches and {cell == "yes" for cell in cells} == {switches}

    numbers = {int(n) for n in re.findall(r"no \((\d+)\)", out)}
    reasons = {int(n): why for n, why in re.findall(r"^\((\d+)\) (.*)$", out, re.M)}
    assert numbers == set(reasons) == set(range(1, len(reasons) + 1)) and len(reasons) < 8
