"""Gradients shared by all ranks in buckets that leave while backward runs, in whatever form a codec gives them."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, optim

from ..comm import Communicator, Work
from ..errors import ConfigError, NonFinite, RanksDisagree
from ..hooks import gradient_hooks
from ..vector import ParameterVector
from .base import Aggregator
from .codec import Bucket, Codec

BUCKET_BYTES = 25 * 2**20
#: Of the last bucket, which no backward is left to hide.
LAST_BUCKET_BYTES = 2**20
#: Numbers of which the gradients begin at a multiple: NCCL and kernels on vectors are fast where memory is so aligned.
ALIGNED = 32


class _Verdict:
    """Numbers of the device on their way to the host, which later reads them without waiting for what follows them."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values, None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


class Bucketed(Aggregator):
    """g ← codec(g_1, ..., g_W), the same on all ranks, in buckets launched from gradient hooks.

    Gradients live in one flat buffer; what is shared is ``[n flags | place | zeros | P]``, in fp32 at least, of which
    the gradients are a part unless they are of a smaller dtype. It is cut into buckets of whole tensors, which leave
    from its end; the last, which no backward is left to hide, is small. Flags and place are summed as they are: in the
    last bucket where the codec sums it, else in a message of their own.

    A parameter without a gradient on this rank counts as zero. It is given back as None if it has none on any rank
    (a zero would let weight decay move it), which one flag per tensor tells, unless the codec sends what it had kept.

    Deadlock argument: a communicator has one order of messages. Here it does not depend on that of hooks, which may
    fire in another one on each rank. A bucket is launched when all its gradients and all earlier buckets are there, and
    what no hook launched is flushed after backward. A bucket's further messages need what the one before has brought,
    which is there earlier on one rank than on another: none leaves from a hook. ``finish``, which all ranks call in one
    order, sends the second of every bucket when all first ones have left, then the third, so that a message only ever
    waits for some that are before it in this order. Where one pass reaches the parameters of several aggregators (two
    optimizers), only the latest built launches from hooks; the others launch everything in ``finish``, and before it
    what is left of later ones that the pass has reached. All ranks must make the same passes; a rank that makes none
    takes part in the step's ``finish``. The place (step, and how often gradients were shared in it) is summed with the
    flags, so that ranks that have lost step find out instead of adding what belongs to other steps.

    Gradients may be shared again before the step, after a further backward pass: what was shared is the same on all
    ranks, and the mean of m + g_j is m plus the mean of g_j.

    Args:
        comm: the ranks that share.
        vector: their parameters.
        codec: what a bucket is on the wire.
        bucket_bytes: largest size of a bucket; a tensor larger than that is a bucket of its own.
        on_nonfinite: ``error``: a mean gradient that is not finite raises on all ranks (on CUDA one step later, so that
            no step waits for the device); ``skip``: all skip the step, and the codec forgets what it has kept.

    Raises:
        ConfigError: another aggregator, which was not closed, shares the gradients of these parameters.

    Source: Li et al., PyTorch Distributed (VLDB 2020), section 3.2.
    """

    def __init__(
        self,
        comm: Communicator,
        vector: ParameterVector,
        codec: Codec,
        bucket_bytes: int = BUCKET_BYTES,
        on_nonfinite: Literal["error", "skip"] = "error",
    ) -> None:
        _refuse_a_second(vector)
        self._comm, self._vector, self._codec, self._on_nonfinite = comm, vector, codec, on_nonfinite
        self.shares = True
        n = len(vector.parameters)
        ahead = -(-(n + 1) // ALIGNED) * ALIGNED
        self._message = torch.zeros(ahead + len(vector), dtype=vector.exact_dtype, device=vector.data.device)
        self._flags, self._header, self._mean = self._message[:n], self._message[: n + 1], self._message[ahead:]
        self.grad = self._mean if vector.data.dtype == vector.exact_dtype else torch.zeros_like(vector.data)
        self._views = vector.views(self.grad)
        self._homes = [view.data_ptr() for view in self._views]
        parts = self._cut(bucket_bytes)
        self._numbers = comm.numbers("gradient", codec.messages * len(parts) + (not codec.sums))
        views = vector.views(self._mean)
        self._buckets = [self._bucket(b, parts, views) for b in range(len(parts))]
        self._bucket_of = [0] * n
        for b, tensors in enumerate(parts):
            for i in tensors:
                self._bucket_of[i] = b
        self._verdict: tuple[_Verdict, float] | None = None
        self._armed = False
        self._steps = 0
        #: How often gradients were shared since the last step.
        self._shared = 0
        self._skips = False
        #: First messages of buckets under way, and that of flags and place where they travel by themselves.
        self._works: list[Work] = []
        self._header_work: Work | None = None
        #: Of each bucket, how many tensors are still to get their gradient in the backward that shares.
        self._awaited: list[int] = []
        #: Tensors that got theirs in it.
        self._arrived: set[int] = set()
        #: Tensors that got a gradient since gradients were last shared, in any part of the batch.
        self._fresh: set[int] = set()
        #: Tensors without a gradient, once everything is launched and until it has arrived.
        self._absent: list[int] | None = None
        #: Tensors that had one on any rank when gradients were last shared for the coming step.
        self._kept: set[int] = set()
        #: Tensors whose ``.grad`` may not be their view of the buffer.
        self._away: set[int] = set()
        #: Numbers in gradients outside the buffer, the largest bucket's at most.
        self._held_twice = 0
        self._most_twice = max(len(bucket.gradient) for bucket in self._buckets)
        self._attach(range(n))
        self._handles = gradient_hooks(vector.parameters, self._ready)
        codec.prepare(self._buckets)
        _open.add(self)

    def _cut(self, bucket_bytes: int) -> list[list[int]]:
        """The tensors of each bucket, in the order of backward."""
        parts: list[list[int]] = [[]]
        held, most = 0, min(bucket_bytes, LAST_BUCKET_BYTES)
        for i, size in enumerate(self._vector.sizes):
            held += size * self._message.element_size()
            if parts[-1] and held > most:
                parts.append([])
                held, most = size * self._message.element_size(), bucket_bytes
            parts[-1].append(i)
        return [part[::-1] for part in reversed(parts)]

    def _bucket(self, number: int, parts: list[list[int]], views: list[Tensor]) -> Bucket:
        tensors, offsets, sizes = parts[number], self._vector.offsets, self._vector.sizes
        span = slice(offsets[tensors[-1]], offsets[tensors[0]] + sizes[tensors[0]])
        ahead = len(self._message) - len(self._mean)
        carries = self._codec.sums and number == len(parts) - 1
        return Bucket(
            comm=self._comm,
            numbers=self._numbers[number : self._codec.messages * len(parts) : len(parts)],
            tensors=tensors,
            span=span,
            gradient=self._mean[span],
            views=[views[i] for i in tensors],
            message=self._message[0 if carries else ahead + span.start : ahead + span.stop],
        )

    @property
    def given(self) -> bool:
        return bool(self._fresh)

    def zero_grad(self, optimizer: optim.Optimizer) -> None:
        """Forget the gradient of the last step: backward hands its tensors over, less work than to add."""
        self._armed = False  # by a backward pass that failed
        self._fresh.clear()
        self._kept.clear()
        self._skips = False
        self._held_twice = 0
        self._give_back_none(range(len(self._views)))

    def start(self) -> None:
        if self._works:
            raise RuntimeError(
                "the last backward pass failed when a part of its gradients had left for the other ranks, so it cannot "
                "be made again: let its error end the run"
            )
        self._awaited = [len(bucket.tensors) for bucket in self._buckets]
        self._arrived.clear()
        self._armed = True

    def stepped(self) -> None:
        if not self._shared or self._fresh:
            raise RuntimeError(
                "this step's gradients were not shared: in a loop of your own, closure = run.closure(loss), where "
                "loss() returns the loss of the batch, and for each step optimizer.step(closure)"
            )
        self._steps += 1
        self._shared = 0
        self._skips = False
        self._kept.clear()

    def finish(self) -> None:
        if not self._comm.are_latest(self._numbers, "gradient"):
            for later in self._later():
                later._flush()
        absent, self._absent = self._flush(), None
        works, self._works = self._works, []
        for _ in range(self._codec.messages - 1):
            with self._comm.meter.span("pack", "gradient"):
                works = [self._codec.follow(bucket, work) for bucket, work in zip(self._buckets, works, strict=True)]
        sums = []
        with self._comm.meter.span("unpack", "gradient"):
            for bucket, work in zip(self._buckets, works, strict=True):
                self._codec.land(bucket, work)
                if self.grad is self._mean:
                    sums.append(bucket.gradient.sum())  # while later ones are under way
        if self._header_work is not None:
            self._header_work.wait()
        if self.grad is not self._mean:
            self.grad.copy_(self._mean)
            sums.append(self.grad.sum(dtype=self._vector.exact_dtype))
        # The same sums of the same bits on every rank, so all ranks decide alike.
        total = torch.stack(sums).sum()
        verdict = _Verdict(torch.stack((total, self._message[len(self._flags)]))), self._comm.size * self._place
        self._shared += 1
        if self._on_nonfinite == "skip" and not self._is_finite(*verdict):
            self._skips = True
            self._codec.reset()
        users = self._flags[absent].tolist() if absent else []
        none = {i for i, ranks in zip(absent, users, strict=True) if not ranks}
        if not self._codec.sums:
            none -= self._landed(sorted(none))  # else steps would lose what the codec had kept
        self._kept = set(range(len(self._views))) - none
        self._fresh.clear()
        self._give_back_none(range(len(self._views)) if self._skips else none)
        if self._on_nonfinite == "error":
            self.settle()
            self._verdict = verdict
            if not total.is_cuda:
                self.settle()

    def _landed(self, tensors: Sequence[int]) -> set[int]:
        """Those of the tensors that something is there of; waits for the device once."""
        if not tensors:
            return set()
        there = torch.stack([self._views[i].any() for i in tensors]).tolist()
        return {i for i, some in zip(tensors, there, strict=True) if some}

    def _later(self) -> list[Bucketed]:
        """Those built later on this communicator that the last backward pass has reached, the latest first."""
        others = [a for a in _open if a._comm is self._comm and a._numbers.start > self._numbers.start]
        return sorted((a for a in others if a._armed and a._fresh), key=lambda a: -a._numbers.start)

    def _flush(self) -> list[int]:
        """Launch what no hook has launched; returns the tensors without a gradient."""
        if self._absent is None:
            if not self._armed:
                self.start()
            self._armed = False
            for i in range(len(self._views)):
                self._keep_home(i)
            self._return_to_what_was_shared()
            earlier = self._fresh - self._arrived  # which somebody may have taken away since
            self._fresh -= {i for i in earlier if self._vector.parameters[i].grad is None}
            self._absent = sorted(set(range(len(self._views))) - self._fresh)
            self._zero(self._absent)
            if self._codec.whole:
                with self._comm.meter.span("pack", "gradient"):
                    self._bring_home()
                    self._codec.inspect(self.grad)
            while len(self._works) < len(self._buckets):
                self._launch(self._absent)
        return self._absent

    def settle(self) -> None:
        verdict, self._verdict = self._verdict, None
        if verdict is not None and not self._is_finite(*verdict):
            raise NonFinite(
                "the mean gradient of all ranks is not finite: lower the learning rate, clip (clip_norm), or "
                "skip such steps (method.on_nonfinite: skip)"
            )

    def state_dict(self) -> dict[str, Any]:
        return self._codec.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._codec.load_state_dict(state)

    def close(self) -> None:
        self.shares = False
        _open.discard(self)
        for handle in self._handles:
            handle.remove()
        self._codec.close()

    @property
    def _place(self) -> int:
        """Where this rank is: small, so that its sum over ranks is exact in fp32."""
        return self._steps % 16 * 8 + self._shared % 8

    def _return_to_what_was_shared(self) -> None:
        """What was shared before in this step counts as a gradient, unless somebody has taken it away since."""
        for i in self._kept - self._fresh:
            grad = self._vector.parameters[i].grad
            if grad is not None:
                self._fresh.add(i)
                if grad is not self._views[i]:
                    self._away.add(i)

    def _keep_home(self, i: int) -> None:
        """Make the view anew that somebody has given another memory (``p.grad.data = p.grad.data / 2``)."""
        if self._views[i].data_ptr() != self._homes[i]:
            self._views[i] = self._vector.views(self.grad)[i]

    def _ready(self, i: int, p: Tensor) -> None:
        self._fresh.add(i)
        self._keep_home(i)
        if p.grad is not self._views[i]:
            self._away.add(i)
            self._held_twice += p.numel()
        if not self._armed and self._absent is None:
            self._hold_few_twice()
            return
        if i in self._arrived or self._absent is not None:  # its bucket may be under way
            raise RuntimeError(
                f"parameter '{self._vector.names[i]}' got a second gradient in the backward pass that shares "
                f"gradients: call backward once on the sum of the losses, checkpoint activations with "
                f"use_reentrant=False, or make the passes parts (run.closure(loss, accumulate=M))"
            )
        self._arrived.add(i)
        self._awaited[self._bucket_of[i]] -= 1
        launches = not self._codec.whole and self._comm.are_latest(self._numbers, "gradient")
        while launches and len(self._works) < len(self._buckets) and not self._awaited[len(self._works)]:
            self._launch()
        self._hold_few_twice()

    def _hold_few_twice(self) -> None:
        """Bring gradients home where those outside the buffer are more than a bucket's."""
        if self._held_twice > self._most_twice:
            with self._comm.meter.span("pack", "gradient"):
                self._bring_home()

    def _launch(self, absent: Sequence[int] = ()) -> None:
        if self._shared and self._codec.once:
            raise RuntimeError(
                "gradients were shared in this step already, and each time moves the momentum that the method keeps: "
                "make one backward pass a step, or say how many (backward_passes_per_step, or accumulate=M)"
            )
        bucket = self._buckets[len(self._works)]
        if absent or bucket.absent:
            gone = set(absent)
            bucket.absent[:] = [place for place, i in enumerate(bucket.tensors) if i in gone]
        last = bucket is self._buckets[-1]
        with self._comm.meter.span("pack", "gradient"):
            self._bring_home()
            if self.grad is not self._mean:
                bucket.gradient.copy_(self.grad[bucket.span])
            if last:
                self._flags.fill_(1)
                if absent:  # on CUDA a list of indices stops the host
                    self._flags[list(absent)] = 0
                self._message[len(self._flags)].fill_(self._place)
            self._works.append(self._codec.launch(bucket))
        if last and not self._codec.sums:
            self._header_work = self._comm.allreduce(self._header, "gradient", self._numbers[-1])

    def _bring_home(self) -> None:
        """Copy gradients made outside the flat buffer (after ``zero_grad(set_to_none=True)``) into it, in one call."""
        self._held_twice = 0
        made = [(i, grad) for i in self._away if (grad := self._vector.parameters[i].grad) is not None]
        if made:
            dense = [grad.to_dense() if grad.is_sparse else grad for _, grad in made]
            torch._foreach_copy_([self._views[i] for i, _ in made], dense)
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

    def _is_finite(self, verdict: _Verdict, place: float) -> bool:
        with self._comm.meter.waiting("gradient", self._comm.ranks):  # NCCL's messages are waited for here
            total, found = verdict.read()
        if found != place:
            raise RanksDisagree(
                "ranks have shared gradients of different steps or backward passes: every rank must make the same "
                "backward passes and steps (where a rank has nothing to learn from, a step without a backward pass)"
            )
        return math.isfinite(total)


#: Those at work.
_open: WeakSet[Bucketed] = WeakSet()


def _refuse_a_second(vector: ParameterVector) -> None:
    ours = set(map(id, vector.parameters))
    if any(id(p) in ours for other in list(_open) for p in other._vector.parameters):
        gc.collect()  # of one that nobody holds: on all ranks alike
    for other in list(_open):
        names = [n for n, p in zip(other._vector.names, other._vector.parameters, strict=True) if id(p) in ours]
        if names:
            raise ConfigError(
                f"the gradient of parameter '{names[0]}' is shared already, by a run that has not ended: call its "
                f"finish() on all ranks (optimizer.run.finish()), or its close(), before a second one begins"
            )
