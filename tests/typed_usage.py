"""How the types of settings are meant: checked by ``make lint``, called by nobody.

mypy in strict mode also complains of a ``type: ignore`` for which there is no need.
"""

import torch

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish


def settings_that_are_meant_to_change(model: torch.nn.Module, sgd: torch.optim.SGD) -> None:
    GradMatch(sgd).method.meta_lr = 0.1
    GradMatch(sgd, Fish()).method.inner_steps = 3
    GradMatch(sgd, SmoothFish(1.0, 0.1)).method.inner_lr = 0.2
    GradMatch(sgd, IDGM(model, 0.1)).method.gamma = 0.5
    optimizer: GradMatch[Fish] = GradMatch(sgd, Fish())
    with optimizer.slow_weights():
        model(torch.zeros(1, 1))


def what_is_mistyped(sgd: torch.optim.SGD) -> None:
    GradMatch(sgd, Fish()).method.meta_rl = 0.1  # type: ignore[attr-defined]  # there is no such setting
    GradMatch(sgd, Fish()).method.buffers = "mean"  # type: ignore[assignment]  # there is no such choice
