"""IDGM through ``meta_step``: the theorem that ties it to Fish, strength, line searches, errors."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net
from _models import FeatureNet, assert_same_model, loss_of
from _reference import naive_idgm
from torch import Tensor, nn
from torch.optim import LBFGS, SGD

from torch_gradmatch import IDGM, DomainBatchSampler, Fish, GradMatch, SmoothFish, fish_gamma, meta_batches


def quartic(seed: int, domains: int, size: int = 5, scale: float = 0.4) -> tuple[list[Any], Tensor]:
    """Smooth losses with third derivatives, each with its own data, and a point. Curvature grows with scale squared."""
    generator = torch.Generator().manual_seed(seed)
    data = [scale * torch.randn(6, size, generator=generator, dtype=torch.float64) for _ in range(domains)]
    targets = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(domains)]
    losses = [
        lambda theta, x=x, y=y: (torch.tanh(x @ theta) - y).square().mean() for x, y in zip(data, targets, strict=True)
    ]
    return losses, torch.randn(size, generator=generator, dtype=torch.float64)


def displacement(losses: Any, theta: Tensor, method: Any, lr: float = 1.0) -> Tensor:
    """What one meta-iteration over SGD takes off the parameters, through the public API."""
    model = nn.ParameterDict({"theta": theta.clone()})
    optimizer = GradMatch(SGD(model.parameters(), lr=lr), method(model))
    optimizer.meta_step(lambda loss: loss(model["theta"]), losses)
    return theta - model["theta"].detach()


def exact_direction(losses: Any, theta: Tensor, gamma: float) -> Tensor:
    return displacement(losses, theta, lambda model: IDGM(model, gamma, "inner_product"))


def fish_direction(losses: Any, theta: Tensor, alpha: float) -> Tensor:
    """(theta - theta~) / (alpha S)."""
    return displacement(losses, theta, lambda _: Fish(meta_lr=1.0), lr=alpha) / (alpha * len(losses))


def mean_fish_direction(losses: Any, theta: Tensor, alpha: float) -> Tensor:
    """Averaged over all orders of the domains."""
    return torch.stack([fish_direction(order, theta, alpha) for order in itertools.permutations(losses)]).mean(dim=0)


def ratios(errors: list[float]) -> list[float]:
    return [coarse / fine for coarse, fine in itertools.pairwise(errors)]


@pytest.mark.parametrize("domains", [2, 3, 4])
def test_fish_is_idgm_with_fish_gamma_to_second_order(domains: int):
    """Mean over all orders of (theta - theta~)/(alpha S) against IDGM's direction: halve alpha, quarter the error."""
    losses, theta = quartic(domains, domains)
    errors = []
    for alpha in (1 / 8, 1 / 16, 1 / 32, 1 / 64):
        exact = exact_direction(losses, theta, fish_gamma(alpha, domains))
        errors.append(float((mean_fish_direction(losses, theta, alpha) - exact).norm()))
    assert all(3.7 <= ratio <= 4.3 for ratio in ratios(errors)), errors


@pytest.mark.parametrize("wrong", [2.0, -1.0], ids=["double", "opposite"])
def test_with_another_gamma_the_theorem_fails(wrong: float):
    """So the test above can fail: the error is then of first order and only halves."""
    losses, theta = quartic(0, domains=3, scale=1.0)
    ordinary, errors = exact_direction(losses, theta, 0.0), []
    for alpha in (1 / 256, 1 / 512):
        exact = ordinary + wrong * (exact_direction(losses, theta, fish_gamma(alpha, 3)) - ordinary)
        errors.append(float((mean_fish_direction(losses, theta, alpha) - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


def errors_of_two_groups(order: Any, seed: int, domains: int, wrong: float = 1.0) -> tuple[list[float], list[float]]:
    """Errors of one walk of Fish, and of the mean of two, against IDGM, while alpha is halved; over its term's size.

    Two groups of a ``DomainBatchSampler`` over domains of one batch each, both from the same parameters.
    """
    losses, theta = quartic(seed, domains)
    sampler = DomainBatchSampler(range(domains), batch_size=1, order=order, seed=seed)
    groups = [[losses[domain] for (domain,) in group] for _ in range(2) for group in meta_batches(sampler, domains)]
    single, mean = [], []
    for halvings in range(5, 9):
        alpha = 0.5**halvings
        walks = [fish_direction(group, theta, alpha) for group in groups]
        exact = exact_direction(losses, theta, wrong * fish_gamma(alpha, domains))
        size = float((exact - exact_direction(losses, theta, 0.0)).norm()) / alpha
        single.append(float((walks[0] - exact).norm()) / size)
        mean.append(float((sum(walks) / 2 - exact).norm()) / size)
    return single, mean


@pytest.mark.parametrize("domains", [2, 3, 8])
def test_a_walk_and_its_reverse_follow_the_exact_direction(domains: int):
    """One pair of groups in flip-flop order: halve alpha, quarter the error; that of one walk only halves."""
    single, mean = errors_of_two_groups("flipflop", domains % 3, domains)
    assert all(3.7 <= ratio <= 4.4 for ratio in ratios(mean)), mean
    assert all(1.8 <= ratio <= 2.2 for ratio in ratios(single)), single
    assert mean[-1] < 0.1 * single[-1]


@pytest.mark.parametrize(("order", "wrong"), [("random", 1.0), ("flipflop", 2.0)])
def test_two_walks_in_random_order_do_not_nor_with_another_gamma(order: str, wrong: float):
    """So the test above can fail."""
    mean = errors_of_two_groups(order, seed=0, domains=5, wrong=wrong)[1]
    assert mean[-2] / mean[-1] == pytest.approx(2.0, abs=0.2)


def features() -> FeatureNet:
    return feature_net().eval()  # the same function wherever it is called


def wrap(model: nn.Module, *, lr: float = 0.0, **settings: Any) -> GradMatch[IDGM]:
    return GradMatch(SGD(model.parameters(), lr=lr), IDGM(model, **settings))


@pytest.mark.parametrize("scaled", [False, True], ids=["no scaler", "GradScaler"])
@pytest.mark.parametrize("agreement", [None, "inner_product", "cosine"])
def test_by_default_matching_is_at_first_a_tenth_as_long_as_the_mean_gradient(agreement: str | None, scaled: bool):
    model, data = features(), batches(3)
    optimizer = wrap(model, **({"agreement": agreement} if agreement else {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
    report = optimizer.meta_step(partial(loss_of, model), data, scaler)
    assert report.scalars("train/")["train/gamma"] == report.gamma > 0

    reached = [p for p in model.parameters() if p.grad is not None]
    found = torch.cat([p.grad.reshape(-1) for p in reached])
    losses = [partial(loss_of, model, batch) for batch in data]
    mean, expected = (
        torch.cat([g.reshape(-1) for g in naive_idgm(reached, losses, gamma, agreement or "variance")[1]])
        for gamma in (0.0, report.gamma)
    )
    assert float((found - mean).norm() / mean.norm()) == pytest.approx(0.1, rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_gamma_is_kept_until_a_new_strength_finds_another_and_a_given_one_is_used():
    model = features()
    optimizer = wrap(model)

    def used(data: Any = None, **settings: Any) -> Any:
        for name, value in settings.items():
            setattr(optimizer.method, name, value)
        return optimizer.meta_step(partial(loss_of, model), data or batches(3)).gamma

    found = used()
    others = batches(3, seed=2)  # which want another one
    assert used(others) == found == copy.deepcopy(optimizer).last_meta_step.gamma
    assert wrap(model).meta_step(partial(loss_of, model), others).gamma != pytest.approx(found, rel=1e-2)
    assert used(strength=0.5) == pytest.approx(5 * found)
    assert used(gamma=0.25) == 0.25
    assert used(gamma=None) == pytest.approx(5 * found)


def test_a_meta_iteration_that_has_nothing_to_match_finds_no_gamma():
    model = features()
    optimizer = wrap(model)
    assert optimizer.meta_step(lambda b: model.out.weight.square().sum(), batches(3)).gamma == 0.0
    found = optimizer.meta_step(partial(loss_of, model), batches(3)).gamma
    assert found == wrap(model).meta_step(partial(loss_of, model), batches(3)).gamma > 0


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("memory", bad) for bad in ("1.0", 1, (), {"first": "1.0"}, None)),
        *(("number", bad) for bad in (0.5, -1, None)),
    ],
    ids=repr,
)
def test_malformed_state_dicts_are_refused(name: str, bad: Any):
    optimizer = wrap(features())
    state = optimizer.state_dict()
    ours = {**state["gradmatch"], name: bad}
    with pytest.raises(ValueError, match=f"the state dict's '{name}' is missing or malformed"):
        optimizer.load_state_dict({**state, "gradmatch": {key: v for key, v in ours.items() if v is not None}})


WOLFE: dict[str, Any] = {"line_search_fn": "strong_wolfe"}


def test_a_closure_that_lbfgs_calls_again():
    """Against LBFGS on the exact objective written by hand; buffers move once for each domain."""
    model, data = feature_net(), batches(3)
    oracle = copy.deepcopy(model)
    optimizer = GradMatch(LBFGS(model.parameters(), lr=0.1, max_iter=4, **WOLFE), IDGM(model, 0.2, "variance"))
    plain = LBFGS(oracle.parameters(), lr=0.1, max_iter=4, **WOLFE)
    wanted = [p for p in oracle.parameters() if p.requires_grad]
    buffers_after: dict[str, Tensor] = {}

    def closure() -> Tensor:
        objective, direction = naive_idgm(wanted, [partial(loss_of, oracle, b) for b in data], 0.2, "variance")
        for p, g in zip(wanted, direction, strict=True):
            p.grad = g
        if not buffers_after:
            buffers_after.update({n: b.clone() for n, b in oracle.named_buffers()})
        return objective

    optimizer.meta_step(partial(loss_of, model), data)
    plain.step(closure)
    for name, buffer in oracle.named_buffers():
        buffer.copy_(buffers_after[name])
    assert_same_model(model, oracle, rtol=1e-8)


@pytest.mark.parametrize("method", ["IDGM", "SmoothFish"])
def test_evaluations_of_one_step_draw_the_same_random_numbers(method: str):
    """LBFGS on a network with dropout: a deterministic objective, and afterwards the generator has moved once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    data = [torch.randn(6, 4, dtype=torch.float64) + i for i in range(3)]
    settings = IDGM(model, 0.1, "variance") if method == "IDGM" else SmoothFish(1.0, 0.01, model)
    optimizer, seen = GradMatch(LBFGS(model.parameters(), lr=0.5, max_iter=5, **WOLFE), settings), []

    def loss_fn(x: Tensor) -> Tensor:
        seen.append(torch.rand(()).item())
        return (model(x) - 1).square().mean()

    torch.manual_seed(1)
    optimizer.meta_step(loss_fn, data)
    next_number = torch.rand(())
    assert len(seen) > 10
    assert len(set(seen)) == 3  # one for each domain
    torch.manual_seed(1)
    for x in data:
        loss_fn(x)
    assert torch.equal(torch.rand(()), next_number)


def test_bad_models():
    with pytest.raises(TypeError, match=r"model should be a torch\.nn\.Module.* \(got list\)"):
        IDGM([nn.Linear(1, 1)])  # type: ignore[arg-type]
    inside, outside = nn.Linear(1, 1), nn.Linear(2, 1)
    message = r"parameter number 2 of the optimizer, of shape \(1, 2\), is not in the model Linear"
    with pytest.raises(ValueError, match=message):
        GradMatch(SGD([*inside.parameters(), *outside.parameters()], lr=0.1), IDGM(inside))
    frozen = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the optimizer requires a gradient"):
        wrap(frozen).meta_step(lambda x: frozen(x).sum(), [torch.ones(1, 1)] * 2)
