"""Memory of a long training: it is the same after 100,000 meta-iterations as after a tenth of them."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

ITERATIONS = 100_000
LOOKS = 20
MOST_GROWTH = 1 << 20  # bytes

Build = Callable[[nn.Module], GradMatch[Any]]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


SETTINGS: dict[str, Build] = {
    "fish-carry": lambda m: GradMatch(sgd(m), Fish(0.5)),
    "fish-reset": lambda m: GradMatch(adam(m), Fish(0.5, inner_state="reset")),
    "fish-model-track": lambda m: GradMatch(sgd(m), Fish(0.5, model=m, track_alignment=True)),
    "fish-wide-pairs": lambda m: GradMatch(sgd(m), Fish(0.5, meta_dtype=torch.float64, track_alignment="pairs")),
    "smooth-fish": lambda m: GradMatch(sgd(m), SmoothFish(0.5, 0.01, m)),
    "smooth-fish-symmetric": lambda m: GradMatch(sgd(m), SmoothFish(0.01, 0.01, m, symmetric=True)),
    "idgm-inner_product-reverse": lambda m: GradMatch(sgd(m), IDGM(m, 0.1, "inner_product")),
    "idgm-variance-forward": lambda m: GradMatch(sgd(m), IDGM(m, 0.1, "variance", hvp="forward")),
    "idgm-cosine-finite_difference": lambda m: GradMatch(sgd(m), IDGM(m, 0.1, "cosine", hvp="finite_difference")),
    "idgm-variance-keep_graphs": lambda m: GradMatch(adam(m), IDGM(m, 0.1, "variance", keep_graphs=True)),
}


def cases(share: float) -> list[str]:
    """Each setting, with how many meta-iterations."""
    return [f"{name}/{max(2 * LOOKS, round(ITERATIONS * share))}" for name in SETTINGS]


def resident() -> int:
    """Bytes of this process's own memory: what is mapped from files, libraries for instance, does not count."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def living() -> int:
    """How many tensors there are, of those made since the collector was frozen."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def check(advance: Callable[[], object], iterations: int) -> dict[str, Any]:
    """Call a function again and again, and raise if memory grows after the first tenth of it."""
    stretch = iterations // LOOKS
    memory, tensors = [0] * LOOKS, [0] * LOOKS
    gc.collect()
    gc.freeze()  # what was there before is nothing new, and there is much of it
    try:
        for look in range(LOOKS):
            for _ in range(stretch):
                advance()
            tensors[look], memory[look] = living(), resident()
    finally:
        gc.unfreeze()
    warm = LOOKS // 10 - 1
    found = {
        "iterations": stretch * LOOKS,
        "memory": memory,
        "growth": memory[-1] - memory[warm],
        "tensors": tensors[-1],
        "new_tensors": tensors[-1] - tensors[warm],
    }
    assert found["new_tensors"] == 0, f"{found['new_tensors']} tensors more at the end than after a tenth: {tensors}"
    assert found["growth"] <= MOST_GROWTH, f"{found['growth']:,} bytes more at the end than after a tenth: {memory}"
    return found


def run(case: str, seed: int, folder: Path) -> dict[str, Any]:
    name, _, iterations = case.partition("/")
    draw = random.Random(f"flat {name} {seed}")
    torch.manual_seed(draw.randrange(2**31))
    layers = [nn.Linear(2, 1)]
    if "model" in name:
        layers.insert(0, nn.BatchNorm1d(2))
    model = nn.Sequential(*layers)
    optimizer = SETTINGS[name](model)
    batches = [torch.randn(4, 2) for _ in range(2)]
    return check(
        lambda: optimizer.meta_step(lambda x: (model(x) - x.sum(1, keepdim=True)).square().mean(), batches),
        int(iterations),
    )


def figures(lines: list[dict[str, Any]]) -> list[str]:
    """Growth of each, of those that were measured."""
    whole = sum(line["iterations"] for line in lines)
    worst = max((line["growth"] for line in lines), default=0)
    tensors = max((line["new_tensors"] for line in lines), default=0)
    told = (
        f"{whole:,} meta-iterations of {len(lines)} settings: at most {worst / 1024:,.0f} KiB and {tensors} tensors "
        "more at the end than after a tenth"
    )
    return [told, "", *map(_figure, lines)]


def _figure(line: dict[str, Any]) -> str:
    return (
        f"- {line['case']}: {line['growth'] / 1024:+,.0f} KiB, {line['new_tensors']:+} tensors, "
        f"{line['seconds'] / line['iterations'] * 1e3:,.2f} ms each"
    )
