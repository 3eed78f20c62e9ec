"""The oracle: every method replayed for W workers in NumPy, float64, one plain loop.

This page is where the mathematics is checked. It shares no code with the package: a backend is right when
its parameters follow `replay` to 1e-12 in float64 and to 1e-5 in float32.

Notation. W ranks m = 0..W-1 hold parameters x_m, a vector of P numbers; g_m is a gradient, eta the learning
rate, c the center. A *round* has the family's one formula

    scores S [W, K]  ->  weights beta = rule(S) [W, K], every column sums to 1
                     ->  center c = sum_m beta_m * x_m  ->  x_m <- x_m + pull (c - x_m)

and a run is, with steps, ranks and rounds counted from 0:

    for step in 0..T-1:
        every rank:  x_m <- optimizer(x_m, gradient_at, eta(step)),  where gradient_at(x) is the gradient of its
                     batch(rank, step) at x, or share(g_1..g_W) of what all ranks ask for together (DataParallel)
                     x_m <- x_m + (prox / H) (c_last - x_m)    (not before the first round)
                     x_m <- NaN where poison(rank, step)       (a broken machine, for the tests)
        if H steps have passed since the last round, or this was the last step:  round

A run may begin with steps of a method that shares gradients (post-local): then it begins where they have ended.

H is the period, asked for at the start of every round. A last round cut short by the end of the run keeps
the H it began with in prox / H.

Averaged is x, or what else a method says. A new method is one more subclass of `Method`; the loop stays as it is.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Span = tuple[int, int]  # (offset, size) of a piece of the flat vector


# ---------------------------------------------------------------------------------------------------------
# Weight rules: scores [W, K] -> weights [W, K]. Each column is weighted by itself and sums to 1.
# A score that is not finite gets weight 0; a column without a finite score is a ValueError, but for gradient norms
# that are +inf on all ranks: none has a gradient there.
# ---------------------------------------------------------------------------------------------------------


def uniform(scores: Array) -> Array:
    """beta_m = 1 / (number of ranks whose score is finite); the scores' values do not matter."""
    weights = np.zeros_like(scores)
    for k in range(scores.shape[1]):
        finite = _finite_rows(scores, k)
        weights[finite, k] = 1.0 / len(finite)
    return weights


def inverse(scores: Array, power: float = 1.0, noise: NDArray[np.bool_] | None = None) -> Array:
    """beta_m = s_m^-q / sum_j s_j^-q with q = `power`; scores that are zero share the weight equally.

    Uniform where all scores are +inf, and over the finite ones where all of these are `noise` [W, K], or q is 0.
    s_m^-q is computed as (s_min / s_m)^q: the factor cancels, and tiny scores cannot overflow.
    """
    weights = np.zeros_like(scores)
    for k in range(scores.shape[1]):
        if len(scores) and all(score == math.inf for score in scores[:, k]):
            weights[:, k] = 1.0 / len(scores)
            continue
        finite = _finite_rows(scores, k)
        if power == 0 or (noise is not None and all(noise[m, k] for m in finite)):
            weights[finite, k] = 1.0 / len(finite)
            continue
        if any(scores[m, k] < 0 for m in finite):
            raise ValueError(f"negative score in column {k}: {scores[:, k]}")
        zero = [m for m in finite if scores[m, k] == 0]
        if zero:
            weights[zero, k] = 1.0 / len(zero)
            continue
        smallest = min(scores[m, k] for m in finite)
        for m in finite:
            weights[m, k] = (smallest / scores[m, k]) ** power
        weights[:, k] /= weights[:, k].sum()
    return weights


def roundoff(scores: Array) -> NDArray[np.bool_]:
    """Which layers' gradients are noise [W, K]: norms of at most 8 eps (float64) times that of the whole gradient."""
    eps = float(np.finfo(np.float64).eps)
    noise = np.zeros(scores.shape, dtype=bool)
    for m, row in enumerate(scores):
        whole = math.sqrt(sum(norm**2 for norm in row if math.isfinite(norm)))
        noise[m] = [math.isfinite(norm) and norm <= 8 * eps * whole for norm in row]
    return noise


def argmin(scores: Array) -> Array:
    """One-hot: weight 1 for the smallest finite score, the lowest rank among equals."""
    weights = np.zeros_like(scores)
    for k in range(scores.shape[1]):
        leader = min(_finite_rows(scores, k), key=lambda m: (scores[m, k], m))
        weights[leader, k] = 1.0
    return weights


def _finite_rows(scores: Array, column: int) -> list[int]:
    finite = [m for m in range(scores.shape[0]) if math.isfinite(scores[m, column])]
    if not finite:
        raise ValueError(f"no finite score left in column {column}")
    return finite


# ---------------------------------------------------------------------------------------------------------
# The pieces of a round.
# ---------------------------------------------------------------------------------------------------------


def weighted_center(x: Array, weights: Array, spans: Sequence[Span]) -> Array:
    """c = sum_m beta_m * x_m, column k of the weights [W, K] acting on the k-th span of x [W, P].

    A rank with weight 0 is left out rather than multiplied: 0 * NaN is NaN.
    """
    center = np.zeros(x.shape[1])
    for k, (offset, size) in enumerate(spans):
        for m in range(x.shape[0]):
            if weights[m, k] > 0:
                center[offset : offset + size] += weights[m, k] * x[m, offset : offset + size]
    return center


def lerp(x: Array, center: Array, pull: float) -> Array:
    """x + pull (c - x), in the form that is exactly x at pull 0 and exactly c at pull 1."""
    if pull < 0.5:
        return x + pull * (center - x)
    return center - (1.0 - pull) * (center - x)


@dataclass
class ScoreMomentum:
    """v_t = b v_{t-1} + (1 - b) s_t, v_0 = 0; returns v_t / (1 - b^t), for every element of [W, K] by itself.

    A score that is not finite does not enter: v and t of that element stay, and the score itself is returned
    (so that the rule gives it weight 0).
    """

    b: float
    v: Array | None = None
    t: NDArray[np.int64] | None = None

    def update(self, scores: Array) -> Array:
        if self.v is None or self.t is None:
            self.v = np.zeros_like(scores)
            self.t = np.zeros(scores.shape, dtype=np.int64)
        corrected = scores.copy()
        for m in range(scores.shape[0]):
            for k in range(scores.shape[1]):
                if math.isfinite(scores[m, k]):
                    self.t[m, k] += 1
                    self.v[m, k] = self.b * self.v[m, k] + (1.0 - self.b) * scores[m, k]
                    corrected[m, k] = self.v[m, k] / (1.0 - self.b ** int(self.t[m, k]))
        return corrected

    def reset(self, rank: int) -> None:
        if self.v is not None and self.t is not None:
            self.v[rank] = 0.0
            self.t[rank] = 0


def bytes_sent(verb: str, payload: int, world_size: int) -> float:
    """Bytes that one of W ranks counts as sent for a payload of n bytes (for allgather: its own part).

    allreduce 2n(W-1)/W, allgather n(W-1), alltoall n(W-1)/W, broadcast n(W-1)/W; a number from a counter n to the rank
    that keeps it and n back, which is 2n(W-1)/W per rank.
    """
    n, w = payload, world_size
    if verb in ("allreduce", "counter"):
        return 2 * n * (w - 1) / w
    if verb == "allgather":
        return float(n * (w - 1))
    if verb in ("alltoall", "broadcast"):
        return n * (w - 1) / w
    raise ValueError(f"unknown verb {verb!r}: allreduce, allgather, alltoall, broadcast")


# ---------------------------------------------------------------------------------------------------------
# Problems: a loss of a flat vector, its gradient by hand, and where its layers lie.
# ---------------------------------------------------------------------------------------------------------


class Problem(Protocol):
    shapes: list[tuple[int, ...]]  # of the tensors
    layers: dict[str, list[Span]]  # "tensor" and "module": the two ways to cut the vector into layers

    def loss_and_grad(self, x: Array, *batch: Any) -> tuple[float, Array]: ...


class TwoLayer:
    """logits = W2 tanh(W1 x + b1) + b2 with softmax cross-entropy, mean over the batch.

    The flat vector holds W1 [h, d], b1 [h], W2 [o, h], b2 [o] in this order, row-major. Its torch twin is

        nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, o))   with   nn.CrossEntropyLoss()

    whose parameters() come in this order too. Inputs are [N, d] floats, targets [N] integers in 0..o-1.
    """

    def __init__(self, d: int, h: int, o: int) -> None:
        self.d, self.h, self.o = d, h, o
        w1, b1, w2, b2 = h * d, h, o * h, o
        self.size = w1 + b1 + w2 + b2
        self.shapes: list[tuple[int, ...]] = [(h, d), (h,), (o, h), (o,)]
        self.layers: dict[str, list[Span]] = {
            "tensor": [(0, w1), (w1, b1), (w1 + b1, w2), (w1 + b1 + w2, b2)],
            "module": [(0, w1 + b1), (w1 + b1, w2 + b2)],
        }

    def unflatten(self, x: Array) -> tuple[Array, Array, Array, Array]:
        d, h, o = self.d, self.h, self.o
        w1, b1, w2, b2 = np.split(x, [h * d, h * d + h, h * d + h + o * h])
        return w1.reshape(h, d), b1, w2.reshape(o, h), b2

    def loss_and_grad(self, x: Array, *batch: Any) -> tuple[float, Array]:
        """With a = tanh(X W1' + b1), p = softmax(a W2' + b2), y one-hot, N inputs:

        loss = -1/N sum_n log p[n, target_n],   d_logits = (p - y) / N,   d_pre = (d_logits W2) * (1 - a^2)
        dW2 = d_logits' a,   db2 = sum_n d_logits,   dW1 = d_pre' X,   db1 = sum_n d_pre
        """
        inputs, targets = batch
        w1, b1, w2, b2 = self.unflatten(x)
        n = len(inputs)
        a = np.tanh(inputs @ w1.T + b1)
        logits = a @ w2.T + b2
        logits = logits - logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        y = np.zeros((n, self.o))
        for i, target in enumerate(targets):
            y[i, target] = 1.0
        loss = -float(np.sum(y * log_p)) / n
        d_logits = (np.exp(log_p) - y) / n
        d_pre = (d_logits @ w2) * (1.0 - a**2)
        grads = [d_pre.T @ inputs, d_pre.sum(axis=0), d_logits.T @ a, d_logits.sum(axis=0)]
        return loss, np.concatenate([grad.ravel() for grad in grads])

    def initial(self, seed: int) -> Array:
        """A start: normal numbers of standard deviation 1/2."""
        return 0.5 * np.random.default_rng(seed).standard_normal(self.size)

    def random_batch(self, n: int, *seed: int) -> tuple[Array, NDArray[np.int64]]:
        """N normal inputs and random targets, the same for the same seeds, e.g. random_batch(8, rank, step)."""
        rng = np.random.default_rng(seed)
        return rng.standard_normal((n, self.d)), rng.integers(0, self.o, size=n)


class Vincent:
    """f(x) = -(1/D) sum_d sin(10 ln x_d),  df/dx_d = -(10/D) cos(10 ln x_d) / x_d; every coordinate is a layer.

    Its valleys x = exp((pi/2 + 2 pi k) / 10) are all as deep, f = -1, and the flatter the larger x. No batch.
    """

    def __init__(self, dimensions: int = 2) -> None:
        coordinates = [(d, 1) for d in range(dimensions)]
        self.shapes: list[tuple[int, ...]] = [()] * dimensions
        self.layers: dict[str, list[Span]] = {"tensor": coordinates, "module": coordinates}

    def loss_and_grad(self, x: Array, *batch: Any) -> tuple[float, Array]:
        loss = -float(np.mean(np.sin(10.0 * np.log(x))))
        return loss, -10.0 / len(x) * np.cos(10.0 * np.log(x)) / x

    @staticmethod
    def corners() -> Array:
        """The four corners of [.25, 10]^2, one per rank."""
        return np.array([[0.25, 0.25], [0.25, 10.0], [10.0, 0.25], [10.0, 10.0]])


# ---------------------------------------------------------------------------------------------------------
# Local optimizers: one object per rank. `state` is all it remembers; `gradient_at` it may ask as often as it likes.
# ---------------------------------------------------------------------------------------------------------


class GradientAt(Protocol):
    def __call__(self, x: Array, share: bool = True, part: tuple[int, int] = (0, 1)) -> Array:
        """The gradient of the step's batch at x; with `share` the one that the method makes of all ranks'.

        Of part (i, M) it is what parts 0..i have added up to, each ∇loss_i(x) / M at the x that it was asked for.
        """


class Optimizer(Protocol):
    state: dict[str, Array]

    def step(self, x: Array, gradient_at: GradientAt, lr: float) -> Array: ...


@dataclass
class SGD:
    """torch.optim.SGD (dampening 0):

    g <- g + weight_decay x;   u <- momentum u + g  (the first step: u = g);   x <- x - lr u,
    with Nesterov x <- x - lr (g + momentum u); without momentum x <- x - lr g.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    state: dict[str, Array] = field(default_factory=dict)

    def step(self, x: Array, gradient_at: GradientAt, lr: float) -> Array:
        g = gradient_at(x) + self.weight_decay * x
        if self.momentum == 0:
            return x - lr * g
        first = "momentum_buffer" not in self.state
        u = g if first else self.momentum * self.state["momentum_buffer"] + g
        self.state["momentum_buffer"] = u
        return x - lr * (g + self.momentum * u) if self.nesterov else x - lr * u


@dataclass
class SAM:
    """base steps from x by the gradient at x + rho g / |g|, g the rank's own; no ascent where it is zero.

    With `weights` (ASAM): x + rho T^2 g / |T g|, T = |x| + eta in these spans and 1 elsewhere.
    """

    base: Optimizer
    rho: float = 0.05
    weights: Sequence[Span] | None = None
    eta: float = 0.01

    @property
    def state(self) -> dict[str, Array]:
        return self.base.state

    def step(self, x: Array, gradient_at: GradientAt, lr: float) -> Array:
        g, t = gradient_at(x, share=False), np.ones_like(x)
        for offset, size in self.weights or ():
            t[offset : offset + size] = np.abs(x[offset : offset + size]) + self.eta
        norm = np.sqrt(np.sum((t * g) ** 2))
        above = x + (self.rho * t**2 * g / norm if norm > 0 else 0)
        return self.base.step(x, lambda x, share=True, part=(0, 1): gradient_at(above), lr)


@dataclass
class LPFSGD:
    """base steps from x by (1/M) sum_i of the gradient of part i at x + sigma |x_filter| n_i, n_i standard normal.

    sigma at a step is sigma (1 + growth (1 - cos(pi t / T)) / 2), of T steps.
    """

    base: Optimizer
    filters: Sequence[Span]
    normal: Callable[[], Array]
    steps: int
    parts: int = 8
    sigma: float = 5e-4
    growth: float = 15.0
    t: int = 0

    @property
    def state(self) -> dict[str, Array]:
        return self.base.state

    def step(self, x: Array, gradient_at: GradientAt, lr: float) -> Array:
        size = np.zeros_like(x)
        for offset, length in self.filters:
            size[offset : offset + length] = np.sqrt(np.sum(x[offset : offset + length] ** 2))
        sigma = self.sigma * (1 + self.growth * (1 - math.cos(math.pi * self.t / self.steps)) / 2)
        self.t += 1
        for i in range(self.parts):
            g = gradient_at(x + sigma * size * self.normal(), i == self.parts - 1, (i, self.parts))
        return self.base.step(x, lambda x, share=True, part=(0, 1): g, lr)


@dataclass
class EntropySGD:
    """y <- y - lr (g + momentum u), g = gradient + weight_decay y + gamma (y - x), u <- momentum u + g.

    Then z <- .75z + .25y, and after every L steps x <- z; gamma = scope (1 + growth)^rounds. The parameters are y.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0
    period: int = 20
    scope: float = 0.03
    growth: float = 1e-3
    t: int = 0
    state: dict[str, Array] = field(default_factory=dict)

    def step(self, x: Array, gradient_at: GradientAt, lr: float) -> Array:
        y, state = x.copy(), self.state
        anchor, z, u = state.get("x", y), state.get("z", y), state.get("u", np.zeros_like(y))
        gamma = self.scope * (1 + self.growth) ** (self.t // self.period)
        g = gradient_at(y) + self.weight_decay * y + gamma * (y - anchor)
        u = self.momentum * u + g
        y = y - lr * (g + self.momentum * u)
        z = 0.75 * z + 0.25 * y
        self.t += 1
        state.update(x=z if self.t % self.period == 0 else anchor, z=z, u=u)
        return y


@dataclass
class LARS:
    """u <- momentum u + r (g + weight_decay x); x <- x - lr u.

    r = trust |x| / (|g| + weight_decay |x|) of each span of `weights`, 1 where |x| or |g| is 0; elsewhere r is 1 and
    there is no weight decay.
    """

    weights: Sequence[Span]
    momentum: float = 0.9
    weight_decay: float = 1e-4
    trust: float = 1e-3
    state: dict[str, Array] = field(default_factory=dict)

    def step(self, x: Array, gradient_at: GradientAt, lr: float) -> Array:
        g = gradient_at(x)
        d = g.copy()
        for offset, size in self.weights:
            own = slice(offset, offset + size)
            w, n = np.sqrt(np.sum(x[own] ** 2)), np.sqrt(np.sum(g[own] ** 2))
            r = self.trust * w / (n + self.weight_decay * w) if w > 0 and n > 0 else 1.0
            d[own] = r * (g[own] + self.weight_decay * x[own])
        self.state["u"] = u = self.momentum * self.state.get("u", np.zeros_like(x)) + d
        return x - lr * u


@dataclass
class LAMB:
    """x <- x - lr r u, u = m^ / (sqrt(v^) + eps) + weight_decay x, with Adam's m^ and v^, corrected for bias.

    r = |x| / |u| of each span of `weights`, 1 where a norm is 0; elsewhere r is 1 and there is no weight decay.
    """

    weights: Sequence[Span]
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 1e-2
    t: int = 0
    state: dict[str, Array] = field(default_factory=dict)

    def step(self, x: Array, gradient_at: GradientAt, lr: float) -> Array:
        g, zero, self.t = gradient_at(x), np.zeros_like(x), self.t + 1 if self.state else 1
        self.state["m"] = m = self.beta1 * self.state.get("m", zero) + (1 - self.beta1) * g
        self.state["v"] = v = self.beta2 * self.state.get("v", zero) + (1 - self.beta2) * g * g
        u = m / (1 - self.beta1**self.t) / (np.sqrt(v / (1 - self.beta2**self.t)) + self.eps)
        for offset, size in self.weights:
            own = slice(offset, offset + size)
            u[own] += self.weight_decay * x[own]
            w, n = np.sqrt(np.sum(x[own] ** 2)), np.sqrt(np.sum(u[own] ** 2))
            u[own] *= w / n if w > 0 and n > 0 else 1.0
        return x - lr * u


@dataclass
class Lion:
    """x <- x - lr (sign(beta1 m + (1 - beta1) g) + weight_decay x); m <- beta2 m + (1 - beta2) g."""

    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    state: dict[str, Array] = field(default_factory=dict)

    def step(self, x: Array, gradient_at: GradientAt, lr: float) -> Array:
        g, m = gradient_at(x), self.state.get("m", np.zeros_like(x))
        self.state["m"] = self.beta2 * m + (1 - self.beta2) * g
        return x - lr * (np.sign(self.beta1 * m + (1 - self.beta1) * g) + self.weight_decay * x)


# ---------------------------------------------------------------------------------------------------------
# Periods: facts of the run -> steps until the next round.
# ---------------------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    step: int  # steps made so far
    lr: float  # of the round's first step
    peak_lr: float  # the largest of the run
    warmup_steps: int
    steps_left: int | None
    steps_per_epoch: int


def qsr(base: int, alpha: float, power: float = 2.0) -> Callable[[Facts], int]:
    """H = max(base, floor((alpha / eta)^power)), with the peak eta during warm-up; growth ends at the steps left.

    With alpha 0 it is the constant period `base`. (That a base beyond the steps left is cut is the loop's affair.)
    """

    def period(facts: Facts) -> int:
        eta = facts.peak_lr if facts.step < facts.warmup_steps else facts.lr
        if alpha == 0:
            return base
        grown = (alpha / eta) ** power if eta > 0 else math.inf
        if facts.steps_left is not None:
            grown = min(grown, facts.steps_left)
        return max(base, math.floor(grown))

    return period


# ---------------------------------------------------------------------------------------------------------
# Methods: what differs from the one formula, and nothing else.
# ---------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """All that the W ranks know. A method may read everything and move x, center."""

    problem: Problem
    x: Array  # [W, P]
    optimizers: list[Optimizer]
    center: Array | None = None  # [P], of the last round; EASGD: its state c
    step: int = 0  # steps made so far
    steps: int = 0  # of the whole run
    round: int = 0  # rounds made so far
    round_began: int = 0  # the step count at which the present round began
    period: int = 0  # the H of the present round
    lr: float = 0.0  # of the present step
    losses: Array = field(default_factory=lambda: np.zeros(0))  # [W], the first of each rank in the present step
    gradients: Array = field(default_factory=lambda: np.zeros((0, 0)))  # [W, P], the last of each rank, before sharing
    probe: Callable[[int, int], tuple[Any, ...]] | None = None

    @property
    def size(self) -> int:
        return len(self.x)

    def probe_gradient(self, rank: int) -> Array:
        """The gradient of rank's loss on a fresh batch, at its x of now. No weight decay, nothing else changes."""
        if self.probe is None:
            raise ValueError("this method scores by a probe gradient: give replay(probe=...)")
        return self.problem.loss_and_grad(self.x[rank], *self.probe(rank, self.round))[1]


class Method:
    """Uniform averaging, pull 1, no proximity. Subclasses replace single lines of it."""

    pull: float = 1.0
    prox: float = 0.0
    shares: ClassVar[bool] = False
    has_rounds: ClassVar[bool] = True

    def start(self, world: World) -> None:
        """Called once, before the first step."""

    def share(self, world: World) -> Array | None:
        """Where gradients are shared: [W, P] as the optimizers get them; None: no rank steps."""
        raise NotImplementedError

    def averaged(self, world: World) -> Array:
        """[W, P]: what rounds average, and what a rank that is not finite there is healed in."""
        return world.x

    def proximity(self, world: World) -> None:
        """The pull of every step to the last center, if there is one."""
        if world.center is not None:
            for m in range(world.size):
                world.x[m] = world.x[m] + (self.prox / world.period) * (world.center - world.x[m])

    def after_step(self, world: World) -> None:
        """Called after every step, before a round that may be due."""

    def force(self, world: World, rank: int) -> Array | float:
        """What is added to the rank's gradient, wherever that was taken."""
        return 0.0

    def spans(self, world: World) -> list[Span]:
        """The pieces of the vector that the K columns of the weights act on."""
        return [(0, world.x.shape[1])]

    def raw_scores(self, world: World) -> Array:
        """[W, K]: what each rank says about itself at a round."""
        return np.zeros((world.size, 1))

    def smoothed(self, scores: Array) -> Array:
        """Raw scores -> the scores that are gathered."""
        return scores

    def weights(self, scores: Array) -> Array:
        """[W, K] -> [W, K], one of the rules above."""
        return uniform(scores)

    def pull_ranks(self, world: World, average: Array) -> None:
        """From average = sum_m beta_m * x_m [P]: sets world.center and moves world.x."""
        world.center = average
        for m in range(world.size):
            world.x[m] = lerp(world.x[m], average, self.pull)

    def forget(self, rank: int) -> None:
        """A healed rank: drops what the method remembers of it."""

    def stop(self, world: World) -> None:
        """Called where another method takes over."""


@dataclass
class LocalSGD(Method):
    """c = mean of all x,  x_m <- c."""


@dataclass
class _GradientNorms(Method):
    """Weights inverse to norms of a probe gradient:  c = sum_m beta_m x_m,  x_m <- lerp(x_m, c, pull).

    `layer` ("tensor" or "module") says what a layer is; GRAWA has none.
    """

    pull: float = 0.5
    prox: float = 0.01
    power: float = 1.0
    score_momentum: float = 0.9**8
    layer: str = "tensor"

    def start(self, world: World) -> None:
        self.momentum = ScoreMomentum(self.score_momentum)

    def norms(self, world: World, gradient: Array) -> list[float]:
        raise NotImplementedError

    def raw_scores(self, world: World) -> Array:
        return np.array([self.norms(world, world.probe_gradient(m)) for m in range(world.size)])

    def layer_norms(self, world: World, gradient: Array) -> list[float]:
        """(|g_l|)_l, the Euclidean norm of every layer."""
        return [float(np.linalg.norm(gradient[o : o + n])) for o, n in world.problem.layers[self.layer]]

    def smoothed(self, scores: Array) -> Array:
        return self.momentum.update(scores)

    def weights(self, scores: Array) -> Array:
        return inverse(scores, self.power, roundoff(scores) if scores.shape[1] > 1 else None)

    def forget(self, rank: int) -> None:
        self.momentum.reset(rank)


@dataclass
class GRAWA(_GradientNorms):
    """Score |g_m| of the whole vector, K = 1."""

    def norms(self, world: World, gradient: Array) -> list[float]:
        return [float(np.linalg.norm(gradient))]


@dataclass
class MGRAWA(_GradientNorms):
    """Score sum_l |g_{m,l}|, K = 1."""

    def norms(self, world: World, gradient: Array) -> list[float]:
        return [sum(self.layer_norms(world, gradient))]


@dataclass
class LGRAWA(_GradientNorms):
    """Scores (|g_{m,l}|)_l, K = L: every layer has weights and center of its own."""

    def norms(self, world: World, gradient: Array) -> list[float]:
        return self.layer_norms(world, gradient)

    def spans(self, world: World) -> list[Span]:
        return world.problem.layers[self.layer]


@dataclass
class LocalMGRAWA(MGRAWA):
    """As MGRAWA, by the norms of the mini-batch gradients: their bias-corrected running mean since the last round."""

    score_momentum: float = 0.85

    def after_step(self, world: World) -> None:
        self.mean = self.momentum.update(np.array([self.norms(world, g) for g in world.gradients]))

    def raw_scores(self, world: World) -> Array:
        self.momentum = ScoreMomentum(self.score_momentum)
        return self.mean

    def smoothed(self, scores: Array) -> Array:
        return scores


@dataclass
class LocalLGRAWA(LocalMGRAWA):
    """As LGRAWA, by the same running means."""

    def norms(self, world: World, gradient: Array) -> list[float]:
        return self.layer_norms(world, gradient)

    def spans(self, world: World) -> list[Span]:
        return world.problem.layers[self.layer]


@dataclass
class EASGD(Method):
    """x_m <- x_m - alpha (x_m - c),  alpha = beta / W;   c <- (1 - beta) c + beta mean(x);  both from old values.

    beta is `pull`; c_0 is the mean of the starts (the common start, if there is one). With ranks left out the
    mean is over the others; alpha stays beta / W.
    """

    pull: float = 0.43

    def start(self, world: World) -> None:
        self.c = world.x.mean(axis=0)

    def pull_ranks(self, world: World, average: Array) -> None:
        alpha = self.pull / world.size
        for m in range(world.size):
            world.x[m] = world.x[m] - alpha * (world.x[m] - self.c)
        self.c = (1.0 - self.pull) * self.c + self.pull * average
        world.center = self.c


@dataclass
class LSGD(Method):
    """c = x_leader,  x_m <- lerp(x_m, c, pull);  leader = argmin of the mean mini-batch loss since the last round.

    With `group` ranks per group each group has a leader of its own every `group_period` steps and at the end: its
    proximity pull comes before that to c, and its round before a round of all. A rank that its group heals has no loss
    from before.
    """

    pull: float = 0.1
    prox: float = 0.1
    group: int = 0
    group_period: int = 0
    group_pull: float = 0.1
    group_prox: float = 0.1

    def start(self, world: World) -> None:
        self.losses: list[Array] = []
        self.begun = [0] * world.size
        self.group_losses: list[Array] = []
        self.leaders: dict[int, Array] = {}

    def proximity(self, world: World) -> None:
        for m, leader in self.leaders.items():
            world.x[m] = world.x[m] + (self.group_prox / self.group_period) * (leader - world.x[m])
        super().proximity(world)

    def after_step(self, world: World) -> None:
        self.losses.append(world.losses)
        self.group_losses.append(world.losses)
        if self.group and (len(self.group_losses) == self.group_period or world.step == world.steps):
            mean = np.mean(self.group_losses, axis=0)
            self.group_losses = []
            for first in range(0, world.size, self.group):
                self.group_round(world, mean, range(first, min(first + self.group, world.size)))

    def group_round(self, world: World, losses: Array, members: Sequence[int]) -> None:
        finite = [m for m in members if np.all(np.isfinite(world.x[m])) and np.isfinite(losses[m])]
        if not finite:
            return
        leader = world.x[min(finite, key=lambda m: losses[m])].copy()
        for m in members:
            if np.all(np.isfinite(world.x[m])):
                world.x[m] = lerp(world.x[m], leader, self.group_pull)
            else:
                world.x[m] = leader
                world.optimizers[m].state.clear()
                self.begun[m] = len(self.losses)
            self.leaders[m] = leader

    def raw_scores(self, world: World) -> Array:
        own = [[losses[m] for losses in self.losses[self.begun[m] :]] for m in range(world.size)]
        self.losses, self.begun = [], [0] * world.size
        return np.array([[sum(losses) / len(losses) if losses else np.nan] for losses in own])

    def weights(self, scores: Array) -> Array:
        return argmin(scores)


@dataclass
class SlowMo(Method):
    """u <- beta u + (x_old - mean) / eta;  x_m <- x_old - alpha eta u;  eta of the round's last step.

    x_old is where all ranks were after the last round (the mean of the starts). With eta = 0, x_m <- mean.
    """

    alpha: float = 1.0
    beta: float = 0.6

    def start(self, world: World) -> None:
        self.old, self.u = world.x.mean(axis=0), np.zeros(world.x.shape[1])

    def pull_ranks(self, world: World, average: Array) -> None:
        if world.lr > 0:
            self.u = self.beta * self.u + (self.old - average) / world.lr
            average = self.old - self.alpha * world.lr * self.u
        self.old = world.center = average
        world.x[:] = average


@dataclass
class DiLoCo(Method):
    """One step of SGD with Nesterov's momentum at x_old, whose gradient is x_old - mean."""

    lr: float = 0.7
    momentum: float = 0.9

    def start(self, world: World) -> None:
        self.old = world.x.mean(axis=0)
        self.outer = SGD(self.momentum, nesterov=self.momentum > 0)

    def pull_ranks(self, world: World, average: Array) -> None:
        delta = self.old - average
        self.old = world.center = self.outer.step(self.old, lambda x, share=True: delta, self.lr)
        world.x[:] = self.old


@dataclass
class DPPF(Method):
    """x_m <- x_m + (mean - x_m) (pull - push / |x_m - mean|); no push where the norm is 0."""

    pull: float = 0.5
    push: float = 0.1

    def pull_ranks(self, world: World, average: Array) -> None:
        world.center = average
        for m in range(world.size):
            apart = world.x[m] - average
            norm = float(np.linalg.norm(apart))
            world.x[m] = world.x[m] - apart * (self.pull - (self.push / norm if norm > 0 else 0.0))


@dataclass
class Parle(Method):
    """y <- y - eta (grad f(y) + (y - x) / gamma);  z <- decay z + (1 - decay) y;  at a round x <- (1-t) z + t mean(z).

    t = gamma / (rho + gamma); gamma and rho are multiplied by `scoping` at each round, down to their floors. y is
    `world.x`. With `previous` the mean is that of x before the round.
    """

    gamma: float = 100.0
    rho: float = 1.0
    gamma_floor: float = 1.0
    rho_floor: float = 0.1
    scoping: float = 1.0
    decay: float = 0.75
    previous: bool = False

    def start(self, world: World) -> None:
        self.slow, self.z = world.x.copy(), world.x.copy()

    def scoped(self, world: World, value: float, floor: float) -> float:
        return max(value * self.scoping**world.round, floor)

    def force(self, world: World, rank: int) -> Array | float:
        return (world.x[rank] - self.slow[rank]) / self.scoped(world, self.gamma, self.gamma_floor)

    def after_step(self, world: World) -> None:
        self.z = self.decay * self.z + (1.0 - self.decay) * world.x

    def averaged(self, world: World) -> Array:
        return self.slow if self.previous else self.z

    def pull_ranks(self, world: World, average: Array) -> None:
        gamma = self.scoped(world, self.gamma, self.gamma_floor)
        t = gamma / (self.scoped(world, self.rho, self.rho_floor) + gamma)
        self.slow[:] = (1.0 - t) * self.z + t * average
        for m in range(world.size):
            if not np.all(np.isfinite(world.x[m])):
                world.x[m] = self.slow[m] = self.z[m] = average
        world.center = average


@dataclass
class DataParallel(Method):
    """Every rank steps with the mean gradient. No rounds.

    A mean gradient that is not finite is a FloatingPointError, or the step is left out (on_nonfinite "skip").
    """

    on_nonfinite: str = "error"
    shares: ClassVar[bool] = True
    has_rounds: ClassVar[bool] = False

    def share(self, world: World) -> Array | None:
        mean = self.shared(world)
        if not np.all(np.isfinite(mean)):
            if self.on_nonfinite == "skip":
                self.start(world)
                return None
            raise FloatingPointError(f"the mean gradient is not finite at step {world.step}")
        return np.array([mean] * world.size)

    def shared(self, world: World) -> Array:
        """[P]: what every rank steps with."""
        mean: Array = world.gradients.mean(axis=0)
        return mean

    def messages(self, shapes: Sequence[tuple[int, ...]], world: int, width: int, step: int) -> list[tuple[str, int]]:
        """(verb, bytes of payload) of a step, for numbers of so many bytes: a flag per tensor, and 1; the gradient.

        Where they are one message, zeros bring what is ahead of the gradient to a multiple of 32 numbers. Where it
        matters each tensor is a bucket of its own.
        """
        ahead = -(-(len(shapes) + 1) // 32) * 32
        return [("allreduce", (ahead + sum(map(math.prod, shapes))) * width)]


@dataclass
class RoundedDataParallel(DataParallel):
    """round(mean of round(g_m)), to "float16" or to "bfloat16", the upper half of a float32."""

    to: str = "float16"

    def rounded(self, x: Array) -> Array:
        single = x.astype(np.float32)
        if self.to == "float16":
            with np.errstate(over="ignore"):
                return single.astype(np.float16).astype(np.float64)
        bits = single.view(np.uint32)
        to_even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (to_even & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)

    def shared(self, world: World) -> Array:
        return self.rounded(self.rounded(world.gradients).mean(axis=0))

    def messages(self, shapes: Sequence[tuple[int, ...]], world: int, width: int, step: int) -> list[tuple[str, int]]:
        parts = [2 * -(-math.prod(shape) // world) for shape in shapes]
        return [
            ("allreduce", (len(shapes) + 1) * width),
            *(("alltoall", world * part) for part in parts),
            *(("allgather", part) for part in parts),
        ]


@dataclass
class _Compressed(DataParallel):
    """p_m = g_m + e_m;  e_m <- p_m - q(p_m);  shared is the mean of q(p_m);  each tensor by itself."""

    def start(self, world: World) -> None:
        self.left = np.zeros_like(world.x)

    def compressed(self, p: Array) -> Array:
        """q(p) of one rank's tensor."""
        raise NotImplementedError

    def payload(self, shape: tuple[int, ...], width: int) -> int:
        """Bytes that q(p) of one tensor takes."""
        raise NotImplementedError

    def shared(self, world: World) -> Array:
        p, mean = world.gradients + self.left, np.zeros(world.x.shape[1])
        for (o, n), shape in zip(world.problem.layers["tensor"], world.problem.shapes, strict=True):
            q = np.array([self.compressed(own[o : o + n].reshape(shape)).reshape(n) for own in p])
            self.left[:, o : o + n] = p[:, o : o + n] - q
            mean[o : o + n] = q.mean(axis=0)
        return mean

    def messages(self, shapes: Sequence[tuple[int, ...]], world: int, width: int, step: int) -> list[tuple[str, int]]:
        gathers = [("allgather", self.payload(shape, width)) for shape in shapes]
        return [("allreduce", (len(shapes) + 1) * width), *gathers]


@dataclass
class OneBitSGD(_Compressed):
    """For each entry of a matrix's row the mean of those >= 0, or of those < 0; vectors as they are."""

    def compressed(self, p: Array) -> Array:
        if p.ndim < 2:
            return p
        rows = p.reshape(len(p), -1)
        q = np.empty_like(rows)
        for i, row in enumerate(rows):
            q[i, row >= 0] = row[row >= 0].mean() if (row >= 0).any() else 0.0
            q[i, row < 0] = row[row < 0].mean() if (row < 0).any() else 0.0
            if not np.all(np.isfinite(row)):
                q[i] = np.nan
        return q

    def payload(self, shape: tuple[int, ...], width: int) -> int:
        n = math.prod(shape)
        return n * width if len(shape) < 2 else -(-n // 8) + 2 * shape[0] * width


@dataclass
class EFSign(_Compressed):
    """(|p|_1 / d) sign(p) with sign(0) = 1."""

    def compressed(self, p: Array) -> Array:
        return np.where(p >= 0, 1.0, -1.0) * np.abs(p).mean()

    def payload(self, shape: tuple[int, ...], width: int) -> int:
        return -(-math.prod(shape) // 8) + width


@dataclass
class PowerSGD(DataParallel):
    """Of each matrix M_m = G_m + e_m:  P = orth(mean of M_m Q),  Q_m = M_m' P,  e_m = M_m - P Q_m',  Q = mean of Q_m.

    Shared is P Q'. Where Q is square, P is orth(mean of M_m). Vectors, and all in the first `warmup` steps, are the
    mean. Q starts as normal numbers seeded by the tensor's number.
    """

    rank: int = 2
    min_compression: float = 2.0
    warmup: int = 0

    def start(self, world: World) -> None:
        self.left = np.zeros_like(world.x)
        self.q: dict[int, Array] = {}
        for i, shape in enumerate(world.problem.shapes):
            if self.thin(shape):
                size = math.prod(shape[1:]), self.thin(shape)
                self.q[i] = np.random.default_rng(i).standard_normal(size)

    def thin(self, shape: tuple[int, ...]) -> int:
        """The rank that a tensor is compressed to; 0 for none."""
        if len(shape) < 2:
            return 0
        n, m = shape[0], math.prod(shape[1:])
        r = min(self.rank, n, m)
        return r if self.min_compression * r * (n + m) < n * m else 0

    def shared(self, world: World) -> Array:
        mean = np.array(world.gradients.mean(axis=0))
        if world.step < self.warmup or not np.all(np.isfinite(mean)):
            return mean
        for i, (o, n) in enumerate(world.problem.layers["tensor"]):
            if i in self.q:
                rows = world.problem.shapes[i][0]
                ms = (world.gradients + self.left)[:, o : o + n].reshape(world.size, rows, -1)
                whole = self.q[i].shape[0] == self.q[i].shape[1]
                p = np.linalg.qr(np.mean(ms if whole else ms @ self.q[i], axis=0))[0]
                qs = [m.T @ p for m in ms]
                self.left[:, o : o + n] = [(m - p @ q.T).reshape(n) for m, q in zip(ms, qs, strict=True)]
                self.q[i] = np.mean(qs, axis=0)
                mean[o : o + n] = (p @ self.q[i].T).reshape(n)
        return mean

    def messages(self, shapes: Sequence[tuple[int, ...]], world: int, width: int, step: int) -> list[tuple[str, int]]:
        numbers = sum(map(math.prod, shapes))
        if step >= self.warmup:
            thin = [(shape, self.thin(shape)) for shape in shapes]
            numbers = sum(r * (shape[0] + math.prod(shape[1:])) if r else math.prod(shape) for shape, r in thin)
        return [("allreduce", (numbers + len(shapes) + 1) * width)]


@dataclass
class DeepGradientCompression(DataParallel):
    """u <- mu u + g,  v <- v + u (Nesterov: v + g + mu u);  the k largest |v| of each matrix are sent, then u = v = 0.

    g is clipped to clip / sqrt(W), then has the weight decay added. Of vectors all of v is sent, and u stays. mu and
    the weight decay are the optimizers', which step without.
    """

    ratio: float = 0.25
    clip: float = math.inf
    masking: bool = True

    def start(self, world: World) -> None:
        self.u, self.v = np.zeros_like(world.x), np.zeros_like(world.x)
        for optimizer in world.optimizers:
            assert isinstance(optimizer, SGD)
            if optimizer.momentum or optimizer.weight_decay:
                self.taken = optimizer.momentum, optimizer.weight_decay
                optimizer.momentum = optimizer.weight_decay = 0.0
        self.momentum, self.decay = getattr(self, "taken", (0.0, 0.0))

    def stop(self, world: World) -> None:
        for optimizer in world.optimizers:
            assert isinstance(optimizer, SGD)
            optimizer.momentum, optimizer.weight_decay = self.momentum, self.decay

    def shared(self, world: World) -> Array:
        if not np.all(np.isfinite(world.gradients)):
            return np.full(world.x.shape[1], np.nan)
        sent = np.zeros_like(world.x)
        for m, (x, gradient, optimizer) in enumerate(zip(world.x, world.gradients, world.optimizers, strict=True)):
            assert isinstance(optimizer, SGD)
            norm = float(np.linalg.norm(gradient))
            limit = self.clip / math.sqrt(world.size)
            g = gradient * (limit / norm if norm > limit else 1.0) + self.decay * x
            self.u[m] = self.momentum * self.u[m] + g
            self.v[m] += g + self.momentum * self.u[m] if optimizer.nesterov else self.u[m]
            for (o, n), shape in zip(world.problem.layers["tensor"], world.problem.shapes, strict=True):
                k = n if len(shape) < 2 else math.ceil(self.ratio * n)
                largest = o + np.argsort(-np.abs(self.v[m, o : o + n]))[:k]
                sent[m, largest] = self.v[m, largest]
                self.v[m, largest] = 0.0
                if self.masking and len(shape) >= 2:
                    self.u[m, largest] = 0.0
        return np.array(sent.mean(axis=0))

    def messages(self, shapes: Sequence[tuple[int, ...]], world: int, width: int, step: int) -> list[tuple[str, int]]:
        sizes = [(math.prod(shape), len(shape)) for shape in shapes]
        gathers = [n * width if d < 2 else math.ceil(self.ratio * n) * (width + 4) for n, d in sizes]
        return [("allreduce", (len(shapes) + 1) * width), *(("allgather", payload) for payload in gathers)]


# ---------------------------------------------------------------------------------------------------------
# The replay.
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    step: int  # which, from 0
    lr: float
    losses: Array  # [W], mini-batch losses at the parameters before the step
    parameters: Array  # [W, P], after the step and after its round, if it had one


@dataclass(frozen=True)
class Round:
    step: int  # steps made when the round took place
    period: int  # H as the period gave it; the last round may have had fewer steps
    raw_scores: Array  # [W, K], as each rank measured them
    scores: Array  # [W, K], after the score momentum; NaN in all columns for a rank that is not finite
    weights: Array  # [W, K]
    before: Array  # [W, P], before the pull
    center: Array  # [P]
    parameters: Array  # [W, P], after the pull
    healed: tuple[int, ...]


@dataclass(frozen=True)
class Replay:
    steps: list[Step]
    rounds: list[Round]
    parameters: Array  # [W, P], at the end
    center: Array | None  # [P], of the last round; None without rounds

    @property
    def mean(self) -> Array:
        mean: Array = self.parameters.mean(axis=0)
        return mean


def replay(
    method: Method,
    problem: Problem,
    starts: Array,
    batch: Callable[[int, int], tuple[Any, ...]],
    *,
    steps: int,
    lr: float | Callable[[int], float],
    period: int | Callable[[Facts], int] = 1,
    optimizer: Callable[[], Optimizer] = SGD,
    probe: Callable[[int, int], tuple[Any, ...]] | None = None,
    poison: Callable[[int, int], bool] | None = None,
    independent: bool = False,
    local_momentum: str = "keep",
    warmup_steps: int = 0,
    steps_per_epoch: int = 1,
    shared: int = 0,
    first: Method | None = None,
) -> Replay:
    """Runs `method` for `steps` local steps on W ranks (see the top of this page) and keeps everything.

    starts          [W, P]; all ranks start from row 0 unless `independent`
    batch           (rank, step) -> the arguments of problem.loss_and_grad after x, e.g. (inputs, targets)
    lr              a number or a function of the step
    period          a number or a function of Facts
    optimizer       makes one local optimizer, e.g. lambda: SGD(0.9, nesterov=True)
    probe           (rank, round) -> the probe batch, taken at x after the local step and its proximity pull
    poison          (rank, step) -> True where the rank's parameters become NaN after that step
    local_momentum  optimizer state at a round: "keep", "reset", or "average" (uniform, over the finite ranks)
    shared          so many steps of a method that shares gradients come first
    first           that method
    """
    method, first = copy.deepcopy(method), copy.deepcopy(first or DataParallel())
    eta = lr if callable(lr) else lambda step: lr
    every = period if callable(period) else lambda facts: period
    x = starts.copy() if independent else np.array([starts[0]] * len(starts))
    world = World(problem, x.astype(np.float64), [optimizer() for _ in starts], probe=probe, steps=steps)
    peak_lr = max(eta(step) for step in range(steps))
    step_records: list[Step] = []
    round_records: list[Round] = []
    round_begins = True

    for step in range(steps):
        now = first if step < shared else method
        if step == 0:
            first.start(world)
        if step == shared:
            first.stop(world)
            method.start(world)
            round_begins = True
        world.lr = eta(step)
        if round_begins:
            facts = Facts(step, world.lr, peak_lr, warmup_steps, steps - step, steps_per_epoch)
            world.round_began, world.period = step, every(facts)
            if world.period < 1:
                raise ValueError(f"a period is at least 1, not {world.period}")

        _local_steps(now, world, [batch(m, step) for m in range(world.size)])
        now.proximity(world)
        for m in range(world.size):
            if poison is not None and poison(m, step):
                world.x[m] = np.nan
        world.step = step + 1
        now.after_step(world)

        due = world.step - world.round_began >= world.period or world.step == steps
        round_begins = now.has_rounds and due
        if round_begins:
            round_records.append(_round(method, world, local_momentum))
            world.round += 1
        step_records.append(Step(step, world.lr, world.losses, world.x.copy()))

    return Replay(step_records, round_records, world.x.copy(), world.center)


class _Skipped(Exception):
    """No rank steps."""


def _local_steps(method: Method, world: World, batches: list[tuple[Any, ...]]) -> None:
    """Every rank's optimizer makes its step. Those that share gradients are threads, which ask for them together."""
    world.losses, world.gradients = np.zeros(world.size), np.empty_like(world.x)
    asked: set[int] = set()
    answer: list[Any] = []

    def answered() -> None:  # by one of them, when all have asked
        try:
            answer[:] = [method.share(world)]
        except FloatingPointError as error:
            answer[:] = [error]

    meeting = threading.Barrier(world.size, answered, timeout=60)

    def step(m: int) -> Array:
        def gradient_at(x: Array, share: bool = True, part: tuple[int, int] = (0, 1)) -> Array:
            i, parts = part
            loss, gradient = world.problem.loss_and_grad(x, *(np.split(whole, parts)[i] for whole in batches[m]))
            if m not in asked or i > 0:
                world.losses[m] += loss / parts
            asked.add(m)
            world.gradients[m] = gradient / parts + (world.gradients[m] if i > 0 else 0)
            if not (share and method.shares):
                own = world.gradients[m].copy()
                return own + method.force(world, m) if share else own
            meeting.wait()
            [shared] = answer
            if shared is None:
                raise _Skipped
            if isinstance(shared, FloatingPointError):
                raise shared
            given: Array = shared[m]
            return given

        try:
            return world.optimizers[m].step(world.x[m], gradient_at, world.lr)
        except _Skipped:
            return world.x[m]

    if method.shares:
        with ThreadPoolExecutor(world.size) as ranks:
            world.x[:] = list(ranks.map(step, range(world.size)))
    else:
        world.x[:] = [step(m) for m in range(world.size)]


def _round(method: Method, world: World, local_momentum: str) -> Round:
    """One round: scores, weights, center, pull, and the healing of ranks where what is averaged is not all finite.

    Such a rank has weight 0 in every column (the rule does not see it), takes over c, and starts anew: optimizer state
    and score momentum are reset; where momenta are averaged, it takes over the mean of the finite ones.
    """
    before, averaged = world.x.copy(), method.averaged(world)
    broken = [m for m in range(world.size) if not np.all(np.isfinite(averaged[m]))]
    finite = [m for m in range(world.size) if m not in broken]

    raw_scores = method.raw_scores(world)
    scores = method.smoothed(raw_scores).copy()
    scores[broken] = np.nan
    weights = np.zeros_like(scores)
    weights[finite] = method.weights(scores[finite])
    average = weighted_center(averaged, weights, method.spans(world))
    method.pull_ranks(world, average)
    assert world.center is not None

    _local_momentum(world, local_momentum, finite)
    for m in broken:
        averaged[m] = world.center
        if local_momentum != "average":
            world.optimizers[m].state.clear()
        method.forget(m)
    return Round(
        step=world.step,
        period=world.period,
        raw_scores=raw_scores,
        scores=scores,
        weights=weights,
        before=before,
        center=world.center.copy(),
        parameters=world.x.copy(),
        healed=tuple(broken),
    )


def _local_momentum(world: World, policy: str, finite: list[int]) -> None:
    states = [world.optimizers[m].state for m in finite]
    if policy == "reset":
        for state in states:
            state.clear()
    elif policy == "average":
        for name in states[0]:
            mean = np.sum([state[name] for state in states], axis=0) / len(states)
            for optimizer in world.optimizers:
                optimizer.state[name] = mean.copy()
    elif policy != "keep":
        raise ValueError(f"local_momentum is keep, reset or average, not {policy!r}")
