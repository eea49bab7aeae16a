"""Recipes for things that need no option: gradient accumulation, clipping, and either under a GradScaler.

Each is beside a loop in plain torch: Fish on deep copies of the model, the other directions by plain autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _models import assert_same_model, assert_same_state
from _reference import naive_idgm, smooth_fish_gradient
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

Batch = tuple[Tensor, Tensor]
Gradients = list[Tensor | None]

META_LR, GAMMA, INNER_LR = 0.5, 0.2, 0.1
DOMAINS, SAMPLES = 3, 8
SCALE = 2.0**10

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(SGD, lr=0.1),
    "Adam": partial(Adam, lr=0.05),
}
METHODS: dict[str, Callable[..., Any]] = {
    "Fish": lambda _, **settings: Fish(META_LR, **settings),
    "SmoothFish": lambda m, **settings: SmoothFish(GAMMA, INNER_LR, m, **settings),
    "IDGM": lambda m, **settings: IDGM(m, GAMMA, "inner_product", **settings),
}


def clip_norm(model: nn.Module, max_norm: float = 0.5) -> None:
    clip_grad_norm_(model.parameters(), max_norm)  # returns the norm, which a hook may not


def make_model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


def make_groups(count: int = 3) -> list[list[Batch]]:
    """For each meta-iteration a batch of each domain, whose inputs and targets are the domain's own."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        [(draw(SAMPLES, 4) + 0.5 * domain, draw(SAMPLES, 1) + domain) for domain in range(DOMAINS)]
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    return list(zip(batch[0].chunk(count), batch[1].chunk(count), strict=True))


# ------------------------------------------------------------------------------------------------- in plain torch


class PlainLoop:
    """Gradient matching without the package: ``clip``, given the model, may change each gradient that steps."""

    def __init__(self, method: str, make: Callable[..., Optimizer], clip: Callable[..., None] = lambda _: None):
        self.method, self.make, self.clip = method, make, clip
        self.model = make_model()
        self.optimizer = make(self.model.parameters())
        self.norms: list[float] = []  # of the gradients, before they are clipped

    def meta_iteration(self, batches: list[Batch]) -> None:
        if self.method != "Fish":
            return self.take(self.model, self.optimizer, self.direction(batches))
        inner = copy.deepcopy(self.model)
        optimizer = self.make(inner.parameters())
        optimizer.load_state_dict(self.optimizer.state_dict())
        for batch in batches:
            gradients = torch.autograd.grad(loss_of(inner, batch), list(inner.parameters()))
            self.take(inner, optimizer, gradients)
        self.optimizer.load_state_dict(optimizer.state_dict())
        with torch.no_grad():
            for slow, fast in zip(self.model.parameters(), inner.parameters(), strict=True):
                slow += META_LR * (fast - slow)
        return None

    def direction(self, batches: list[Batch]) -> Any:
        if self.method == "SmoothFish":
            return smooth_fish_gradient(self.model, loss_of, batches, GAMMA, INNER_LR)
        losses = [partial(loss_of, self.model, batch) for batch in batches]
        return naive_idgm(list(self.model.parameters()), losses, GAMMA, "inner_product")[1]

    def take(self, model: nn.Module, optimizer: Optimizer, gradients: Any) -> None:
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        self.clip(model)
        optimizer.step()

    def assert_same(self, model: nn.Module, optimizer: GradMatch[Any]) -> None:
        assert_same_model(model, self.model, rtol=1e-9)
        assert_same_state(optimizer.optimizer.state_dict()["state"], self.optimizer.state_dict()["state"], rtol=1e-9)


NO_SCALER = GradScaler("cpu", enabled=False)


def train_by_hand(
    optimizer: GradMatch[Any], model: nn.Module, batches: list[Batch], scaler: GradScaler = NO_SCALER
) -> None:
    for batch in batches:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()


def train_by_meta_step(
    optimizer: GradMatch[Any], model: nn.Module, batches: list[Batch], scaler: GradScaler | None = None
) -> None:
    optimizer.meta_step(partial(loss_of, model), batches, scaler=scaler)


# -------------------------------------------------------------------------------------------- gradient accumulation


@pytest.mark.parametrize(("kind", "count"), [("SGD", 2), ("Adam", 4)])
def test_micro_batches_of_one_domain_add_up_to_its_batch(kind: str, count: int):
    model, plain = make_model(), PlainLoop("Fish", OPTIMIZERS[kind])
    optimizer = GradMatch(OPTIMIZERS[kind](model.parameters()), Fish(META_LR, inner_steps=DOMAINS))
    for batches in make_groups():
        for batch in batches:
            optimizer.zero_grad()
            for part in micro_batches(batch, count):
                (loss_of(model, part) / count).backward()
            optimizer.step()
        plain.meta_iteration(batches)
        plain.assert_same(model, optimizer)


def test_micro_batches_of_different_domains_do_not():
    """Added up before one step they are a batch of the whole data: ``check_loader`` refuses it, see its tests."""
    model, erm, plain = make_model(), make_model(), PlainLoop("Fish", OPTIMIZERS["SGD"])
    optimizer = GradMatch(OPTIMIZERS["SGD"](model.parameters()), Fish(META_LR, inner_steps=1))
    (batches,) = make_groups(1)
    for batch in batches:
        (loss_of(model, batch) / DOMAINS).backward()
    optimizer.step()
    whole = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    loss_of(erm, whole).backward()
    SGD(erm.parameters(), lr=0.1 * META_LR).step()
    plain.meta_iteration(batches)
    assert_same_model(model, erm)
    with pytest.raises(AssertionError):
        plain.assert_same(model, optimizer)


@pytest.mark.parametrize(
    ("name", "settings", "saves_memory"),
    [
        ("Fish", {}, False),
        ("Fish", {}, True),
        ("SmoothFish", {}, True),
        ("IDGM", {}, True),
        ("IDGM", {"keep_graphs": True}, True),
        ("IDGM", {"hvp": "finite_difference"}, True),
    ],
    ids=["Fish, plain", "Fish", "SmoothFish", "IDGM", "IDGM, kept", "IDGM, finite_difference"],
)
def test_a_batch_split_in_the_loss_is_the_whole_batch(name: str, settings: dict[str, Any], saves_memory: bool):
    model, plain, forward_passes = make_model(), PlainLoop(name, OPTIMIZERS["Adam"]), []
    model.register_forward_hook(lambda *_: forward_passes.append(1))
    optimizer = GradMatch(OPTIMIZERS["Adam"](model.parameters()), METHODS[name](model, **settings))

    def loss_fn(batch: Batch) -> Tensor:
        parts = micro_batches(batch, 4)
        if saves_memory:  # activations of one part at a time
            losses = [checkpoint(loss_of, model, part, use_reentrant=False) for part in parts]
        else:
            losses = [loss_of(model, part) for part in parts]
        return torch.stack(losses).mean()

    for batches in make_groups():
        report = optimizer.meta_step(loss_fn, batches)
        torch.testing.assert_close(report.losses[0], loss_of(plain.model, batches[0]).detach())
        plain.meta_iteration(batches)
        if "hvp" in settings:
            assert_same_model(model, plain.model, rtol=1e-4)
        else:
            plain.assert_same(model, optimizer)
    if name == "Fish":  # the second pass is the price
        assert len(forward_passes) == 3 * DOMAINS * 4 * (2 if saves_memory else 1)


# --------------------------------------------------------------------------------------------------------- clipping

WAYS: dict[str, Any] = {
    "Fish, by hand": ("Fish", train_by_hand),
    "Fish": ("Fish", train_by_meta_step),
    "SmoothFish": ("SmoothFish", train_by_meta_step),
    "IDGM": ("IDGM", train_by_meta_step),
}


def build(way: str, make: Callable[..., Optimizer], model: nn.Module, **settings: Any) -> GradMatch[Any]:
    if way == "Fish, by hand":
        settings["inner_steps"] = DOMAINS
    return GradMatch(make(model.parameters()), METHODS[WAYS[way][0]](model, **settings))


@pytest.mark.parametrize("hooked", ["GradMatch", "the wrapped optimizer"])
@pytest.mark.parametrize("way", WAYS)
def test_a_hook_before_the_step_clips_what_it_steps_by(way: str, hooked: str):
    """Under Fish each domain's gradient before its inner step, under SmoothFish and IDGM the direction."""
    model, plain = make_model(), PlainLoop(WAYS[way][0], OPTIMIZERS["Adam"], clip_norm)
    optimizer = build(way, OPTIMIZERS["Adam"], model)
    (optimizer if hooked == "GradMatch" else optimizer.optimizer).register_step_pre_hook(lambda *_: clip_norm(model))
    for batches in make_groups():
        WAYS[way][1](optimizer, model, batches)
        plain.meta_iteration(batches)
        plain.assert_same(model, optimizer)
    assert max(plain.norms) > 1.0  # so that there was something to clip


@pytest.mark.parametrize("scaler", [None, GradScaler("cpu", init_scale=SCALE)], ids=["no scaler", "GradScaler"])
def test_a_hook_on_several_optimizers_wrapped_as_one_clips_the_norm_over_all(scaler: GradScaler | None):
    model, plain = make_model(), PlainLoop("Fish", OPTIMIZERS["SGD"], clip_norm)
    parts = [OPTIMIZERS["SGD"](model[index].parameters()) for index in (0, 2)]
    optimizer = GradMatch(parts, Fish(META_LR))
    optimizer.optimizer.register_step_pre_hook(lambda *_: clip_norm(model))
    for batches in make_groups():
        optimizer.meta_step(partial(loss_of, model), batches, scaler=scaler)
        plain.meta_iteration(batches)
        assert_same_model(model, plain.model, rtol=1e-5 if scaler else 1e-10)


@pytest.mark.parametrize("hooked", ["GradMatch", "the wrapped optimizer"])
def test_what_is_tracked_under_fish_is_clipped_by_a_hook_on_gradmatch_only(hooked: str):
    model, plain = make_model(), PlainLoop("Fish", OPTIMIZERS["SGD"], clip_norm)
    optimizer = build("Fish", OPTIMIZERS["SGD"], model, track_alignment=True)
    (optimizer if hooked == "GradMatch" else optimizer.optimizer).register_step_pre_hook(lambda *_: clip_norm(model))
    (batches,) = make_groups(1)
    norms = optimizer.meta_step(partial(loss_of, model), batches).grad_norms
    plain.meta_iteration(batches)
    expected = [0.5] * DOMAINS if hooked == "GradMatch" else plain.norms
    torch.testing.assert_close(norms, torch.tensor(expected, dtype=norms.dtype), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------- clipping under a GradScaler


def scale_of(optimizer: Optimizer) -> Tensor:
    """By what the gradients that a step is about to find are still multiplied."""
    return torch.as_tensor(1.0 if getattr(optimizer, "grad_scale", None) is None else optimizer.grad_scale)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("way", ["no GradMatch", "Fish, by hand", "IDGM"])
def test_which_hook_sees_gradients_still_scaled(way: str, fused: bool):
    """One of GradMatch does. One of the wrapped optimizer sees what it would without GradMatch: a GradScaler unscales
    before the step unless the optimizer is fused and does so in its kernel.
    """
    model, seen, make = make_model(), dict[str, float](), partial(SGD, lr=0.1, fused=fused)
    optimizer: Any = make(model.parameters()) if way == "no GradMatch" else build(way, make, model)

    def look(o: Optimizer, *_: Any) -> None:
        seen[type(o).__name__] = float(scale_of(o))

    optimizer.register_step_pre_hook(look)
    if way != "no GradMatch":
        optimizer.optimizer.register_step_pre_hook(look)
    train = train_by_hand if way == "no GradMatch" else WAYS[way][1]
    train(optimizer, model, make_groups(1)[0], GradScaler("cpu", init_scale=SCALE))
    assert seen.get("GradMatch", SCALE) == SCALE
    assert seen["SGD"] == (SCALE if fused else 1.0)


def hook_on_the_wrapped(optimizer: GradMatch[Any], model: nn.Module) -> None:
    optimizer.optimizer.register_step_pre_hook(lambda *_: clip_norm(model))


def hook_that_knows_the_scale(optimizer: Optimizer, model: nn.Module) -> None:
    optimizer.register_step_pre_hook(lambda o, *_: clip_norm(model, 0.5 * float(scale_of(o))))


CLIPS_SCALED: dict[str, Any] = {
    "hook on the wrapped": (False, hook_on_the_wrapped),
    "hook that knows the scale": (False, hook_that_knows_the_scale),
    "hook that knows the scale, fused": (True, hook_that_knows_the_scale),
    "hook on the wrapped that knows the scale, fused": (
        True,
        lambda o, model: hook_that_knows_the_scale(o.optimizer, model),
    ),
}


@pytest.mark.parametrize("recipe", CLIPS_SCALED)
@pytest.mark.parametrize("way", ["Fish, by hand", "Fish", "IDGM"])
def test_clipping_under_a_scaler_in_a_hook(way: str, recipe: str):
    kind = OPTIMIZERS["Adam"]
    fused, register = CLIPS_SCALED[recipe]
    model, plain = make_model(), PlainLoop(WAYS[way][0], kind, clip_norm)
    optimizer = build(way, partial(kind, fused=fused), model)
    register(optimizer, model)
    scaler = GradScaler("cpu", init_scale=SCALE)
    for batches in make_groups():
        WAYS[way][1](optimizer, model, batches, scaler)
        plain.meta_iteration(batches)
        assert_same_model(model, plain.model, rtol=1e-5)  # clip_grad_norm_ divides by the norm + 1e-6
    assert max(plain.norms) > 1.0


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("tracks", [False, True], ids=["untracked", "tracked"])
def test_clipping_under_a_scaler_in_a_loop_of_ones_own(tracks: bool, fused: bool):
    """As in any loop of torch: unscale, clip, step."""
    kind = partial(Adam, lr=0.05)
    model, plain = make_model(), PlainLoop("Fish", kind, clip_norm)
    optimizer = build("Fish, by hand", partial(kind, fused=fused), model, track_alignment=tracks)
    scaler = GradScaler("cpu", init_scale=SCALE)
    for batches in make_groups():
        for batch in batches:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            scaler.unscale_(optimizer)
            clip_norm(model)
            scaler.step(optimizer)
            scaler.update()
        plain.meta_iteration(batches)
        plain.assert_same(model, optimizer)


@pytest.mark.parametrize("recipe", ["hook on the wrapped", "hook that knows the scale, fused"])
def test_clipping_leaves_a_step_that_overflowed_skipped(recipe: str):
    """Clipping makes NaN of infinite gradients, which nobody is to step by."""
    kind = partial(SGD, lr=0.1, momentum=0.9)
    fused, register = CLIPS_SCALED[recipe]
    model, plain = make_model(), PlainLoop("Fish", kind, clip_norm)
    optimizer = build("Fish", partial(kind, fused=fused), model)
    register(optimizer, model)
    scaler = GradScaler("cpu", init_scale=SCALE)
    for batches in make_groups():

        def loss_fn(batch: Batch, overflows: Batch = batches[1]) -> Tensor:
            return model(batch[0]).mean() * 1e306 if batch is overflows else loss_of(model, batch)

        optimizer.meta_step(loss_fn, batches, scaler=scaler)
        plain.meta_iteration([batches[0], batches[2]])
        assert_same_model(model, plain.model, rtol=1e-5)
