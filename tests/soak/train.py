"""A training that is killed: short steps, a checkpoint every few of them, and what it holds in a log.

``python -m soak.train SETTINGS`` in JSON, under torchrun for two ranks; else :func:`train` in a forked process.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler

from torch_gradmatch import IDGM, DomainBatchSampler, DomainLoader, Fish, GradMatch, SmoothFish
from torch_gradmatch import meta_batches as groups_of

DOMAINS = 4


class Variant:
    """One way to train.

    Args:
        method: Makes the method for a model.
        optimizer: Makes the optimizer, or a list of them.
        loader: ``"plain"``, ``"workers"`` or ``"streams"``.
        loop: Whether in a plain loop, which is saved in the middle of a walk, or by ``meta_step``.
        dtype: Of the parameters.
        split: How two ranks share the work; None for one process.
        steps: How many in a run.
    """

    def __init__(
        self,
        method: Callable[[nn.Module], Any],
        optimizer: Callable[[nn.Module], Any],
        *,
        loader: str = "plain",
        loop: bool = False,
        dtype: torch.dtype = torch.float32,
        split: str | None = None,
        steps: int = 400,
    ) -> None:
        self.method, self.optimizer, self.loader, self.loop = method, optimizer, loader, loop
        self.dtype, self.split, self.steps = dtype, split, steps


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def both(model: nn.Module) -> Any:
    parameters = list(model.parameters())
    return [torch.optim.SGD(parameters[:2], lr=1e-2, momentum=0.9), torch.optim.Adam(parameters[2:], lr=1e-2)]


def lbfgs(model: nn.Module) -> Any:
    return torch.optim.LBFGS(model.parameters(), lr=1e-2, max_iter=2, history_size=3)


def fish(**settings: Any) -> Callable[[nn.Module], Any]:
    return lambda m: Fish(0.3, inner_steps=DOMAINS, model=m, **settings)


def fish_of_ranks(**settings: Any) -> Callable[[nn.Module], Any]:
    return lambda m: Fish(0.3, inner_state="reset", model=m, process_group=dist.group.WORLD, **settings)


def smooth(gamma: float = 0.5, **settings: Any) -> Callable[[nn.Module], Any]:
    return lambda m: SmoothFish(gamma, 0.05, m, **settings)


def exact(agreement: str, **settings: Any) -> Callable[[nn.Module], Any]:
    gamma = 1e-3 if agreement == "inner_product" else 0.1  # that one is unbounded: with more it diverges here
    return lambda m: IDGM(m, gamma, agreement, **settings)


def exact_of_ranks() -> Callable[[nn.Module], Any]:
    return lambda m: IDGM(m, 0.1, "variance", process_group=dist.group.WORLD)


def smooth_of_ranks() -> Callable[[nn.Module], Any]:
    return lambda m: SmoothFish(1.0, 0.05, m, process_group=dist.group.WORLD)


VARIANTS = {
    "fish-carry": Variant(fish(track_alignment=True), adamw, loop=True),
    "fish-reset": Variant(fish(inner_state="reset", track_alignment="pairs", buffers="latest"), adamw, loop=True),
    "fish-meta-dtype": Variant(fish(meta_dtype=torch.float32), sgd, loop=True, dtype=torch.bfloat16),
    "fish-several": Variant(fish(inner_state="reset"), both, loop=True),
    "fish-lbfgs": Variant(fish(), lbfgs, steps=200),
    "fish-meta-step": Variant(fish(meta_dtype=torch.float64), adamw, steps=200),
    "fish-workers": Variant(fish(track_alignment=True), adamw, loader="workers", loop=True, steps=200),
    "fish-streams": Variant(fish(), sgd, loader="streams", loop=True, steps=200),
    "smooth-fish": Variant(smooth(track_alignment=True), adamw, steps=200),
    "smooth-fish-symmetric": Variant(smooth(0.02, symmetric=True), both, steps=200),  # with more it diverges here
    "smooth-fish-workers": Variant(smooth(), sgd, loader="workers", steps=80),
    "idgm-inner_product": Variant(exact("inner_product", one_pass=True), adamw, steps=150),
    "idgm-variance-forward": Variant(exact("variance", hvp="forward"), sgd, steps=100),
    "idgm-cosine-finite_difference": Variant(exact("cosine", hvp="finite_difference"), both, steps=100),
    "fish-walks": Variant(fish_of_ranks(track_alignment=True), adamw, split="walks", steps=150),
    "smooth-fish-walks": Variant(smooth_of_ranks(), adamw, split="walks", steps=150),
    "idgm-domains": Variant(exact_of_ranks(), adamw, split="domains", steps=150),
}


def join() -> tuple[int, int]:
    """Join the other ranks; torchrun's store outlives a start, so each has its own part of it (gloo)."""
    store, rank, size = next(iter(dist.rendezvous("env://")))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(store=dist.PrefixStore(f"start {start}", store), rank=rank, world_size=size)
    return rank, size


def workers(number: int) -> dict[str, Any]:
    """Workers that end when the training is killed: those of a fork server would not notice."""
    return {"num_workers": number, "multiprocessing_context": "fork"} if number else {}


def comparable(state: Any) -> Any:
    """A state but for what torchdata seeds its workers with, who draw nothing: it is another in each process."""
    if isinstance(state, dict):
        return {key: comparable(value) for key, value in state.items() if key != "_base_seed"}
    return [comparable(value) for value in state] if isinstance(state, list | tuple) else state


def digest(state: Any) -> str:
    """A number that says whether two states are the same bit for bit."""
    found = hashlib.blake2b(digest_size=12)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            dense = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
            found.update(dense.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                found.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            found.update(f"{len(value)}".encode())
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(state)
    return found.hexdigest()


class Run:
    """One training, from where its checkpoint is.

    Args:
        settings: ``variant``, ``seed``, ``folder`` and ``save_every``, perhaps ``steps``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.variant = variant = VARIANTS[settings["variant"]]
        self.seed, self.folder, self.save_every = settings["seed"], Path(settings["folder"]), settings["save_every"]
        self.steps = settings.get("steps") or variant.steps
        self.rank, self.size = (0, 1) if variant.split is None else join()
        self.checkpoint = self.folder / "checkpoint.pt"
        draw = torch.Generator().manual_seed(self.seed)
        self.data = TensorDataset(*(torch.randn(120, n, generator=draw).to(variant.dtype) for n in (4, 1)))
        torch.manual_seed(self.seed)
        layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)]
        self.model = nn.Sequential(*layers).to(variant.dtype)
        self.optimizer = GradMatch(variant.optimizer(self.model), variant.method(self.model))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)
        self.source, self.place = self.make_loader()
        self.step = 0
        if self.checkpoint.exists():
            self.load()

    def make_loader(self) -> tuple[Any, Any]:
        """Return what is iterated over, and what knows the place in it."""
        variant, fixed = self.variant, torch.Generator()
        if variant.loader == "streams":
            parts = {}
            for domain in range(DOMAINS):
                part = TensorDataset(*(t[domain::DOMAINS] for t in self.data.tensors))
                # With the loader's own generator torchdata (0.11) does not resume without workers; and with none the
                # loader draws from dropout's.
                own = RandomSampler(part, generator=torch.Generator().manual_seed(self.seed + domain))
                settings = {"sampler": own, "generator": torch.Generator(), **workers(domain % 2)}
                parts[domain] = StatefulDataLoader(part, batch_size=8, **settings)
            streams = DomainLoader(parts, 5 * DOMAINS, seed=self.seed)
            return streams, streams
        domains = [i % DOMAINS for i in range(120)]
        ranks = {} if variant.split is None else {"num_replicas": self.size, "rank": self.rank, "split": variant.split}
        sampler = DomainBatchSampler(domains, 5, seed=self.seed, exhausted="cycle", **ranks)
        settings = workers(2 if variant.loader == "workers" else 0)
        kind: Any = StatefulDataLoader if variant.loader == "workers" else DataLoader
        loader = kind(self.data, batch_sampler=sampler, generator=fixed, **settings)
        place = loader if variant.loader == "workers" else sampler
        return (loader if variant.loop else groups_of(loader)), place

    def state(self) -> dict[str, Any]:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "place": self.place.state_dict(),
            "step": self.step,
        }
        if self.size == 1:  # ranks have other ones
            state["random"] = torch.get_rng_state()
        return state

    def load(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.place.load_state_dict(saved["place"])
        self.step = saved["step"]
        if self.size == 1:
            torch.set_rng_state(saved["random"])

    def save(self) -> None:
        """Write a checkpoint, which then replaces the last; and say in the log what it holds."""
        if self.rank != 0:
            return
        state = self.state()
        unfinished = self.checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint)
        with (self.folder / "log").open("a") as log:
            log.write(f"{self.step} {digest(comparable(state))}\n")

    def loss_fn(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return (self.model(x) - y).square().mean()

    def advance(self, item: Any) -> None:
        if self.size > 1:
            torch.manual_seed(self.seed + self.size * self.step + self.rank)
        if not self.variant.loop:
            self.optimizer.meta_step(self.loss_fn, item)
            return
        self.optimizer.zero_grad()
        self.loss_fn(item).backward()
        self.optimizer.step()

    def items(self) -> Iterator[Any]:
        while self.step < self.steps:
            yield from self.source

    def to_the_end(self) -> None:
        with closing(self.items()) as items:
            for item in items:
                self.advance(item)
                self.scheduler.step()
                self.step += 1
                if self.step % self.save_every == 0 or self.step == self.steps:
                    self.save()
                if self.step == self.steps:
                    return


def train(settings: dict[str, Any]) -> None:
    """Train to the end. ``began`` in the folder says that it has come as far as to train, and holds the process."""
    run = Run(settings)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    told = run.folder / f"began-{start}-{run.rank}"
    told.with_suffix(".unfinished").write_text(str(os.getpid()))
    os.replace(told.with_suffix(".unfinished"), told)
    began = time.monotonic()
    run.to_the_end()
    if run.rank == 0:
        (run.folder / "seconds").write_text(str(time.monotonic() - began))
    if run.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(json.loads(sys.argv[1]))
