"""A model's buffers: as they were after an evaluation, and one set for all ranks where one model is meant."""

from __future__ import annotations

import copy
import math
from typing import Any

import own
import pytest
import torch
from conftest import Ranks
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from hpc_grawa import LocalSGD, ParameterVector, buffers, simulate
from hpc_grawa.averaging.averager import Averager
from hpc_grawa.averaging.riders import WeightBuffers
from hpc_grawa.batchnorm import norms, recalibrate
from hpc_grawa.buffers import as_bytes, checksum
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.data import TensorExamples
from hpc_grawa.errors import ConfigError
from hpc_grawa.forward import undisturbed
from hpc_grawa.metrics import Accuracy
from hpc_grawa.training.evaluate import Evaluator
from hpc_grawa.training.examiner import Examiner
from hpc_grawa.training.worker import Worker

EVALUATOR = Evaluator(nn.CrossEntropyLoss(), Accuracy(), batch_size=8)


class Table(nn.Module):
    """Replaces a buffer, changes another in place, resizes a third, and fills one in that was not there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("memory", torch.ones(2, 3))
        self.register_buffer("later", None)

    def forward(self, x: Tensor) -> Tensor:
        self.table = torch.cat((self.table, x.detach().mean()[None]))
        self.count += 1
        self.memory.resize_(len(self.memory) + 1, 3).fill_(self.count)
        self.later = x.detach().clone()
        y: Tensor = self.linear(x) * (1 + self.table.mean())
        return y


def test_after_an_evaluation_a_model_has_the_very_buffers_it_had() -> None:
    model = Table()
    before = dict(model._buffers), copy.deepcopy(model._buffers)
    examples = TensorExamples(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))
    Evaluator(nn.CrossEntropyLoss(), Accuracy(), batch_size=2).evaluate(model, examples)
    assert [model._buffers[name] is own for name, own in before[0].items()] == [True] * 4
    torch.testing.assert_close(model._buffers, before[1], rtol=0, atol=0)
    assert "table" not in model.state_dict()


class Expanded(nn.Module):
    """A buffer whose numbers share memory, so that torch writes to none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("scale", torch.rand(1, 2).expand(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.scale


def test_an_expanded_buffer_is_given_to_all_ranks_and_kept(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> Tensor:
        torch.manual_seed(comm.rank)
        model = Expanded()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = LocalSGD(period=2).build(comm, ParameterVector(model), optimizer)
        examples = TensorExamples(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))
        for step in range(3):
            optimizer.zero_grad()
            model(examples.inputs).square().sum().backward()
            optimizer.step()
            run.after_step()
            EVALUATOR.evaluate(model, examples, comm if step == 1 else None)
        run.finish()
        return model.scale

    scales = on_ranks(body)
    torch.manual_seed(0)
    start = Expanded().scale
    assert all(scale.equal(start) and scale.stride() == start.stride() for scale in scales)


@pytest.mark.parametrize("evaluations", [1, 3])
def test_a_model_that_replaces_its_buffers_trains_the_same_however_often_it_is_evaluated(evaluations: int) -> None:
    def trained(evaluations: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Table()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(4):
            for _ in range(evaluations):
                with undisturbed(model), torch.no_grad():
                    model(torch.randn(7, 3))
            optimizer.zero_grad()
            model(torch.randn(2, 3)).square().mean().backward()
            optimizer.step()
        return {**model.state_dict(), "table": model.table}

    torch.testing.assert_close(trained(evaluations), trained(0), rtol=0, atol=0)


def test_an_evaluation_may_lie_between_a_forward_pass_and_its_backward_pass() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.register_buffer("scale", torch.full((2,), 3.0))
    loss = (model(torch.randn(5, 3)).square() * model.scale).sum()
    for _ in range(2):
        with undisturbed(model):
            model(torch.randn(5, 3))
    loss.backward()
    assert model[0].num_batches_tracked == 1


class Taught(nn.Module):
    """Learns beside a mean teacher, which it changes from a step on, and a frozen backbone, which nobody does."""

    def __init__(self, way: str = "in place", late: int = 0) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 7).requires_grad_(False)
        self.norm, self.online = nn.BatchNorm1d(7), nn.Linear(7, 2)
        self.teacher = copy.deepcopy(self.online).requires_grad_(False)
        self.way, self.late, self.passes = way, late, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            if self.passes > self.late:
                self.teach()
        z = self.norm(self.backbone(x))
        y: Tensor = self.online(z) + self.teacher(z)
        return y

    @torch.no_grad()
    def teach(self) -> None:
        for old, new in zip(self.teacher.parameters(), self.online.parameters(), strict=True):
            if self.way == "in place":
                old.lerp_(new, 0.1)
            elif self.way == "by data":
                old.data.mul_(0.9).add_(0.1 * new.data)
            else:
                old.data = 0.9 * old.data + 0.1 * new.data


class Pupil:
    """One rank's run of such a model."""

    def __init__(self, comm: Communicator, *model: Any) -> None:
        torch.manual_seed(comm.rank)
        self.comm, self.model = comm, Taught(*model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.run = LocalSGD(period=3).build(comm, ParameterVector(self.model), self.optimizer)
        self.inputs = torch.Generator().manual_seed(comm.rank)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            x = torch.randn(4, 3, generator=self.inputs) + self.comm.rank
            (self.model(x) - 1).square().mean().backward()
            self.optimizer.step()
            self.run.after_step()

    def bits(self) -> list[Tensor]:
        return [as_bytes(p).clone() for p in self.model.parameters()]


@pytest.mark.parametrize("way", ["in place", "by data", "anew"])
def test_a_mean_teacher_is_one_ranks_after_a_round_and_in_an_evaluation(on_ranks: Ranks, way: str) -> None:
    """The center between rounds has one loss on all ranks, with the teacher of rank 0, and each keeps its own."""

    def body(comm: Communicator) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[float]]:
        pupil = Pupil(comm, way)
        pupil.train(3)
        after = pupil.bits()
        pupil.train(2)
        before, losses = pupil.bits(), []
        with undisturbed(pupil.model), pupil.run.vector.swapped(pupil.run.center):
            recalibrate(pupil.model, [EXAMPLES.inputs], comm)
            with undisturbed(pupil.model, comm):
                held = pupil.bits()
                losses.append(EVALUATOR.evaluate(pupil.model, EXAMPLES)["loss"])
            losses.append(EVALUATOR.evaluate(pupil.model, EXAMPLES, comm)["loss"])
        return after, before, pupil.bits(), held, losses

    results = on_ranks(body)
    for after, before, kept, held, losses in results:
        assert all(map(torch.equal, after, results[0][0]))
        assert all(map(torch.equal, held, results[0][3]))
        assert all(map(torch.equal, held[-2:], results[0][1][-2:]))
        assert all(map(torch.equal, kept, before))
        assert losses[0] == results[0][4][0] and losses[1] == pytest.approx(losses[0], rel=1e-6)
    if on_ranks.size > 1:
        assert not results[0][1][-2].equal(results[1][1][-2])


def test_a_mean_teacher_rides_from_the_round_on_at_which_ranks_are_seen_to_differ(on_several_ranks: Ranks) -> None:
    """Looked at in rounds 1, 2, 4, 8: it moves from round 3 on. A backbone never rides."""

    def body(comm: Communicator) -> tuple[list[Tensor], list[tuple[int, int]]]:
        pupil, found = Pupil(comm, "in place", 6), []
        for _ in range(5):
            calls, payload = comm.meter.calls["center"], comm.meter.payload_bytes["center"]
            pupil.train(3)
            found.append((comm.meter.calls["center"] - calls, comm.meter.payload_bytes["center"] - payload))
        return pupil.bits(), found

    results = on_several_ranks(body)
    trained, teacher, frozen = 4 * (14 + 16), 4 * (2 + 16), 8 * 4
    for bits, found in results:
        assert all(map(torch.equal, bits, results[0][0]))
        looks = [(2, trained + frozen)] * 2, (2, trained + frozen + teacher)
        assert found == [*looks[0], (1, trained), looks[1], (1, trained + teacher)]


def test_a_run_goes_on_exactly_with_a_mean_teacher(on_several_ranks: Ranks) -> None:
    def body(comm: Communicator) -> bool:
        whole, first, second = (Pupil(comm) for _ in range(3))
        whole.train(10)
        first.train(7)
        second.model.load_state_dict(first.model.state_dict())
        second.run.load_state_dict(first.run.state_dict())
        second.inputs.set_state(first.inputs.get_state())
        second.train(3)  # a round among them at which nobody looks
        return all(map(torch.equal, whole.bits(), second.bits()))

    assert on_several_ranks(body) == [True] * on_several_ranks.size


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4, 7), (2, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex128])
def test_a_checksum_tells_tensors_apart_by_every_bit_and_place(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert checksum(t) == checksum(t.clone())
    if t.dim() > 1:
        assert checksum(t.transpose(0, 1)) == checksum(t.transpose(0, 1).contiguous())
        assert checksum(t.flip(0)) != checksum(t) != checksum(t.flip(1))
    for place in range(0, t.numel(), 7):
        other = t.clone()
        bits = other.view(-1)[place : place + 1].view(torch.uint8)
        bits[0] ^= 1
        assert checksum(other) != checksum(t)


class Sets(nn.Module):
    """Buffers of every kind that belong to the weights, or do not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 1), nn.BatchNorm1d(2)
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64):
            self.register_buffer("of " + str(dtype).removeprefix("torch."), torch.zeros(3, 2, dtype=dtype))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("table", torch.zeros(2))
        self.register_buffer("nothing", None)

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, buffer in self.named_buffers():
            if name != "norm.running_var":
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64) * 2**40)


BELONG = {f"of {kind}" for kind in ("float32", "bfloat16", "float64", "int64", "bool", "complex64")}


@pytest.mark.parametrize("weights", ["alone", "more"])
def test_at_a_round_buffers_of_the_weights_become_those_of_the_rank_that_weighs_most(
    on_ranks: Ranks, weights: str
) -> None:
    """Bit for bit, in a broadcast or a sum; caches, counts of BatchNorm and what has another shape stay each rank's."""
    world = on_ranks.size
    heaviest = world // 2
    given = torch.zeros(world, 2, dtype=torch.float64)
    given[heaviest] = 1
    if weights == "more":
        given = (given + 1 / world) / 2

    def body(comm: Communicator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = Sets()
        vector = ParameterVector(model)
        layers = vector.layers([["linear.*"], ["norm.*"]])
        averager = Averager(comm, vector, 0.5, layers)
        averager.riders = [WeightBuffers(vector)]
        for turn in range(2):
            model.fill(2 * comm.rank + turn)
            if comm.rank != heaviest:
                model.table = torch.full((3,), comm.rank + 1.0)
            before = copy.deepcopy(dict(model.named_buffers()))
            averager.start(vector.data, given, torch.ones(world, dtype=torch.bool))
            averager.finish(vector.data)
        return before, dict(model.named_buffers())

    results = on_ranks(body)
    for before, after in results:
        for name in BELONG:
            assert as_bytes(after[name]).equal(as_bytes(results[heaviest][0][name])), name
        for name in after.keys() - BELONG:
            assert as_bytes(after[name]).equal(as_bytes(before[name])), name


def test_what_the_heaviest_rank_no_longer_has_is_taken_over_by_none(on_several_ranks: Ranks) -> None:
    def body(comm: Communicator) -> Tensor:
        model = Sets()
        run = LocalSGD(period=1).build(comm, ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1))
        model.table = torch.full((2 + (comm.rank == 0),), comm.rank + 1.0)
        run.after_step()
        return model.table

    for rank, table in enumerate(on_several_ranks(body)):
        assert table.tolist() == [rank + 1.0] * (2 + (rank == 0))


def test_a_model_without_such_buffers_sends_nothing_for_them(on_ranks: Ranks) -> None:
    """And one with them, in the one message of the round."""

    def body(comm: Communicator) -> list[tuple[int, int]]:
        found = []
        for length in (0, 5):
            model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
            if length:
                model.register_buffer("code", torch.zeros(length))
            run = LocalSGD(period=1).build(comm, ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1))
            calls, payload = comm.meter.calls["center"], comm.meter.payload_bytes["center"]
            run.after_step()
            found.append((comm.meter.calls["center"] - calls, comm.meter.payload_bytes["center"] - payload))
        return found

    assert on_ranks(body) == [[(1, 4 * 12), (1, 4 * (12 + 1 + 5))]] * on_ranks.size


def spectral() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(3, 8)), nn.Tanh(), nn.BatchNorm1d(8), norm(nn.Linear(8, 2)))


EXAMPLES = TensorExamples(torch.randn(50, 3, generator=torch.Generator().manual_seed(1)), torch.arange(50).remainder(2))


@pytest.mark.parametrize("buffers", ["recalibrate", "average", "local"])
def test_after_a_round_that_makes_ranks_one_model_each_finds_the_same_loss(on_ranks: Ranks, buffers: Any) -> None:
    """With pull 1, by themselves and together; BatchNorm as its policy says."""

    def body(comm: Communicator) -> list[float]:
        model = spectral()
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        run = LocalSGD(period=4, buffers=buffers).build(comm, ParameterVector(model), optimizer)
        generator = torch.Generator().manual_seed(comm.rank)
        for _ in range(4):
            x = torch.randn(16, 3, generator=generator) * (1 + comm.rank)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), (x[:, 0] > comm.rank).long())
            loss.backward()
            optimizer.step()
            run.after_step(loss)
        if buffers == "recalibrate":
            recalibrate(model, [EXAMPLES.inputs], comm)
        return [EVALUATOR.evaluate(model, EXAMPLES)["loss"], EVALUATOR.evaluate(model, EXAMPLES, comm)["loss"]]

    found = on_ranks(body)
    alone, together = zip(*found, strict=True)
    assert len(set(together)) == 1 and together[0] == pytest.approx(alone[0], rel=1e-6)
    if buffers != "local":
        assert len(set(alone)) == 1
    elif on_ranks.size > 1:
        assert len(set(alone)) > 1  # each has statistics of its own, and together they evaluate rank 0's


@pytest.mark.parametrize("broken", [False, True])
def test_ranks_that_share_the_work_evaluate_one_model(on_ranks: Ranks, broken: bool) -> None:
    """Rank 0's, or where that has NaN the next; whatever the shapes of their buffers. Each keeps its own afterwards."""
    first = int(broken and on_ranks.size > 1)

    def body(comm: Communicator) -> tuple[float, float, bool]:
        model = own.Remembering()
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
        for _ in range(comm.rank + 1):  # a table of another length on each
            model(torch.full((2, 1, 8, 8), comm.rank + 1.0))
        if first and comm.rank == 0:
            model.mean.fill_(torch.nan)
        examples = TensorExamples(torch.linspace(0, 1, 9 * 64).view(9, 1, 8, 8), torch.arange(9))
        before = copy.deepcopy(model.state_dict())
        found = [EVALUATOR.evaluate(model, examples, c)["loss"] for c in (comm, None)]
        after = model.state_dict()
        same = after.keys() == before.keys() and all(as_bytes(after[k]).equal(as_bytes(before[k])) for k in before)
        return found[0], found[1], same

    results = on_ranks(body)
    for together, _, same in results:
        assert same
        assert together == pytest.approx(results[first][1], rel=1e-6) and math.isfinite(together)


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_that_are_expanded_or_of_8_bits_are_those_of_one_rank(on_ranks: Ranks, persistent: bool) -> None:
    def body(comm: Communicator) -> list[Tensor]:
        model = nn.Linear(3, 1)
        odd = {"mask": torch.full((1, 3), comm.rank + 1.0).expand(4, 3)}
        odd["code"] = torch.full((3,), comm.rank + 1.0).to(torch.float8_e4m3fn)
        for name, buffer in odd.items():
            model.register_buffer(name, buffer, persistent=persistent)
        run = LocalSGD(period=1).build(comm, ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1))
        run.after_step()
        run.finish()
        with undisturbed(model, comm):
            return [buffer.float().clone() for buffer in model.buffers()]

    for mask, code in on_ranks(body):
        assert torch.equal(mask, torch.ones(4, 3)) and torch.equal(code, torch.ones(3))


@pytest.mark.parametrize("persistent", [True, False])
def test_conjugates_and_negatives_that_torch_writes_down_later_are_shared(on_ranks: Ranks, persistent: bool) -> None:
    def body(comm: Communicator) -> list[list[Tensor]]:
        model = nn.Linear(3, 1)
        z = torch.full((3,), complex(comm.rank + 1, 2))
        model.register_buffer("conjugate", z.conj(), persistent=persistent)
        model.register_buffer("negative", z.clone().conj().imag, persistent=persistent)
        assert model.conjugate.is_conj() and model.negative.is_neg()
        run = LocalSGD(period=1).build(comm, ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1))
        found = [[buffer.clone() for buffer in model.buffers()]]
        model.conjugate += comm.rank
        run.after_step()
        with undisturbed(model, comm):
            return [*found, [buffer.clone() for buffer in model.buffers()]]

    for found in on_ranks(body):
        for conjugate, negative in found:
            assert conjugate.tolist() == [1 - 2j] * 3 and negative.tolist() == [-2.0] * 3


ODD = {
    "sparse (COO)": lambda: torch.eye(3).to_sparse(),
    "of layout torch.sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantized (torch.qint8)": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "a TwoTensor": lambda: TwoTensor(torch.zeros(3), torch.zeros(3)),
    "a tensor of inference mode": lambda: torch.inference_mode()(torch.zeros)(3),
}


@pytest.mark.filterwarnings("ignore")  # some of these are a prototype, or deprecated
@pytest.mark.parametrize("kind", ODD)
def test_a_buffer_of_a_kind_that_cannot_be_shared_is_named_with_what_to_register(on_ranks: Ranks, kind: str) -> None:
    def body(comm: Communicator) -> list[str]:
        model = nn.Linear(3, 1)
        model.register_buffer("graph", ODD[kind]())
        with pytest.raises(ConfigError) as at_build:
            LocalSGD().build(comm, ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1))
        with pytest.raises(ConfigError) as at_evaluation, undisturbed(model, comm):
            pass
        return [str(at_build.value), str(at_evaluation.value)]

    for said in on_ranks(body):
        for line in said:
            assert line.startswith(f"buffer 'graph' is {kind}, which ranks cannot share: register ")


@pytest.mark.parametrize("policy", ["recalibrate", "average", "local"])
@pytest.mark.parametrize("method", ["LocalLGRAWA", "LocalSGD"])
def test_a_named_model_has_one_set_of_buffers(method: str, policy: str) -> None:
    """Also between rounds, when every rank has its own; what is saved is what was evaluated, also by one process."""
    config = parse(
        [
            *("--config=digits", "--model=own.Remembering", f"--method={method}", "--method.period=3"),
            *("--budget.seconds=null", "--budget.steps=9", f"--method.buffers={policy}", "--eval.bn_batches=2"),
        ]
    )

    def body(comm: Communicator) -> tuple[dict[str, Any], list[Tensor], dict[str, Any]]:
        worker = Worker(config, comm)
        for _ in range(4):
            worker.step()
        statistics = [t.clone() for norm in norms(worker.model) for t in (norm.running_mean, norm.running_var)]
        found = Examiner(worker).everything()
        return found.pop("center_state"), statistics, found

    states, statistics, found = zip(*simulate(3, body), strict=True)
    for state in states:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)
    saved = [states[0][f"layers.2.running_{what}"] for what in ("mean", "var")]
    if policy == "local":
        assert all(map(torch.equal, saved, statistics[0]))
    if policy == "average":
        means, variances = (torch.stack(row).double() for row in zip(*statistics, strict=True))
        mean = means.mean(0)
        torch.testing.assert_close(saved[0].double(), mean, rtol=1e-5, atol=1e-6)
        second = (variances + means.square()).mean(0)
        torch.testing.assert_close(saved[1].double(), second - mean.square(), rtol=1e-5, atol=1e-6)
    model = config.build_model()
    buffers.load_state(model, {"table": states[0]["table"], "last": states[0]["last"]})  # of other shapes than at first
    model.load_state_dict(states[0])
    alone = Evaluator(config.loss, config.metric).evaluate(model, config.data.load().test)
    assert alone["loss"] == pytest.approx(found[0]["center_test_loss"], rel=1e-6)
