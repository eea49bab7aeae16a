"""How the types of settings are meant: checked by ``make lint``, called by nobody.

mypy in strict mode also complains of a ``type: ignore`` for which there is no need.
"""

import torch

from torch_gradmatch import IDGM, DomainLoader, Fish, GradMatch, SmoothFish, meta_batches


def settings_that_are_meant_to_change(model: torch.nn.Module, sgd: torch.optim.SGD) -> None:
    GradMatch(sgd).method.meta_lr = 0.1
    GradMatch(sgd, Fish()).method.inner_steps = 3
    GradMatch(sgd, SmoothFish(1.0, 0.1)).method.inner_lr = 0.2
    GradMatch(sgd, IDGM(model, 0.1)).method.gamma = 0.5
    optimizer: GradMatch[Fish] = GradMatch(sgd, Fish())
    with optimizer.slow_weights():
        model(torch.zeros(1, 1))


def several_optimizers_and_domains_by_name(sgd: torch.optim.SGD, adam: torch.optim.Adam) -> dict[str, float]:
    optimizer = GradMatch([sgd, adam], Fish(inner_state=lambda optimizer: optimizer.state.clear()))
    optimizer.method.track_alignment = "pairs"
    loader = DomainLoader({"north": [torch.zeros(1)], "south": [torch.ones(1)]}, batches_per_epoch=2)
    for batches in meta_batches(loader, 2):
        optimizer.meta_step(lambda batch: batch.sum(), batches)
    report = optimizer.meta_step(lambda batch: batch.sum(), {"north": torch.zeros(1), "south": torch.ones(1)})
    return report.scalars("train/")


def what_is_mistyped(sgd: torch.optim.SGD) -> None:
    GradMatch(sgd, Fish()).method.meta_rl = 0.1  # type: ignore[attr-defined]  # there is no such setting
    GradMatch(sgd, Fish()).train_on("north")  # type: ignore[attr-defined]  # methods of the wrapped one have no types
    GradMatch(sgd, Fish()).method.buffers = "mean"  # type: ignore[assignment]  # there is no such choice
