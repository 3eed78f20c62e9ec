"""What ``hpc-grawa methods NAME`` says of a method."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

import own
import pytest
from table import METHODS, PERIOD, as_words, is_, plain

from hpc_grawa import cli
from hpc_grawa.runs.log import human_bytes

P = 269_722  # of ResNet-20


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    cli.main(["methods", *words])
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("name", plain())
def test_a_card_says_all_that_is_to_be_known(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    card = printed(capsys, name)
    assert card.startswith(f"{name}: ")
    for part in ("Limits: ", "Not for: ", "Source: ", "Settings:"):
        assert f"\n{part}" in card
    for field in fields(METHODS[name].ours):
        said = re.search(rf"--method.{field.name} \((.*?)\): \S+", card)
        assert said and (said[1] == "to be given") == (field.default is MISSING is field.default_factory)
    assert all(len(line) <= 120 for line in card.splitlines())


@pytest.mark.parametrize("name", plain("averages", "uniform"))
def test_a_round_is_one_small_gather_and_one_allreduce_of_all_parameters(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if any(f.default is MISSING for f in fields(METHODS[name].ours)):
        assert "--config digits --method." in printed(capsys, name)
        return
    card = " ".join(printed(capsys, name, "--world_size=6").split())
    n = 4 * P
    assert f"P = {P:,} parameters of 4 bytes in 59 tensors, W = 6 ranks" in card
    assert "each step nothing" in card
    gather = f"allgather (control), n = 88 B: n(W-1) = {5 * 88} B"
    reduce = f"allreduce (center), n = {human_bytes(n)}: 2n(W-1)/W = {human_bytes(2 * n * 5 / 6)}"
    assert f"each round {gather}; {reduce}" in card


@pytest.mark.parametrize(("name", "memory", "checkpoint"), [("LocalSGD", 1, 1), ("LGRAWA", 2, 1), ("Parle", 4, 3)])
@pytest.mark.parametrize("words", [(), ("--config=digits",)], ids=["ResNet20", "digits"])
def test_what_is_kept_is_counted(
    name: str, memory: int, checkpoint: int, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A center; one more for the proximity pull; x, z and their distance to y. Data that a probe draws from do not."""
    card = printed(capsys, name, *words)
    assert re.search(rf"memory .* = {memory} x parameters", card)
    assert re.search(rf"checkpoint .* = {checkpoint} x parameters", card)


@pytest.mark.parametrize("name", [plain("layers")[0], plain("shares")[0], "DPPF"])
def test_of_a_given_model_it_says_what_a_dry_run_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config=digits", *as_words(name)[1:]]
    card = printed(capsys, name, *words, "--world_size=3")
    cli.main(["train", *words, f"--method={name}", "--dry_run", "--world_size=3"])
    dry = capsys.readouterr().out
    per_round = re.search(r"sent per rank +(\S+ \S+) per (round|step)", dry)
    assert per_round and "SmallCNN" in card
    sent = card.partition(f"  each {per_round[2]} ")[2].partition("\n  memory")[0]
    values = [float(v) * {"B": 1, "kB": 1e3, "MB": 1e6}[u] for v, u in re.findall(r"\)?(?:W|1\)) = (\S+) (\w+)", sent)]
    amount, unit = per_round[1].split()
    assert sum(values) == pytest.approx(float(amount) * {"kB": 1e3, "MB": 1e6}[unit], rel=0.01)
    assert is_(name, "shares") or METHODS[name].ours.period == PERIOD  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["NoSuch"], "method is NoSuch: must be one of|method is NoSuch: must be"),
        (["LGRAWA", "--world_size=0"], "world_size is 0: must be 1 to 65,536 ranks"),
        (["LGRAWA", "--world_size=1000000"], "world_size is 1000000: must be 1 to 65,536 ranks"),
        (["--config=digits"], "method is None: must name one"),
        (["--config", "digits"], "method is None: must name one"),
        (["LGRAWA", "--combinations"], "method is LGRAWA: must be left out with --combinations"),
        (["LGRAWA", "--config=digits", "--method.perid=3"], "did you mean method.period"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["methods", *words])
    assert re.search(message, capsys.readouterr().err)
