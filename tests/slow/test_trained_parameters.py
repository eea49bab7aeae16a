"""Which parameters move: those that the optimizer has, the loss uses and the model holds."""

from __future__ import annotations

import copy

import _networks as networks
import pytest
import torch
from _models import assert_identical
from _networks import make, regression
from _second_order import (
    METHODS,
    assert_close,
    assert_same_buffers,
    nothing_changes,
    plain_autograd,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from torch_gradmatch import IDGM, GradMatch, SmoothFish


@pytest.mark.parametrize("method", METHODS)
def test_only_parameters_of_the_optimizer_that_a_loss_uses_move(method: str):
    """AdamW decays every parameter that has a gradient, so those without must have None."""
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("trained", "frozen", "unused", "elsewhere")}).double()
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3).double()))
    model.register_parameter("of_one_domain", nn.Parameter(torch.ones(4).double()))
    model["frozen"].requires_grad_(False)
    twin = copy.deepcopy(model)
    groups = [
        {"params": [*model["trained"].parameters(), *model["frozen"].parameters()], "lr": 0.05},
        {"params": [*model["unused"].parameters(), model.empty, model.of_one_domain], "lr": 0.5},
    ]
    optimizer = GradMatch(AdamW(groups, weight_decay=0.5), METHODS[method](model))

    def loss(batch: tuple[int, Tensor]) -> Tensor:
        domain, x = batch
        hidden = torch.tanh(model["elsewhere"](torch.tanh(model["frozen"](model["trained"](x)))))
        return (hidden * model.of_one_domain if domain == 1 else hidden).square().mean()

    optimizer.meta_step(loss, [(d, x) for d, (x, _) in enumerate(regression(5, 4))])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, twin.get_parameter(n))}
    assert moved == {"trained.weight", "trained.bias", "of_one_domain"}
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    if method != "Fish":  # whose backward() leaves gradients wherever they are required
        assert with_gradient == moved
    assert not model["frozen"].weight.requires_grad
    step = (model["trained"].weight - twin["trained"].weight).detach().abs().max()
    larger = (model.of_one_domain - twin.of_one_domain).detach().abs().min()
    assert float(larger) > 2 * float(step)  # by the groups' learning rates


@pytest.mark.parametrize("method", ["IDGM", "IDGM-kept", "IDGM-finite_difference", "SmoothFish"])
def test_a_head_is_trained_alone_and_gradients_that_another_optimizer_accumulates_are_as_before(method: str):
    """And where there were none there is None."""
    case = make(networks.batch_norm_1d)
    twin = copy.deepcopy(case.model)
    body = {"0.weight": torch.full((6, 4), 0.25).double(), "0.bias": None, "1.weight": torch.ones(6).double()}
    for name, gradient in body.items():
        case.model.get_parameter(name).grad = None if gradient is None else gradient.clone()
    optimizer = GradMatch(SGD(case.model[3].parameters(), lr=0.1), METHODS[method](case.model))
    optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)
    if method == "IDGM":
        expected = plain_autograd(twin, case.loss, case.batches, names=["3.weight", "3.bias"]).direction
        for name in ("3.weight", "3.bias"):
            assert_close(case.model.get_parameter(name).grad, expected[name], 1e-11)
        assert_same_buffers(case.model, twin)
    for name, gradient in body.items():
        assert_identical(case.model.get_parameter(name).grad, gradient, name)


def test_a_loss_that_uses_no_trained_parameter_is_named():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 1), "other": nn.Linear(4, 1)})
    for method in (IDGM(model), SmoothFish(1.0, 0.1, model)):
        optimizer = GradMatch(SGD(model["head"].parameters(), lr=0.1), method)
        with nothing_changes(model, optimizer), pytest.raises(ValueError, match=r"batch 1 .*depend"):
            optimizer.meta_step(lambda name: model[name](torch.ones(2, 4)).sum(), ["head", "other", "head"])
