"""How far the first-order approximations reach: directions beyond ERM against the exact ones.

By :mod:`torch_gradmatch.evaluation.fidelity`, on networks that a few steps of ordinary training have moved.
Fish and SmoothFish are measured against the inner learning rate, in steps of SGD; they and what else approximates the
exact direction also against the batch size. SmoothFish that walks to and fro should need no mean over orders: there its
cosine in a single meta-iteration is what counts. Every repeat draws network, data and orders of the domains anew.
Against the learning rate each network is measured with GELU in place of ReLU, too: the theorem is about smooth
gradients, and those of ReLU networks jump.

``error`` is ``|d - gamma e| / |gamma e|`` for the mean d of a method's directions beyond ERM over the orders, e the
exact one and gamma what theory says: ``fish_gamma(lr, S)`` for Fish and SmoothFish, the method's own for IDGM.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from benchmarks._models import NETWORKS, Batch
from benchmarks.ways import SYMMETRIC
from torch_gradmatch import IDGM, Fish, SmoothFish, fish_gamma
from torch_gradmatch.evaluation.fidelity import ExactTerm, Fidelity, fidelity, random_orders
from torch_gradmatch.evaluation.trial import Trial
from torch_gradmatch.methods.base import Method

DOMAINS = 5
ORDERS = 4
LEARNING_RATES = [10.0**e for e in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0)]
SMOOTH_FISH_RATES = LEARNING_RATES[::4]  # its direction is that of Fish by SGD: a few are enough to show it
BATCH_SIZES = {"MLP": [4, 16, 64, 256], "CdSprites CNN": [4, 16, 64], "ResNet-18/4": [2, 4, 8],
               "Transformer": [2, 4, 16]}  # fmt: skip
BATCH_SIZE = {"MLP": 64, "CdSprites CNN": 16, "ResNet-18/4": 4, "Transformer": 8}  # where the learning rate varies
RATE_OF_BATCHES = 1e-2  # inner learning rate where the batch size varies
WARMUP_STEPS = 20
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "GELU": nn.GELU}


def error_at(found: Fidelity, gamma: float) -> float:
    """The relative error against the exact direction times ``gamma``, from that against the fitted one."""
    along = found.gamma / gamma
    return math.hypot(along - 1, along * found.relative_error)


def sweep(network: str, activation: str, batch_size: int, against: str, repeat: int) -> list[dict[str, Any]]:
    """Measure the methods on one draw of network and data; figures as in ``Fidelity``, and ``error``."""
    torch.set_num_threads(1)
    torch.manual_seed(repeat)
    model = NETWORKS[network].make(activation=ACTIVATIONS[activation]).train()
    batches = NETWORKS[network].batches(DOMAINS, batch_size)

    def loss_fn(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(WARMUP_STEPS):
        adam.zero_grad()
        torch.stack([loss_fn(batch) for batch in batches]).mean().backward()
        adam.step()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    orders = random_orders(DOMAINS, ORDERS, torch.Generator().manual_seed(repeat))
    measured = []
    with Trial(model, loss_fn, batches, sgd) as trial:
        trial.fix_random_numbers()
        exact = ExactTerm(trial)
        for rate in LEARNING_RATES if against == "learning rate" else [RATE_OF_BATCHES]:
            gamma = fish_gamma(rate, DOMAINS)
            methods: dict[str, Method] = {"Fish": Fish(model=model, nonfinite="ignore")}
            if rate in SMOOTH_FISH_RATES:
                methods["SmoothFish"] = SmoothFish(1.0, rate, model, nonfinite="ignore")
                methods[SYMMETRIC] = SmoothFish(gamma, rate, model, nonfinite="ignore", symmetric=True)
            if against == "batch size":
                methods["IDGM, one_pass"] = IDGM(model, gamma, "inner_product", one_pass=True)
                methods["IDGM, finite_difference"] = IDGM(model, gamma, "inner_product", hvp="finite_difference")
            trial.optimizer.param_groups[0]["lr"] = rate
            for name, method in methods.items():
                try:
                    found = fidelity(trial, method, exact, orders)
                except ValueError as error:  # differences across the kinks of ReLUs, which are no gradient's
                    print(f"{network}, {name}, {against} {batch_size}, repeat {repeat}: {error}", file=sys.stderr)
                    continue
                assert found is not None  # SGD needs no closure
                finite = math.isfinite(found.cosine) and math.isfinite(found.relative_error)
                measured.append({
                    "network": network, "activation": activation, "method": name, "against": against,
                    "at": rate if against == "learning rate" else batch_size, "repeat": repeat,
                    "cosine": found.cosine if finite else math.nan, "cosines": found.cosines,
                    "error": error_at(found, gamma) if finite else math.inf,
                    "resolved": found.resolved and finite,
                })  # fmt: skip
    return measured


def measure(networks: Sequence[str], repeats: int, processes: int) -> list[dict[str, Any]]:
    """Measure all networks against learning rate and batch size, the largest first."""
    tasks = []
    for repeat, network in product(range(repeats), reversed(networks)):
        tasks += [(network, activation, BATCH_SIZE[network], "learning rate", repeat) for activation in ACTIVATIONS]
        tasks += [(network, "ReLU", size, "batch size", repeat) for size in BATCH_SIZES[network]]
    parts = Parallel(processes, batch_size=1, verbose=5)(delayed(sweep)(*task) for task in tasks)
    return [row for part in reversed(parts) for row in part]
