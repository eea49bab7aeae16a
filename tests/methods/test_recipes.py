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
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from torch_gradmatch import IDGM, DomainBatchSampler, Fish, GradMatch, SmoothFish, check_loader

Batch = tuple[Tensor, Tensor]
Gradients = list[Tensor | None]

META_LR, GAMMA, INNER_LR = 0.5, 0.2, 0.1
DOMAINS, SAMPLES = 3, 8
SCALE = 2.0**10

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(SGD, lr=0.1),
    "SGD, momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": partial(Adam, lr=0.05),
}
METHODS: dict[str, Callable[..., Any]] = {
    "Fish": lambda _, **settings: Fish(META_LR, **settings),
    "SmoothFish": lambda m, **settings: SmoothFish(GAMMA, INNER_LR, m, **settings),
    "IDGM": lambda m, **settings: IDGM(m, GAMMA, **settings),
}


def clip_norm(model: nn.Module, max_norm: float = 0.5) -> None:
    clip_grad_norm_(model.parameters(), max_norm)  # returns the norm, which a hook may not


def clip_value(model: nn.Module) -> None:
    clip_grad_value_(model.parameters(), 0.05)


CLIPS: dict[str, Callable[[nn.Module], None]] = {"norm": clip_norm, "value": clip_value}


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


def train_by_hand(optimizer: GradMatch[Any], model: nn.Module, batches: list[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def train_by_meta_step(optimizer: GradMatch[Any], model: nn.Module, batches: list[Batch]) -> None:
    optimizer.meta_step(partial(loss_of, model), batches)


# -------------------------------------------------------------------------------------------- gradient accumulation


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", OPTIMIZERS)
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


def test_micro_batches_of_different_domains_do_not_and_are_refused():
    """Added up before one step they are a batch of the whole data, and the domains' agreement is out of sight."""
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

    sampler = DomainBatchSampler(["a", "b", "c"] * 8, batch_size=4)
    optimizer = GradMatch(OPTIMIZERS["SGD"](model.parameters()), Fish(META_LR, inner_steps=DOMAINS))
    loader = DataLoader(range(24), batch_sampler=sampler)  # type: ignore[arg-type]
    check_loader(optimizer, loader)
    with pytest.raises(ValueError, match="accumulation_steps=3 adds up the gradients of 3 batches"):
        check_loader(optimizer, loader, accumulation_steps=DOMAINS)


@pytest.mark.parametrize("saves_memory", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Fish", {}),
        ("SmoothFish", {}),
        ("IDGM", {}),
        ("IDGM", {"keep_graphs": True}),
        ("IDGM", {"hvp": "finite_difference"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())) or "default",
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
@pytest.mark.parametrize("clipping", CLIPS)
@pytest.mark.parametrize("kind", ["SGD, momentum", "Adam"])
@pytest.mark.parametrize("way", WAYS)
def test_a_hook_before_the_step_clips_what_it_steps_by(way: str, kind: str, clipping: str, hooked: str):
    """Under Fish each domain's gradient before its inner step, under SmoothFish and IDGM the direction."""
    model, plain = make_model(), PlainLoop(WAYS[way][0], OPTIMIZERS[kind], CLIPS[clipping])
    optimizer = build(way, OPTIMIZERS[kind], model)
    (optimizer if hooked == "GradMatch" else optimizer.optimizer).register_step_pre_hook(
        lambda *_: CLIPS[clipping](model)
    )
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
@pytest.mark.parametrize("way", WAYS)
def test_what_tracking_measures_of_clipped_training(way: str, hooked: str):
    """The domains' gradients before they are clipped, but under Fish with the hook on GradMatch: those after it."""
    model, reference = make_model(), make_model()
    optimizer = build(way, OPTIMIZERS["SGD"], model, track_alignment=True)
    (optimizer if hooked == "GradMatch" else optimizer.optimizer).register_step_pre_hook(lambda *_: clip_norm(model))
    (batches,) = make_groups(1)
    WAYS[way][1](optimizer, model, batches)
    norms = optimizer.last_meta_step.grad_norms
    if WAYS[way][0] == "Fish" and hooked == "GradMatch":
        torch.testing.assert_close(norms, torch.full_like(norms, 0.5), rtol=1e-5, atol=0)
    elif WAYS[way][0] == "Fish":
        plain = PlainLoop("Fish", OPTIMIZERS["SGD"], clip_norm)
        plain.meta_iteration(batches)
        torch.testing.assert_close(norms, torch.tensor(plain.norms, dtype=norms.dtype))
    else:
        for batch, norm in zip(batches, norms, strict=True):
            gradients = torch.autograd.grad(loss_of(reference, batch), list(reference.parameters()))
            torch.testing.assert_close(nn.utils.get_total_norm(gradients), norm)


# ---------------------------------------------------------------------------------------- clipping under a GradScaler


def scaled_by_hand(optimizer: GradMatch[Any], model: nn.Module, batches: list[Batch], scaler: GradScaler) -> None:
    for batch in batches:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()


def scaled_by_meta_step(optimizer: GradMatch[Any], model: nn.Module, batches: list[Batch], scaler: GradScaler) -> None:
    optimizer.meta_step(partial(loss_of, model), batches, scaler=scaler)


SCALED: dict[str, Any] = {way: scaled_by_hand if "hand" in way else scaled_by_meta_step for way in WAYS}


def scale_of(optimizer: Optimizer) -> Tensor:
    """By what the gradients that a step is about to find are still multiplied."""
    return torch.as_tensor(1.0 if getattr(optimizer, "grad_scale", None) is None else optimizer.grad_scale)


@pytest.mark.parametrize("tracks", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("way", ["no GradMatch", *WAYS])
def test_which_hook_sees_gradients_still_scaled(way: str, fused: bool, tracks: bool):
    """One of GradMatch does. One of the wrapped optimizer sees what it would without GradMatch: a GradScaler unscales
    before the step unless the optimizer is fused and does so in its kernel. Tracking under Fish always unscales.
    """
    model, seen = make_model(), {}
    make = partial(SGD, lr=0.1, fused=fused)
    (batches,) = make_groups(1)

    def look(optimizer: Optimizer, *_: Any) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        seen.setdefault(type(optimizer).__name__, (float(norm), float(scale_of(optimizer))))

    if way == "no GradMatch":
        optimizer = make(model.parameters())
        optimizer.register_step_pre_hook(look)
        scaled_by_hand(optimizer, model, batches, GradScaler("cpu", init_scale=SCALE))
    else:
        optimizer = build(way, make, model, **({"track_alignment": True} if tracks else {}))
        optimizer.register_step_pre_hook(look)
        optimizer.optimizer.register_step_pre_hook(look)
        SCALED[way](optimizer, model, batches, GradScaler("cpu", init_scale=SCALE))

    plain = PlainLoop("Fish" if way == "no GradMatch" else WAYS[way][0], OPTIMIZERS["SGD"])
    plain.meta_iteration(batches)
    unscaled, scaled = (pytest.approx(plain.norms[0]), 1.0), (pytest.approx(SCALE * plain.norms[0]), SCALE)
    assert seen.get("GradMatch", scaled) == scaled
    assert seen["SGD"] == (scaled if fused and not (tracks and way.startswith("Fish")) else unscaled)


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


@pytest.mark.parametrize("kind", [partial(SGD, lr=0.1, momentum=0.9), partial(Adam, lr=0.05)], ids=["SGD", "Adam"])
@pytest.mark.parametrize("recipe", CLIPS_SCALED)
@pytest.mark.parametrize("way", WAYS)
def test_clipping_under_a_scaler_in_a_hook(way: str, recipe: str, kind: Callable[..., Optimizer]):
    fused, register = CLIPS_SCALED[recipe]
    model, plain = make_model(), PlainLoop(WAYS[way][0], kind, clip_norm)
    optimizer = build(way, partial(kind, fused=fused), model)
    register(optimizer, model)
    scaler = GradScaler("cpu", init_scale=SCALE)
    for batches in make_groups():
        SCALED[way](optimizer, model, batches, scaler)
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


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_on_gradmatch_that_does_not_know_the_scale_clips_too_much(way: str):
    """To 0.5 / scale: the mistake that the recipes avoid."""
    model = make_model()
    optimizer = build(way, OPTIMIZERS["SGD"], model)
    optimizer.register_step_pre_hook(lambda *_: clip_norm(model))
    SCALED[way](optimizer, model, make_groups(1)[0], GradScaler("cpu", init_scale=SCALE))
    torch.testing.assert_close(
        float(nn.utils.get_total_norm([p.grad for p in model.parameters()])), 0.5 / SCALE, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("recipe", CLIPS_SCALED)
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
