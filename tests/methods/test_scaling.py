"""Loss scaling: a skipped step is a visited domain, and meta_step with a GradScaler is meta_step without."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net
from _models import assert_identical, assert_same_model, loss_of
from _second_order import EVERY
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, Optimizer

from torch_gradmatch import IDGM, Fish, GradMatch, agreement

SCALE = 2.0**10


def make_scaler(**settings: Any) -> GradScaler:
    return GradScaler("cpu", **{"init_scale": SCALE} | settings)


def step(optimizer: Optimizer, scaler: GradScaler, loss: Any, *, unscale: bool = False) -> None:
    """One step of a loop of one's own."""
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True], ids=["by step", "before, to clip"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_skipped_step_moves_nothing_and_counts(fused: bool, unscale: bool):
    """Four domains in each group of the sampler, one of which overflows: the groups stay the inner loops."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    reference = nn.Parameter(parameter.detach().clone())
    optimizer = GradMatch(Adam([parameter], lr=0.1, fused=fused), Fish(0.5, inner_steps=4))
    plain, scaler = Adam([reference], lr=0.1), make_scaler()
    for group in range(3):
        slow = reference.detach().clone()
        for domain in range(4):
            before, factor = parameter.detach().clone(), float("inf") if domain == group else domain + 1.0
            step(optimizer, scaler, lambda f=factor: (parameter * f).square().sum(), unscale=unscale)
            assert optimizer.inner_step == (domain + 1) % 4
            if domain == group:
                assert torch.equal(parameter, before)
            else:
                step(plain, make_scaler(enabled=False), lambda f=factor: (reference * f).square().sum())
        with torch.no_grad():
            reference.copy_(slow + 0.5 * (reference - slow))
        torch.testing.assert_close(parameter, reference)
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer.optimizer, "found_inf")


@pytest.mark.parametrize("method", ["SmoothFish", "IDGM", "ERM"])
def test_ordinary_steps_under_the_other_methods_are_the_wrapped_optimizers(method: str):
    model, other = feature_net(), feature_net()
    wrapped = GradMatch(SGD(model.parameters(), lr=0.1), EVERY[method](model))
    for m, optimizer in ((model, wrapped), (other, SGD(other.parameters(), lr=0.1))):
        scaler = make_scaler()
        for batch in batches(3):
            step(optimizer, scaler, partial(loss_of, m, batch))
    assert_identical(model.state_dict(), other.state_dict())


def test_tracking_measures_unscaled_gradients_and_a_skipped_step_ends_it():
    parameter = nn.Parameter(torch.tensor([3.0, 0.0]))
    optimizer = GradMatch(SGD([parameter], lr=0.0), Fish(0.5, inner_steps=2, track_alignment=True))
    scaler, reports = make_scaler(), []
    for last in (1.0, float("inf")):
        for slope in (torch.tensor([3.0, 0.0]), torch.tensor([1.0, last])):
            step(optimizer, scaler, lambda s=slope: (parameter * s).sum())
        reports.append(optimizer.last_meta_step)
    torch.testing.assert_close(reports[0].inner_product, torch.tensor(3.0))
    torch.testing.assert_close(reports[0].grad_norms, torch.tensor([3.0, 2.0**0.5]))
    assert reports[1].inner_product is None  # one gradient for two steps


def test_a_diverged_loop_leaves_no_scale_behind():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(SGD([parameter], lr=float("inf")), Fish(0.5, inner_steps=1))
    with pytest.raises(RuntimeError, match="diverged"):
        step(optimizer, make_scaler(), parameter.sum)
    optimizer.rollback()
    optimizer.param_groups[0]["lr"] = 0.5
    parameter.grad = torch.ones(2)
    optimizer.step()  # without the scaler: nothing to unscale
    assert parameter.tolist() == [0.75, 0.75]


def test_half_precision_gradients_are_refused_as_torch_does():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        step(GradMatch(SGD([parameter], lr=0.1)), make_scaler(), lambda: parameter.float().sum())
    assert parameter.tolist() == [1.0, 1.0]


def layerwise(gradients: Any) -> Tensor:
    return torch.stack([agreement.inner_product([g[n] for g in gradients]).tanh() for n in gradients[0]]).sum()


METHODS: dict[str, Any] = EVERY | {
    "Fish, reset": lambda m: Fish(0.5, model=m, inner_state="reset"),
    "IDGM, cosine": lambda m: IDGM(m, 0.2, "cosine"),
    "IDGM, one's own": lambda m: IDGM(m, 0.2, layerwise),
}


@pytest.mark.parametrize(("name", "fused"), [*((name, False) for name in METHODS), ("Fish", True), ("IDGM", True)])
def test_with_a_scaler_is_as_without(name: str, fused: bool):
    """Parameters, buffers, state and report: the scale is a power of two, so little is rounded otherwise."""
    models = [feature_net(), feature_net()]
    optimizers = [GradMatch(Adam(m.parameters(), lr=0.02, fused=fused), METHODS[name](m)) for m in models]
    for optimizer in optimizers:
        if hasattr(optimizer.method, "track_alignment"):
            optimizer.method.track_alignment = True
    scaler, rtol = make_scaler(growth_interval=2), 1e-4 if "finite" in name else 1e-9
    for seed in range(4):
        data = batches(3, seed)
        reports = [
            o.meta_step(partial(loss_of, m), data, s)
            for o, m, s in zip(optimizers, models, (scaler, None), strict=True)
        ]
        assert_same_model(models[0], models[1], rtol=rtol)
        for key, value in vars(reports[1]).items():
            torch.testing.assert_close(getattr(reports[0], key), value, rtol=rtol, atol=rtol)
    growth = 2 ** (6 if name in ("Fish", "Fish, reset") else 2)  # 12 and 4 updates, growing every second
    assert scaler.get_scale() == SCALE * growth


@pytest.mark.parametrize("name", [n for n in METHODS if n != "GroupDRO"])  # whose weights go by losses: finite here
def test_a_meta_iteration_that_overflows_is_skipped_and_forgotten(name: str):
    """As with the scale too large: nothing moves, nothing fails, nothing is remembered, and the scale comes down."""
    model, scaler = feature_net(), make_scaler()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.01), METHODS[name](model))

    def meta_step(factor: float) -> Any:
        def loss_fn(batch: Any) -> Tensor:
            x, y, domain = batch
            out = model(x, domain)
            out.register_hook(lambda gradient: gradient * factor)
            return (out - y).square().mean()

        assert optimizer.meta_step(loss_fn, batches(3), scaler).losses.shape == (3,)
        assert optimizer.inner_step == 0
        return copy.deepcopy((dict(model.named_parameters()), optimizer.state_dict()["gradmatch"].get("memory")))

    assert_identical(meta_step(float("inf"))[0], dict(feature_net().named_parameters()))  # before any gamma is found
    before = meta_step(1.0)
    assert_identical(meta_step(float("inf")), before)
    assert scaler.get_scale() < SCALE
    assert not torch.equal(meta_step(1.0)[0]["out.weight"], before[0]["out.weight"])
    assert bool(model.out.weight.isfinite().all())


def test_what_is_no_scaler_is_refused_and_a_disabled_one_does_nothing():
    models = [feature_net(), feature_net()]
    for model, scaler in zip(models, (None, make_scaler(enabled=False)), strict=True):
        optimizer = GradMatch(SGD(model.parameters(), lr=0.1))
        optimizer.meta_step(partial(loss_of, model), batches(3), scaler)
    assert_identical(models[0].state_dict(), models[1].state_dict())
    with pytest.raises(TypeError, match=r"scaler should be None or a torch.amp.GradScaler \(got float\)"):
        optimizer.meta_step(partial(loss_of, model), batches(2), SCALE)  # type: ignore[arg-type]
