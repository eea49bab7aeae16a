"""A small problem for the framework examples: four training domains that disagree on a shortcut, and a held-out one.

All features are -1 or 1. One agrees with the class in 75 % of the samples of every domain. Each training domain has a
shortcut of its own that agrees in 90 %; in the other domains it is noise, and in the held-out one all four are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

DOMAINS, SAMPLES, HELD_OUT = 4, 256, 4000
LASTING, SHORTCUT = 0.75, 0.9
BATCH_SIZE = 64
ERM_LR, FISH_LR = 0.005, 0.3  # chosen on two seeds, with the other settings of the examples


def draw(domain: int | None, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw samples of one domain.

    Args:
        domain: Its number, or None for the held-out one.
        size: How many.
        generator: Decides all of it.

    Returns:
        Features, shape (size, 1 + DOMAINS), and classes, shape (size,).
    """
    y = torch.randint(2, (size,), generator=generator)
    agreement = torch.full((1 + DOMAINS,), 0.5)
    agreement[0] = LASTING
    if domain is not None:
        agreement[1 + domain] = SHORTCUT
    agrees = torch.rand(size, 1 + DOMAINS, generator=generator) < agreement
    return torch.where(agrees, 1.0, -1.0) * (2 * y - 1)[:, None], y


def make_data(seed: int = 0) -> tuple[TensorDataset, list[str], TensorDataset]:
    """Draw the training domains and the held-out one.

    Args:
        seed: Decides the samples.

    Returns:
        The training set, the domain of each of its samples, and the held-out set.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [draw(domain, SAMPLES, generator) for domain in range(DOMAINS)]
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    names = [f"domain {domain}" for domain in range(DOMAINS) for _ in range(SAMPLES)]
    return TensorDataset(x, y), names, TensorDataset(*draw(None, HELD_OUT, generator))


def make_model(seed: int = 0) -> nn.Sequential:
    """Build a small network with BatchNorm.

    Args:
        seed: Decides the initial weights.

    Returns:
        The network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1 + DOMAINS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Measure a model, in evaluation mode.

    Returns:
        The fraction of samples that it classifies rightly.
    """
    was_training = model.training
    x, y = data.tensors
    correct = model.eval()(x.to(next(model.parameters()).device)).argmax(1).cpu() == y
    model.train(was_training)
    return float(correct.double().mean())
