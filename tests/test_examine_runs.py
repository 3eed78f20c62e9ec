"""``hpc-grawa flatness``, ``measures`` and ``compare --paper`` on runs that were really trained."""

from __future__ import annotations

import json
import re
import shutil
from csv import reader
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import torch
from launcher import called

from hpc_grawa import simulate
from hpc_grawa.cli.finished import FinishedRun, finished_config
from hpc_grawa.cli.flatness import How
from hpc_grawa.cli.landscape import landscape
from hpc_grawa.cli.measures import _grid
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError
from hpc_grawa.generalisation import conditional_information, granulated, psi, tau
from hpc_grawa.launch import own_slot
from hpc_grawa.runs.checkpoint import model_file, saved_models
from hpc_grawa.runs.record import RunRecord
from hpc_grawa.training.loop import fit


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


def trained(folder: Path, *words: str, world: int = 2) -> Path:
    """A finished run of a tiny network."""
    folder.mkdir(parents=True)
    given = [
        "--config=digits",
        "--budget.seconds=null",
        "--budget.steps=30",
        "--model.width=2",
        "--log.tensorboard=false",
    ]
    config = parse([*given, f"--run.name={folder.name}", f"--run.dir={folder.parent}", *words])
    simulate(world, lambda comm: fit(config, comm, new_folder=None if comm.rank else lambda: folder, speaks=False))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        own.plain_process(patch)
        return trained(tmp_path_factory.mktemp("runs") / "LGRAWA-0", "--method=LGRAWA", "--method.period=8")


def finished(run: Path) -> FinishedRun:
    return FinishedRun(run, finished_config(run, "test", "auto", None), SingleCommunicator(), own_slot())


def test_a_run_keeps_its_ranks_models_and_knows_its_start(run: Path) -> None:
    """The center lies between the ranks, which are a pull away from it; the start is that of its seed."""
    kept = finished(run)
    assert kept.ranks == saved_models(run) == 2
    weights = []
    for name in ("center", "rank 0", "rank 1"):
        kept.put(name)
        weights.append(torch.cat([p.detach().flatten() for p in kept.model.parameters()]))
    center, *ranks = weights
    assert not torch.equal(ranks[0], ranks[1])
    between = (ranks[0] - center) * (ranks[1] - center)
    assert float(between.max()) <= 1e-12  # on opposite sides in every coordinate
    start = kept.initial()
    assert start is not None
    again = finished(run).initial()
    assert again is not None and all(map(torch.equal, start.parameters(), again.parameters()))
    metrics = (run / "metrics.jsonl").read_text()
    other = run.parent / "other"
    other.mkdir()
    for file in ("config.yaml", "center.pt", "summary.json"):
        (other / file).write_bytes((run / file).read_bytes())
    (other / "metrics.jsonl").write_text(metrics.replace('"weights": "', '"weights": "0', 1))
    assert finished(other).initial() is None


def test_gradient_sharing_keeps_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert saved_models(trained(tmp_path / "a", "--method=DataParallel")) == 0
    assert saved_models(trained(tmp_path / "b", "--method=LocalSGD", "--save.ranks=false")) == 0
    assert not model_file(tmp_path / "b", 0).parent.exists()
    alone = called(capsys, "flatness", str(tmp_path / "b"), "--measures=valley", "--examples=50")
    assert alone.status == 0 and "valley     not measured: " in alone.said  # nor noted as if it were
    assert not (tmp_path / "b/flatness.json").exists()
    finished(tmp_path / "a").put("mean")  # is the center
    with pytest.raises(ConfigError, match=r"model is mean: must be center: .* has kept the models of 0 of 2 ranks"):
        finished(tmp_path / "b").put("mean")


FEW = ("--examples=100", "--steps=6", "--samples=2", "--lpf_samples=2", "--double")


def test_flatness_says_what_it_found_and_goes_on(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "spectra.png"
    first = called(capsys, "flatness", str(run), *FEW, "--figure", str(figure))
    assert first.status == 0, first.said
    for part in ("100 of 1,437 training examples, float64", "largest, smallest eigenvalue", "width of the valley"):
        assert part in first.said
    assert figure.stat().st_size > 10_000
    found = json.loads((run / "flatness.json").read_text())["center"][-1]
    assert found["ritz_values"] == 6 and len(found["valley_widths"]) == 2
    assert found["top_eigenvalues"][0] == found["largest_eigenvalue"] == max(found["spectra"][0][0])
    assert found["sum_of_ritz_values"] == pytest.approx(sum(found["spectra"][0][0]))
    far = [width for width in found["valley_widths"] if width is not None]
    assert min(far) > 0 and found["valley_width_at_least"] == pytest.approx(sum(far) / len(far))
    assert found["valley_width"] == (None if any(found["valley_cut"]) else found["valley_width_at_least"])
    assert not (run / "flatness").exists()  # what Lanczos's method was to go on with
    # Once more: nothing is measured again. With another setting: what depends on it.
    (run / "flatness.json").write_text(json.dumps({"center": [{**found, "loss": -1.0}]}))
    again = called(capsys, "flatness", str(run), *FEW)
    assert "-1" in again.said and json.loads((run / "flatness.json").read_text())["center"][-1]["loss"] == -1
    assert called(capsys, "flatness", str(run), *FEW, "--seed=1", "--measures=loss,spectrum").status == 0
    other = json.loads((run / "flatness.json").read_text())["center"][-1]
    assert other["loss"] == -1 and other["spectra"] != found["spectra"] and other["trace"] == found["trace"]
    table = called(capsys, "table", str(run))
    assert "largest eigenvalue" in table.said
    by = "6 Ritz values, ρ 0.05, ε 0.0005, σ 0.0005, M 2, κ 2, reach 1000, samples of the trace 2"
    exactly = f"of 1437 training examples, float64, {by}."
    assert f"- flatness: of the center, on 100 {exactly}" in table.said
    # On other examples, and on the first ones again, which is then the latest.
    assert called(capsys, "flatness", str(run), "--measures=loss", "--examples=50").status == 0
    assert "on 50 of 1437 training examples, float32." in called(capsys, "table", str(run)).said
    assert called(capsys, "flatness", str(run), "--measures=loss", "--examples=100", "--double").status == 0
    assert f"on 100 {exactly}" in called(capsys, "table", str(run)).said


def test_what_was_measured_stays_beside_what_is_measured_later(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By other settings of one measure, by other examples, for another table."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "flatness.json").unlink(missing_ok=True)
    few = ["--samples=2", "--lpf_samples=2", "--measures=loss,spectrum"]
    for words in (
        ["--examples=100", "--steps=4"],
        ["--examples=100", "--measures=sam"],
        ["--examples=50", "--steps=3"],
    ):
        assert called(capsys, "flatness", str(copy), *few, *words).status == 0
    entries = json.loads((copy / "flatness.json").read_text())["center"]
    assert [one["how"]["examples"] for one in entries] == [100, 50]
    assert set(entries[0]["measures"]) == {"loss", "spectrum", "sam"} and entries[0]["ritz_values"] == 4
    assert called(capsys, "flatness", str(copy), *few, "--examples=100", "--steps=4").status == 0
    again = json.loads((copy / "flatness.json").read_text())["center"]
    assert again == entries[::-1]  # the latest last
    (copy / "flatness.json").write_text('{"center": [1]}')
    for command in ("flatness", "table"):
        ended = called(capsys, command, str(copy))
        assert ended.status == 2 and "flatness.json is damaged" in ended.said and "Traceback" not in ended.said


def test_two_jobs_at_one_run_keep_each_others_results(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One measures again by another ρ, and is over while the other measures something else."""
    from hpc_grawa.cli import flatness as module

    copy, few = tmp_path / "copy", ["--examples=50", "--measures=sam"]
    shutil.copytree(run, copy)
    (copy / "flatness.json").unlink(missing_ok=True)
    assert called(capsys, "flatness", str(copy), *few).status == 0
    honest = module.measure

    def later(*given: Any) -> dict[str, Any]:
        monkeypatch.setattr(module, "measure", honest)
        assert called(capsys, "flatness", str(copy), *few, "--rho=0.1").status == 0
        return honest(*given)

    monkeypatch.setattr(module, "measure", later)
    assert called(capsys, "flatness", str(copy), *few, "--measures=loss").status == 0
    (both,) = json.loads((copy / "flatness.json").read_text())["center"]
    assert both["measures"]["sam"] == {"rho": 0.1} and "loss" in both
    monkeypatch.setattr(module, "measure", honest)
    (copy / "flatness.json").unlink()
    assert called(capsys, "flatness", str(copy), *few, "--rho=0.1").status == 0
    (alone,) = json.loads((copy / "flatness.json").read_text())["center"]
    assert both["sam_sharpness"] == alone["sam_sharpness"]


def test_lanczos_goes_on_where_it_was_cut_off(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as in one go, and no product is made twice; nothing of it stays."""
    from hpc_grawa.cli import flatness as module
    from hpc_grawa.flatness.objective import Objective

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    for folder in (straight, cut):
        shutil.copytree(run, folder)
        (folder / "flatness.json").unlink(missing_ok=True)
    words = ["--measures=spectrum", "--examples=100", "--steps=5", "--starts=2", "--double"]
    assert called(capsys, "flatness", str(straight), *words).status == 0
    honest, made = Objective.product, 0

    def product(self: Objective, direction: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == 8:
            raise KeyboardInterrupt
        return honest(self, direction)

    monkeypatch.setattr(module, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(Objective, "product", product)
    assert called(capsys, "flatness", str(cut), *words).status == 130
    assert len(list((cut / "flatness").glob("center-*"))) == 1
    # One by other settings comes to its end in between.
    assert called(capsys, "flatness", str(cut), *words, "--steps=2", "--starts=1").status == 0
    assert len(list((cut / "flatness").glob("center-*"))) == 1
    assert called(capsys, "flatness", str(cut), *words).status == 0
    assert made == 8 + 2 + 3 and not (cut / "flatness").exists()
    found, expected = (json.loads((f / "flatness.json").read_text())["center"][-1] for f in (cut, straight))
    assert found == expected


def test_flatness_of_a_folder_of_runs(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of its finished ones; and the table says where they were not measured alike."""
    for seed in ("0", "1"):
        shutil.copytree(run, tmp_path / "all" / f"LGRAWA-{seed}")
        (tmp_path / "all" / f"LGRAWA-{seed}" / "flatness.json").unlink(missing_ok=True)
    (tmp_path / "all" / "LGRAWA-2").mkdir()
    (tmp_path / "all" / "LGRAWA-2" / "metrics.jsonl").write_text("")
    ended = called(capsys, "flatness", str(tmp_path / "all"), "--measures=loss", "--examples=50")
    assert ended.status == 0 and "runs       2 of 3; the others are not finished" in ended.said, ended.said
    assert (tmp_path / "all/LGRAWA-0/flatness.json").read_text() == (
        tmp_path / "all/LGRAWA-1/flatness.json"
    ).read_text()

    def told_of(seed: int, *words: str) -> str:
        """What the table says, once that run is measured."""
        ended = called(capsys, "flatness", str(tmp_path / f"all/LGRAWA-{seed}"), *words)
        assert ended.status == 0, ended.said
        return " ".join(called(capsys, "table", str(tmp_path / "all")).said.split())

    alike = "- flatness: of the center, on 50 of 1437 training examples, float32"
    assert f"{alike}, ρ 0.05." in told_of(0, "--measures=sam", "--examples=50")  # which the other has not
    unlike = "- flatness was not measured alike, so do not compare it: LGRAWA on 50 of 1437 training examples, "
    unlike += "float32, ρ 0.05"
    assert f"{unlike} and 50" in told_of(1, "--measures=sam", "--examples=50", "--rho=0.1")
    assert f"{unlike} and 60 of" in told_of(1, "--measures=loss", "--examples=60")
    for folder, why in (("all/LGRAWA-2", "has no config.yaml"), ("nothing", "has no config.yaml")):
        ended = called(capsys, "flatness", str(tmp_path / folder))
        assert ended.status == 2 and why in ended.said, ended.said


def test_a_spectrum_goes_on_by_as_many_ranks(run: Path, tmp_path: Path) -> None:
    """Each has kept its part of the basis; others would lose it."""
    from hpc_grawa.cli.flatness import How, measure_runs, place_of_spectrum
    from hpc_grawa.flatness.measure import Settings
    from hpc_grawa.runs.checkpoint import Checkpoints

    folder = tmp_path / "cut"
    shutil.copytree(run, folder)
    (folder / "flatness.json").unlink(missing_ok=True)
    how, settings = How(examples=50), Settings(measures=("spectrum",), steps=3)

    def cut(comm: Communicator) -> None:
        kept = FinishedRun(folder, finished_config(folder, "test", "auto", None), comm, own_slot())
        told = {**how.said(how.objective(kept, comm), kept), **settings.of("spectrum")}
        checkpoints = Checkpoints(place_of_spectrum(folder, "center", told), comm, keep=1)
        assert not [*checkpoints.save(1, {"spectra": []}, {"how": told}), *checkpoints.settle()]

    simulate(2, cut)
    configs = {folder: finished_config(folder, "test", "auto", None)}
    with pytest.raises(ConfigError, match="ranks is 1: must be 2, who began the spectrum of center; or remove"):
        measure_runs(configs, settings, how, SingleCommunicator(), own_slot())
    assert list((folder / "flatness").glob("center-*/*/rank-0001.pt"))


@pytest.mark.parametrize("world", [1, 3])
def test_the_mean_of_the_ranks_models(run: Path, world: int) -> None:
    """With BatchNorm statistics of its own, the same on any number of ranks."""

    def body(comm: Communicator) -> list[torch.Tensor]:
        kept = FinishedRun(run, finished_config(run, "test", "auto", None), comm, own_slot())
        found = []
        for name in ("rank 0", "rank 1", "mean", "center"):
            kept.put(name)
            found.append(torch.cat([p.detach().flatten() for p in kept.model.parameters()]))
            if name == "mean":
                found.append(torch.cat([b.flatten() for n, b in kept.model.named_buffers() if n.endswith("_var")]))
        return found

    first, second, mean, spread, center = simulate(world, body)[0]
    assert torch.allclose(mean, (first + second) / 2, atol=1e-7) and not torch.equal(mean, center)
    alone = simulate(1, body)[0][3]
    assert torch.allclose(spread, alone, rtol=1e-5) and float(spread.min()) > 0
    state = torch.load(run / "center.pt", weights_only=True)
    centers = torch.cat([b.flatten() for n, b in state.items() if n.endswith("_var")])
    assert not torch.equal(spread, centers)


def test_flatness_of_each_rank(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = called(capsys, "flatness", str(run), *FEW, "--models=ranks", "--measures=loss,sam")
    assert ended.status == 0, ended.said
    found = json.loads((run / "flatness.json").read_text())
    assert {"rank 0", "rank 1"} <= set(found) and found["rank 0"][-1]["loss"] != found["rank 1"][-1]["loss"]


def test_the_loss_between_models(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Along lines from the center to its ranks, between runs, and on the plane through three of them."""
    few = ["--measures=loss", "--examples=60", "--points=5", "--double"]
    figure = tmp_path / "ranks.png"
    ended = called(capsys, "flatness", str(run), *few, f"--landscape={figure}")
    assert ended.status == 0, ended.said
    found = json.loads(figure.with_name(f"{figure.name}.json").read_text())

    def of_batch(folder: Path) -> float:
        assert called(capsys, "flatness", str(folder), *few, "--statistics=batch").status == 0
        return float(json.loads((folder / "flatness.json").read_text())["center"][-1]["loss"])

    center = of_batch(run)
    assert found["how"]["statistics"] == "batch"
    assert found["at"] == [-0.5, 0, 0.5, 1, 1.5] and list(found["lines"]) == ["rank 0", "rank 1"]
    assert all(one["losses"][1] == pytest.approx(center) for one in found["lines"].values())
    assert found["plane"]["places"]["center"] == [0, 0] and found["plane"]["through"] == ["center", "rank 0", "rank 1"]
    assert figure.stat().st_size > 10_000
    alone = trained(run.parent / "alone", "--method=MGRAWA")  # its center lies between its two ranks
    ended = called(capsys, "flatness", str(alone), *few, f"--landscape={figure}")
    assert ended.status == 0 and "without a plane" in ended.said, ended.said
    runs = [trained(run.parent / f"seed{seed}", "--method=LocalSGD", f"--run.seed={seed}") for seed in (1, 2)]
    figure = tmp_path / "runs.png"
    ended = called(capsys, "flatness", *map(str, (run, *runs)), *few, f"--landscape={figure}")
    assert ended.status == 0, ended.said
    found = json.loads(figure.with_name(f"{figure.name}.json").read_text())
    plane = found["plane"]
    assert plane["through"] == [run.name, "seed1", "seed2"] and np.shape(plane["losses"]) == (5, 5)
    assert found["lines"]["seed1"]["losses"][3] == pytest.approx(of_batch(runs[0]))  # not by another's BatchNorm
    assert found["lines"]["seed1"]["distance"] == pytest.approx(plane["places"]["seed1"][0])


def test_lines_go_between_the_same_models_on_several_ranks(run: Path, tmp_path: Path) -> None:
    """Whatever weights the ranks' models are made with, before one of the run's is put in place."""

    def distances(comm: Communicator) -> Any:
        torch.manual_seed(comm.rank)
        figure = tmp_path / f"{comm.size}.png"
        kept = FinishedRun(run, finished_config(run, "test", "auto", None), comm, own_slot(), double=True)
        landscape(kept, [], How(examples=60, double=True), comm, 3, figure)
        comm.barrier()
        lines = json.loads(figure.with_name(f"{figure.name}.json").read_text())["lines"]
        assert np.isfinite([one["losses"] for one in lines.values()]).all()
        return {name: one["distance"] for name, one in lines.items()}

    (alone,) = simulate(1, distances)
    assert simulate(2, distances) == [alone] * 2 and alone["rank 1"] > 0


def test_flatness_at_evaluations(tmp_path: Path) -> None:
    """It changes nothing of training, and is what is said of the last center afterwards."""
    words = ["--method=LGRAWA", "--method.period=8", "--eval.unit=steps", "--eval.every=15"]
    plain, measured = (trained(tmp_path / f"f{n}", *words, f"--eval.flatness={n}") for n in (0, 100))
    states = [torch.load(folder / "center.pt", weights_only=True) for folder in (plain, measured)]
    assert all(torch.equal(a, states[1][key]) for key, a in states[0].items())
    events = [json.loads(line) for line in (measured / "metrics.jsonl").read_text().splitlines()]
    found = [event for event in events if event["event"] == "flatness"]
    assert len(found) == sum(event["event"] == "evaluate" for event in events) >= 3
    assert {"gradient_norm", "sum_of_layer_norms", "sam_sharpness", "valley_width_at_least"} <= found[-1].keys()
    kept = finished(measured)
    kept.put("center")
    objective = How(examples=100).objective(kept, SingleCommunicator())
    assert found[-1]["examples"] == 100 and found[-1]["loss"] == pytest.approx(objective.value(), rel=1e-5)
    assert found[-1]["gradient_norm"] == pytest.approx(float(objective.gradient()[1].norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--measures=loss,flat"], "measures is flat: must be among loss, sam, entropy"),
        (["--models=mine"], "models is mine: must be some of center,mean,ranks"),
        (["--steps=0"], "steps is 0: must be at least 1"),
        (["--rho=nan"], "rho is nan: must be a positive number"),
        (["--examples=-1"], "examples is -1: must be at least 1, or 0 for all"),
        (["--figure=a.txt"], "a.txt: must end in .png"),
        (["--points=1"], "points is 1: must be at least 2"),
    ],
)
def test_what_flatness_cannot_do_is_named(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = called(capsys, "flatness", str(run), *words)
    assert ended.status == 2 and message in ended.said and ended.said.count("\n") == 1


def test_what_there_is_not_to_draw_is_told_before_anything_is_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = shutil.copytree(run, tmp_path / "new", ignore=shutil.ignore_patterns("flatness*"))
    ended = called(capsys, "flatness", str(new), "--measures=loss", f"--figure={tmp_path / 'a.png'}")
    assert ended.status == 2 and ended.said.count("\n") == 1
    assert "measures is loss: must have spectrum, which --figure draws, and no run has yet" in ended.said
    assert not (new / "flatness.json").exists()


@pytest.mark.slow
def test_measures_rank_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A grid of 2 x 2: each run is measured once; the table, the CSV and the figure say how well measures rank."""
    for width in (2, 4):
        for lr in (0.02, 0.1):
            given = [f"--model.width={width}", f"--optimizer.lr={lr}", "--data.augment=true"]
            words = [*given, "--method=LocalSGD"]
            trained(tmp_path / "runs" / f"{width}-{lr}", *words, "--budget.steps=60", world=1)
    csv, figure = tmp_path / "m.csv", tmp_path / "m.png"
    words = [str(tmp_path / "runs"), "--examples=200", "--bound=.3", f"--csv={csv}", f"--figure={figure}"]
    ended = called(capsys, "measures", *words)
    assert ended.status == 0, ended.said
    assert "4 of 4 runs; axes optimizer.lr, model.width" in ended.said and "path norm" in ended.said
    assert "- on 200 training examples, to a cross-entropy of " in ended.said
    line = re.findall(r"^\| path norm +\|.*", ended.said, re.M)[0]
    path = [cell.strip() for cell in line.split("|")]
    with csv.open() as file:
        columns = list(zip(*reader(file), strict=True))
    gaps, norms = (next([float(v) for v in c[1:]] for c in columns if c[0] == name) for name in ("gap", "path_norm"))
    found = tau(norms, gaps)
    along = granulated(norms, gaps, {c[0]: c[1:] for c in columns if c[0] in ("optimizer.lr", "model.width")})
    information = conditional_information(norms, gaps, {c[0]: c[1:] for c in columns[1:3]})
    assert path[2:7] == ["44", "4", f"{found.value:+.3f}", "6", f"{found.ties}"]
    assert (path[7], path[9]) == (f"{psi(along):+.3f}", f"{information:.3f}") and path[10:12] == ["+0.373", "+0.311"]
    assert re.search(r"^\| tau along +\| optimizer.lr \| model.width \|$", ended.said, re.M)
    assert figure.stat().st_size > 10_000
    rows = csv.read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("run,optimizer.lr,model.width,gap,")
    known = json.loads((tmp_path / "runs/2-0.1/measures.json").read_text())
    assert not known["left_out"] and known["values"]["frobenius_distance"] > 0
    again = called(capsys, "measures", words[0], str(tmp_path / "runs/2-0.1"), *words[1:])
    assert again.said.partition("| measure")[1:] == ended.said.partition("| measure")[1:]
    known["notes"] = ["this was kept"]
    (tmp_path / "runs/2-0.1/measures.json").write_text(json.dumps(known))
    kept = called(capsys, "measures", *words)
    assert "- this was kept (1 runs)" in kept.said and "this was kept" in csv.read_text()
    drawn = called(capsys, "measures", *words, "--seed=-1")
    assert drawn.status == 2 and "seed is -1: must be a whole number" in drawn.said
    few = called(capsys, "measures", str(tmp_path / "runs/2-0.1"))
    assert few.status == 2 and "runs are 1 of 1" in few.said
    axes = called(capsys, "measures", *words, "--axes=data.seed")
    assert axes.status == 2 and "axes is data.seed: must be among the settings in which runs differ" in axes.said
    # Settings that only one of two methods has are no axes by themselves.
    trained(tmp_path / "runs/LGRAWA", *given, "--method=LGRAWA", "--budget.steps=60", world=1)
    methods = called(capsys, "measures", *words)
    assert "5 of 5 runs; axes method, optimizer.lr, model.width" in methods.said, methods.said
    assert "- one with method, as they go together: method.period, " in methods.said


def test_what_spans_a_grid_of_runs() -> None:
    """Settings in which runs differ, but where they were made and looked at; those that go together are one."""
    pulls = {"method.pull": 0.3}, {"method.pull": 0.5}, {}, {}
    records = [
        RunRecord(Path(f"{number}"), {"state": "finished", "world_size": 1}, {}, {**settings, **pull})
        for number, pull in enumerate(pulls)
        for settings in [
            {
                "method": "LGRAWA" if pull else "DataParallel",
                "method.wire": "exact" if pull else "bf16",
                "optimizer.lr": (0.1, 0.2)[number % 2],
                "data.path": f"/data/{number % 2}",
                "eval.every": number,
                "run.seed": number,
            }
        ]
    ]
    grid = _grid(None, records)
    assert grid.axes == {"method": ["LGRAWA"] * 2 + ["DataParallel"] * 2, "optimizer.lr": ["0.1", "0.2"] * 2}
    assert grid.others == {"method.pull": ["0.3", "0.5", None, None]}
    assert grid.notes == [
        "one with method, as they go together: method.wire",
        "no axes, as not all runs have them: method.pull",
    ]
    one = _grid("optimizer.lr", records)
    assert list(one.axes) == ["optimizer.lr"] and list(one.others) == ["method", "method.pull"]
    with pytest.raises(
        ConfigError, match=r"axes is data\.path: must be among the settings in which runs differ: method"
    ):
        _grid("data.path", records)


def test_a_budget_ends_at_a_training_loss(tmp_path: Path) -> None:
    run = trained(
        tmp_path / "a", "--budget.train_loss=1.0", "--budget.steps=300", "--eval.unit=steps", "--eval.every=10"
    )
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in events if e["event"] == "evaluate" and e["part"] == "train"]
    assert summary["state"] == "finished" and summary["steps"] < 300
    assert all(loss > 1 for loss in losses[:-2]) and losses[-2] <= 1  # and once more at the end
    assert summary["center_train_loss"] <= 1.2


@pytest.mark.slow
def test_a_comparison_as_in_a_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--methods=LGRAWA,EASGD", "--seeds=1,2", "--grid=method.prox=0.05,0.01"]  # EASGD has none
    words = ["--config=digits", *few, "--budget.seconds=null", "--budget.steps=20", "--model.width=2"]
    ended = called(capsys, "compare", "--paper", *words, f"--run.dir={tmp_path}", "--run.name=p", "--device=cpu")
    assert ended.status == 0, ended.said
    lines = [line for line in ended.said.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if "communication (rounds)" in line)
    cells = [cell.strip() for cell in head.split("|")]
    assert {"test error, mean, %", "center, %", "largest eigenvalue"} <= set(cells)
    other = called(capsys, "compare", "--paper", "--config=demo")
    assert other.status == 2 and "must not be in a file beside --paper" in other.said
    rows = lines[lines.index(head) + 2 : lines.index(head) + 4]
    assert sorted(row.split()[1] for row in rows) == ["EASGD", "LGRAWA"] and all("±" in row for row in rows)
    assert len(list((tmp_path / "p").glob("*/summary.json"))) == 6
    again = called(
        capsys, "compare", "--paper", *words, f"--run.dir={tmp_path}", "--run.name=p", "--device=cpu", "--launcher=env"
    )
    assert again.status == 0 and all(row in again.said for row in (head, *rows)), again.said
