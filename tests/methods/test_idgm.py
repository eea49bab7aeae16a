"""IDGM through ``meta_step``: the theorem that ties it to Fish, divergence, errors, checkpoints."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from _layout import numbers_of, with_numbers
from _models import FeatureNet, assert_identical, assert_same_model, loss_of, make_batches
from _reference import mean_pairwise_cosine, mean_pairwise_inner_product, naive_idgm
from test_fish import expected_fish_direction, quartic_losses
from torch import Tensor, nn

from torch_gradmatch import IDGM, DomainBatchSampler, Fish, GradMatch, SmoothFish, fish_gamma, meta_batches


def expected_idgm_direction(losses: list[Any], theta: Tensor, gamma: float) -> Tensor:
    """What a step of SGD with IDGM takes off the parameters, through the public API."""
    model = nn.Module()
    model.register_parameter("theta", nn.Parameter(theta.clone()))
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=1.0), IDGM(model, gamma))
    optimizer.meta_step(lambda loss: loss(model.theta), losses)
    return theta - model.theta.detach()


@pytest.mark.parametrize("domains", [2, 3, 4])
@pytest.mark.parametrize("seed", range(2))
def test_fish_is_idgm_with_fish_gamma_to_second_order(seed: int, domains: int):
    """Mean over all orders of (theta - theta~)/(alpha S) against IDGM's direction: halve alpha, quarter the error."""
    generator = torch.Generator().manual_seed(seed)
    losses = quartic_losses(generator, domains=domains, size=5, scale=0.4)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)
    errors = []
    for halvings in range(3, 7):  # down to 1/64
        alpha = 0.5**halvings
        exact = expected_idgm_direction(losses, theta, fish_gamma(alpha, domains))
        errors.append(float((expected_fish_direction(losses, theta, alpha) - exact).norm()))
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert all(3.7 <= ratio <= 4.3 for ratio in ratios), ratios


def errors_of_two_groups(order: str, seed: int, domains: int, wrong: float = 1.0) -> tuple[list[float], list[float]]:
    """Errors of one walk of Fish, and of the mean of two, against IDGM, while alpha is halved; over its term's size.

    Two groups of a ``DomainBatchSampler`` over domains of one batch each, both from the same parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    features = 0.4 * torch.randn(domains * 6, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(domains * 6, generator=generator, dtype=torch.float64)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(features, targets)
    sampler = DomainBatchSampler([i // 6 for i in range(len(data))], batch_size=6, order=order, seed=seed)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler)
    groups = [group for _ in range(2) for group in meta_batches(loader, domains)]
    model = nn.Module()
    model.register_parameter("theta", nn.Parameter(theta.clone()))

    def loss_fn(batch: Any) -> Tensor:
        return (torch.tanh(batch[0] @ model.theta) - batch[1]).square().mean()

    def displacement(optimizer: GradMatch, batches: Any) -> Tensor:
        optimizer.meta_step(loss_fn, batches)
        moved = theta - model.theta.detach()
        with torch.no_grad():
            model.theta.copy_(theta)
        return moved

    def of_idgm(gamma: float) -> Tensor:
        return displacement(GradMatch(torch.optim.SGD(model.parameters(), lr=1.0), IDGM(model, gamma)), groups[0])

    single, mean = [], []
    for halvings in range(5, 9):
        alpha = 0.5**halvings
        fish = GradMatch(torch.optim.SGD(model.parameters(), lr=alpha), Fish(meta_lr=1.0))
        walks = [displacement(fish, group) / (alpha * domains) for group in groups]
        exact = of_idgm(wrong * fish_gamma(alpha, domains))
        size = float((exact - of_idgm(0.0)).norm()) / alpha
        single.append(float((walks[0] - exact).norm()) / size)
        mean.append(float((sum(walks) / 2 - exact).norm()) / size)
    return single, mean


@pytest.mark.parametrize("domains", [2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_a_walk_and_its_reverse_follow_the_exact_direction(seed: int, domains: int):
    """One pair of groups in flip-flop order: halve alpha, quarter the error; that of one walk only halves."""
    single, mean = errors_of_two_groups("flipflop", seed, domains)
    assert all(3.7 <= coarse / fine <= 4.4 for coarse, fine in itertools.pairwise(mean)), mean
    assert all(1.8 <= coarse / fine <= 2.2 for coarse, fine in itertools.pairwise(single)), single
    assert mean[-1] < 0.1 * single[-1]


@pytest.mark.parametrize(("order", "wrong"), [("random", 1.0), ("flipflop", 0.5), ("flipflop", 2.0)])
def test_two_walks_in_random_order_do_not_nor_with_another_gamma(order: str, wrong: float):
    """So the test above can fail."""
    mean = errors_of_two_groups(order, seed=0, domains=5, wrong=wrong)[1]
    assert mean[-2] / mean[-1] == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("wrong", [0.5, 2.0, -1.0], ids=["half", "double", "opposite"])
def test_with_another_gamma_the_theorem_fails(wrong: float):
    """So the test above can fail: the error is then of first order and only halves."""
    generator = torch.Generator().manual_seed(0)
    losses = quartic_losses(generator, domains=3, size=5)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)
    errors = []
    for alpha in (1 / 256, 1 / 512):
        ordinary = expected_idgm_direction(losses, theta, 0.0)
        exact = ordinary + wrong * (expected_idgm_direction(losses, theta, fish_gamma(alpha, 3)) - ordinary)
        errors.append(float((expected_fish_direction(losses, theta, alpha) - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("agreement", ["inner_product", "variance", "cosine"])
def test_adam_on_the_exact_objective(agreement: str):
    """Parameters, buffers and the optimizer's state over four meta-iterations, on the network with every feature."""
    model = FeatureNet(torch.Generator().manual_seed(0))
    oracle = copy.deepcopy(model)
    optimizer = GradMatch(
        torch.optim.AdamW(model.parameters(), lr=0.05), IDGM(model, 0.2, agreement, track_alignment=True)
    )
    plain = torch.optim.AdamW(oracle.parameters(), lr=0.05)
    wanted = [p for p in oracle.parameters() if p.requires_grad]
    batches = make_batches(torch.Generator().manual_seed(1), 12)
    for start in range(0, 12, 3):
        group = batches[start : start + 3]
        report = optimizer.meta_step(lambda b: loss_of(model, b), group)
        reference = copy.deepcopy(oracle)  # for what the report says
        parameters = [p for p in reference.parameters() if p.requires_grad]
        losses = [loss_of(reference, b) for b in group]
        gradients = []
        for loss in losses:
            parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            gradients.append(torch.cat([g.reshape(-1) for g in parts]))
        torch.testing.assert_close(report.losses, torch.stack(losses).detach())
        torch.testing.assert_close(report.inner_product, mean_pairwise_inner_product(gradients))
        torch.testing.assert_close(report.cosine, mean_pairwise_cosine(gradients))
        torch.testing.assert_close(report.grad_norms, torch.stack([g.norm() for g in gradients]))
        assert optimizer.last_meta_step is report

        _, direction = naive_idgm(wanted, [lambda b=b: loss_of(oracle, b) for b in group], 0.2, agreement)
        for p, g in zip(wanted, direction, strict=True):
            p.grad = None if p is oracle.unused else g
        plain.step()
        assert_same_model(model, oracle, rtol=1e-8)
    assert model.unused.grad is None  # so AdamW's weight decay left it, as in ordinary training
    assert bool((model.unused == 1).all())
    assert model.frozen.weight.grad is None


@pytest.mark.parametrize(
    "make", [lambda m: IDGM(m, 0.1), lambda m: SmoothFish(2.0, 0.01, m)], ids=["IDGM", "SmoothFish"]
)
def test_gamma_may_change_and_zero_is_ordinary_training(make: Any):
    model = FeatureNet(torch.Generator().manual_seed(0))
    plain = copy.deepcopy(model)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), make(model))
    optimizer.method.gamma = 0.0
    batches = make_batches(torch.Generator().manual_seed(1), 3)
    optimizer.meta_step(lambda b: loss_of(model, b), batches)
    ordinary = torch.optim.SGD(plain.parameters(), lr=0.1)
    torch.stack([loss_of(plain, b) for b in batches]).mean().backward()
    ordinary.step()
    assert_same_model(model, plain, rtol=1e-13)
    with pytest.raises(ValueError, match=r"gamma .*got -1.0"):
        optimizer.method.gamma = -1.0
    assert optimizer.method.gamma == 0.0


# ------------------------------------------------------------------------------------------------------ divergence


def bowl(gamma: float, lr: float = 0.1, **settings: Any) -> tuple[nn.Module, GradMatch, Any, list[float]]:
    """L_i = (w - t_i)^2 / 2 for t = 1, 3: unbounded below if gamma > 1/2, since GIP = (w - 1)(w - 3)."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=lr), IDGM(model, gamma, **settings))
    return model, optimizer, lambda t: (model.weight.squeeze() - t).square() / 2, [1.0, 3.0]


def test_an_exploding_inner_product_is_an_error_before_anything_changes():
    model, optimizer, loss_fn, targets = bowl(gamma=20.0)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    message = r"IDGM diverges: .*gamma=20.0.*agreement='variance', which is bounded"
    with pytest.raises(RuntimeError, match=message) as error:
        optimizer.meta_step(loss_fn, targets)
    assert_identical((model.state_dict(), optimizer.state_dict()), before)
    assert model.weight.grad is None
    assert "go back to a checkpoint" not in str(error.value)  # it was the first meta-iteration
    optimizer.method.gamma = 0.1
    optimizer.meta_step(loss_fn, targets)


def test_an_explosion_on_the_way_says_to_go_back():
    """It starts harmless: at w = 2 the domains' gradients are opposed, and grows from there without end."""
    model, optimizer, loss_fn, targets = bowl(gamma=8.0)
    with torch.no_grad():
        model.weight.fill_(2.1)

    def train() -> None:
        for _ in range(100):
            optimizer.meta_step(loss_fn, targets)

    with pytest.raises(RuntimeError, match="earlier meta-iterations have led here, so go back to a checkpoint"):
        train()
    assert bool(torch.isfinite(model.weight).all())


def test_the_bounded_agreements_are_not_suspected():
    for agreement in ("variance", "cosine"):
        model, optimizer, loss_fn, targets = bowl(gamma=1e6, lr=1e-9, agreement=agreement)
        optimizer.meta_step(loss_fn, targets)
        assert bool(torch.isfinite(model.weight).all())


def test_a_stable_gamma_is_not_suspected():
    """gamma = 0.4: bounded below, minimum of the mean loss kept, ratio of the matching term to the loss below one."""
    model, optimizer, loss_fn, targets = bowl(gamma=0.4, lr=0.5)
    for _ in range(120):
        optimizer.meta_step(loss_fn, targets)
    assert model.weight.item() == pytest.approx(2.0, abs=1e-4)


def test_nonfinite_gradients_are_an_error_that_names_gamma_and_variance():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), IDGM(model, 1.0))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"IDGM diverged.*gamma=1.0.*agreement='variance'"):
        optimizer.meta_step(lambda t: model.weight.abs().sqrt().sum() + t, [torch.ones(1), torch.ones(1)])
    assert_identical(model.state_dict(), before)
    assert model.weight.grad is None


def test_the_check_can_be_turned_off():
    model, optimizer, loss_fn, targets = bowl(gamma=20.0, nonfinite="ignore")
    for _ in range(80):
        optimizer.meta_step(loss_fn, targets)
    assert not bool(torch.isfinite(model.weight).all())


# --------------------------------------------------------------------------------------------------- the other calls


def test_a_closure_that_lbfgs_calls_again():
    """Against LBFGS on the exact objective written by hand; buffers move once for each domain."""
    model = FeatureNet(torch.Generator().manual_seed(0))
    oracle = copy.deepcopy(model)
    settings: dict[str, Any] = {"lr": 0.1, "max_iter": 4, "line_search_fn": "strong_wolfe"}
    optimizer = GradMatch(torch.optim.LBFGS(model.parameters(), **settings), IDGM(model, 0.2, "variance"))
    plain = torch.optim.LBFGS(oracle.parameters(), **settings)
    wanted = [p for p in oracle.parameters() if p.requires_grad]
    batches = make_batches(torch.Generator().manual_seed(1), 3)
    buffers_after: dict[str, Tensor] = {}

    def closure() -> Tensor:
        objective, direction = naive_idgm(wanted, [lambda b=b: loss_of(oracle, b) for b in batches], 0.2, "variance")
        for p, g in zip(wanted, direction, strict=True):
            p.grad = g
        if not buffers_after:
            buffers_after.update({n: b.clone() for n, b in oracle.named_buffers()})
        return objective

    optimizer.meta_step(lambda b: loss_of(model, b), batches)
    plain.step(closure)
    for name, buffer in oracle.named_buffers():
        buffer.copy_(buffers_after[name])
    assert_same_model(model, oracle, rtol=1e-8)


def test_evaluations_of_one_step_draw_the_same_random_numbers():
    """LBFGS on a network with dropout: a deterministic objective, and afterwards the generator has moved once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    batches = [torch.randn(6, 4, dtype=torch.float64) + i for i in range(3)]
    seen = []

    def loss_fn(x: Tensor) -> Tensor:
        seen.append(torch.rand(()).item())
        return (model(x) - 1).square().mean()

    settings: dict[str, Any] = {"lr": 0.5, "max_iter": 5, "line_search_fn": "strong_wolfe"}
    for method in (IDGM(model, 0.1, "variance"), SmoothFish(1.0, 0.01, model)):
        optimizer = GradMatch(torch.optim.LBFGS(model.parameters(), **settings), method)
        seen.clear()
        torch.manual_seed(1)
        optimizer.meta_step(loss_fn, batches)
        next_number = torch.rand(())
        assert len(seen) > 10
        assert len(set(seen)) == 3  # one for each domain
        torch.manual_seed(1)
        for x in batches:
            loss_fn(x)
        assert torch.equal(torch.rand(()), next_number)


def test_checkpoint_goes_on_bit_for_bit(tmp_path: Any):
    batches = make_batches(torch.Generator().manual_seed(1), 12)

    def build() -> tuple[nn.Module, GradMatch]:
        model = FeatureNet(torch.Generator().manual_seed(0))
        return model, GradMatch(torch.optim.Adam(model.parameters()), IDGM(model, 0.2, hvp_domains=1))

    def train(model: nn.Module, optimizer: GradMatch, groups: range) -> None:
        for i in groups:
            optimizer.meta_step(lambda b: loss_of(model, b), batches[3 * i : 3 * i + 3])

    torch.manual_seed(0)
    model, optimizer = build()
    train(model, optimizer, range(2))
    saved = {"m": model.state_dict(), "o": optimizer.state_dict(), "r": torch.get_rng_state()}
    torch.save(saved, tmp_path / "c.pt")
    train(model, optimizer, range(2, 4))
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed, again = build()
    resumed.load_state_dict(loaded["m"])
    again.load_state_dict(loaded["o"])
    torch.set_rng_state(loaded["r"])
    train(resumed, again, range(2, 4))
    assert_identical(resumed.state_dict(), model.state_dict())
    assert_identical(again.state_dict(), optimizer.state_dict())


def test_malformed_state_dicts_are_refused():
    model = FeatureNet(torch.Generator().manual_seed(0))
    optimizer = GradMatch(torch.optim.Adam(model.parameters()), IDGM(model, 0.2))
    state = optimizer.state_dict()
    for bad in ("1.0", 1, ()):
        spoilt = with_numbers(state, {**numbers_of(state), "first_loss": bad})
        with pytest.raises(ValueError, match="'first_loss' is missing or malformed"):
            optimizer.load_state_dict(spoilt)


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -1.0}, r"gamma should be a finite number of at least 0 \(got -1.0\)"),
        ({"gamma": float("inf")}, "gamma .*got inf"),
        ({"gamma": 1.0, "agreement": "mean"}, "agreement should be one of .*got 'mean'"),
        ({"gamma": 1.0, "agreement": None}, "agreement should be one of .*got None"),
        ({"gamma": 1.0, "hvp": "double"}, "hvp should be one of .*got 'double'"),
        ({"gamma": 1.0, "hvp_domains": 0}, "hvp_domains .*got 0"),
        ({"gamma": 1.0, "hvp_domains": 1.5}, "hvp_domains .*got 1.5"),
        ({"gamma": 1.0, "keep_graphs": 1}, "keep_graphs should be True or False .got 1."),
        ({"gamma": 1.0, "nonfinite": "warn"}, "nonfinite should be one of .*got 'warn'"),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_bad_settings(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        IDGM(nn.Linear(1, 1), **settings)


def test_bad_models():
    with pytest.raises(TypeError, match=r"model should be a torch\.nn\.Module \(got list\)"):
        IDGM([nn.Linear(1, 1)], 1.0)  # type: ignore[arg-type]
    inside, outside = nn.Linear(1, 1), nn.Linear(2, 1)
    parameters = [*inside.parameters(), *outside.parameters()]
    with pytest.raises(
        ValueError, match=r"parameter number 2 of the optimizer, of shape \(1, 2\), is not in the model Linear"
    ):
        GradMatch(torch.optim.SGD(parameters, lr=0.1), IDGM(inside, 1.0))
    frozen = nn.Linear(1, 1).requires_grad_(False)
    optimizer = GradMatch(torch.optim.SGD(frozen.parameters(), lr=0.1), IDGM(frozen, 1.0))
    with pytest.raises(ValueError, match="no parameter of the optimizer requires a gradient"):
        optimizer.meta_step(lambda x: frozen(x).sum(), [torch.ones(1, 1)] * 2)


def test_parameters_added_later():
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    optimizer = GradMatch(torch.optim.SGD(model[0].parameters(), lr=0.1), IDGM(model, 0.1))
    before = model[1].weight.detach().clone()

    def loss_fn(x: Tensor) -> Tensor:
        return model[1](model[0](x)).square().sum()

    optimizer.meta_step(loss_fn, [torch.ones(1, 1), torch.ones(2, 1)])
    assert torch.equal(model[1].weight, before)
    assert model[1].weight.grad is None
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.meta_step(loss_fn, [torch.ones(1, 1), torch.ones(2, 1)])
    assert not torch.equal(model[1].weight, before)


def test_representation():
    text = repr(IDGM(nn.Linear(1, 1), 0.5, "variance"))
    assert text.startswith("IDGM(Linear, gamma=0.5, agreement='variance', hvp='reverse'")
