"""A model's buffers: as they were after an evaluation, and one set for all ranks where one model is meant."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hpc_grawa.data import TensorExamples
from hpc_grawa.evaluate import Judge, undisturbed
from hpc_grawa.metrics import Accuracy


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
    Judge(nn.CrossEntropyLoss(), Accuracy(), batch_size=2).judge(model, examples)
    assert [model._buffers[name] is own for name, own in before[0].items()] == [True] * 4
    torch.testing.assert_close(model._buffers, before[1], rtol=0, atol=0)
    assert "table" not in model.state_dict()


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
