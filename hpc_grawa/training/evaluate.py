"""Exact evaluation: every example counts once, however ranks share them, and training notices nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, nests
from ..comm import Communicator
from ..data import Examples, in_advance
from ..forward import Precision, autocast, eval_mode, undisturbed
from ..metrics import Metric

BATCH = 500


@dataclass(frozen=True)
class Evaluator:
    """What a model is evaluated by.

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

    def evaluate(
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


def uniform_mean(comm: Communicator, x: Tensor) -> tuple[Tensor, float]:
    """The mean x̄ of all ranks' ``x`` ``[P]``, and the consensus distance sqrt(mean_m ‖x_m - x̄‖²)."""
    mean = x.to(torch.promote_types(x.dtype, torch.float32), copy=True).div_(comm.size)
    comm.allreduce(mean, "evaluate").wait()
    squared = (x - mean).double().square().sum().reshape(1) / comm.size
    return mean, float(comm.allreduce(squared, "evaluate").wait().sqrt())
