"""Loss scaling: a skipped step is a visited domain, and meta_step with a GradScaler is meta_step without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net
from _models import assert_identical, assert_same_model, loss_of
from _second_order import MORE_METHODS
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish, agreement

SCALE = 2.0**10


def make_scaler(**settings: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=SCALE, **settings)


# --------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("unscale", ["by step", "before, to clip"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_skipped_step_moves_nothing_and_counts(fused: bool, unscale: str):
    """Four domains in each group of the sampler, one of which overflows: the groups stay the inner loops."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    reference = nn.Parameter(parameter.detach().clone())
    optimizer = GradMatch(Adam([parameter], lr=0.1, fused=fused), Fish(0.5, inner_steps=4))
    plain, scaler = Adam([reference], lr=0.1), make_scaler()
    for group in range(3):
        slow = reference.detach().clone()
        for domain in range(4):
            overflows = domain == group
            optimizer.zero_grad()
            scaler.scale((parameter * (float("inf") if overflows else domain + 1.0)).square().sum()).backward()
            if unscale != "by step":
                scaler.unscale_(optimizer)
            before = parameter.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert optimizer.inner_step == (domain + 1) % 4
            if overflows:
                assert torch.equal(parameter, before)
                continue
            plain.zero_grad()
            (reference * (domain + 1.0)).square().sum().backward()
            plain.step()
        with torch.no_grad():
            reference.copy_(slow + 0.5 * (reference - slow))
        torch.testing.assert_close(parameter, reference)
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer.optimizer, "found_inf")


@pytest.mark.parametrize("method", [lambda m: SmoothFish(1.0, 0.1, m), lambda m: IDGM(m, 0.1)])
def test_ordinary_steps_under_the_other_methods_are_the_wrapped_optimizers(method: Any):
    model, other = feature_net(), feature_net()
    wrapped = GradMatch(SGD(model.parameters(), lr=0.1), method(model))
    pairs = [(model, wrapped, make_scaler()), (other, SGD(other.parameters(), lr=0.1), make_scaler())]
    for m, optimizer, scaler in pairs:
        for batch in batches(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(m, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_identical(model.state_dict(), other.state_dict())


def test_tracking_measures_unscaled_gradients_and_a_skipped_step_ends_it():
    parameter = nn.Parameter(torch.tensor([3.0, 0.0]))
    optimizer = GradMatch(SGD([parameter], lr=0.0), Fish(0.5, inner_steps=2, track_alignment=True))
    scaler = make_scaler()
    for overflow in (1.0, float("inf")):
        for slope in (torch.tensor([3.0, 0.0]), torch.tensor([1.0, overflow])):
            optimizer.zero_grad()
            scaler.scale((parameter * slope).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        report = optimizer.last_meta_step
        assert report is not None
        if overflow == 1.0:
            torch.testing.assert_close(report.inner_product, torch.tensor(3.0))
            torch.testing.assert_close(report.grad_norms, torch.tensor([3.0, 2.0**0.5]))
        else:
            assert report.inner_product is None  # one gradient for two steps


def test_a_diverged_loop_leaves_no_scale_behind():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(SGD([parameter], lr=float("inf")), Fish(0.5, inner_steps=1))
    scaler = make_scaler()
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(RuntimeError, match="diverged"):
        scaler.step(optimizer)
    optimizer.rollback()
    optimizer.param_groups[0]["lr"] = 0.5
    parameter.grad = torch.ones(2)
    optimizer.step()  # without the scaler: nothing to unscale
    assert parameter.tolist() == [0.75, 0.75]


def test_half_precision_gradients_are_refused_as_torch_does():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer, scaler = GradMatch(SGD([parameter], lr=0.1)), make_scaler()
    scaler.scale(parameter.float().sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(optimizer)
    assert parameter.tolist() == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------------- in meta_step


def layerwise(gradients: Any) -> Tensor:
    return torch.stack([agreement.inner_product([g[n] for g in gradients]).tanh() for n in gradients[0]]).sum()


METHODS: dict[str, Any] = {
    "Fish": lambda m: Fish(0.5, model=m, track_alignment=True),
    "Fish, reset": lambda m: Fish(0.5, model=m, inner_state="reset"),
    "SmoothFish": lambda m: SmoothFish(2.0, 0.1, m, track_alignment=True),
    "SmoothFish, walk": lambda m: SmoothFish(1.0, 0.1, m, track_alignment=True),
    "SmoothFish, symmetric": lambda m: SmoothFish(0.2, 0.1, m, track_alignment=True, symmetric=True),
    "IDGM": lambda m: IDGM(m, 0.2, "inner_product", track_alignment=True),
    "IDGM, found gamma": lambda m: IDGM(m),
    "IDGM, cosine": lambda m: IDGM(m, 0.2, "cosine"),
    "IDGM, one's own": lambda m: IDGM(m, 0.2, layerwise),
    "IDGM, forward": lambda m: IDGM(m, 0.2, "inner_product", hvp="forward"),
    "IDGM, finite_difference": lambda m: IDGM(m, 0.2, "inner_product", hvp="finite_difference"),
    **MORE_METHODS,
}


@pytest.mark.parametrize(("name", "fused"), [*((name, False) for name in METHODS), ("Fish", True), ("IDGM", True)])
def test_with_a_scaler_is_as_without(name: str, fused: bool):
    """Parameters, buffers, state and report: the scale is a power of two, so little is rounded otherwise."""
    models = [feature_net(), feature_net()]
    optimizers = [GradMatch(Adam(m.parameters(), lr=0.02, fused=fused), METHODS[name](m)) for m in models]
    scaler = make_scaler(growth_interval=2)
    for seed in range(4):
        data = batches(3, seed)
        reports = [
            o.meta_step(lambda b, m=m: loss_of(m, b), data, **({"scaler": scaler} if o is optimizers[0] else {}))
            for m, o in zip(models, optimizers, strict=True)
        ]
        rtol = 1e-4 if "finite" in name else 1e-9
        assert_same_model(models[0], models[1], rtol=rtol)
        for key, value in vars(reports[1]).items():
            torch.testing.assert_close(getattr(reports[0], key), value, rtol=rtol, atol=rtol)
    growth = 2 ** (6 if name in ("Fish", "Fish, reset") else 2)  # 12 and 4 updates, growing every second
    assert scaler.get_scale() == SCALE * growth


class HalfPrecision(torch.autograd.Function):
    """What a network in half precision does to large gradients."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.half().to(gradient.dtype)


@pytest.mark.parametrize("name", ["Fish", "SmoothFish", "SmoothFish, walk", "IDGM", "IDGM, found gamma"])
def test_a_skipped_step_leaves_the_meta_iteration_whole(name: str):
    """With the scale too large gradients overflow in fp16: nothing moves, nothing fails, and the scale comes down."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.01), METHODS[name](model))
    scaler = GradScaler("cpu", init_scale=2.0**24)
    start = model.weight.detach().clone()
    scales = []
    data = [torch.ones(1, 2), torch.tensor([[2.0, 1.0]])]
    for _ in range(24):
        before = model.weight.detach().clone()
        report = optimizer.meta_step(lambda x: HalfPrecision.apply(model(x)).square().sum(), data, scaler=scaler)
        scales.append(scaler.get_scale())
        assert report.losses is not None
        assert report.losses.shape == (2,)
        assert optimizer.inner_step == 0
        if len(scales) == 1 and name != "Fish":
            assert torch.equal(model.weight, before)
    assert scales[-1] < 2.0**24
    assert not torch.equal(model.weight, start)
    assert bool(model.weight.isfinite().all())


def test_what_is_no_scaler_is_refused():
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"scaler should be None or a torch.amp.GradScaler \(got float\)"):
        optimizer.meta_step(lambda b: loss_of(model, b), batches(2), scaler=SCALE)  # type: ignore[arg-type]


def test_a_disabled_scaler_does_nothing():
    models = [feature_net(), feature_net()]
    for model, settings in zip(models, ({}, {"scaler": GradScaler("cpu", enabled=False)}), strict=True):
        GradMatch(SGD(model.parameters(), lr=0.1)).meta_step(lambda b, m=model: loss_of(m, b), batches(3), **settings)
    assert_identical(models[0].state_dict(), models[1].state_dict())
