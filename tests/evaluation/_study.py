"""A small task on which a study takes a second: a weak feature that all domains share, and a strong one they do not."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import Dataset, TensorDataset

from torch_gradmatch import Evidence, leave_one_domain_out
from torch_gradmatch.evaluation import cost
from torch_gradmatch.evaluation.task import Task

DOMAINS = ("north", "south", "west", "east")
SMALL: dict[str, Any] = {"seeds": 2, "budget": 300, "draws": 2, "evaluations": 3, "show": False}


def data(seed: int = 0, samples: int = 96) -> tuple[TensorDataset, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    domains = [DOMAINS[i % len(DOMAINS)] for i in range(samples)]
    y = torch.randint(2, (samples,), generator=generator)
    sign = 2.0 * y - 1
    x = torch.randn(samples, 5, generator=generator)
    x[:, 0] += sign
    x[:, 1] += sign * torch.tensor([3.0 if d != "east" else -3.0 for d in domains])
    return TensorDataset(x, y), domains


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def metric(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(dim=1) == batch[1]).float()


def found(methods: Any = ("ERM", "Fish"), **settings: Any) -> Evidence:
    dataset, domains = data()
    own: dict[str, Any] = {
        "make_model": net, "dataset": dataset, "domains": domains, "loss_fn": loss_fn, "metric": metric
    }  # fmt: skip
    return leave_one_domain_out(**(own | {"methods": methods} | SMALL | settings))


def lines(folder: Path) -> dict[tuple[Any, ...], Any]:
    """The runs that a folder holds, without their times."""
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    for run in runs:
        del run["seconds"], run["measuring"]
    return {(r["method"], r["held_out"], r["draw"], r["seed"]): r for r in runs}


def task(dataset: Dataset[Any] | None = None, domains: list[str] | None = None, **settings: Any) -> Task:
    dataset, domains = (dataset or data()[0]), (domains or data()[1])
    by_domain: dict[str, list[int]] = {}
    for index, label in enumerate(domains):
        by_domain.setdefault(label, []).append(index)
    own: dict[str, Any] = {
        "make_model": net, "dataset": dataset, "by_domain": by_domain, "loss_fn": loss_fn, "metric": metric,
        "predict": None, "optimizer": torch.optim.SGD, "collate_fn": None, "group_of": {}, "device": "cpu",
        "domains_per_step": None, "validation": 0.25, "budget": 240, "evaluations": 3, "predictions": False,
    }  # fmt: skip
    return Task(**(own | settings))


class OnceDifferentiable(torch.autograd.Function):
    """The square, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of ``compare`` that are not about time."""
    monkeypatch.setattr(cost, "SHORTEST_TIMING", 1e-9)


def state_of_everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Every tensor of model and optimizer, the random states, flags and hooks."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return copy.deepcopy({
        "parameters": {n: p.detach() for n, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": {n: g.to_dense() if g is not None and g.is_sparse else g for n, g in gradients.items()},
        "buffers": dict(model.named_buffers()),
        "identities": [id(t) for t in (*model.parameters(), *model.buffers(), *gradients.values())],
        "training": [module.training for module in model.modules()],
        "hooks": [
            [list(map(id, table)), list(map(id, table.values()))]
            for module in model.modules()
            for table in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_post_hooks)
        ],
        "optimizer": optimizer.state_dict(),
        "attributes": sorted(vars(optimizer)),
        "torch": torch.get_rng_state(),
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "python": random.getstate(),
        "grad_mode": torch.is_grad_enabled(),
    })  # fmt: skip
