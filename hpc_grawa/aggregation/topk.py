"""The largest entries of a gradient's accumulated momentum, by value and index."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from ..comm import Work
from ..errors import ConfigError, label
from ..vector import ParameterVector
from .codec import Bucket, Codec
from .wires import as_message, as_parts


class TakenOver:
    """Momentum and weight decay of an ``SGD``, which steps without, as they enter before gradients are shared.

    A schedule or a checkpoint may set them in the optimizer meanwhile: each value but 0 is taken as well.

    Raises:
        ConfigError: the optimizer is none whose momentum can be taken over.
    """

    _KEYS = ("momentum", "weight_decay")
    #: In a group whose are taken, also in a checkpoint of the optimizer.
    _MARK = "taken_over"

    def __init__(self, optimizer: optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        groups = optimizer.param_groups
        # SAM and the like make another gradient, by which theirs steps. What else has momentum is not linear in it.
        if not isinstance(getattr(optimizer, "base", optimizer), optim.SGD):
            raise ConfigError(
                f"the optimizer is a {label(optimizer)}: deep gradient compression takes over the momentum of "
                f"SGD, which this one has not; take SGD, method.momentum_correction: false, or PowerSGD, which both "
                f"leave any optimizer as it is"
            )
        if any(group["dampening"] or group.get("maximize") for group in groups):
            raise ConfigError(
                "the optimizer has dampening or maximize, with which deep gradient compression cannot take over its "
                "momentum: leave them out, or take method.momentum_correction: false"
            )
        numbers = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
        self._group_of = [numbers[id(p)] for p in parameters]
        self.values: list[dict[str, float]] = []
        #: Those that the optimizer was made with; empty where it was loaded since, with what they are while taken.
        self.configured = [
            {} if group.get(self._MARK) else {key: float(group[key]) for key in self._KEYS} for group in groups
        ]

    def take(self) -> None:
        """Set them to 0 in the optimizer, whose groups a loaded checkpoint has made anew."""
        groups = self._optimizer.param_groups
        self.values = self.values or [dict.fromkeys(self._KEYS, 0.0) for _ in groups]
        for group, values in zip(groups, self.values, strict=True):
            group[self._MARK] = True
            for key in self._KEYS:
                if group[key]:
                    values[key], group[key] = group[key], 0.0

    def go_on(self, values: list[dict[str, float]], configured: list[dict[str, float]]) -> None:
        """Go on with the values of a checkpoint, but for those that were configured otherwise there."""
        self.configured = [now or then for then, now in zip(configured, self.configured, strict=True)]
        self.values = [
            kept | {key: value for key, value in now.items() if key in then and then[key] != value}
            for kept, then, now in zip(values, configured, self.configured, strict=True)
        ]

    def give_back(self) -> None:
        if self.values:
            self.take()
            for group, values in zip(self._optimizer.param_groups, self.values, strict=True):
                group.update(values)
                del group[self._MARK]
            self.values = []

    def of(self, tensors: Sequence[int]) -> tuple[list[float], list[float], list[bool]]:
        """Momentum, weight decay and whether it is Nesterov's, of each tensor."""
        groups = [self._group_of[i] for i in tensors]
        return (
            [self.values[group]["momentum"] for group in groups],
            [self.values[group]["weight_decay"] for group in groups],
            [bool(self._optimizer.param_groups[group]["nesterov"]) for group in groups],
        )


class TopK(Codec):
    """u ← μu + g, v ← v + u: of each matrix the entries of v with the largest |v| are sent; there v, and u, become 0.

    Vectors are sent whole, and keep their momentum u, as nothing of them is late.

    Args:
        vector: the parameters, for their weight decay.
        ratio: the share of a matrix's entries that is sent in the coming step.
        taken: momentum and weight decay; None: v ← v + g.
        masks: whether u becomes 0 where v is sent.
        clip_norm: what each rank's own gradient is clipped to, before it is added to anything; None for no clipping.
    """

    def __init__(
        self,
        vector: ParameterVector,
        ratio: Callable[[], float],
        taken: TakenOver | None,
        masks: bool,
        clip_norm: float | None,
    ) -> None:
        self._ratio, self._taken, self._masks, self._clip_norm = ratio, taken, masks, clip_norm
        self.whole, self.once = clip_norm is not None, taken is not None
        self._parameters = vector.views(vector.data)
        self._v = torch.zeros(len(vector), dtype=vector.exact_dtype, device=vector.data.device)
        self._u = torch.zeros_like(self._v) if taken is not None else None
        self._u_views = [] if self._u is None else vector.views(self._u)
        self._v_views = vector.views(self._v)
        self._scale: Tensor | None = None
        #: Of each bucket the entries of vectors.
        self._exact: dict[Bucket, Tensor] = {}

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            spans = [_span(bucket, k) for k, view in enumerate(bucket.views) if view.dim() < 2]
            places = [torch.arange(*span, device=self._v.device) for span in spans or [(0, 0)]]
            self._exact[bucket] = torch.cat(places)
        if self._taken is not None:
            self._taken.take()

    def inspect(self, gradient: Tensor) -> None:
        assert self._clip_norm is not None
        norm = torch.linalg.vector_norm(gradient, dtype=self._v.dtype)
        self._scale = (self._clip_norm / norm).clamp_(max=1)

    def launch(self, bucket: Bucket) -> Work:
        if self._scale is not None:
            bucket.gradient.mul_(self._scale)
        v = self._v[bucket.span]
        if self._taken is None:
            v.add_(bucket.gradient)
        else:
            self._accumulate(bucket, self._taken)
        exact = self._exact[bucket]
        largest = self._largest(bucket, v)
        places = torch.cat((exact, largest))
        message = as_message([v[places], largest.to(torch.int32)])
        v.index_fill_(0, places, 0)
        if self._u is not None and self._masks:
            self._u[bucket.span].index_fill_(0, largest, 0)
        return bucket.comm.allgather(message, "gradient", bucket.numbers[0])

    def _accumulate(self, bucket: Bucket, taken: TakenOver) -> None:
        taken.take()
        momentum, decay, nesterov = taken.of(bucket.tensors)
        for place in bucket.absent:  # perhaps on all ranks, and then weight decay must not make a gradient
            decay[place] = 0.0
        g, u, v = list(bucket.views), *([of[i] for i in bucket.tensors] for of in (self._u_views, self._v_views))
        if any(decay):
            torch._foreach_add_(g, torch._foreach_mul([self._parameters[i] for i in bucket.tensors], decay))
        torch._foreach_mul_(u, momentum)
        torch._foreach_add_(u, g)
        if any(nesterov):
            torch._foreach_add_(v, torch._foreach_mul(g, [float(n) for n in nesterov]))
        ahead = [m if n else 1.0 for m, n in zip(momentum, nesterov, strict=True)]
        torch._foreach_add_(v, torch._foreach_mul(u, ahead))

    def _largest(self, bucket: Bucket, v: Tensor) -> Tensor:
        """The entries ``[k]`` of the bucket that are sent with their index; NaN is the largest of all."""
        sizes, chosen = v.abs(), [self._exact[bucket].new_empty(0)]
        for (start, stop), k in self._matrices(bucket):
            chosen.append(sizes[start:stop].topk(k, sorted=False).indices + start)
        return torch.cat(chosen)

    def _matrices(self, bucket: Bucket) -> list[tuple[tuple[int, int], int]]:
        """Where they lie, and how many entries of each are sent."""
        spans = [_span(bucket, k) for k, view in enumerate(bucket.views) if view.dim() >= 2]
        ratio = self._ratio()
        return [((start, stop), math.ceil(ratio * (stop - start))) for start, stop in spans]

    def land(self, bucket: Bucket, work: Work) -> None:
        exact, dtype = self._exact[bucket], bucket.gradient.dtype
        k = sum(k for _, k in self._matrices(bucket))
        values, indices = as_parts(work.wait(), [(len(exact) + k, dtype), (k, torch.int32)])
        bucket.gradient.zero_()
        for value, index in zip(values, indices, strict=True):  # rank by rank, so that sums have an order
            bucket.gradient.index_add_(0, torch.cat((exact, index.long())), value)
        bucket.gradient.mul_(1 / bucket.comm.size)

    def reset(self) -> None:
        self._v.zero_()
        if self._u is not None:
            self._u.zero_()

    def state_dict(self) -> dict[str, Any]:
        taken = self._taken
        if taken is None:
            return {"v": self._v}
        return {"v": self._v, "u": self._u, "taken": taken.values, "configured": taken.configured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:  # of a run that has kept nothing yet
            return
        self._v.copy_(state["v"])
        if self._u is not None and self._taken is not None and "u" in state:
            self._u.copy_(state["u"])
            if state["taken"]:  # else it was saved when they had been given back
                self._taken.go_on(state["taken"], state.get("configured", self._taken.configured))

    def close(self) -> None:
        if self._taken is not None:
            self._taken.give_back()


def _span(bucket: Bucket, place: int) -> tuple[int, int]:
    """Where a tensor lies in the bucket's gradient."""
    view = bucket.views[place]
    start = int(view.storage_offset() - bucket.gradient.storage_offset())
    return start, start + view.numel()
