"""What flatness is measured of: the mean loss of N examples as a function of all parameters, shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from .. import losses, nests
from ..buffers import checksum
from ..comm import Communicator
from ..comm.single import SingleCommunicator
from ..data import Examples, in_advance
from ..errors import ConfigError, RanksDisagree, in_a_line, require
from ..forward import NoDropout, eagerly, eval_mode, undisturbed
from ..vector import ParameterVector

Statistics = Literal["model", "batch"]


class Objective:
    """f(θ) = mean loss over N examples, un-augmented, without weight decay and dropout; its gradient and H·v.

    Every rank takes its exact share of the examples, and one allreduce adds them up: values are those of one process,
    to round-off. All ranks make it together, and call every method together, with the same arguments.

    Args:
        model: on its device, in its dtype; its parameters are moved into one vector, θ. Or that vector itself.
        loss: (output, target) → loss of a batch; of many batches as ``losses.sums`` says.
        examples: N of them, or more.
        comm: ranks that share the work; None: this process alone.
        limit: only so many examples, evenly spaced.
        batch_size: examples per pass and rank.
        statistics: BatchNorm's: of the ``model``, as in evaluation, or of each ``batch``, as in training.

    Raises:
        ConfigError: no examples, or a value that cannot be.
        RanksDisagree: the model has other parameters on some rank, as after a run's last round, where each has its own:
            put one in its place on all, such as ``run.vector.swapped(run.center)``.

    Example:
        >>> model = nn.Linear(1, 1, bias=False).double()
        >>> pairs = Pairs(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))  # doctest: +SKIP
        >>> Objective(model, nn.MSELoss(), pairs).product(torch.ones(1))    # 2 · mean of x²  # doctest: +SKIP
        tensor([10.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module | ParameterVector,
        loss: Callable[[Any, Any], Tensor],
        examples: Examples,
        comm: Communicator | None = None,
        limit: int | None = None,
        batch_size: int = 500,
        statistics: Statistics = "model",
    ) -> None:
        require(limit is None or limit >= 1, "examples", limit, "at least 1")
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(len(examples) > 0, "examples", 0, "at least 1")
        self.vector = model if isinstance(model, ParameterVector) else ParameterVector(model)
        self.model = self.vector.model
        self.comm = comm or SingleCommunicator()
        sums = self.comm.gather_bytes(str(checksum(self.vector.data)).encode(), "evaluate")
        if differ := [rank for rank, told in enumerate(sums) if told != sums[0]]:
            raise RanksDisagree(
                f"rank {differ[0]} has another model in place than rank 0: put one in its place on all ranks, such as "
                f"the center (with run.vector.swapped(run.center))"
            )
        self.examples = min(len(examples), limit or len(examples))
        self._loss, self._data, self._statistics = loss, examples, statistics
        index = torch.arange(self.examples) * len(examples) // self.examples
        own = index[self.comm.rank :: self.comm.size]
        # Of like sizes: a last batch of one example has no BatchNorm statistics.
        self._parts = torch.tensor_split(own, -(-len(own) // batch_size)) if len(own) else ()
        self._smooth = False  # whether that was looked at
        #: Told after each batch of a pass: how many of this rank's there are.
        self.watch: Callable[[int], None] = lambda batches: None

    @property
    def batches(self) -> int:
        """Of this rank, in a pass over its examples."""
        return len(self._parts)

    def value(self, at: Tensor | None = None) -> float:
        """f; at other parameters ``[P]`` than the model's, if given."""
        pair = self._zeros(2)
        with self._measuring(at), torch.no_grad():
            for numerator, denominator in self._losses():
                pair += torch.stack((numerator, denominator))
        self._add_up(pair)
        return float(pair[0] / pair[1])

    def gradient(
        self, at: Tensor | None = None, valued: Callable[[Any, Any], Tensor] | None = None
    ) -> tuple[float, Tensor]:
        """The loss f, and ∇f ``[P]``.

        Args:
            at: other parameters ``[P]`` than the model's.
            valued: another loss of the same outputs, whose mean is returned in the place of f.
        """
        total = self._zeros(len(self.vector) + 3)
        with self._measuring(at):
            for part, (inputs, targets) in self._batches():
                output = self.model(inputs)
                pair = losses.sums(self._loss, output, targets, len(part), self.examples)
                self._add(total, torch.autograd.grad(pair[0], self.vector.parameters, allow_unused=True))
                with torch.no_grad():
                    told = pair if valued is None else losses.sums(valued, output, targets, len(part), self.examples)
                    total[-3:] += torch.stack((pair[1], *told))
        self._add_up(total)
        return float(total[-2] / total[-1]), (total[:-3] / total[-3]).to(self.vector.exact_dtype)

    def product(self, direction: Tensor) -> Tensor:
        """H·v ``[P]``, H = ∇²f at the model's parameters: exact double backward.

        Args:
            direction: v ``[P]``.

        Raises:
            ConfigError: an operation of the model or the loss cannot be differentiated twice.
        """
        total = self._zeros(len(self.vector) + 2)
        v = self.vector.views(direction.to(self.vector.data))
        with self._measuring(None):
            for numerator, denominator in self._losses():
                self._add(total, self._twice(numerator, v))
                total[-2:] += torch.stack((numerator.detach(), denominator.detach()))
        self._add_up(total)
        return (total[:-2] / total[-1]).to(self.vector.exact_dtype)

    def outputs(self) -> Iterator[tuple[Any, Any, int]]:
        """Outputs, targets and examples of each of this rank's batches, without a graph."""
        with self._measuring(None), torch.no_grad():
            for part, (inputs, targets) in self._batches():
                yield self.model(inputs), targets, len(part)

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Inputs and targets of each of this rank's batches, while the model is as it is measured."""
        with self._measuring(None):
            for _, batch in self._batches():
                yield batch

    def _twice(self, numerator: Tensor, v: list[Tensor]) -> tuple[Tensor | None, ...]:
        parameters = self.vector.parameters
        try:
            first = torch.autograd.grad(numerator, parameters, create_graph=True, allow_unused=True)
            pairs = [(g, w) for g, w in zip(first, v, strict=True) if g is not None and g.requires_grad]
            if not self._smooth:
                _check_twice([g for g, _ in pairs])
                self._smooth = True
            if not pairs:  # f is linear in θ
                return (None,) * len(parameters)
            once, along = zip(*pairs, strict=True)
            return torch.autograd.grad(once, parameters, along, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"the loss cannot be differentiated twice, so it has no Hessian to measure: {in_a_line(error)[:200]}"
            ) from error

    @contextmanager
    def _measuring(self, at: Tensor | None) -> Iterator[None]:
        self.vector.check()  # another vector of the same model would leave this one without effect
        there = nullcontext() if at is None else self.vector.swapped(at)
        twice = sdpa_kernel(SDPBackend.MATH)  # attention's fast forms have no second derivative
        # cuDNN's recurrence has no backward pass in eval mode, and no second derivative.
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        exact = _exact(cudnn=not recurrent)
        with undisturbed(self.model, self.comm), eval_mode(self.model), NoDropout(), eagerly(), twice, exact, there:
            if self._statistics == "batch":
                for module in self.model.modules():
                    if isinstance(module, _BatchNorm):
                        module.train()
            yield

    def _batches(self) -> Iterator[tuple[Tensor, Any]]:
        device, dtype = self.vector.data.device, self.vector.data.dtype
        batches = in_advance(self._data, ((part, None) for part in self._parts), device)
        for part, batch in zip(self._parts, batches, strict=True):
            yield part, nests.mapped(partial(in_dtype, dtype), nests.moved(batch, device))
            self.watch(len(self._parts))

    def _losses(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Numerator and denominator of each of this rank's batches."""
        for part, (inputs, targets) in self._batches():
            pair = losses.sums(self._loss, self.model(inputs), targets, len(part), self.examples)
            yield pair[0], pair[1]

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self.vector.data.device)

    def _add(self, total: Tensor, gradients: tuple[Tensor | None, ...]) -> None:
        given = [(view, g) for view, g in zip(self.vector.views(total), gradients, strict=True) if g is not None]
        if given:
            torch._foreach_add_([view for view, _ in given], [g.detach().to(total.dtype) for _, g in given])

    def _add_up(self, total: Tensor) -> None:
        self.comm.allreduce(total, "evaluate").wait()


@contextmanager
def _exact(cudnn: bool) -> Iterator[None]:
    """Within the block float32 is computed as such: convolutions of cuDNN would round it to TF32, 10 bits, by default.

    Nor is an algorithm chosen by its speed, which may be another each time.

    Args:
        cudnn: whether cuDNN may be used.
    """
    backends: Any = torch.backends
    each: list[tuple[Callable[[], Any], Callable[[Any], object], Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
    ]

    def within(where: Any, name: str, value: object) -> None:
        each.append((partial(getattr, where, name), partial(setattr, where, name), value))

    within(backends.cudnn, "benchmark", False)
    within(backends.cudnn, "allow_tf32", False)
    if not cudnn:
        within(backends.cudnn, "enabled", False)
    if hasattr(backends.cudnn, "conv"):  # since PyTorch 2.9 each kind of operation has its own
        for where in (backends.cuda.matmul, backends.mkldnn.matmul):
            within(where, "fp32_precision", "ieee")
        for where in (backends.cudnn, backends.mkldnn):
            within(where.conv, "fp32_precision", "ieee")
            within(where.rnn, "fp32_precision", "ieee")
    before = []
    for get, put, _ in each:
        with suppress(RuntimeError):  # PyTorch does not tell those before 2.9 where a program has set the newer ones
            before.append((put, get()))
    try:
        for _, put, value in each:
            put(value)
        yield
    finally:
        for put, value in before:
            put(value)


def _check_twice(gradients: list[Tensor]) -> None:
    """Raise ``RuntimeError`` for what autograd leaves out in silence: functions that may be differentiated once."""
    seen: set[Any] = set()
    to_do = [g.grad_fn for g in gradients]
    while to_do:
        node = to_do.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a function in it is marked with @once_differentiable")
        seen.add(node)
        to_do += [other for other, _ in node.next_functions]


def in_dtype(dtype: torch.dtype, leaf: Any) -> Any:
    """A floating-point tensor in ``dtype``; anything else as it is."""
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
