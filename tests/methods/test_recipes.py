"""Recipes for things that need no option: gradient accumulation, clipping, and either under a GradScaler.

Each is beside a loop in plain torch: Fish on deep copies of the model, the other directions by plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _models import assert_same_model, assert_same_state, small_network
from _networks import mean_squared_error as loss_of
from _reference import ReferenceFish, naive_idgm, smooth_fish_gradient
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

Batch = tuple[Tensor, Tensor]
META_LR, GAMMA, INNER_LR = 0.5, 0.2, 0.1
DOMAINS, SAMPLES, PARTS = 3, 8, 4
METHODS: dict[str, Callable[..., Any]] = {
    "Fish, by hand": lambda _, **settings: Fish(META_LR, inner_steps=DOMAINS, **settings),
    "Fish": lambda _, **settings: Fish(META_LR, **settings),
    "SmoothFish": lambda m, **settings: SmoothFish(GAMMA, INNER_LR, m, **settings),
    "IDGM": lambda m, **settings: IDGM(m, GAMMA, "inner_product", **settings),
}


def groups(count: int = 3) -> list[list[Batch]]:
    """For each meta-iteration a batch of each domain, whose inputs and targets are the domain's own."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [[(draw(SAMPLES, 3) + d / 2, draw(SAMPLES, 1) + d) for d in range(DOMAINS)] for _ in range(count)]


def clip(model: nn.Module, scale: float = 1.0) -> None:
    clip_grad_norm_(model.parameters(), 0.5 * scale)  # returns the norm, which a hook may not


class PlainLoop:
    """Gradient matching without the package: ``clip``, given the model, may change each gradient that steps."""

    def __init__(self, method: str, make: Callable[..., Optimizer], clip: Callable[..., None] = lambda _: None) -> None:
        self.method, self.model = method, small_network()
        self.norms: list[float] = []  # of the gradients, before they are clipped

        def build(model: nn.Module) -> Optimizer:
            def before_step(*_: Any) -> None:
                self.norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
                clip(model)

            optimizer = make(model.parameters())
            optimizer.register_step_pre_hook(before_step)
            return optimizer

        self.fish = ReferenceFish(self.model, build, META_LR)
        self.optimizer = build(self.model)

    def meta_iteration(self, batches: list[Batch]) -> None:
        if self.method.startswith("Fish"):
            for batch in batches:
                self.fish.step(partial(loss_of, batch=batch))
            self.fish.interpolate()
            return
        losses = [partial(loss_of, self.model, batch) for batch in batches]
        parameters = list(self.model.parameters())
        found: Any = naive_idgm(parameters, losses, GAMMA, "inner_product")[1]
        if self.method == "SmoothFish":
            found = smooth_fish_gradient(self.model, loss_of, batches, GAMMA, INNER_LR)
        for p, g in zip(parameters, found, strict=True):
            p.grad = g
        self.optimizer.step()

    def assert_same(self, model: nn.Module, optimizer: GradMatch[Any]) -> None:
        assert_same_model(model, self.model, rtol=1e-9)
        fish = self.method.startswith("Fish")
        state = self.fish.optimizer_state if fish else self.optimizer.state_dict()["state"]
        assert_same_state(optimizer.optimizer.state_dict()["state"], state, rtol=1e-9)


def build(method: str, make: Callable[..., Optimizer], **settings: Any) -> tuple[nn.Module, GradMatch[Any]]:
    model = small_network()
    return model, GradMatch(make(model.parameters()), METHODS[method](model, **settings))


def train(
    method: str, model: nn.Module, optimizer: GradMatch[Any], batches: list[Batch], scaler: GradScaler | None = None
) -> None:
    """One meta-iteration, by ``meta_step`` or by hand."""
    if method != "Fish, by hand":
        optimizer.meta_step(partial(loss_of, model), batches, scaler=scaler)
        return
    scaler = scaler or GradScaler("cpu", enabled=False)
    for batch in batches:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize(
    ("method", "settings"),
    [("Fish", {}), ("SmoothFish", {}), ("IDGM", {}), ("IDGM", {"keep_graphs": True})],
    ids=["Fish", "SmoothFish", "IDGM", "IDGM, kept"],
)
def test_a_batch_split_in_the_loss_is_the_whole_batch(method: str, settings: dict[str, Any]):
    """With the activations of one part at a time."""
    make = partial(Adam, lr=0.05)
    (model, optimizer), plain = build(method, make, **settings), PlainLoop(method, make)

    def loss_fn(batch: Batch) -> Tensor:
        parts = zip(batch[0].chunk(PARTS), batch[1].chunk(PARTS), strict=True)
        return torch.stack([checkpoint(loss_of, model, part, use_reentrant=False) for part in parts]).mean()

    for batches in groups():
        report = optimizer.meta_step(loss_fn, batches)
        torch.testing.assert_close(report.losses[0], loss_of(plain.model, batches[0]).detach())
        plain.meta_iteration(batches)
        plain.assert_same(model, optimizer)


def hook_on_both_kinds(optimizer: Optimizer, model: nn.Module) -> None:
    """Knows by what gradients are still multiplied: for GradMatch all, for a wrapped optimizer if it is fused."""

    def clips(of: Any, *_: Any) -> None:
        clip(model, 1.0 if getattr(of, "grad_scale", None) is None else float(of.grad_scale))

    optimizer.register_step_pre_hook(clips)


HOOKS: dict[str, Callable[[GradMatch[Any], nn.Module], object]] = {
    "of GradMatch": lambda o, m: o.register_step_pre_hook(lambda *_: clip(m)),
    "of the wrapped": lambda o, m: o.optimizer.register_step_pre_hook(lambda *_: clip(m)),
    "of GradMatch, knows the scale": lambda o, m: hook_on_both_kinds(o, m),
    "of the wrapped, knows the scale": lambda o, m: hook_on_both_kinds(o.optimizer, m),
}
WITHOUT_SCALER = [(False, "of GradMatch", False), (False, "of the wrapped", False)]
WITH_SCALER = [
    (True, "of the wrapped", False),
    (True, "of GradMatch, knows the scale", False),
    (True, "of GradMatch, knows the scale", True),
    (True, "of the wrapped, knows the scale", True),
]


@pytest.mark.parametrize(("scaled", "hook", "fused"), WITHOUT_SCALER + WITH_SCALER)
@pytest.mark.parametrize("method", METHODS)
def test_a_hook_before_the_step_clips_what_it_steps_by(method: str, scaled: bool, hook: str, fused: bool):
    """Under Fish each domain's gradient before its inner step, under SmoothFish and IDGM the direction."""
    make = partial(Adam, lr=0.05)
    (model, optimizer), plain = build(method, partial(make, fused=fused)), PlainLoop(method, make, clip)
    HOOKS[hook](optimizer, model)
    scaler = GradScaler("cpu", init_scale=2.0**10) if scaled else None
    for batches in groups():
        train(method, model, optimizer, batches, scaler)
        plain.meta_iteration(batches)
        if scaled:
            assert_same_model(model, plain.model, rtol=1e-5)  # clip_grad_norm_ divides by the norm + 1e-6
        else:
            plain.assert_same(model, optimizer)
    assert max(plain.norms) > 1.0  # so that there was something to clip


@pytest.mark.parametrize(("hook", "clipped"), [("of GradMatch", True), ("of the wrapped", False)])
def test_what_is_tracked_under_fish_is_clipped_by_a_hook_on_gradmatch_only(hook: str, clipped: bool):
    make = partial(SGD, lr=0.1)
    (model, optimizer), plain = build("Fish", make, track_alignment=True), PlainLoop("Fish", make, clip)
    HOOKS[hook](optimizer, model)
    norms = optimizer.meta_step(partial(loss_of, model), groups()[0]).grad_norms
    plain.meta_iteration(groups()[0])
    expected = torch.tensor([0.5] * DOMAINS if clipped else plain.norms, dtype=norms.dtype)
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("tracks", [False, True], ids=["untracked", "tracked"])
def test_clipping_under_a_scaler_in_a_loop_of_ones_own(tracks: bool, fused: bool):
    """As in any loop of torch: unscale, clip, step."""
    model, optimizer = build("Fish, by hand", partial(Adam, lr=0.05, fused=fused), track_alignment=tracks)
    plain, scaler = PlainLoop("Fish", partial(Adam, lr=0.05), clip), GradScaler("cpu", init_scale=2.0**10)
    for batches in groups():
        for batch in batches:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            scaler.unscale_(optimizer)
            clip(model)
            scaler.step(optimizer)
            scaler.update()
        plain.meta_iteration(batches)
        plain.assert_same(model, optimizer)


@pytest.mark.parametrize(
    ("hook", "fused"), [("of the wrapped", False), ("of GradMatch, knows the scale", True)], ids=["plain", "fused"]
)
def test_clipping_leaves_a_step_that_overflowed_skipped(hook: str, fused: bool):
    """Clipping makes NaN of infinite gradients, which nobody is to step by."""
    make = partial(SGD, lr=0.1, momentum=0.9)
    (model, optimizer), plain = build("Fish", partial(make, fused=fused)), PlainLoop("Fish", make, clip)
    HOOKS[hook](optimizer, model)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for batches in groups():

        def loss_fn(batch: Batch, overflows: Batch = batches[1]) -> Tensor:
            return model(batch[0]).mean() * 1e306 if batch is overflows else loss_of(model, batch)

        optimizer.meta_step(loss_fn, batches, scaler=scaler)
        plain.meta_iteration([batches[0], batches[2]])
        assert_same_model(model, plain.model, rtol=1e-5)
