"""Several runs on the same ranks: two models that train each other, two optimizers of one model, phase after phase."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Ranks
from table import METHODS, is_, kinds, paced
from test_data_parallel import MIB, USES, branches, expected_run, launches_recorded
from test_data_parallel import loss_of as branches_loss
from test_distributed_optimizer import flat, gradient, line, linear
from torch import Tensor, nn, optim

from hpc_grawa import (
    DataParallel,
    DistributedOptimizer,
    LocalLGRAWA,
    LocalSGD,
    Method,
    ParameterVector,
    simulate,
)
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError, LostView, NonFinite, RanksDisagree
from hpc_grawa.methods.base import _state_told
from hpc_grawa.periods import PostLocal
from hpc_grawa.training.loop import fit

PHASES: dict[str, Method] = {
    **{name: paced(name, 3) for name in kinds()},
    "LocalSGD, pooled": LocalSGD(period=3, rounds="pooled"),
}


# ---------------------------------------------------------------------------------------------------------
# Two models, two optimizers.
# ---------------------------------------------------------------------------------------------------------


def adversaries() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(2, 3, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64)


def losses(g: nn.Module, d: nn.Module, rank: int, step: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    data = torch.Generator().manual_seed(1000 * rank + step)
    noise, real = (torch.randn(8, n, generator=data, dtype=torch.float64) for n in (2, 3))
    return lambda: -d(g(noise)).tanh().mean(), lambda: (d(g(noise).detach()).tanh() - d(real).tanh()).mean()


@pytest.mark.parametrize("latest", ["generator", "discriminator"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_generator_and_a_discriminator(on_ranks: Ranks, frozen: bool, latest: str) -> None:
    """The first's loss passes through the second, whose gradients of that pass are thrown away, or never made."""
    steps = 4

    def body(comm: Communicator) -> list[Tensor]:
        g, d = adversaries()

        def begin(model: nn.Module) -> Any:
            plain = optim.Adam(model.parameters(), 0.1)
            return DistributedOptimizer(plain, model, DataParallel(bucket_mb=1e-9), comm=comm)

        if latest == "discriminator":
            of_g, of_d = begin(g), begin(d)
        else:
            of_d, of_g = begin(d), begin(g)
        for step in range(steps):
            loss_g, loss_d = losses(g, d, comm.rank, step)
            of_g.zero_grad()
            d.requires_grad_(not frozen)
            loss_g().backward()
            d.requires_grad_(True)
            of_g.step()
            of_d.zero_grad()
            loss_d().backward()
            of_d.step()
        return [flat(g), flat(d)]

    g, d = adversaries()
    of_g, of_d = optim.Adam(g.parameters(), 0.1), optim.Adam(d.parameters(), 0.1)
    for step in range(steps):
        for which, optimizer in enumerate((of_g, of_d)):
            g.zero_grad()
            d.zero_grad()
            parts = [losses(g, d, rank, step)[which]() for rank in range(on_ranks.size)]
            torch.stack(parts).mean().backward()
            optimizer.step()
    results = on_ranks(body)
    for result in results:
        torch.testing.assert_close(result, [flat(g), flat(d)], rtol=1e-9, atol=1e-9)
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("bucket", [1, 10**9])
@pytest.mark.parametrize("use", ["all in order", "another order on each rank", "unused on some ranks", "used by turns"])
def test_two_optimizers_of_one_model_and_one_backward_pass(on_ranks: Ranks, use: str, bucket: int) -> None:
    """Each has a part of the parameters, as Muon and AdamW; messages have one order whatever order hooks fire in."""
    steps = 5

    def body(comm: Communicator) -> tuple[list[Tensor], list[str]]:
        model = branches()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers = []
        for part in (trained[::2], trained[1::2]):
            plain = optim.SGD(part, 0.1, momentum=0.9, weight_decay=0.5)
            method = DataParallel(bucket_mb=bucket / MIB)
            optimizers.append(DistributedOptimizer(plain, nn.ParameterList(part), method, comm=comm))
        states: list[Tensor] = []
        events: list[str] = []
        with launches_recorded(comm, events):
            for step in range(steps):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                branches_loss(model, comm.rank, step, 0, USES[use](comm.rank, step, 0)).backward()
                for optimizer in optimizers:
                    optimizer.step()
                states.append(nn.utils.parameters_to_vector(trained).detach().clone())
        return states, [e for e in events if "launch" in e]

    results = on_ranks(body)
    expected = expected_run(on_ranks.size, USES[use], steps, 1)
    for states, launched in results:
        assert launched == results[0][1]
        for ours, theirs in zip(states, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("use", ["another order on each rank", "unused on some ranks"])
def test_two_aggregators_may_be_finished_in_any_order(on_ranks: Ranks, use: str, first: int) -> None:
    """In a loop of one's own; some of the later one's buckets have left then, on each rank perhaps others."""
    steps = 4

    def body(comm: Communicator) -> Tensor:
        model = branches()
        trained = [p for p in model.parameters() if p.requires_grad]
        pairs = []
        for part in (trained[::2], trained[1::2]):
            optimizer = optim.SGD(part, 0.1, momentum=0.9, weight_decay=0.5)
            vector = ParameterVector(nn.ParameterList(part))
            pairs.append((optimizer, DataParallel(bucket_mb=1e-9).build(comm, vector, optimizer)))
        for step in range(steps):
            for optimizer, run in pairs:
                run.aggregator.zero_grad(optimizer)
                run.aggregator.start()
            branches_loss(model, comm.rank, step, 0, USES[use](comm.rank, step, 0)).backward()
            for optimizer, run in (pairs[first], pairs[1 - first]):
                run.aggregator.finish()
                optimizer.step()
                run.after_step()
        return nn.utils.parameters_to_vector(trained).detach().clone()

    expected = expected_run(on_ranks.size, USES[use], steps, 1)[-1]
    for ours in on_ranks(body):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_two_runs_that_average_with_words_under_way(on_ranks: Ranks) -> None:
    """Each is what it is alone, though the words and rounds of both cross."""
    methods = LocalSGD(period=6), LocalLGRAWA(period=4)

    def body(comm: Communicator, which: tuple[int, ...]) -> dict[int, Tensor]:
        runs = {}
        for i in which:
            model = linear(i)
            optimizer = optim.SGD(model.parameters(), 0.01)
            run = methods[i].build(comm, ParameterVector(model), optimizer, control_every=2 + i)
            runs[i] = model, optimizer, run
        for step in range(13):
            for i, (model, optimizer, run) in runs.items():
                optimizer.zero_grad()
                gradient(model, comm.rank + i, step)
                optimizer.step()
                run.after_step()
        for _, _, run in runs.values():
            run.finish()
        return {i: run.center.clone() for i, (_, _, run) in runs.items()}

    both, first, second = (on_ranks(lambda c, w=w: body(c, w)) for w in ((0, 1), (0,), (1,)))
    for rank in range(on_ranks.size):
        assert torch.equal(both[rank][0], first[rank][0]) and torch.equal(both[rank][1], second[rank][1])


# ---------------------------------------------------------------------------------------------------------
# Phase after phase.
# ---------------------------------------------------------------------------------------------------------


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 1, dtype=torch.float64))


def train(model: nn.Module, optimizer: Any, rank: int, steps: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        inputs, targets = line(rank, int(torch.randint(1000, ())))
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(steps):
        optimizer.step(closure)


def probe_of(model: nn.Module, rank: int) -> Callable[[], Tensor]:
    return lambda: model(line(rank, 99)[0]).square().mean()


@pytest.mark.parametrize("name", PHASES)
def test_a_layer_is_unfrozen_in_a_second_phase(on_ranks: Ranks, name: str) -> None:
    """The way that errors name; the second phase is that of a fresh process which begins where the first ended."""

    def phase(comm: Communicator, model: nn.Module, kept: optim.Optimizer | None = None) -> Any:
        plain = optim.SGD(model.parameters(), 0.01) if kept is None else kept
        optimizer = DistributedOptimizer(plain, model, PHASES[name], comm=comm, probe=probe_of(model, comm.rank))
        torch.manual_seed(comm.rank)
        train(model, optimizer, comm.rank, 5)
        optimizer.run.finish()
        optimizer.run.vector.data.copy_(optimizer.run.center)
        return optimizer

    def body(comm: Communicator) -> list[Tensor]:
        model = layers()
        model[0].requires_grad_(False)
        before = flat(model[0])
        optimizer = phase(comm, model)
        assert torch.equal(flat(model[0]), before)
        hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
        assert not any([*hooks, *(module._forward_pre_hooks for module in model.modules())])
        fresh = layers()
        fresh.load_state_dict(model.state_dict())
        for each, kept in ((model, optimizer), (fresh, None)):
            each.requires_grad_(True)
            phase(comm, each, kept)
        assert not torch.equal(flat(model[0]), before)
        return [flat(model), flat(fresh)]

    results = on_ranks(body)
    for ours, fresh in results:
        assert torch.equal(ours, results[0][0])
        # Whose step a pooled one is, is chance where ranks are processes.
        assert torch.equal(ours, fresh) or ("pooled" in name and on_ranks.backend != "simulated")


@pytest.mark.parametrize("method", [DataParallel(), LocalSGD(period=PostLocal(2), sharing=DataParallel())], ids=str)
def test_momenta_that_differ_are_told_before_gradients_are_shared(on_several_ranks: Ranks, method: Method) -> None:
    """Replicas that step by one gradient and by momenta of their own would part in silence."""

    def body(comm: Communicator) -> Tensor:
        model = linear()
        plain = optim.SGD(model.parameters(), 0.01, momentum=0.9)
        first = DistributedOptimizer(plain, model, LocalSGD(period=2), comm=comm)
        train(model, first, comm.rank, 4)
        first.run.finish()
        with pytest.raises(RanksDisagree, match=r"rank 1 has an optimizer that has made steps \(state .*load rank 0's"):
            DistributedOptimizer(plain, model, method, comm=comm)
        for state in plain.state.values():
            comm.broadcast(state["momentum_buffer"], 0, "setup").wait()
        second = DistributedOptimizer(plain, model, method, comm=comm)
        train(model, second, comm.rank, 2)
        second.run.finish()
        return flat(model)

    results = on_several_ranks(body)
    assert all(torch.equal(ours, results[0]) for ours in results)


def test_momenta_are_compared_by_their_numbers_wherever_they_lie() -> None:
    """A view of a larger tensor, as a loaded checkpoint may hold, is what its copy is."""
    told = set()
    for larger in (False, True):
        model = linear()
        plain = optim.SGD(model.parameters(), 0.01, momentum=0.9)
        gradient(model, 0, 0)
        plain.step()
        for state in plain.state.values():
            momentum = state["momentum_buffer"]
            room = momentum.new_full((2, *momentum.shape), torch.nan)
            state["momentum_buffer"] = room[1].copy_(momentum) if larger else momentum
        told.add(_state_told(plain))
    assert len(told) == 1


@pytest.mark.parametrize("trained", [True, False], ids=["unfrozen", "frozen"])
@pytest.mark.parametrize("name", ["DataParallel", "LocalSGD", "LocalLGRAWA"])
def test_freezing_and_unfreezing_are_told_at_the_next_step(on_ranks: Ranks, name: str, trained: bool) -> None:
    def body(comm: Communicator) -> None:
        model = layers()
        model[0].requires_grad_(not trained)
        optimizer = DistributedOptimizer(optim.SGD(model.parameters(), 0.01), model, PHASES[name], comm=comm)
        train(model, optimizer, comm.rank, 1)
        model[0].requires_grad_(trained)
        message = r"'0\.weight' was .*frozen .* finish\(\) .* requires_grad, and a new optimizer"
        with pytest.raises(LostView, match=message):
            train(model, optimizer, comm.rank, 1)
        optimizer.run.close()

    on_ranks(body)


@pytest.mark.parametrize("where", ["in the model", "elsewhere"])
@pytest.mark.parametrize("name", ["DataParallel", "LocalSGD", "LocalLGRAWA"])
def test_a_layer_that_the_optimizer_is_given_later_is_told_at_the_next_step(name: str, where: str) -> None:
    def body(comm: Communicator) -> None:
        model, layer = layers(), nn.Linear(1, 1, dtype=torch.float64)
        optimizer = DistributedOptimizer(optim.SGD(model.parameters(), 0.01), model, PHASES[name], comm=comm)
        train(model, optimizer, comm.rank, 1)
        optimizer.add_param_group({"params": list(layer.parameters())})
        if where == "in the model":
            model.extra = layer
        with pytest.raises(LostView, match=r"'extra\.weight' was added" if where == "in the model" else "was given"):
            train(model, optimizer, comm.rank, 1)
        optimizer.run.close()

    simulate(2, body)


def test_steps_after_the_end_are_refused() -> None:
    model = linear()
    vector = ParameterVector(model)
    plain = optim.SGD(model.parameters(), 0.01)
    run = LocalSGD(period=2).build(SingleCommunicator(), vector, plain)
    run.finish()
    with pytest.raises(RuntimeError, match=r"after the run has ended .* build a new run"):
        run.after_step()
    optimizer = DistributedOptimizer(plain, model, DataParallel(), comm=SingleCommunicator())
    optimizer.run.close()
    gradient(model, 0, 0)
    with pytest.raises(RuntimeError, match=r"after the run has ended .* wrap it once more"):
        optimizer.step()


@pytest.mark.parametrize("name", PHASES)
def test_a_run_that_has_ended_leaves_no_hook(name: str) -> None:
    model = linear()
    optimizer: Any = optim.SGD(model.parameters(), 0.01)
    optimizer = DistributedOptimizer(
        optimizer, model, PHASES[name], probe=probe_of(model, 0), comm=SingleCommunicator()
    )
    optimizer.run.close()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def test_a_second_run_that_shares_the_same_gradients_is_refused_until_the_first_has_ended() -> None:
    model = linear()

    def begin() -> Any:
        plain = optim.SGD(model.parameters(), 0.1)
        return DistributedOptimizer(plain, model, DataParallel(), comm=SingleCommunicator())

    first = begin()
    with pytest.raises(ConfigError, match=r"'weight' is shared already, .*optimizer\.run\.finish\(\)"):
        begin()
    first.run.finish()
    begin()


@pytest.mark.parametrize("name", [name for name in kinds("averages") if not is_(name, "centered")])
def test_before_the_first_round_there_is_no_center(name: str) -> None:
    def body(comm: Communicator) -> list[Tensor]:
        model = layers()
        plain = optim.SGD(model.parameters(), 0.01)
        optimizer = DistributedOptimizer(plain, model, PHASES[name], comm=comm, probe=probe_of(model, comm.rank))
        torch.manual_seed(comm.rank)
        train(model, optimizer, comm.rank, 2)
        with pytest.raises(RuntimeError, match=r"before the first round: .* run\.finish\(\)"):
            _ = optimizer.run.center
        train(model, optimizer, comm.rank, 1)
        kept = optimizer.run.center.clone()
        train(model, optimizer, comm.rank, 3)
        return [kept, optimizer.run.center]

    (first, second), (kept, live) = simulate(2, body)
    assert torch.equal(first, kept) and torch.equal(second, live) and not torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------------
# Cut off and resumed.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [2, 5])
@pytest.mark.parametrize("name", [name for name in PHASES if "pooled" not in name])
def test_a_loop_resumed_by_model_optimizer_and_run_is_bit_equal(on_ranks: Ranks, name: str, cut: int) -> None:
    """Cut before the first round, of period 3, and in the middle of the second."""

    def begin(comm: Communicator, seed: int) -> tuple[nn.Module, Any]:
        model = linear(seed)
        own_momentum = name in METHODS and is_(name, "momentum")
        p = model.parameters()
        plain = optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1) if own_momentum else optim.Adam(p, 0.01)
        probe = probe_of(model, comm.rank)
        return model, DistributedOptimizer(plain, model, PHASES[name], comm=comm, probe=probe)

    def go_on(comm: Communicator, model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:

            def closure(step: int = step) -> float:
                optimizer.zero_grad()
                gradient(model, comm.rank, step)
                return float(step + comm.rank)

            optimizer.step(closure)

    def body(comm: Communicator, resumes: bool) -> list[Tensor]:
        model, optimizer = begin(comm, 0)
        go_on(comm, model, optimizer, range(cut))
        if resumes:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), optimizer.run.state_dict()], file)
            optimizer.run.close()
            model, optimizer = begin(comm, 1)
            file.seek(0)
            for part, state in zip((model, optimizer, optimizer.run), torch.load(file), strict=True):
                part.load_state_dict(state)
        go_on(comm, model, optimizer, range(cut, 10))
        optimizer.run.finish()
        return [flat(model), optimizer.run.center.clone()]

    for ours, theirs in zip(on_ranks(lambda c: body(c, True)), on_ranks(lambda c: body(c, False)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", ["DataParallel", "LGRAWA --method.period=2"])
def test_ranks_whose_run_has_diverged_make_another(
    on_ranks: Ranks, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing left under way: a control word is, where a gradient that is not finite ends the run."""
    words = ["--config=digits", "--budget.seconds=null", "--budget.steps=4", "--data.batch_size=8"]
    words += ["--run.control_every=1", "--eval.bn_batches=1", *f"--method={method}".split()]
    honest, works = Communicator._start, []

    def start(*args: Any, **kwargs: Any) -> Any:
        works.append(honest(*args, **kwargs))
        return works[-1]

    monkeypatch.setattr(Communicator, "_start", start)

    def body(comm: Communicator) -> float:
        with pytest.raises(NonFinite):
            fit(parse([*words, "--optimizer.lr=1e20"]), comm, speaks=False)
        return float(fit(parse(words), comm, speaks=False)["steps"])

    assert set(on_ranks(body)) == {4}
    assert works and not [work for work in works if work._result is None]
