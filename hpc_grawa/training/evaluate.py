"""Exact evaluation: every example counts once, however ranks share them, and training notices nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import attributes, buffers, random_streams
from ..averaging.probe import NoDropout
from ..batchnorm import Recalibration
from ..comm import Communicator
from ..data import Examples, Nest, in_advance, nests
from ..eager import eagerly
from ..metrics import Metric
from . import losses

Precision = Literal["fp32", "bf16"]
BATCH = 500


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """bf16 where a layer profits from it, over fp32 parameters; nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True)
class Judge:
    """What a model is judged by.

    Attributes:
        loss: (output, target) → loss of a batch; see ``losses.sums`` for what that of all examples is.
        metric: the metric.
        precision: of the forward pass.
        batch_size: examples per forward pass and rank.
    """

    loss: Callable[[Any, Any], Tensor]
    metric: Metric
    precision: Precision = "fp32"
    batch_size: int = BATCH

    def judge(
        self, model: nn.Module, examples: Examples, comm: Communicator | None = None, limit: int | None = None
    ) -> dict[str, float]:
        """Loss and metric of the model over ``examples`` as if they were one batch.

        Args:
            model: as it is; evaluated in eval mode, its modules' modes are restored.
            examples: each counts once.
            comm: ranks share the work (all must call), with one model's buffers (``buffers.shared``); None: this
                process does all of it.
            limit: only so many examples, evenly spaced.

        Returns:
            ``{"loss": ..., metric.name: ...}``, and whatever else the metric says.
        """
        count = len(examples) if limit is None else min(limit, len(examples))
        index = torch.arange(count) * len(examples) // count
        own = index if comm is None else index[comm.rank :: comm.size]
        device = next(model.parameters()).device
        # A rank without examples (fewer than ranks) runs one for the shape of the sums, and counts it as none.
        parts = torch.split(own, self.batch_size) if len(own) else (index[:1],)
        sums: list[Tensor] = []
        with undisturbed(model, comm), eval_mode(model), torch.no_grad(), autocast(self.precision, device):
            batches = in_advance(examples, ((part, None) for part in parts), device)
            for part, (inputs, targets) in zip(parts, batches, strict=True):
                inputs, targets = nests.moved((inputs, targets), device)
                output = model(inputs)
                loss = losses.sums(self.loss, output, targets, len(part), count)
                sums.append(torch.cat((loss, self.metric.sums(output, targets).double())))
        message = torch.stack(sums).sum(0) if len(own) else torch.zeros_like(sums[0])
        if comm is not None:
            comm.allreduce(message, "evaluate").wait()
        message = message.cpu()
        return {"loss": float(message[0] / message[1]), **self.metric.values(message[2:])}


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block all modules are in eval mode; afterwards each in its own again."""
    with _modes_kept(model):
        model.eval()
        yield


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
    statistics = Recalibration(model)
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


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Within the block all modules are in the modes they train in: those they have, if the model is in training mode.

    Otherwise ``model.train()`` says which. Afterwards each is in its own again.
    """
    with _modes_kept(model):
        if not model.training:
            model.train()
        yield


@contextmanager
def undisturbed(model: nn.Module, comm: Communicator | None = None) -> Iterator[None]:
    """Within the block buffers and attributes may change and random numbers be drawn; afterwards all are as before.

    With ``comm`` the model begins the block with one set of buffers and frozen parameters on all ranks, see
    ``buffers.shared``; ``ConfigError`` if one is of a kind that ranks cannot share.
    """
    if comm is not None:
        buffers.check_kinds(model)
    one_set = nullcontext() if comm is None else buffers.shared(model, comm)
    with random_streams.kept(), attributes.kept(model), buffers.kept(model.modules()), one_set:
        yield


def uniform_mean(comm: Communicator, x: Tensor) -> tuple[Tensor, float]:
    """The mean x̄ of all ranks' ``x`` ``[P]``, and the consensus distance sqrt(mean_m ‖x_m - x̄‖²)."""
    mean = x.to(torch.promote_types(x.dtype, torch.float32), copy=True).div_(comm.size)
    comm.allreduce(mean, "evaluate").wait()
    squared = (x - mean).double().square().sum().reshape(1) / comm.size
    return mean, float(comm.allreduce(squared, "evaluate").wait().sqrt())
