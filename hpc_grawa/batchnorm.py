"""BatchNorm and its like: layers with running statistics of their inputs, recalibrated, pooled and reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from . import buffers
from .comm import Communicator


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


class Recalibration:
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
                mean, var = moments(norm, x.detach())
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


def moments(norm: _NormBase, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (over n) of each channel of what the layer is given, as it normalises by, in float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if spreads(norm):
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        return mean.double(), var.double()
    x = x[None] if x.dim() == norm._get_no_batch_dim() else x  # type: ignore[operator]
    var, mean = torch.var_mean(x.flatten(2), 2, correction=0)
    return mean.double().mean(0), var.double().mean(0)
