"""What training ends with, in a plain loop and in three frameworks: ``train`` of ``_in_accelerate.py`` and the like."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from _spurious_data import BATCH_SIZE, DOMAINS, ERM_LR, FISH_LR, HELD_OUT, make_data, make_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torch_gradmatch import IDGM, DomainBatchSampler, Fish, GradMatch, domain_batches, meta_batches

STEPS_IN_EPOCH = 16
DOMAIN_NAMES = [f"domain {domain}" for domain in range(DOMAINS)]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.half}


@dataclass
class Trained:
    """What training ends with. Nothing here is what a framework wraps it in, but for ``trainer``, its own."""

    network: nn.Module
    optimizer: Any
    schedule: Any = None
    trainer: Any = None
    place: Any = None  # of the loader
    told: list[tuple[Any, str]] = field(default_factory=list)  # the domain that the optimizer was told, and the batch's
    losses: list[tuple[str, float]] = field(default_factory=list)  # of the batches, behind their domains
    answers: list[Tensor] = field(default_factory=list)  # of the network in evaluation

    def evaluated(self) -> list[Tensor]:
        """Return the answers on the whole held-out domain, of each evaluation."""
        return list(torch.cat(self.answers).split(HELD_OUT))

    def state(self) -> dict[str, Any]:
        """Return all that training goes on from, with the names of the network's own buffers."""
        optimizer = dict(self.optimizer.state_dict())
        if buffers := optimizer.get("gradmatch", {}).get("slow_buffers"):
            buffers = {name.removeprefix("model.").removeprefix("network."): value for name, value in buffers.items()}
            optimizer["gradmatch"] = {**optimizer["gradmatch"], "slow_buffers": buffers}
        schedule = {key: value for key, value in self.schedule.state_dict().items() if not key.startswith("_")}
        state = {"network": dict(self.network.state_dict()), "optimizer": optimizer, "schedule": schedule}
        return copy.deepcopy(state)


def domain_of(features: Tensor, classes: Tensor) -> str:
    """Return the domain whose shortcut agrees with the classes: in 90 % of its own samples, in half of all others."""
    return f"domain {int((features[:, 1:] * (2 * classes - 1)[:, None]).mean(0).argmax())}"


@contextlib.contextmanager
def watched(example: ModuleType) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Let an example train a network whose answers in evaluation are kept."""
    network, answers = example.make_model(0), []

    def note(module: nn.Module, _: Any, answer: Tensor) -> None:
        if not module.training:
            answers.append(answer.detach().clone())

    network.register_forward_hook(note)
    with mock.patch.object(example, "make_model", return_value=network):
        yield network, answers


def plain_loop(method: str, steps: int, precision: str = "fp32", accumulate: int = 1, clip: float = 0.5) -> Trained:
    """Train as the examples do, in a loop of one's own."""
    network, (data, names, _) = make_model(0), make_data()
    loader = DataLoader(data, batch_sampler=DomainBatchSampler(names, BATCH_SIZE, accumulate=accumulate))
    optimizer: Any = torch.optim.AdamW(network.parameters(), lr=FISH_LR if method == "Fish" else ERM_LR)
    if method == "Fish":
        fish = Fish(0.05, inner_steps=DOMAINS, inner_state="reset", model=network, track_alignment=True)
        optimizer = GradMatch(optimizer, fish)
    elif method == "exact":
        optimizer = GradMatch(optimizer, IDGM(network, track_alignment=True))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    trained = Trained(network, optimizer, scheduler)

    def loss_of(batch: Any) -> Tensor:
        with torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            return nn.functional.cross_entropy(network(batch[0]), batch[1])

    served = meta_batches if method == "exact" else domain_batches
    batches = (batch for _ in range(9) for batch in served(loader))
    for number, batch in enumerate(islice(batches, steps * accumulate), 1):
        if method == "exact":
            optimizer.meta_step(loss_of, batch)
            scheduler.step()
            continue
        domain, batch = batch
        assert domain == domain_of(*batch)
        loss = loss_of(batch) / accumulate
        trained.losses.append((domain, loss.item()))
        scaler.scale(loss).backward()
        if number % accumulate == 0:
            if method == "Fish":
                optimizer.domain = domain
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
    return trained
