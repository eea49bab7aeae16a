"""What two walks are good for: meta-iterations until Fish knows CdSprites' unseen colours, by one walk and by two.

Network, data and settings of ``benchmarks/outcome.py``; nothing is changed for two walks but the process group and the
sampler's ``split``. Each rank draws other samples of the same domains, in the opposite order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.outcome import SETTINGS, cdsprites, make_cdsprites
from torch_gradmatch import DomainBatchSampler, Fish, GradMatch, meta_batches

EVERY = 20  # meta-iterations between two looks
REACHED = 0.95
Batch = tuple[Tensor, Tensor]


def groups(dataset: Any, config: Any, walks: int, rank: int) -> Iterator[list[Batch]]:
    """Draw this rank's S batches of each meta-iteration, for ever."""
    sampler = DomainBatchSampler(
        dataset.domains,
        config.batch_size,
        seed=config.seed,
        drop_last=True,
        num_replicas=walks,
        rank=rank,
        split="walks",
    )
    loader: Any = DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda batch: batch)
    return cdsprites.endless(meta_batches(loader, config.domains))


def train(walks: int, seed: int, settings: dict[str, Any], told: Callable[..., object]) -> dict[str, Any]:
    """Train one model, by itself or with the other ranks."""
    config = cdsprites.Config(**settings, seed=seed)
    sizes = {name: settings[name] for name in ("domains", "images_per_domain", "eval_images", "size")}
    data = make_cdsprites(cdsprites.DrawnSprites(), **sizes, seed=seed)
    train_set, unseen = (cdsprites.SpriteDataset(split, torch.device("cpu")) for split in (data.train, data.test))
    images, labels = unseen.__getitems__(list(range(len(unseen))))
    torch.manual_seed(seed)
    model = cdsprites.make_model(config)
    group = dist.group.WORLD if walks > 1 else None
    method = Fish(config.meta_lr, inner_state="reset", model=model, process_group=group)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=config.inner_lr), method)

    def loss_fn(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def accuracy() -> float:
        right = [model(x).argmax(1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)]
        return float(torch.cat(right).double().mean())

    rank = dist.get_rank() if walks > 1 else 0
    curve: list[tuple[int, float]] = [(0, accuracy())]
    for iteration, batches in enumerate(groups(train_set, config, walks, rank), 1):
        optimizer.meta_step(loss_fn, batches)
        if iteration % EVERY == 0 or iteration == config.iterations:
            curve.append((iteration, accuracy()))
        if rank == 0:
            told()
        if iteration == config.iterations:
            break
    at, values = (list(x) for x in zip(*curve, strict=True))
    return {"walks": walks, "seed": seed, "iteration": at, "accuracy": values, "reached": reached(at, values)}


def reached(iterations: Sequence[int], accuracies: Sequence[float]) -> int | None:
    """The first meta-iteration at which the accuracy was seen to be high enough; None if never."""
    return next((i for i, a in zip(iterations, accuracies, strict=True) if a >= REACHED), None)


def train_all(seeds: Sequence[int], settings: dict[str, Any], told: Callable[..., object]) -> list[dict[str, Any]]:
    """Train with every seed: by one walk, the seeds dealt to the ranks; then by as many walks as there are ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = [train(1, seed, settings, told) for seed in seeds[rank::size]]
    dist.barrier()
    both = [train(size, seed, settings, told) for seed in seeds]
    return found + (both if rank == 0 else [])


def settings_for(others: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``benchmarks/outcome.py``, a little longer, and with some others."""
    return SETTINGS | {"iterations": 600} | others
