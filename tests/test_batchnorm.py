"""Running statistics, whatever the layer and however it is called: recalibrated, and pooled in a round's message."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from own import network
from torch import Tensor, nn

from hpc_grawa import LocalSGD, ParameterVector, simulate
from hpc_grawa.batchnorm import pool
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.evaluate import recalibrate

ALONE = SingleCommunicator()


class Calls(nn.Module):
    """A layer, and how a forward pass calls it."""

    def __init__(self, norm: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.call, self.scale = norm, call, nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Any:
        return self.call(self.norm, x)


def numbers(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def statistics(calls: list[Tensor]) -> tuple[Any, Any]:
    """Mean of means and mean(E[x²]) - mean², by NumPy, of what a layer was given."""
    rows = [np.moveaxis(x.double().numpy(), 1, 0).reshape(x.shape[1], -1) for x in calls]
    mean = np.mean([r.mean(1) for r in rows], axis=0)
    return mean, np.mean([r.var(1) + (r.mean(1) - mean) ** 2 for r in rows], axis=0)


def assert_has(norm: Any, mean: Any, var: Any, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(norm.running_mean.double().numpy(), mean, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(norm.running_var.double().numpy(), var, rtol=rtol)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (8, 3)),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(3), (8, 3, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 3, 2)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (4, 3, 5)),
    "without momentum": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 5, 2)),
    "without weights": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_has_the_statistics_of_its_calls(name: str) -> None:
    make, shape = LAYERS[name]
    batches = [numbers(*shape, seed=i, mean=i) for i in range(3)]
    model = Calls(make(), lambda norm, x: norm(x)).double()
    recalibrate(model, batches, ALONE)
    assert_has(model.norm, *statistics(batches))


def test_a_layer_normalises_in_eval_mode_as_by_the_batch_it_was_recalibrated_on() -> None:
    for make, shape in LAYERS.values():
        model, x = Calls(make(), lambda norm, x: norm(x)).double(), numbers(*shape, mean=3)
        recalibrate(model, [x], ALONE)
        by_batch = copy.deepcopy(model).train()(x)
        torch.testing.assert_close(model.eval()(x), by_batch)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_instance_norm_has_the_mean_of_the_variances_within_instances(dims: int) -> None:
    """As in training, where each instance is normalised by itself; a single one may come without its dimension."""
    kind: Any = getattr(nn, f"InstanceNorm{dims}d")
    shape = (5, 4, 3)[:dims]
    batches = [numbers(6, 2, *shape, mean=1), numbers(1, 2, *shape, seed=1)]
    model = Calls(kind(2, track_running_stats=True), lambda norm, x: norm(x if len(x) > 1 else x[0])).double()
    recalibrate(model, batches, ALONE)
    rows = [x.flatten(2).numpy() for x in batches]
    mean, var = (np.mean([getattr(r, what)(2).mean(0) for r in rows], axis=0) for what in ("mean", "var"))
    assert_has(model.norm, mean, var)


def chosen(x: Tensor) -> bool:
    return bool(x.mean() > 0)


CALLS: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Tensor], list[Tensor]]]] = {
    "once": (lambda norm, x: norm(x), lambda x: [x]),
    "twice": (lambda norm, x: norm(x) + norm(2 * x + 1), lambda x: [x, 2 * x + 1]),
    "by keyword": (lambda norm, x: norm(input=x), lambda x: [x]),
    "on parts that may be empty": (
        lambda norm, x: norm(x[: 4 * bool(x.mean() > 0)]),
        lambda x: [x] if x.mean() > 0 else [],
    ),
    "for some batches": (lambda norm, x: norm(x) if x.mean() > 0 else x, lambda x: [x] if x.mean() > 0 else []),
}


@pytest.mark.parametrize("name", CALLS)
def test_ranks_share_the_statistics_of_all_their_calls(on_ranks: Ranks, name: str) -> None:
    """However many batches and calls each has."""
    call, given = CALLS[name]
    batches = [[numbers(4, 3, 6, seed=7 * m + i, mean=0.5 - i % 2) for i in range(m + 1)] for m in range(on_ranks.size)]

    def body(comm: Communicator) -> Any:
        model = Calls(nn.BatchNorm1d(3), call).double()
        recalibrate(model, batches[comm.rank], comm)
        return model.norm

    calls = [x for own in batches for batch in own for x in given(batch)]
    for norm in on_ranks(body):
        assert_has(norm, *statistics(calls))


def test_a_layer_that_is_not_reached_or_trains_in_eval_mode_keeps_its_statistics(on_ranks: Ranks) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen, self.scale = *(nn.BatchNorm1d(2) for _ in range(3)), nn.Linear(1, 1)
            self.train()

        def train(self, mode: bool = True) -> Partly:
            super().train(mode)
            self.frozen.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.frozen(self.used(x))
            return y

    def body(comm: Communicator) -> list[Tensor]:
        kept = []
        for was_training in (True, False):
            model = Partly().train(was_training)
            for norm in (model.unused, model.frozen):
                norm.running_mean.fill_(7.0), norm.running_var.fill_(4.0)
            recalibrate(model, [numbers(8, 2).float()], comm)
            assert not model.used.running_mean.eq(0).any()
            assert model.used.training == was_training and not model.frozen.training
            kept += [t.clone() for norm in (model.unused, model.frozen) for t in (norm.running_mean, norm.running_var)]
        return kept

    for found in on_ranks(body):
        assert [t.tolist() for t in found] == [[7, 7], [4, 4]] * 4


def test_a_layer_frozen_by_hand_in_a_model_that_trains_stays_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].eval()
    recalibrate(model, [numbers(8, 2, mean=3).float()], ALONE)
    assert model[0].running_mean.tolist() == [0, 0] and not model[2].running_mean.eq(0).any()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_recalibrated_statistics_are_those_of_all_batches_of_all_ranks(world: int) -> None:
    each = 3
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(world, each, 6, 1, 5, 5, generator=generator, dtype=torch.float64) * 3 + 1

    def body(comm: Communicator) -> nn.Sequential:
        model = network()
        model[1].running_mean.fill_(7)  # forgotten
        recalibrate(model, batches[comm.rank], comm)
        return model

    # What the layers see, by NumPy: the second layer's inputs come through the first's batch statistics.
    model = network()
    first, second = [], []
    with torch.no_grad():
        for batch in batches.flatten(0, 1):
            seen = model[0](batch)
            first.append(seen.transpose(0, 1).flatten(1).numpy())
            normed = nn.functional.batch_norm(seen, None, None, model[1].weight, model[1].bias, training=True)
            second.append(model[4](normed.flatten(1)).T.numpy())
    for result in simulate(world, body):
        for layer, seen in ((result[1], first), (result[5], second)):
            mean = np.mean([x.mean(1) for x in seen], axis=0)
            squares = np.mean([(x**2).mean(1) for x in seen], axis=0)
            np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(layer.running_var, squares - mean**2, rtol=1e-5)


def test_recalibration_changes_nothing_else() -> None:
    model = network()
    model[0].eval()  # a mode of its own
    before = copy.deepcopy(model.state_dict())
    batches = torch.randn(2, 6, 1, 5, 5).double()
    streams = torch.get_rng_state()
    recalibrate(model, batches, ALONE)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {f"{i}.running_{what}" for i in (1, 5) for what in ("mean", "var")}
    assert [m.training for m in model] == [False] + [True] * 6
    assert torch.equal(torch.get_rng_state(), streams)


@pytest.mark.parametrize("where", [0.0, 5e3, 1e6])
def test_a_small_variance_far_from_zero_is_exact_to_what_numbers_there_hold(where: float) -> None:
    batches = [numbers(512, 3, seed=i, mean=where).float() for i in range(4)]
    model = Calls(nn.BatchNorm1d(3), lambda norm, x: norm(x))
    recalibrate(model, batches, ALONE)
    np.testing.assert_allclose(model.norm.running_var.numpy(), statistics(batches)[1], rtol=1e-3)


def test_the_layers_of_a_compiled_model_are_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    compiled, x = torch.compile(model, backend="eager"), numbers(8, 2, mean=3).float()
    compiled(x)  # compiled before it is watched
    recalibrate(compiled, [x], ALONE)
    with torch.no_grad():
        assert_has(model[1], *statistics([model[0](x)]), rtol=1e-5)


@pytest.mark.parametrize("where", [0.0, 5e3, 1e5])
def test_pooled_variances_far_from_zero_do_not_cancel(on_ranks: Ranks, where: float) -> None:
    """In a message of fp32, at the first round as at later ones; the oracle has what the ranks hold in float64."""
    layers = nn.BatchNorm1d, nn.InstanceNorm1d

    def body(comm: Communicator) -> list[list[list[Tensor]]]:
        model = nn.Sequential(nn.Linear(2, 2), *(kind(3, track_running_stats=True) for kind in layers))
        run = LocalSGD(period=1, buffers="average").build(
            comm, ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1)
        )
        seen = []
        for turn in range(3):
            for norm in model[1:]:
                norm.running_mean.copy_(numbers(3, seed=9 * comm.rank + turn, mean=where * (1 + turn)))
                norm.running_var.copy_(numbers(3, seed=99 * comm.rank + turn).abs() + 0.5)
            before = [[norm.running_mean.clone(), norm.running_var.clone()] for norm in model[1:]]
            run.after_step()
            seen.append([*before, *([norm.running_mean.clone(), norm.running_var.clone()] for norm in model[1:])])
        return seen

    results = on_ranks(body)
    for turn in range(3):
        for i in range(2):
            means, variances = (torch.stack([r[turn][i][k] for r in results]).double() for k in (0, 1))
            mean, var = means.mean(0), variances.mean(0)
            if i == 0:
                var += means.var(0, correction=0)
            for result in results:
                torch.testing.assert_close(result[turn][2 + i][0].double(), mean, rtol=2e-7, atol=1e-6)
                torch.testing.assert_close(result[turn][2 + i][1].double(), var, rtol=1e-4, atol=0)


def test_statistics_that_all_ranks_have_alike_survive_rounds_bit_for_bit(on_ranks: Ranks) -> None:
    """Those of a frozen layer; also on a rank that is healed."""
    mean, var = (numbers(3, seed=i).abs().float() * 1e3 for i in (1, 2))

    def body(comm: Communicator, buffers: Any) -> tuple[Tensor, Tensor]:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
        model[0].eval()
        model[0].running_mean.copy_(mean), model[0].running_var.copy_(var)
        vector = ParameterVector(model)
        run = LocalSGD(period=1, buffers=buffers).build(comm, vector, torch.optim.SGD(model.parameters(), 0.1))
        for turn in range(4):
            if turn == 1 and comm.rank == 1:
                vector.data.fill_(torch.nan)
            run.after_step()
        assert vector.data.isfinite().all()
        return model[0].running_mean, model[0].running_var

    for buffers in ("average", "recalibrate"):
        for found in on_ranks(lambda comm, buffers=buffers: body(comm, buffers)):
            assert torch.equal(found[0], mean) and torch.equal(found[1], var)


@pytest.mark.parametrize("all_broken", [False, True])
def test_statistics_that_are_not_finite_do_not_count(on_ranks: Ranks, all_broken: bool) -> None:
    """Of a rank whose parameters are; where none has finite ones, each keeps what it has. In rounds as in pooling."""

    def body(comm: Communicator, together: Callable[[nn.Module, Any], None]) -> list[float]:
        model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
        run = LocalSGD(period=1, buffers="average").build(
            comm, ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1)
        )
        model[0].running_mean.fill_(comm.rank + 1.0)
        if comm.rank > 0 or all_broken:
            model[0].running_var.fill_(torch.inf)
        together(model, run)
        return [model[0].running_mean.item(), model[0].running_var.item()]

    for together in (lambda model, run: run.after_step(), lambda model, run: pool(model, run.comm)):
        for rank, found in enumerate(on_ranks(lambda comm, together=together: body(comm, together))):
            assert found == ([rank + 1.0, math.inf] if all_broken else [1.0, 1.0])
