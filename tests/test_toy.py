"""Methods on the Vincent function: where they end, by which ways, and the command that shows it."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import reference as ref
import table
import torch
from launcher import called
from table import is_
from torch import Tensor

from hpc_grawa import EASGD, MGRAWA, DataParallel, Method, ParameterVector, cli, simulate
from hpc_grawa.averaging.averager import Averager, argmin
from hpc_grawa.averaging.scores import SCORE_MOMENTUM, TrainingLoss
from hpc_grawa.comm import Communicator
from hpc_grawa.errors import ConfigError
from hpc_grawa.methods import AveragingMethod, Level, Probe, Run
from hpc_grawa.toy import Descent, Vincent, descend, draw, first_round, valley, vincent
from hpc_grawa.toy import table as printed_table
from hpc_grawa.toy.starts import end_of
from hpc_grawa.toy.starts import ends as ends_of
from hpc_grawa.toy.vincent import CORNERS, DOMAIN

#: As far as a method has them.
SETTINGS = {"pull": 0.5, "prox": 0.0, "power": 1.0, "score_momentum": 0.0}


def with_settings(method: Any) -> Any:
    names = {field.name for field in fields(method)}
    return replace(method, **{name: value for name, value in SETTINGS.items() if name in names})


METHODS: dict[str, Method] = {name: with_settings(table.METHODS[name].ours) for name in table.plain()}


@dataclass(kw_only=True)
class Follow(AveragingMethod):
    """All become the rank with the smallest loss; has none of pull, prox, power and score_momentum."""

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        return Level(Averager(comm, run.vector, 1.0), TrainingLoss(), argmin)


@dataclass(kw_only=True)
class Demanding(Follow):
    leader: int


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own.plain_process(monkeypatch)
    monkeypatch.chdir(tmp_path)


def test_the_function_and_its_valleys() -> None:
    x = torch.tensor([[0.3, 9.0], [1.0, 4.0]], dtype=torch.float64)
    assert vincent(x).tolist() == pytest.approx([ref.Vincent().loss_and_grad(row)[0] for row in x.numpy()], rel=1e-14)
    minima = valley(torch.linspace(0.25, 10, 2000, dtype=torch.float64)).unique()
    assert minima.tolist() == pytest.approx([0.333, 0.624, 1.170, 2.193, 4.111, 7.706], abs=5e-4)
    assert vincent(minima[:, None]).tolist() == pytest.approx([-1] * 6, abs=1e-14)
    for inside in (0.26, 2.9, 7.0):  # no hill lies between a point and its valley
        way = torch.linspace(inside, valley(torch.tensor(inside)).item(), 200)
        assert (vincent(way[:, None]).diff() <= 1e-6).all()


@pytest.mark.parametrize(
    ("name", "weights"), [("GRAWA", [0.040, 0.056, 0.056, 0.847]), ("MGRAWA", [0.038, 0.073, 0.073, 0.815])]
)
def test_the_start(name: str, weights: list[float]) -> None:
    def body(comm: Communicator) -> tuple[float, float, Tensor]:
        model = Vincent(CORNERS[comm.rank])
        vector = ParameterVector(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        run = METHODS[name].build(comm, vector, optimizer, probe=model, start="independent")
        rounds = []
        run.synchronizers[0].on_round = rounds.append
        loss = model()
        norm = torch.stack(torch.autograd.grad(loss, vector.parameters)).norm().item()
        run.synchronizers[0].round()
        return loss.item(), norm, rounds[0].weights

    losses, norms, tables = zip(*simulate(4, body), strict=True)
    assert losses == pytest.approx((0.963, 0.911, 0.911, 0.860), abs=5e-4)
    assert norms == pytest.approx((7.66, 5.42, 5.42, 0.361), abs=5e-3)
    assert norms[3] == pytest.approx(0.361, abs=5e-4)
    assert tables[0].flatten().tolist() == pytest.approx(weights, abs=5e-4)


@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_the_oracles(name: str) -> None:
    steps = 42  # so that the last round is a shortened one
    expected = ref.replay(
        with_settings(table.METHODS[name].oracle), ref.Vincent(), np.array(CORNERS), lambda m, t: (),
        steps=steps, lr=1e-3, period=table.PERIOD, probe=lambda m, r: (), independent=True,
    )  # fmt: skip
    descent = descend(METHODS[name], steps=steps)
    ways = np.stack([np.array(CORNERS), *(step.parameters for step in expected.steps)], axis=1)
    np.testing.assert_allclose(descent.ranks, ways, rtol=1e-11)
    if expected.center is None:
        assert descent.center.isnan().all()
        return
    for record in expected.rounds:
        np.testing.assert_allclose(descent.center[record.step], record.center, rtol=1e-11)
    before = descent.center[0]
    assert before.tolist() == pytest.approx([5.125] * 2) if is_(name, "centered") else before.isnan().all()


@pytest.mark.parametrize(
    ("name", "end", "tolerance"),
    [
        pytest.param("GRAWA", 7.706, 0.05, marks=pytest.mark.slow),
        pytest.param("MGRAWA", 7.706, 0.05, marks=pytest.mark.slow),
        pytest.param("LGRAWA", 7.706, 0.05, marks=pytest.mark.slow),
        pytest.param("EASGD", 4.111, 0.001, marks=pytest.mark.slow),
        pytest.param("LSGD", 0.333, 0.001, marks=pytest.mark.slow),
    ],
)
def test_the_valley_a_method_ends_in(name: str, end: float, tolerance: float) -> None:
    descent = descend(METHODS[name])
    for ends in (descent.ranks[:, -1], descent.center[-1]):
        assert (ends - end).abs().max() < tolerance
        assert (valley(ends) - end).abs().max() < 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", table.kinds("norms", "probes"))
def test_score_momentum_ends_in_the_same_valley(name: str) -> None:
    assert pytest.approx(0.4305, abs=5e-5) == SCORE_MOMENTUM
    descent = descend(replace(METHODS[name], score_momentum=SCORE_MOMENTUM), steps=8000)  # type: ignore[call-arg]
    assert (descent.ranks[:, -1] - 7.706).abs().max() < 0.05
    assert (descent.center[-1] - 7.706).abs().max() < 0.05


def test_what_the_end_of_a_descent_is() -> None:
    """Also on its way down a bowl; tops count as saddles."""
    low, high = (math.exp((sign * math.pi / 2 + 4 * math.pi) / 10) for sign in (1, -1))
    for x, kind in (
        ((low, low), "minimum"),
        ((low, 1.1 * low), "minimum"),
        ((low, high), "saddle"),
        ((high, high), "saddle"),
        ((low, 1.05 * high), "moving"),
    ):
        end = end_of(torch.tensor(x, dtype=torch.float64))
        assert end.kind == kind
        assert end.curvature == pytest.approx(50 / low**2 if kind == "minimum" else math.nan, nan_ok=True)


@pytest.mark.parametrize(("sides", "stays"), [((-0.4, -0.1, 0.05, 0.5), True), ((-0.3, -0.2, -0.1, 0.3), False)])
def test_a_top_holds_ranks_of_which_half_are_on_either_side(sides: tuple[float, ...], stays: bool) -> None:
    """Near a top scores |∂f| are |h||δ_m|, so weights are as 1/|δ_m|, and the center is at Σ sign δ_m / Σ 1/|δ_m|.

    Half of the ranks on either side: that is the top. One more on one: half the harmonic mean of |δ_m| beside it.
    """
    top, bottom = (math.exp((sign * math.pi / 2 + 6 * math.pi) / 10) for sign in (-1, 1))
    starts = [(top + side, bottom) for side in sides]
    pulled = first_round(METHODS["LGRAWA"], starts=starts)
    off = pulled.before[:, 0] - top
    assert float(pulled.center[0]) - top == pytest.approx(float(off.sign().sum() / (1 / off.abs()).sum()), abs=0.01)
    descent = descend(METHODS["LGRAWA"], steps=300, starts=starts)
    off = (descent.center[:, 0] - top).abs()
    assert float(off[300]) < 1e-4 if stays else float(off[300]) > float(off[100]) > 1e-2


@pytest.mark.slow
def test_ends_from_random_starts(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a descent from each start, whichever process makes it."""
    method = with_settings(MGRAWA(period=4))
    found = ends_of({"MGRAWA": method}, starts=3, seed=1, steps=200, lr=1e-3)["MGRAWA"]
    low, high = DOMAIN
    drawn = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * (high - low) + low
    by_hand = [end_of(descend(method, 200, 1e-3, start.tolist()).center[-1]) for start in drawn]
    assert str(found) == str(by_hand)  # NaN is not NaN
    status, output, errors = called(capsys, "toy", "--starts=3", "--seed=1", "--steps=200", "--methods=MGRAWA,LocalSGD")
    assert (status, errors) == (0, ""), output
    for name in ("MGRAWA", "LocalSGD"):
        (line,) = (line for line in output.splitlines() if line.startswith(f"| {name} "))
        assert sum(float(share) for share in re.findall(r"([\d.]+) %", line)) == pytest.approx(100, abs=0.2)


def test_leaving_the_domain_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"lr is 0\.1: must be smaller for EASGD, under which rank [02] left .* at step 3,"
    ):
        descend(METHODS["EASGD"], steps=5, lr=0.1)


@pytest.mark.parametrize(("lr", "steps"), [(0.0, 5), (-1.0, 5), (float("nan"), 5), (float("inf"), 5), (1e-3, 0)])
def test_impossible_numbers(lr: float, steps: int) -> None:
    with pytest.raises(ConfigError, match="steps is 0" if not steps else "lr is "):
        descend(METHODS["EASGD"], steps=steps, lr=lr)


def test_the_command_with_every_kind_of_method(capsys: pytest.CaptureFixture[str]) -> None:
    names = [*table.plain(), "test_toy.Follow", "own.Alone"]
    cli.main(["toy", "--methods", ",".join(names), "--steps=12", "--figure=a.png"])
    printed = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines() if "rank" in line]
    assert {row[0] for row in rows} == {name.rpartition(".")[2] for name in names}
    expected = descend(METHODS["LGRAWA"], steps=12).ranks[3, -1]
    point = f"({expected[0]:.3f}, {expected[1]:.3f})"
    assert ["LGRAWA", "rank 3", point, f"{vincent(expected):.4f}", "(7.706, 7.706)", "0.842"] in rows
    assert ["Follow", "rank 0 1 2 3, center"] in [row[:2] for row in rows]
    assert printed.out.splitlines()[-1] == "figure  a.png" and printed.err == ""
    assert Path("a.png").stat().st_size > 10_000


def test_per_layer_weights_reach_where_weights_per_rank_cannot() -> None:
    """c_d = Σ_m β_md x_md; with one β per rank inside the ranks' triangle, with one per coordinate beyond its edge."""
    rounds = {name: first_round(METHODS[name]) for name in ("MGRAWA", "LGRAWA")}
    beyond = {}
    for name, pulled in rounds.items():
        torch.testing.assert_close((pulled.weights * pulled.before).sum(0), pulled.center)
        torch.testing.assert_close(pulled.weights.sum(0), torch.ones(2, dtype=torch.float64))
        corners = torch.cat((pulled.before.T, torch.ones(1, 3, dtype=torch.float64)))
        shares = torch.linalg.solve(corners, torch.cat((pulled.center, torch.ones(1, dtype=torch.float64))))
        beyond[name] = bool((shares < 0).any())  # the center's coordinates in the triangle
        assert bool(
            ((pulled.center > pulled.before.min(0).values) & (pulled.center < pulled.before.max(0).values)).all()
        )
        shorter = (pulled.after - pulled.center).norm(dim=1) < (pulled.before - pulled.center).norm(dim=1)
        assert bool(shorter.all())
    assert beyond == {"MGRAWA": False, "LGRAWA": True}
    with pytest.raises(ConfigError, match="makes no round in 100 steps"):
        first_round(DataParallel())
    with pytest.raises(ConfigError, match=r"lr is 1\.0: must be smaller for MGRAWA"):
        first_round(METHODS["MGRAWA"], lr=1.0)


@pytest.mark.parametrize("view", ["surface", "weights"])
def test_other_views(view: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "a.png"
    cli.main(["toy", "--methods=LGRAWA,Parle", "--steps=8", f"--view={view}", f"--figure={figure}"])
    assert f"figure  {figure}" in capsys.readouterr().out and figure.stat().st_size > 20_000


def test_settings_reach_the_methods_that_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--period=3", "--pull=0.2", "--prox=0.1", "--power=2", "--score_momentum=0.3"]
    cli.main(["toy", "--methods=MGRAWA,EASGD", "--steps=7", "--lr=0.002", "--figure=a.svg", *settings])
    chosen: dict[str, Method] = {
        "MGRAWA": MGRAWA(period=3, pull=0.2, prox=0.1, power=2, score_momentum=0.3),
        "EASGD": EASGD(period=3, pull=0.2),
    }
    descents = {name: descend(method, 7, 0.002) for name, method in chosen.items()}
    assert capsys.readouterr().out == f"{printed_table(descents)}\n\nfigure  a.svg\n"
    drawn = Path("a.svg").read_text()
    assert "lr 0.002, 7 steps" in drawn and "a round every 3" in drawn


def test_the_figure_names_methods_and_ends(tmp_path: Path) -> None:
    together = descend(METHODS["LocalSGD"], steps=4)
    draw({"One": together, "Two": descend(METHODS["DataParallel"], steps=4)}, tmp_path / "a.svg", "in all panels")
    drawn = (tmp_path / "a.svg").read_text()
    end = ", ".join(f"{x:.2f}" for x in together.ranks[0, -1].tolist())
    texts = ("One", f"ends at ({end})", "Two", "ranks end apart", *(f"rank {m}" for m in range(4)), "in all panels")
    for text in (*texts, "center", "start"):
        assert drawn.count(f">{text}</text>") == 1, text


@pytest.mark.parametrize("panels", [1, 2, 5])
def test_nothing_is_cut_off(panels: int, tmp_path: Path) -> None:
    from matplotlib.image import imread

    descent = descend(METHODS["LSGD"], steps=8)
    draw(
        {f"Method {n}": descent for n in range(panels)}, tmp_path / "a.png", "Gradient descent, lr 0.001, 4,000 steps;"
    )
    pixels = imread(tmp_path / "a.png")[:, :, :3]
    border = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3), pixels[:, -4:].reshape(-1, 3)])
    assert (border == 1).all() and (pixels[:, :4] == 1).all()
    assert len(np.unique((pixels * 15).round().reshape(-1, 3), axis=0)) > 20


def test_ways_out_of_the_picture_are_drawn(tmp_path: Path) -> None:
    ranks = torch.tensor([[[0.25, 10.0], [300.0, 4.0]], [[10.0, 10.0], [0.01, 5.0]]], dtype=torch.float64)
    draw({"Far": Descent(ranks, torch.full((2, 2), torch.nan))}, tmp_path / "a.png", "")
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--methods=NoSuch"], ("method is NoSuch", "LGRAWA", "import path")),
        (["--methods="], ("error: method: must be", "LGRAWA")),
        (["--methods=LGRAWA,"], ("error: method: must be",)),
        (["--methods=no_module.Method"], ("method is no_module.Method", "No module named")),
        (["--methods=own.Line"], ("method is own.Line", "derived from Method")),
        (["--methods=hpc_grawa.methods.base.Method"], ("derived from Method, and not abstract",)),
        (["--methods=LGRAWA,own.LGRAWA"], ("methods is LGRAWA,own.LGRAWA", "twice")),
        (["--methods=test_toy.Demanding"], ("method is test_toy.Demanding", "leader")),
        (["--steps=0"], ("steps is 0",)),
        (["--steps=many"], ("--steps", "'many'")),
        (["--lr=0"], ("lr is 0.0",)),
        (["--lr=0.1", "--steps=9"], ("lr is 0.1", "GRAWA", "left")),
        (["--period=0"], (": period is 0",)),
        (["--pull=1.5"], (": pull is 1.5", "[0, 1]")),
        (["--power=-1"], (": power is -1",)),
        (["--figure=a.gif"], ("a.gif", ".png")),
        (["--figure=nowhere/a.png"], ("nowhere/a.png", "no folder")),
        (["--perod=4"], ("--perod",)),
    ],
)
def test_bad_input_is_one_line(words: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["toy", *words])
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("hpc-grawa toy: error: ") and printed.err.count("\n") == 1
    for part in parts:
        assert part in printed.err
    assert list(Path().iterdir()) == []


def test_without_matplotlib_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["toy"])
    assert re.fullmatch(r"hpc-grawa toy: error: .*pip install 'hpc-grawa\[demo\]'\n", capsys.readouterr().err)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_one_does_it(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    status, output, errors = called(capsys, "toy", "--methods=EASGD", "--steps=4")
    assert (status, errors) == (0, "")
    assert (output.count("figure  toy.png"), output.count("| EASGD")) == ((0, 0) if rank else (1, 5))
    assert Path("toy.png").exists() == (rank == 0)
