"""All measures of a model, one after the other: with progress, and going on where they were left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, NonFinite, require, wrong
from .estimators import trace_and_square
from .lanczos import Lanczos, Ritz
from .objective import Objective
from .perturbed import keskar_sharpness, lpf, sam_sharpness, valley_width

#: Passes over the examples that a forward pass, a gradient and a product are worth, roughly.
VALUE, GRADIENT, PRODUCT = 1, 3, 8


@dataclass
class Settings:
    """What is measured, and how exactly.

    Attributes:
        measures: names of ``MEASURES``; none: all.
        steps: k of Lanczos's method.
        starts: spectra from so many starts, for the density.
        samples: vectors of the trace's estimate, and of its sketch.
        rho: ρ of SAM's sharpness.
        epsilon: ε of Keskar's sharpness.
        sigma: σ of the low-pass filter.
        lpf_samples: its M.
        kappa: κ of the valley's width.
        reach: of the search for it, in parts of the way to a rank.
        seed: of all random vectors.
    """

    measures: tuple[str, ...] = ()
    steps: int = 100
    starts: int = 1
    samples: int = 10
    rho: float = 0.05
    epsilon: float = 5e-4
    sigma: float = 5e-4
    lpf_samples: int = 20
    kappa: float = 2.0
    reach: float = 1000.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.measures = tuple(self.measures) or tuple(MEASURES)
        for name in self.measures:
            if name not in MEASURES:
                raise wrong("measures", name, f"must be among {', '.join(MEASURES)}")
            if name in ("keskar", "spectrum") and find_spec("scipy") is None:
                raise ConfigError(f"measures hold {name}, which needs SciPy: pip install 'hpc-grawa[demo]'")
        for name in ("steps", "starts", "samples", "lpf_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("rho", "epsilon", "sigma"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a positive number")
        require(1 <= self.reach < math.inf, "reach", self.reach, "a number of 1 or more")
        require(1 < self.kappa < math.inf, "kappa", self.kappa, "a number above 1")

    def of(self, measure: str) -> dict[str, Any]:
        """Those that a measure depends on."""
        return {key: getattr(self, key) for key in MEASURES[measure].settings}


class Models(Sequence[Tensor]):
    """Models ``[P]``, such as the ranks' own, each made when it is asked for; all ranks must ask alike.

    Args:
        count: of models.
        make: one, by its number.
    """

    def __init__(self, count: int, make: Callable[[int], Tensor]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return self._make(number)


@dataclass
class Subject:
    """What is measured: an objective at a model, and the ranks' models beside it.

    Attributes:
        objective: f, at the model.
        ranks: their models ``[P]``; none where there are none, or all have one.
        spectra: Lanczos's state of each start, as it was left.
        keep: called after each of its steps with what makes these states.
    """

    objective: Objective
    ranks: Sequence[Tensor] = ()
    spectra: Sequence[dict[str, Any]] = ()
    keep: Callable[[Callable[[], list[dict[str, Any]]]], None] = lambda spectra: None


def loss(subject: Subject, settings: Settings) -> dict[str, Any]:
    """f(θ), ‖∇f‖₂ and Σ_l ‖∇_l f‖."""
    value, gradient = subject.objective.gradient()
    norms = subject.objective.vector.layers().norms(subject.objective.vector.views(gradient))
    return {
        "loss": value,
        "gradient_norm": float(gradient.double().norm()),
        "sum_of_layer_norms": float(norms.double().sum()),
    }


def spectrum(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Ritz values of k steps: λ_max, λ_min, the top ten, their sum (which is not the trace), √Σθ²; and the density.

    Errors of λ_max and λ_min are residuals: an eigenvalue is so near.
    """
    objective, vector = subject.objective, subject.objective.vector
    spectra: list[Ritz] = []
    done: list[dict[str, Any]] = []
    residuals = []
    for start in range(settings.starts):
        lanczos = Lanczos(len(vector), settings.seed + start, objective.comm, vector.exact_dtype, vector.data.device)
        if start < len(subject.spectra):
            lanczos.load_state_dict(subject.spectra[start])
        while lanczos.steps < settings.steps and not lanczos.complete:
            try:
                lanczos.advance(objective.product)
            except NonFinite:
                ends = [f"{end}_eigenvalue{of}" for end in ("largest", "smallest") for of in ("", "_error")]
                return dict.fromkeys((*ends, "sum_of_ritz_values"))
            subject.keep(lambda lanczos=lanczos: [*done, lanczos.state_dict()])  # type: ignore[misc]
        spectra.append(lanczos.ritz())
        residuals.append(lanczos.residuals())
        done.append(lanczos.state_dict(basis=False))
    values, _ = spectra[0]
    return {
        "largest_eigenvalue": float(values[-1]),
        "largest_eigenvalue_error": float(residuals[0][-1]),
        "smallest_eigenvalue": float(values[0]),
        "smallest_eigenvalue_error": float(residuals[0][0]),
        "top_eigenvalues": values[::-1][:10].tolist(),
        "ritz_values": len(values),
        "sum_of_ritz_values": float(values.sum()),
        "root_of_squared_ritz_values": float(np.sqrt((values**2).sum())),
        "spectra": [[values.tolist(), weights.tolist()] for values, weights in spectra],
    }


def trace(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Tr H and ‖H‖_F, with standard errors."""
    objective = subject.objective
    like = objective.vector.data.to(objective.vector.exact_dtype)
    found, square = trace_and_square(objective.product, like, settings.samples, settings.seed)
    norm = math.sqrt(square.value)
    return {
        "trace": found.value,
        "trace_error": found.error,
        "frobenius_norm": norm,
        "frobenius_norm_error": square.error / (2 * norm) if norm else 0.0,
    }


def sam(subject: Subject, settings: Settings) -> dict[str, Any]:
    """SAM's sharpness, plain and adaptive."""
    return {
        "sam_sharpness": sam_sharpness(subject.objective, settings.rho),
        "adaptive_sam_sharpness": sam_sharpness(subject.objective, settings.rho, adaptive=True),
    }


def keskar(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Keskar's ε-sharpness."""
    return {"epsilon_sharpness": keskar_sharpness(subject.objective, settings.epsilon)}


def filtered(subject: Subject, settings: Settings) -> dict[str, Any]:
    """The loss through a low-pass filter."""
    found = lpf(subject.objective, settings.sigma, settings.lpf_samples, settings.seed)
    return {"lpf": found.value, "lpf_error": found.error}


def entropy(subject: Subject, settings: Settings) -> dict[str, Any]:
    """The mean Shannon entropy of the outputs, where they are logits of classes ``[B, C, ...]``."""
    objective = subject.objective
    sums = torch.zeros(3, dtype=torch.float64, device=objective.vector.data.device)
    for output, target, _ in objective.outputs():
        tensors = isinstance(output, Tensor) and isinstance(target, Tensor) and not target.is_floating_point()
        if tensors and output.dim() > 1 < output.shape[1] and output.shape[:1] + output.shape[2:] == target.shape:
            each = torch.special.entr(output.double().softmax(1)).sum(1)
            sums += sums.new_tensor([float(each.sum()), each.numel(), 0])
        else:
            sums[2] += 1
    objective.comm.allreduce(sums, "evaluate").wait()
    return {"entropy": None if sums[2] or not sums[1] else float(sums[0] / sums[1])}


def valley(subject: Subject, settings: Settings) -> dict[str, Any]:
    """How far the valley reaches towards the ranks' models, on the mean; at least, where some searches ended before."""
    center = subject.objective.vector.data.clone()
    found = valley_width(subject.objective, center, subject.ranks, settings.kappa, settings.reach)
    towards = [width for width, _ in found if width is not None]  # a rank that is the center, such as LSGD's leader
    mean = sum(towards) / len(towards) if towards else math.nan
    cut = [ended for _, ended in found]
    return {
        "valley_width": None if math.isnan(mean) or any(cut) else mean,
        "valley_width_at_least": mean if math.isfinite(mean) else None,
        "valley_widths": [None if width is None or math.isnan(width) else width for width, _ in found],
        "valley_cut": cut,
    }


def _steps_left(subject: Subject, settings: Settings) -> int:
    """Of Lanczos's method."""
    made = sum(len(one["alpha"]) for one in subject.spectra)
    return max(1, settings.starts * settings.steps - made)


class Measure(NamedTuple):
    """One of ``MEASURES``.

    Attributes:
        find: numbers by name.
        one: what most of its passes over the examples are worth, in forward passes.
        passes: how many these are, roughly.
        settings: those that it depends on.
    """

    find: Callable[[Subject, Settings], dict[str, Any]]
    one: float
    passes: Callable[[Subject, Settings], float]
    settings: tuple[str, ...] = ()


MEASURES: dict[str, Measure] = {
    "loss": Measure(loss, GRADIENT, lambda subject, s: 1),
    "sam": Measure(sam, GRADIENT, lambda subject, s: 4, ("rho",)),
    "entropy": Measure(entropy, VALUE, lambda subject, s: 1),
    "keskar": Measure(keskar, GRADIENT, lambda subject, s: 15, ("epsilon",)),
    "lpf": Measure(filtered, VALUE, lambda subject, s: s.lpf_samples, ("sigma", "lpf_samples", "seed")),
    "valley": Measure(valley, VALUE, lambda subject, s: 1 + 20 * len(subject.ranks), ("kappa", "reach")),
    "trace": Measure(trace, PRODUCT, lambda subject, s: 3 * s.samples, ("samples", "seed")),
    "spectrum": Measure(spectrum, PRODUCT, lambda subject, s: _steps_left(subject, s), ("steps", "starts", "seed")),
}


#: Those that ask for a few passes over the examples.
CHEAP = ("loss", "sam", "valley")


def measure(
    subject: Subject,
    settings: Settings,
    known: dict[str, Any] | None = None,
    watch: Callable[[float, str], None] = lambda share, text: None,
    on_found: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """All measures of a model; all ranks of its objective must call it together.

    Args:
        subject: what is measured.
        settings: which, and how.
        known: what was found before; what the same settings have given is not measured again.
        watch: told after each batch the share that is done, and a line with the time that all will still take.
        on_found: told what is known after each measure.

    Returns:
        Numbers by name, None where a measure does not apply; ``measures``: the settings of each.
    """
    found = dict(known or {})
    names = [name for name in settings.measures if not is_known(name, settings, found)]
    passes = {name: MEASURES[name].passes(subject, settings) for name in names}
    costs = {name: MEASURES[name].one * passes[name] for name in names}
    began, done = time.monotonic(), 0.0
    for name in names:
        batches = 0

        def tell(count: int, name: str = name, before: float = done) -> None:
            nonlocal batches
            batches += 1
            own = min(1.0, batches / (passes[name] * count))
            share = (before + own * costs[name]) / sum(costs.values())
            left = (time.monotonic() - began) * (1 - share) / share
            watch(share, f"{name}  {own:.0%}  ETA {left:.0f} s")

        subject.objective.watch = tell
        found |= MEASURES[name].find(subject, settings)
        subject.objective.watch = lambda batches: None
        found["measures"] = {**found.get("measures", {}), name: settings.of(name)}
        done += costs[name]
        on_found(found)
    return found


def is_known(name: str, settings: Settings, found: dict[str, Any]) -> bool:
    """Whether a measure was found before, by the same settings."""
    return bool(found.get("measures", {}).get(name) == settings.of(name))
