"""The copies of optimizers that ``compare`` steps: they step as their originals would, which do not notice."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from _models import assert_identical
from torch.optim import SGD, Adam, Optimizer

from torch_gradmatch.evaluation.trial import copy_optimizer


def lookahead(parameters: Any, lr: float) -> Optimizer:
    """An optimizer that wraps another."""
    return pytest.importorskip("pytorch_optimizer").Lookahead(Adam(parameters, lr=lr), k=2)


DENSE = [
    value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, Optimizer) and name not in ("Optimizer", "SparseAdam")
]


class Quadratic:
    """A matrix, since Muon takes nothing else, and its loss."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(2, 3, generator=generator))
        self.x = torch.randn(5, 3, generator=generator)

    def steps(self, optimizer: Optimizer) -> torch.Tensor:
        """The weight three steps on; it is put back."""
        begin = self.weight.detach().clone()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (self.x @ self.weight.T).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        end = self.weight.detach().clone()
        assert not torch.equal(begin, end)
        with torch.no_grad():
            self.weight.copy_(begin)
        return end


@pytest.mark.parametrize("kind", [*DENSE, lookahead], ids=lambda kind: kind.__name__)
def test_a_copy_steps_as_the_original_and_leaves_it_alone(kind: Any):
    problem = Quadratic()
    original = kind([problem.weight], lr=0.01)
    problem.steps(original)
    state = copy.deepcopy(original.state_dict())
    by_copy = problem.steps(copy_optimizer(original))
    assert_identical(original.state_dict(), state)
    assert torch.equal(problem.steps(original), by_copy)


def test_neither_hooks_nor_a_schedulers_count_come_along():
    problem = Quadratic()
    original = SGD([problem.weight], lr=0.1)
    called: list[str] = []
    original.register_step_pre_hook(lambda *_: called.append("before"))
    original.register_step_post_hook(lambda *_: called.append("after"))
    torch.optim.lr_scheduler.StepLR(original, 1)
    before = {name: value for name, value in vars(original).items() if name != "param_groups"}
    problem.steps(copy_optimizer(original))
    assert called == []
    assert {name: value for name, value in vars(original).items() if name != "param_groups"} == before
