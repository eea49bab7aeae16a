"""``IDGM(matched=...)``: the gradients of some parameters agree, and the derivative goes through all: exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from _models import assert_identical
from _operations import Operations
from _ranks import on_ranks
from _spread import Collectives, error_of, full, world
from test_fishr import domains, loss_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from torch_gradmatch import IDGM, GradMatch
from torch_gradmatch.gradients.agreement import AGREEMENTS

DOMAINS = len(domains())
GAMMA = 0.3


def cubes(gradients: list[dict[str, Tensor]]) -> Tensor:
    """An agreement of the user's."""
    return -0.01 * sum((g**3).sum() for gradient in gradients for g in gradient.values())  # type: ignore[return-value]


class Network(nn.Module):
    """A body with BatchNorm or attention, run as asked, and a head of two layers."""

    def __init__(self, kind: str = "plain", *, layer_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        norm = nn.LayerNorm(8) if layer_norm else nn.BatchNorm1d(8)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 8), norm)
        self.attend = nn.Linear(8, 24)
        self.top = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.double()
        if kind == "frozen":
            self.body.requires_grad_(False)
        if kind == "low_rank":
            self.requires_grad_(False)
            self.head.requires_grad_(True)
            self.down, self.up = nn.Linear(8, 2, bias=False).double(), nn.Linear(2, 8, bias=False).double()

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def features(self, x: Tensor) -> Tensor:
        z = self.body(x)
        if self.kind == "attention":
            q, k, v = self.attend(z).unflatten(-1, (3, 1, 2, 4)).permute(1, 2, 3, 0, 4)  # the fused kernel takes four
            z = z + F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        if self.kind == "low_rank":
            z = z + self.up(self.down(z))
        return z

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "checkpointed":
            z = checkpoint(self.features, x.clone().requires_grad_(), use_reentrant=True)
        else:
            z = self.features(x)
        return self.head(F.gelu(self.top(z)))


MATCHED: dict[str, Callable[[Network], Any]] = {
    "head": lambda m: m.head,
    "last two": lambda m: [*m.top.parameters(), *m.head.parameters()],
    "middle": lambda m: m.body[2],
    "all": lambda m: m,
}


def by_autograd(model: Network, matched: Any = None, agreement: Any = "variance") -> tuple[Any, Any, Tensor]:
    """Mean gradient, dphi/dtheta and phi, by differentiating phi of the matched gradients as it stands."""
    matched = model.head if matched is None else matched
    chosen = list(matched.parameters()) if isinstance(matched, nn.Module) else list(matched)
    names = {id(p): name for name, p in model.named_parameters()}
    losses = [loss_of(model, batch) for batch in domains()]
    settings = {"allow_unused": True, "materialize_grads": True}
    by_domain = [torch.autograd.grad(loss, chosen, create_graph=True, **settings) for loss in losses]
    gradients = [dict(zip([names[id(p)] for p in chosen], gradient, strict=True)) for gradient in by_domain]
    phi = AGREEMENTS.get(agreement, agreement)(gradients)
    mean = torch.autograd.grad(torch.stack(losses).mean(), model.trained, retain_graph=True, **settings)
    return mean, torch.autograd.grad(phi, model.trained, **settings), phi.detach()


def direction(
    model: Any, loss: Any = None, batches: Any = None, meta_steps: int = 1, gamma: float | None = GAMMA, **settings: Any
) -> Any:
    """Gradients after some meta-steps that move nothing, and the last report."""
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = {"matched": getattr(model, "head", None)} | settings
    optimizer = GradMatch(SGD(trained, lr=0.0), IDGM(model, gamma, **settings))
    for _ in range(meta_steps):
        report = optimizer.meta_step(loss or partial(loss_of, model), batches or domains())
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in trained], report


def assert_direction(found: list[Tensor], mean: Any, term: Any, gamma: float = GAMMA) -> None:
    for g, m, t in zip(found, mean, term, strict=True):
        torch.testing.assert_close(g, m - gamma * t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("meta_steps", [1, 2])
@pytest.mark.parametrize("keep_graphs", [False, True])
@pytest.mark.parametrize("agreement", [*AGREEMENTS, cubes])
@pytest.mark.parametrize("matched", MATCHED)
def test_is_the_derivative_of_phi_through_all_parameters(
    matched: str, agreement: Any, keep_graphs: bool, meta_steps: int
):
    """The first meta-step compares with ``backward()`` and finds gamma; from the second on it is one pass."""
    reference = Network()
    mean, term, phi = by_autograd(reference, MATCHED[matched](reference), agreement)
    for gamma in (GAMMA, None):
        model = Network()
        settings = {"agreement": agreement, "matched": MATCHED[matched](model), "keep_graphs": keep_graphs}
        found, report = direction(model, meta_steps=meta_steps, gamma=gamma, **settings)
        if gamma is None:
            length, of_term = (sum(float(v.square().sum()) for v in part) ** 0.5 for part in (mean, term))
            assert report.gamma == pytest.approx(0.1 * length / of_term, rel=1e-9)
        assert_direction(found, mean, term, report.gamma)
        if agreement == "inner_product":
            assert report.inner_product.item() == pytest.approx(phi.item(), rel=1e-10)


@pytest.mark.parametrize("agreement", AGREEMENTS)
def test_gamma_is_found_where_the_gradient_of_the_body_is_longer_than_those_of_the_head(agreement: str):
    networks = [Network(), Network()]
    for network in networks:
        network.head.weight.data *= 10
    mean, term, _ = by_autograd(networks[0], agreement=agreement)
    found, report = direction(networks[1], gamma=None, agreement=agreement)
    length, of_term = (sum(float(v.square().sum()) for v in part) ** 0.5 for part in (mean, term))
    assert length > report.grad_norms.max()
    assert report.gamma == pytest.approx(0.1 * length / of_term, rel=1e-9)
    assert_direction(found, mean, term, report.gamma)


@pytest.mark.parametrize("agreement", AGREEMENTS)
def test_one_pass_and_its_reverse_are_exact(agreement: str):
    mean, term, _ = by_autograd(Network(), agreement=agreement)
    both = []
    for order in (domains(), domains()[::-1]):
        model, calls = Network(), list[Any]()
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        both.append(direction(model, batches=order, one_pass=True, agreement=agreement)[0])
        assert len(calls) == DOMAINS  # each is evaluated once
    assert_direction([(a + b) / 2 for a, b in zip(*both, strict=True)], mean, term)


def test_gamma_zero_is_ordinary_training_and_reports_the_matched_alone():
    mean = by_autograd(Network())[0]
    whole, part = (direction(Network(), gamma=0.0, matched=None), direction(Network(), gamma=0.0))
    for found, _ in (whole, part):
        assert_direction(found, mean, mean, 0.0)
    assert part[1].grad_norms.max() < whole[1].grad_norms.max()


def test_an_optimizer_may_train_a_part_without_the_matched():
    model, reference = Network("frozen"), Network("frozen")
    mean, term, _ = by_autograd(reference)
    optimizer = GradMatch(SGD(model.top.parameters(), lr=0.0), IDGM(model, GAMMA, matched=model.head))
    optimizer.meta_step(partial(loss_of, model), domains())
    assert model.head.weight.grad is None
    of_top = [any(p is q for q in reference.top.parameters()) for p in reference.trained]
    chosen = [[g for g, is_top in zip(part, of_top, strict=True) if is_top] for part in (mean, term)]
    assert_direction([p.grad for p in model.top.parameters()], *chosen)


def compiled(model: Network) -> Callable[[Any], Tensor]:
    body = torch.compile(model.features, backend="aot_eager")
    return lambda batch: F.cross_entropy(model.head(F.gelu(model.top(body(batch[0])))), batch[1])


@pytest.mark.parametrize("keep_graphs", [False, True])
@pytest.mark.parametrize("kind", ["attention", "checkpointed", "frozen", "low_rank", "compiled", "weight_norm"])
def test_goes_through_what_has_first_derivatives_only(kind: str, keep_graphs: bool):
    """Fused attention, reentrant checkpointing and compiled code below the head; a frozen body; low-rank adapters.

    And weight_norm, of which torch takes the second derivative wrongly on a CPU (2.13), in silence.
    """

    def build(kind: str) -> Network:
        model = Network(kind, layer_norm=True)
        if kind == "weight_norm":
            weight_norm(model.body[0])
        return model

    with sdpa_kernel(SDPBackend.MATH):
        mean, term, _ = by_autograd(build("plain" if kind == "checkpointed" else kind))
    model = build(kind)
    loss = compiled(model) if kind == "compiled" else None
    for meta_steps in (1, 2):
        with nullcontext() if kind == "compiled" else Operations() as operations:
            found, _ = direction(model, loss, meta_steps=meta_steps, keep_graphs=keep_graphs)
        assert_direction(found, mean, term)
        if kind == "attention":
            assert any("flash_attention_for_cpu_backward" in name for name in operations.counts)


def test_what_has_no_second_derivative_above_is_refused_in_words():
    model = Network("attention")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="match parameters above it, the last layer for instance"):
        direction(model, matched=model.body)
    assert_identical(model.state_dict(), before)
    weight_norm(model.head)
    with pytest.raises(RuntimeError, match="weight_norm"):
        direction(model)


@pytest.mark.parametrize("settings", [{}, {"keep_graphs": True}, {"one_pass": True}], ids=str)
def test_a_hook_that_changes_a_matched_gradient_is_found(settings: dict[str, Any]):
    model = Network()

    def double(p: Tensor) -> None:
        p.grad.mul_(2)

    model.head.weight.register_post_accumulate_grad_hook(double)
    for gamma in (GAMMA, None):
        with pytest.raises(ValueError, match=r"'head.weight' by backward\(\) is another one"):
            direction(model, gamma=gamma, **settings)


def test_compiled_graphs_that_are_kept_cannot_be_traversed_twice_to_find_gamma():
    model = Network(layer_norm=True)
    loss = compiled(model)
    loss(domains()[0]).backward()  # which compiles the backward pass, for one traversal
    with pytest.raises(RuntimeError, match=r"leave out keep_graphs=True and one_pass=True or pass gamma="):
        direction(model, loss, gamma=None, keep_graphs=True)
    assert direction(model, loss, gamma=None)[1].gamma > 0


def test_autocast_around_the_loss():
    """In bfloat16 the direction is that of single precision to the digits that it has."""

    def found(half: bool) -> Tensor:
        model = Network().float()

        def loss(batch: Any) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                return F.cross_entropy(model(batch[0].float()).float(), batch[1])

        return torch.cat([g.flatten() for g in direction(model, loss, meta_steps=2)[0]])

    assert found(True).dtype == torch.float32
    assert F.cosine_similarity(found(True), found(False), dim=0) > 0.99


@pytest.mark.parametrize("wrong", ["head", 3, {"head": nn.Linear(1, 1)}, ["head.weight"]], ids=str)
def test_what_is_no_part_of_a_model_is_refused(wrong: Any):
    with pytest.raises(TypeError, match="matched should be a module of the model or parameters of it"):
        IDGM(Network(), matched=wrong)


NONE_TRAINED = "holds no parameter that requires a gradient"


@pytest.mark.parametrize(
    ("choose", "settings", "message"),
    [
        (lambda m: [], {}, NONE_TRAINED),
        (lambda m: nn.GELU(), {}, NONE_TRAINED),
        (lambda m: m.body, {}, NONE_TRAINED),
        (lambda m: Network().head, {}, "is it another model's, or a copy"),
        (lambda m: m.attend, {}, "batch 0 depends on none of the matched parameters"),  # in the model, not in the loss
        (lambda m: m.head, {"hvp": "forward"}, r"matched=\.\.\. needs hvp='reverse'"),
        (lambda m: m.head, {"hvp": "finite_difference"}, r"matched=\.\.\. needs hvp='reverse'"),
    ],
    ids=["empty", "no parameters", "frozen", "of a copy", "unused", "forward", "differences"],
)
def test_parts_that_cannot_be_matched_are_errors_in_words_and_change_nothing(
    choose: Any, settings: dict[str, Any], message: str
):
    model = Network("frozen")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        direction(model, matched=choose(model), **settings)
    assert_identical(model.state_dict(), before)


def test_a_loss_linear_in_the_head_and_alone_has_nothing_to_match():
    model = nn.Linear(6, 1).double()
    with pytest.raises(RuntimeError, match="there is nothing to match"):
        direction(model, lambda batch: model(batch[0]).mean(), matched=model)


def in_loss(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "attend" not in n]


def one_rank(scheme: str, settings: dict[str, Any], meta_steps: int) -> Any:
    """Gradients found, gamma, losses, and how much was reduced by us."""
    model: Any = Network(layer_norm=True)
    rank, size = dist.get_rank(), dist.get_world_size()
    batches = [(x[rank::size], y[rank::size]) for x, y in domains()]
    called: Any = model
    if scheme == "ddp":
        called = DistributedDataParallel(model, find_unused_parameters=True)
    elif scheme == "fsdp":
        fully_shard(model.body, mesh=init_device_mesh("cpu", (size,)))
    else:
        settings = {**settings, **world(parallel=scheme)}
    if scheme == "domains":
        batches = domains()[rank::size]
    method = IDGM(called, matched=model.head, **settings)
    optimizer = GradMatch(SGD(in_loss(model), lr=0.0, foreach=False), method)
    for _ in range(meta_steps):
        with Collectives() as reduced:
            report = optimizer.meta_step(partial(loss_of, called), batches)
    gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return gradients, report.gamma, reduced.reductions()


@pytest.mark.parametrize("meta_steps", [1, 2])
@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        (scheme, settings)
        for scheme in ("ddp", "fsdp", "data", "domains")
        for settings in ({}, {"keep_graphs": True}, {"one_pass": True})
        if scheme != "domains" or "one_pass" not in settings
    ],
    ids=str,
)
def test_on_two_ranks_is_what_one_process_finds(scheme: str, settings: dict[str, Any], meta_steps: int):
    for gamma in (GAMMA, None):
        model = Network(layer_norm=True)
        optimizer = GradMatch(SGD(in_loss(model), lr=0.0), IDGM(model, gamma, matched=model.head, **settings))
        for _ in range(meta_steps):
            report = optimizer.meta_step(partial(loss_of, model), domains())
        of_matched, of_all = 8 * 27, 8 * sum(p.numel() for p in in_loss(model))
        for gradients, found, reduced in on_ranks(2, one_rank, scheme, {"gamma": gamma, **settings}, meta_steps):
            assert found == pytest.approx(report.gamma, rel=1e-9)
            if scheme != "fsdp":
                assert reduced.count(of_matched) == (1 if scheme == "domains" else DOMAINS)
                assert reduced.count(of_all) == (2 if gamma is None and meta_steps == 1 else 1)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    torch.testing.assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-9, msg=name)


def refused_on_a_rank() -> str:
    model = Network()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return error_of(lambda: GradMatch(SGD(model.parameters(), lr=0.1), IDGM(model, matched=model.head)))


def test_a_sharded_head_is_refused():
    assert all("DTensors" in error for error in on_ranks(2, refused_on_a_rank))
