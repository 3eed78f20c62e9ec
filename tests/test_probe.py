"""The gradient of a probe is that of training without dropout, and nothing of it remains (T12)."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_hooks import Broken
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpc_grawa import LGRAWA, ParameterVector, random_streams, simulate
from hpc_grawa.averaging.probe import probe_gradient
from hpc_grawa.averaging.scores import GradientNorm
from hpc_grawa.comm import Communicator


class Everything(nn.Module):
    """BatchNorm, dropout, attention, a tied weight, a frozen layer and random numbers of every stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.first = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        h = F.dropout(self.frozen(self.first(self.norm(x))), 0.5, self.training)[None]
        h = self.attention(h, h, h)[0][0]
        return self.last(torch.tanh(h)) + noise


def everything() -> Everything:
    torch.manual_seed(0)
    return Everything()


INPUT = torch.linspace(-2, 2, 24).reshape(6, 4)


def state_of_the_world(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    return [
        [p.detach().clone() for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [(name, b.clone()) for name, b in model.named_buffers()],
        [(name, id(p), p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        [(name, id(b)) for name, b in model.named_buffers()],
        [module.training for module in model.modules()],
        [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
        (torch.is_grad_enabled(), torch.get_default_dtype()),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_t12_probing_leaves_everything_bit_identical(grad_enabled: bool) -> None:
    model = everything()
    vector = ParameterVector(model)
    optimizer = torch.optim.SGD(vector.parameters, 0.1, momentum=0.9)
    model(INPUT).square().mean().backward()
    optimizer.step()
    model.first.bias.grad = None
    model.attention.eval()  # a mode of its own
    fired: list[str] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda grad, name=name: fired.append(name))
            p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    score = GradientNorm(vector, vector.layers(), lambda: model(INPUT).square().mean(), "layers")
    before = state_of_the_world(model, optimizer)
    with torch.set_grad_enabled(grad_enabled):
        norms = score.take()
        after = state_of_the_world(model, optimizer)
        before[-1] = after[-1]
        assert torch.is_grad_enabled() == grad_enabled
    assert norms.shape == (len(vector.names),) and (norms[:-1] > 0).any()
    assert norms[vector.names.index("unused")] == math.inf  # it has no gradient
    assert fired == []
    assert same(before, after)
    vector.check()


def test_a_probe_that_raises_leaves_no_trace_either() -> None:
    model = everything()
    vector = ParameterVector(model)
    optimizer = torch.optim.SGD(vector.parameters, 0.1)

    def probe() -> Tensor:
        model(INPUT)
        raise ZeroDivisionError

    before = state_of_the_world(model, optimizer)
    with pytest.raises(ZeroDivisionError):
        probe_gradient(vector, probe)
    assert same(before, state_of_the_world(model, optimizer))


def test_a_probe_may_be_a_module_that_holds_the_model() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(3, 1)

        def forward(self) -> Tensor:
            return self.model(torch.ones(2, 3)).square().mean()

    whole = Square()
    for model in (whole, whole.model):
        vector = ParameterVector(model)
        gradient = probe_gradient(vector, whole)
        vector.check()
        whole.zero_grad()
        whole().backward()
        assert same(list(gradient), [p.grad for p in vector.parameters])


def test_the_probes_gradient_is_that_of_backward() -> None:
    model = everything().eval()
    vector = ParameterVector(model)

    def probe() -> Tensor:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return model(INPUT).square().mean()

    gradients = probe_gradient(vector, probe)
    probe().backward()
    for name, p, gradient in zip(vector.names, vector.parameters, gradients, strict=True):
        assert (gradient is None) == (p.grad is None), name
        assert gradient is None or torch.equal(gradient, p.grad), name


def test_batch_statistics_are_those_of_the_probe() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    vector = ParameterVector(model)
    weights = torch.linspace(1, 2, 6)[:, None]
    gradients = probe_gradient(vector, lambda: (weights * model(100 * INPUT)).sum())
    shifted = probe_gradient(vector, lambda: (weights * model(100 * INPUT + 7)).sum())
    for a, b in zip(gradients, shifted, strict=True):  # normalised by the batch, a shift of it cancels
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert model[0].num_batches_tracked == 0


class Functional(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class Attention(nn.Module):
    def __init__(self, dropout: float, need_weights: bool = True) -> None:
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(4, 2, dropout=dropout), need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, None], x[:, None], x[:, None], need_weights=self.need_weights)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: str, dropout: float, packed: bool = False) -> None:
        super().__init__()
        self.rnn: nn.RNNBase = getattr(nn, kind)(4, 3, num_layers=2, dropout=dropout)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return self.rnn(nn.utils.rnn.pack_sequence([x, x[:2]]))[0].data
        return self.rnn(x)[0]


def attend(rate: float, positional: bool) -> Callable[[Tensor], Tensor]:
    if positional:
        return lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None], None, rate, False, scale=0.7)
    return lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None], dropout_p=rate, scale=0.7)


WITH_DROPOUT: dict[str, Callable[[float], nn.Module]] = {
    "Dropout": lambda rate: nn.Sequential(nn.Linear(4, 4), nn.Dropout(rate)),
    "Dropout in place": lambda rate: nn.Sequential(nn.Linear(4, 4), nn.Dropout(rate, inplace=True)),
    "Dropout1d": lambda rate: nn.Sequential(nn.Linear(4, 4), nn.Dropout1d(rate)),
    "AlphaDropout": lambda rate: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(rate)),
    "FeatureAlphaDropout": lambda rate: nn.Sequential(nn.Linear(4, 4), nn.FeatureAlphaDropout(rate)),
    "F.dropout": lambda rate: Functional(lambda h: F.dropout(h, rate)),
    "F.dropout in eval mode": lambda rate: Functional(lambda h: F.dropout(input=h, p=rate, training=True)).eval(),
    "F.dropout2d": lambda rate: Functional(lambda h: F.dropout2d(h[None, :, :, None], rate)),
    "torch.dropout": lambda rate: Functional(lambda h: torch.dropout(h, rate, True)),
    "torch.alpha_dropout": lambda rate: Functional(lambda h: torch.alpha_dropout(h, rate, True)),
    "MultiheadAttention": lambda rate: Attention(rate),
    "MultiheadAttention without weights": lambda rate: Attention(rate, need_weights=False),
    "TransformerEncoderLayer": lambda rate: nn.TransformerEncoderLayer(4, 2, 8, rate),
    "attention, positional": lambda rate: Functional(attend(rate, positional=True)),
    "attention, by keyword": lambda rate: Functional(attend(rate, positional=False)),
    "LSTM": lambda rate: Recurrent("LSTM", rate),
    "GRU": lambda rate: Recurrent("GRU", rate),
    "RNN": lambda rate: Recurrent("RNN", rate),
    "packed LSTM": lambda rate: Recurrent("LSTM", rate, packed=True),
}


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_dropout_is_off_however_it_is_written(kind: str) -> None:
    """A probe of the model with dropout ½ has the gradient of the same model without."""
    gradients = []
    for rate in (0.5, 0.0):
        torch.manual_seed(0)
        model = WITH_DROPOUT[kind](rate)
        vector = ParameterVector(model)
        gradients.append(probe_gradient(vector, lambda model=model: model(INPUT).exp().sum()))
        if rate:  # and outside the probe it is on
            assert len({tuple(model(INPUT).flatten().tolist()) for _ in range(20)}) > 1
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------
# Models that do more than compute an output.
# ---------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Computes ``function(self, x)``, or saves memory by computing it twice."""

    def __init__(self, function: Callable[..., Tensor], saving: Any = None, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function, self.saving = function, saving

    def forward(self, x: Tensor) -> Tensor:
        if self.saving is None:
            return self.function(self, x)
        return checkpoint(self.function, self, x, use_reentrant=self.saving == "reentrant")


class Noise(nn.Module):
    """Gaussian noise, and blocks left out at random."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1) < 0.7) + torch.randn_like(x) * random.random() + float(np.random.rand())


class Table(nn.Module):
    """A table that is made anew where it is too short, and how long it is; room that grows; calls, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.length, self.calls = nn.Parameter(torch.ones(4)), 1, 0
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.register_buffer("ids", torch.arange(3).expand(4, 3), persistent=False)
        self.register_buffer("room", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.length < x.shape[1]:
            self.table, self.length = torch.linspace(0, 1, x.shape[1]), x.shape[1]
            self.register_buffer("other", 2 * self.table)
        self.room.resize_(x.shape[1]).fill_(1)
        return x * self.weight * self.table[: x.shape[1]]


class Generated(nn.Module):
    """Noise of a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=self.generator)


class Codes(nn.Module):
    """A codebook that follows its inputs behind autograd's back, as is usual, and weights kept within bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(3 * torch.ones(4))
        self.register_buffer("code", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.code.data.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.weight.data.clamp_(max=2)
        return x * self.weight + self.code


def deep(s: Any, x: Tensor) -> Tensor:
    return s.b(s.drop(torch.relu(s.norm(s.a(x)))))


def deep_modules(rate: float) -> dict[str, nn.Module]:
    return {"a": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "drop": nn.Dropout(rate), "b": nn.Linear(4, 4)}


def words(x: Tensor) -> Tensor:
    return x.detach().abs().mul(3).long().clamp(max=9)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    """The norm of the gradient of an output, by its inputs and by its parameters, is part of the loss."""
    x = x.clone().requires_grad_()
    output = model(x).square().mean()
    gradients = torch.autograd.grad(output, [x, *model.parameters()], create_graph=True, allow_unused=True)
    return output + sum(g.square().sum() for g in gradients if g is not None)


def twice(model: nn.Module, x: Tensor) -> Tensor:
    squares(model, x.clone().requires_grad_()).backward()
    return squares(model, x.clone().requires_grad_())


def one_block(rate: float) -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(rate))] * 3, nn.Linear(4, 1))


def one_norm(rate: float) -> nn.Module:
    norm = nn.BatchNorm1d(4)
    return Own(lambda s, x: s.b(s.second(s.a(x))), a=nn.Linear(4, 4), first=norm, second=norm, b=nn.Linear(4, 1))


def embedding(**options: Any) -> Callable[[float], nn.Module]:
    return lambda rate: Own(lambda s, x: s.b(s.e(words(x))), e=nn.Embedding(10, 4, **options), b=nn.Linear(4, 1))


def between(make: Callable[[], nn.Module]) -> Callable[[float], nn.Module]:
    return lambda rate: nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 4))


def saved(how: str | None) -> Callable[[float], nn.Module]:
    return lambda rate: nn.Sequential(nn.Linear(4, 4), Own(deep, how, **deep_modules(rate)), nn.Linear(4, 1))


def saved_first(how: str | None) -> Callable[[float], nn.Module]:
    return lambda rate: nn.Sequential(Own(deep, how, **deep_modules(rate)), nn.Linear(4, 1))


#: A model with a dropout rate, its loss, and the same without what must not matter.
CASES: dict[str, tuple[Callable[[float], nn.Module], Callable[..., Tensor], Callable[[float], nn.Module] | None]] = {
    "plain": (saved(None), squares, None),
    "checkpointing": (saved("as usual"), squares, saved(None)),
    "reentrant checkpointing": (saved("reentrant"), squares, saved(None)),
    "reentrant checkpointing of the first layers": (
        saved_first("reentrant"),
        lambda model, x: squares(model, x.clone().requires_grad_()),
        saved_first(None),
    ),
    "checkpointing of noise": (
        between(lambda: Own(lambda s, x: s.n(s.a(x)), "as usual", n=Noise(), a=nn.Linear(4, 4))),
        squares,
        None,
    ),
    "a block under three names": (one_block, squares, None),
    "a BatchNorm under two names": (one_norm, squares, None),
    "sparse embedding": (embedding(sparse=True), squares, embedding()),
    "embedding with max_norm": (embedding(max_norm=0.5), squares, None),
    "noise and stochastic depth": (between(Noise), squares, None),
    "spectral norm": (
        lambda rate: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)),
        squares,
        None,
    ),
    "weight norm of old": (lambda rate: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4))), squares, None),
    "a table": (between(Table), squares, None),
    "a generator of its own": (between(Generated), squares, None),
    "a codebook": (between(Codes), squares, None),
    "double backward through checkpointing": (saved_first("as usual"), penalised, saved_first(None)),
    "a loss with a backward pass of its own": (saved_first("reentrant"), twice, saved_first(None)),
    "double backward": (
        lambda rate: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(rate), nn.Linear(4, 1)),
        penalised,
        None,
    ),
}


def everything_of(model: nn.Module) -> list[Any]:
    """All that a probe must leave as it is."""
    modules = list(model.modules())
    return [
        [(id(p), p.detach().clone(), p.requires_grad) for p in model.parameters()],
        [(id(p.grad), None if p.grad is None else p.grad.to_dense().clone()) for p in model.parameters()],
        [[(name, id(b), b.clone()) for name, b in module._buffers.items() if b is not None] for module in modules],
        [{name: id(value) for name, value in module.__dict__.items()} for module in modules],
        [v.get_state() for module in modules for v in module.__dict__.values() if isinstance(v, torch.Generator)],
        [*random_streams.streams()[:3]],
    ]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_training_without_dropout_and_nothing_of_it_remains(case: str) -> None:
    make, loss, plain = CASES[case]
    torch.manual_seed(0)
    model = make(0.5)
    vector = ParameterVector(model)
    for steps in range(2):  # without gradients from before, and with
        before = everything_of(model)
        gradient = probe_gradient(vector, lambda: loss(model, INPUT), seed=(5, steps))
        assert same(before, everything_of(model))
        vector.check()
        twin = (plain or make)(0.0)
        twin.load_state_dict(model.state_dict())
        with random_streams.seeded(5, steps):
            loss(twin, INPUT).backward()
        wanted = [p.grad for p in twin.parameters()]
        for name, ours, theirs in zip(vector.names, gradient, wanted, strict=True):
            assert ours is not None and theirs is not None, name
            assert torch.equal(ours.to_dense(), theirs), name
        with torch.no_grad():
            for p in model.parameters():
                p.grad = torch.full_like(p, 3)
                p.add_(0.1)


def test_no_hook_fires_while_a_gradient_is_taken_aside() -> None:
    """On tensors, after accumulation, and on the nodes that accumulate."""
    model = nn.Linear(4, 1)
    node = torch.autograd.graph.get_gradient_edge(model.weight).node
    fired: list[str] = []
    model.weight.register_hook(lambda _: fired.append("tensor"))
    model.weight.register_post_accumulate_grad_hook(lambda _: fired.append("accumulated"))
    node.register_prehook(lambda _: fired.append("before"))
    node.register_hook(lambda *_: fired.append("after"))
    probe_gradient(ParameterVector(model), lambda: squares(model, INPUT))
    assert fired == []
    squares(model, INPUT).backward()
    assert sorted(fired) == ["accumulated", "after", "before", "tensor"]


def test_gradients_of_tensors_outside_the_model_stay_as_they_were() -> None:
    """A critic's, say, or those of a loss with parameters of its own."""
    model, critic = nn.Linear(4, 4), nn.Linear(4, 1)
    critic.weight.grad = own = torch.ones(1, 4)
    fired: list[Tensor] = []
    critic.weight.register_hook(fired.append)
    inputs = INPUT.clone().requires_grad_()
    gradient = probe_gradient(ParameterVector(model), lambda: critic(model(inputs)).mean())
    assert all(g is not None and g.any() for g in gradient)
    assert critic.weight.grad is own and own.tolist() == [[1, 1, 1, 1]]
    assert critic.bias.grad is None and inputs.grad is None and not fired


def test_hooks_and_gradients_are_back_where_a_probe_fails_in_its_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    vector, fired = ParameterVector(model), []
    model[0].weight.register_hook(fired.append)
    squares(model, INPUT).backward()
    before = everything_of(model)
    with pytest.raises(ZeroDivisionError):
        probe_gradient(vector, lambda: squares(nn.Sequential(model), Broken.apply(INPUT.clone().requires_grad_())))
    assert same(before, everything_of(model))
    squares(model, INPUT).backward()
    assert len(fired) == 2


def test_batches_one_after_another_and_their_parts_add_up_to_one_mean_gradient() -> None:
    """No part's activations are left when the next part is computed."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 1, dtype=torch.float64))
    vector = ParameterVector(model)
    inputs = torch.randn(24, 4, dtype=torch.float64)
    batches, alive = iter(inputs.chunk(3)), []

    def probe() -> Iterator[Tensor]:
        for part in next(batches).chunk(4):
            assert all(activation() is None for activation in alive)
            hidden = model[:2](part)
            alive.append(weakref.ref(hidden))
            loss = model[2](hidden).square().mean() / 4
            del hidden
            yield loss
            del loss

    gradient = probe_gradient(vector, probe, batches=3)
    assert len(alive) == 12
    squares(model, inputs).backward()
    for ours, p in zip(gradient, vector.parameters, strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-12, atol=1e-14)


def test_a_compiled_model_is_probed_without_dropout_and_not_compiled_anew() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def make(rate: float) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(rate), nn.Linear(4, 1))

    plain = make(0.0)
    squares(plain, INPUT).backward()
    for in_place in (False, True):
        compiled.clear()
        model = make(0.5)
        fast = model
        if in_place:
            model.compile(backend=backend, fullgraph=True)
        else:
            fast = torch.compile(model, backend=backend, fullgraph=True)
        vector = ParameterVector(model)
        score = GradientNorm(vector, vector.layers(), lambda fast=fast: squares(fast, INPUT), "layers", momentum=0.0)
        for _ in range(3):
            squares(fast, INPUT).backward()
            torch.testing.assert_close(
                score.take(), vector.layers().norms([p.grad for p in plain.parameters()]).double()
            )
        assert len(compiled) == 1


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (lambda model: model(INPUT), r"probe\(\) gave a tensor of shape \[6, 1\]"),
        (lambda model: squares(model, INPUT).item(), r"probe\(\) gave a .*float"),
        (lambda model: squares(model, INPUT).detach(), r"probe\(\) gave a loss that depends on no trainable parameter"),
        (lambda model: None, r"probe\(\) gave a NoneType"),
    ],
)
def test_a_probe_that_gives_no_loss_is_told_so(probe: Any, message: str) -> None:
    model = nn.Linear(4, 1)
    with pytest.raises(ValueError, match=message):
        probe_gradient(ParameterVector(model), lambda: probe(model))


def test_what_a_probe_draws_is_of_its_seed_rank_and_round_and_goes_on_after_a_resume() -> None:
    """Other draws on every rank and in every round; the same ones again where a run is made again, or goes on."""

    def body(comm: Communicator, rounds: int = 6, resume_at: int | None = None) -> list[tuple[float, ...]]:
        torch.manual_seed(42)
        model, seen = nn.Linear(4, 1), []

        def probe() -> Tensor:
            x = torch.rand(8, 4)
            seen.append((x[0, 0].item(), random.random(), float(np.random.rand())))
            return squares(model, x)

        def build() -> Any:
            return LGRAWA(period=1).build(comm, ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1), probe)

        run = build()
        for number in range(rounds):
            if number == resume_at:
                state = run.state_dict()
                torch.manual_seed(43)
                run = build()
                run.load_state_dict(state)
            streams = random_streams.streams()[:3]
            squares(model, INPUT).backward()
            run.after_step()
            assert same(streams, random_streams.streams()[:3])
        return seen

    drawn = simulate(3, body)
    for stream in range(3):
        assert len({numbers[stream] for seen in drawn for numbers in seen}) == 18
    assert simulate(3, body) == drawn
    assert simulate(3, lambda comm: body(comm, resume_at=3)) == drawn


def test_a_probe_that_asks_is_told_each_rounds_number_also_after_a_resume_and_from_another_world() -> None:
    """Once before the batches of a round; a function is asked for its batches alone."""

    class Numbered:
        def __init__(self, model: nn.Module) -> None:
            self.model, self.seen = model, []

        def set_round(self, number: int) -> None:
            self.seen.append([number])

        def __call__(self) -> Tensor:
            self.seen[-1].append("batch")
            return squares(self.model, INPUT)

    def body(comm: Communicator, resume: str) -> list[list[Any]]:
        seen = []

        def build() -> Any:
            model = nn.Linear(4, 1)
            probe = Numbered(model)
            probe.seen = seen
            method = LGRAWA(period=2, probe_batches=2)
            return method.build(comm, ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1), probe)

        run = build()
        for step in range(10):
            if step == 5:
                state = run.state_dict()
                run = build()
                getattr(run, resume)(state)
            squares(run.vector.model, INPUT).backward()
            run.after_step()
        return seen

    for resume, rounds in (("load_state_dict", 5), ("start_from", 4)):  # another world begins its period anew
        for seen in simulate(2, lambda comm, resume=resume: body(comm, resume)):
            assert seen == [[number, "batch", "batch"] for number in range(rounds)]


def test_streams_of_other_numbers_are_others() -> None:
    seen = set()
    for numbers in [(0,), (0, 0), (1, 0), (0, 1), (2**64 - 1, 0), (-1, 1), (36, 720, 1042)]:
        with random_streams.seeded(*numbers):
            first = torch.rand(1).item(), float(np.random.rand()), random.random()
        with random_streams.seeded(*numbers):
            assert first == (torch.rand(1).item(), float(np.random.rand()), random.random())
        seen.update(first)
    assert len(seen) == 21
