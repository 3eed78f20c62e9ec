"""BatchNorm and its like: layers with running statistics of their inputs; recalibrated, pooled, kept and reset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from . import buffers, nests
from .comm import Communicator
from .forward import NoDropout, Precision, autocast, eagerly, training_mode, undisturbed
from .nests import Nest

#: The buffers of such a layer.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def norms(model: nn.Module) -> list[_NormBase]:
    """The layers of the model that keep running statistics: BatchNorm, SyncBatchNorm, InstanceNorm."""
    found = [m for m in model.modules() if isinstance(m, _NormBase)]
    return [m for m in found if m.running_mean is not None and m.running_var is not None and not is_lazy(m.running_var)]


def spreads(norm: _NormBase) -> bool:
    """Whether a variance holds that between means: of a batch, not of InstanceNorm's single instances."""
    return not isinstance(norm, _InstanceNorm)


def reset(model: nn.Module) -> None:
    """Begin statistics anew; those of layers that train in eval mode stay, unless they are not finite."""
    for norm in norms(model):
        assert norm.running_mean is not None and norm.running_var is not None
        if norm.training or not bool((norm.running_mean + norm.running_var).isfinite().all()):
            norm.reset_running_stats()


def frozen(model: nn.Module) -> AbstractContextManager[None]:
    """After the block running statistics are what they were, bit for bit; within it layers do as they always do."""
    return buffers.kept(norms(model))


def recalibrate(model: nn.Module, batches: Iterable[Nest], comm: Communicator, precision: Precision = "fp32") -> None:
    """Give BatchNorm layers the statistics of the model's present parameters.

    The running mean becomes the mean of batch means, the running variance mean(E[x²]) - mean², over all calls of the
    layer on all ranks; one allreduce of the sums. A layer that no pass reaches, or that trains in eval mode, keeps
    its statistics. No dropout is applied, and random streams are left as they were. All ranks must call it.

    Args:
        model: changed in its running statistics only.
        batches: inputs, this rank's.
        comm: the ranks.
        precision: of the forward pass.

    Source: Izmailov et al., Averaging Weights Leads to Wider Optima (UAI 2018), section 3.2.
    """
    statistics = _Recalibration(model)
    if not statistics.norms:
        return
    device = next(model.parameters()).device
    # Passes in training mode change parameters too: a mean teacher's, those of embeddings with max_norm.
    held = buffers.values_kept(model.parameters())
    with training_mode(model), undisturbed(model), held, statistics.watching(), torch.no_grad():
        for inputs in batches:
            with NoDropout(), eagerly(), autocast(precision, device):
                model(nests.moved(inputs, device))
    statistics.take_over(comm)


class _Recalibration:
    """Statistics over calls of all ranks: the mean of batch means, and mean(E[x²]) - mean².

    A layer counts each of its own calls; one in eval mode none. InstanceNorm's variance is the mean over instances.

    Args:
        model: whose layers are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.norms = norms(model)
        #: Per layer the number of calls, and sums of means and of second moments. In float64, as the difference of
        #: the two leaves nothing of a small variance far from zero.
        self._sums = [
            torch.zeros(1 + 2 * m.num_features, dtype=torch.float64, device=m.running_var.device)  # type: ignore[union-attr]
            for m in self.norms
        ]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block calls count."""
        hooks = [
            norm.register_forward_pre_hook(self._hook(total), with_kwargs=True)
            for norm, total in zip(self.norms, self._sums, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, total: Tensor) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def count(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            if norm.training and x.numel():
                assert isinstance(norm, _NormBase)
                mean, var = _moments(norm, x.detach())
                total.add_(torch.cat((mean.new_ones(1), mean, var + mean.square() if spreads(norm) else var)))

        return count

    def take_over(self, comm: Communicator) -> None:
        """Give layers that were called, on whichever rank, the statistics of all ranks; one allreduce."""
        message = torch.cat(self._sums)
        comm.allreduce(message, "evaluate").wait()
        for norm, total in zip(self.norms, torch.split(message, [len(s) for s in self._sums]), strict=True):
            assert norm.running_mean is not None and norm.running_var is not None
            if calls := float(total[0]):
                mean, second = (total[1:] / calls).view(2, -1)
                norm.running_mean.copy_(mean)
                norm.running_var.copy_((second - mean.square()).clamp_(min=0) if spreads(norm) else second)


def _moments(norm: _NormBase, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (over n) of each channel of what the layer is given, as it normalises by, in float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if spreads(norm):
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        return mean.double(), var.double()
    x = x[None] if x.dim() == norm._get_no_batch_dim() else x  # type: ignore[operator]
    var, mean = torch.var_mean(x.flatten(2), 2, correction=0)
    return mean.double().mean(0), var.double().mean(0)


def pool(model: nn.Module, comm: Communicator) -> None:
    """Give the model the statistics that a round would pool now; all must call it."""
    if norms(model):
        pooling = Pooling(model)
        packed = pooling.pack()
        message = torch.cat([t.double().flatten() for t in packed])
        comm.allreduce(message, "evaluate").wait()
        parts = torch.split(message, [t.numel() for t in packed])
        pooling.unpack([part.view_as(t) for part, t in zip(parts, packed, strict=True)])


class Pooling:
    """Running statistics of all ranks made one by a sum: the mean of means, and mean(var + mean²) - mean².

    They travel as digits, whose sums are exact: in fp32 squares of means far from zero leave no digit of a variance.
    Those of ranks where all are finite count; where no rank's are, each keeps its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = norms(model)
        self._sizes = [m.num_features for m in self._norms]
        self._spreads = torch.tensor([spreads(m) for m in self._norms]).repeat_interleave(torch.tensor(self._sizes))

    def _tensors(self) -> list[Tensor]:
        held = [m.running_mean for m in self._norms] + [m.running_var for m in self._norms]
        return [t for t in held if t is not None]

    def pack(self) -> list[Tensor]:
        """What to sum over ranks."""
        own = torch.cat(self._tensors()).double()
        finite = own.isfinite().all()
        mean, var = own.where(finite, 0).view(2, -1)
        self._spreads = self._spreads.to(mean)
        return [finite.reshape(1), _digits(mean), _digits(var) + _digits(mean.square()) * self._spreads]

    def unpack(self, sums: list[Tensor]) -> None:
        """Take over the statistics that the sums of ``pack`` give."""
        count, means, seconds = (t.double() for t in sums)
        mean = _number(means) / count
        var = (_number(seconds - count * _digits(mean.square()) * self._spreads) / count).clamp_(min=0)
        own = self._tensors()
        pooled = torch.cat((mean, var)).where(count > 0, torch.cat(own))
        torch._foreach_copy_(own, torch.split(pooled, self._sizes * 2))


#: Of the digits that numbers travel as: |digit| <= 2^13, so that sums over a thousand ranks are exact in fp32.
_PLACES = tuple(2.0**exponent for exponent in range(70, -57, -14))


def _digits(x: Tensor) -> Tensor:
    """Numbers ``[...]`` in float64 as digits ``[10, ...]`` to the base 2^14, of 2^70 (any size) down to 2^-56."""
    found = []
    for place in _PLACES:
        digit = torch.round(x / place)
        x = x - digit * place
        found.append(digit)
    return torch.stack(found)


def _number(digits: Tensor) -> Tensor:
    """The numbers ``[...]`` that sums and differences of such digits stand for."""
    return torch.stack([digit * place for digit, place in zip(digits, _PLACES, strict=True)]).sum(0)
