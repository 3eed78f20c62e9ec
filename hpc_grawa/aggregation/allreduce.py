"""Data parallelism: the mean gradient of all ranks, allreduced in buckets while backward runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, optim

from ..comm import Communicator, Work
from ..errors import NonFinite
from ..vector import ParameterVector
from .base import Aggregator

BUCKET_BYTES = 25 * 2**20


class _Verdict:
    """A boolean of the device on its way to the host, which later reads it without waiting for what follows it."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._event = value, None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


class AllreduceAggregator(Aggregator):
    """g ← (1/W) Σ_m g_m, in buckets launched from gradient hooks.

    Gradients live in one flat buffer ``[n flags | P]``. It is cut, from its end, into buckets of whole tensors; a
    bucket is launched when all its gradients and all earlier buckets are there, so the order of messages is the same
    on all ranks whatever order hooks fire in. What no hook launched is flushed after backward.

    A parameter without a gradient on this rank counts as zero. It is given back as None if it has none on any rank
    (a zero would let weight decay move it): one flag per tensor, summed in the last bucket, tells.

    Args:
        comm: the ranks that share.
        vector: their parameters.
        bucket_bytes: largest size of a bucket; a tensor larger than that is a bucket of its own.
        on_nonfinite: ``error``: a mean gradient that is not finite raises on all ranks (on CUDA one step later, so that
            no step waits for the device); ``skip``: all skip the step.

    Source: Li et al., PyTorch Distributed (VLDB 2020), section 3.2.
    """

    def __init__(
        self,
        comm: Communicator,
        vector: ParameterVector,
        bucket_bytes: int = BUCKET_BYTES,
        on_nonfinite: Literal["error", "skip"] = "error",
    ) -> None:
        self._comm, self._vector, self._on_nonfinite = comm, vector, on_nonfinite
        n = len(vector.parameters)
        self._flat = torch.zeros(n + len(vector), dtype=vector.data.dtype, device=vector.data.device)
        self._flags, self.grad = self._flat[:n], self._flat[n:]
        self._views = vector.views(self.grad)
        self._buckets = self._cut(bucket_bytes)
        self._bucket_of = {i: b for b, (tensors, _) in enumerate(self._buckets) for i in tensors}
        self._verdict: _Verdict | None = None
        self._armed = False
        self._shared = False
        self._works: list[Work] = []
        #: Of each bucket, the tensors whose gradient is still to come in the backward that shares.
        self._awaited: list[set[int]] = []
        #: Tensors that got a gradient since the last step, in any part of the batch.
        self._given: set[int] = set()
        #: Tensors whose ``.grad`` may not be their view of the buffer.
        self._away: set[int] = set()
        self._attach(range(n))
        for i, p in enumerate(vector.parameters):
            p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p, i=i: self._ready(i, p)
            )

    def _cut(self, bucket_bytes: int) -> list[tuple[list[int], Tensor]]:
        """Buckets (tensor numbers, slice of the flat buffer) in the order of backward; the last holds the flags."""
        width, sizes = self._flat.element_size(), self._vector.sizes
        buckets: list[list[int]] = [[]]
        for i in reversed(range(len(sizes))):
            if buckets[-1] and (sum(sizes[j] for j in buckets[-1]) + sizes[i]) * width > bucket_bytes:
                buckets.append([])
            buckets[-1].append(i)
        cut, end = [], len(self._flat)
        for tensors in buckets:
            begin = len(self._flags) + self._vector.offsets[tensors[-1]] if tensors is not buckets[-1] else 0
            cut.append((tensors, self._flat[begin:end]))
            end = begin
        return cut

    def zero_grad(self, optimizer: optim.Optimizer) -> None:
        self._flat.zero_()
        self._given.clear()
        self._attach(list(self._away))

    def start(self) -> None:
        self._works = []
        self._awaited = [set(tensors) for tensors, _ in self._buckets]
        self._armed = True

    def stepped(self) -> None:
        if not self._shared:
            raise RuntimeError(
                "this step's gradients were not shared: in a loop of your own, call aggregator.zero_grad(optimizer), "
                "aggregator.start(), loss.backward(), aggregator.finish() of run.aggregator, then optimizer.step()"
            )
        self._shared = False

    def finish(self) -> None:
        if not self._armed:
            self.start()
        self._shared = True
        self._armed = False
        absent = sorted(set(range(len(self._views))) - self._given)
        self._given.clear()
        self._zero(absent)
        while len(self._works) < len(self._buckets):
            self._launch(absent)
        for work in self._works:
            work.wait()
        self.grad.mul_(1 / self._comm.size)
        # The same sum of the same bits on every rank, so all ranks decide alike.
        finite = self.grad.sum(dtype=self._vector.exact_dtype).isfinite()
        if self._on_nonfinite == "error":
            self.settle()
            self._verdict = _Verdict(finite)
            if not finite.is_cuda:
                self.settle()
        if self._on_nonfinite == "skip" and not bool(finite):
            self._give_back_none(range(len(self._views)))
        elif absent:
            users = self._flags[absent].tolist()
            self._give_back_none(i for i, ranks in zip(absent, users, strict=True) if not ranks)

    def settle(self) -> None:
        verdict, self._verdict = self._verdict, None
        if verdict is not None and not verdict.read():
            raise NonFinite(
                "the mean gradient of all ranks is not finite: lower the learning rate, clip (optimizer.clip_norm), or "
                "skip such steps (method.on_nonfinite: skip)"
            )

    def _ready(self, i: int, p: Tensor) -> None:
        if self._armed:
            awaited = self._awaited[self._bucket_of[i]]
            if i not in awaited:  # its bucket may be under way
                raise RuntimeError(
                    f"parameter '{self._vector.names[i]}' got a second gradient after the backward pass that shares "
                    f"gradients and before the step: step after every backward pass, or call backward once on the sum "
                    f"of the losses, or let only the last pass share (DistributedOptimizer's "
                    f"backward_passes_per_step; run.aggregator.start() just before the last pass)"
                )
            awaited.remove(i)
        self._given.add(i)
        if p.grad is not self._views[i]:
            self._away.add(i)
        if self._armed:
            while len(self._works) < len(self._buckets) and not self._awaited[len(self._works)]:
                self._launch()

    def _launch(self, absent: Sequence[int] = ()) -> None:
        self._bring_home()
        number = len(self._works)
        if number == len(self._buckets) - 1:
            self._flags.fill_(1)
            if absent:  # on CUDA a list of indices stops the host
                self._flags[list(absent)] = 0
        self._works.append(self._comm.allreduce(self._buckets[number][1], "gradient", bucket=number))

    def _bring_home(self) -> None:
        """Copy gradients made outside the flat buffer (after ``zero_grad(set_to_none=True)``) into it, in one call."""
        made = [(i, grad) for i in self._away if (grad := self._vector.parameters[i].grad) is not None]
        if made:
            with self._comm.meter.span("pack", "gradient"):
                torch._foreach_copy_([self._views[i] for i, _ in made], [grad for _, grad in made])
                self._attach([i for i, _ in made])

    def _zero(self, absent: Sequence[int]) -> None:
        """Tensors that got no gradient count as zero; those whose ``.grad`` is home were zeroed with it."""
        lost = [i for i in absent if self._vector.parameters[i].grad is not self._views[i]]
        if lost:
            torch._foreach_zero_([self._views[i] for i in lost])
            self._attach(lost)

    def _attach(self, tensors: Iterable[int]) -> None:
        for i in tensors:
            self._vector.parameters[i].grad = self._views[i]
        self._away.difference_update(tensors)

    def _give_back_none(self, tensors: Iterable[int]) -> None:
        for i in tensors:
            self._vector.parameters[i].grad = None
            self._away.add(i)
