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
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from torch_gradmatch import IDGM, GradMatch
from torch_gradmatch.gradients.agreement import AGREEMENTS

DOMAINS = 4
GAMMA = 0.3


def cubes(gradients: list[dict[str, Tensor]]) -> Tensor:
    """An agreement of the user's."""
    return -0.01 * sum((g**3).sum() for gradient in gradients for g in gradient.values())  # type: ignore[return-value]


class Network(nn.Module):
    """A body with BatchNorm or attention, run as asked, and a head of two layers."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        norm = nn.LayerNorm(8) if kind in {"checkpointed", "compiled", "ranks"} else nn.BatchNorm1d(8)
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


def domains(seed: int = 0, samples: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(samples, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (samples,), generator=generator),
        )
        for _ in range(DOMAINS)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


MATCHED: dict[str, Callable[[Network], Any]] = {
    "head": lambda m: m.head,
    "last two": lambda m: [*m.top.parameters(), *m.head.parameters()],
    "middle": lambda m: m.body[2],
    "all": lambda m: m,
}


def by_autograd(
    model: nn.Module, matched: Any, agreement: Any, batches: list[Any]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Mean gradient, dphi/dtheta and phi, by differentiating phi of the matched gradients as it stands."""
    chosen = list(matched.parameters()) if isinstance(matched, nn.Module) else list(matched)
    names = {id(p): name for name, p in model.named_parameters()}
    losses = [loss_of(model, batch) for batch in batches]
    settings = {"allow_unused": True, "materialize_grads": True}
    by_domain = [torch.autograd.grad(loss, chosen, create_graph=True, **settings) for loss in losses]
    gradients = [dict(zip([names[id(p)] for p in chosen], gradient, strict=True)) for gradient in by_domain]
    phi = AGREEMENTS.get(agreement, agreement)(gradients)
    trained = [p for p in model.parameters() if p.requires_grad]
    mean = torch.autograd.grad(torch.stack(losses).mean(), trained, retain_graph=True, **settings)
    return list(mean), list(torch.autograd.grad(phi, trained, **settings)), phi.detach()


def direction(model: nn.Module, batches: list[Any], loss: Any = None, meta_steps: int = 1, **settings: Any) -> Any:
    """Gradients after some meta-steps that move nothing, and the last report."""
    optimizer = GradMatch(SGD([p for p in model.parameters() if p.requires_grad], lr=0.0), IDGM(model, **settings))
    for _ in range(meta_steps):
        report = optimizer.meta_step(loss or partial(loss_of, model), batches)
    return [p.grad for p in model.parameters() if p.requires_grad], report


def assert_direction(found: list[Tensor | None], mean: list[Tensor], term: list[Tensor], gamma: float) -> None:
    for g, m, t in zip(found, mean, term, strict=True):
        expected = m - gamma * t
        torch.testing.assert_close(torch.zeros_like(m) if g is None else g, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ against autograd


@pytest.mark.parametrize("meta_steps", [1, 2])
@pytest.mark.parametrize("keep_graphs", [False, True])
@pytest.mark.parametrize("agreement", [*AGREEMENTS, cubes])
@pytest.mark.parametrize("matched", MATCHED)
def test_is_the_derivative_of_phi_through_all_parameters(
    matched: str, agreement: Any, keep_graphs: bool, meta_steps: int
):
    """The first meta-step compares with ``backward()`` and finds gamma; from the second on it is one pass."""
    reference = Network()
    mean, term, phi = by_autograd(reference, MATCHED[matched](reference), agreement, domains())
    for gamma in (GAMMA, None):
        model = Network()
        settings = {"agreement": agreement, "matched": MATCHED[matched](model), "keep_graphs": keep_graphs}
        found, report = direction(model, domains(), gamma=gamma, meta_steps=meta_steps, **settings)
        if gamma is None:
            length, of_term = (sum(float(v.square().sum()) for v in part) ** 0.5 for part in (mean, term))
            assert report.gamma == pytest.approx(0.1 * length / of_term, rel=1e-9)
        assert_direction(found, mean, term, report.gamma)
        if agreement == "inner_product":
            assert report.inner_product.item() == pytest.approx(phi.item(), rel=1e-10)


@pytest.mark.parametrize("agreement", AGREEMENTS)
def test_one_pass_and_its_reverse_are_exact(agreement: str):
    batches, settings = domains(), {"gamma": GAMMA, "agreement": agreement}
    model = Network()
    mean, term, _ = by_autograd(model, model.head, agreement, batches)
    both = []
    for order in (batches, batches[::-1]):
        model, calls = Network(), []
        found, _ = direction(
            model,
            order,
            lambda batch, m=model, c=calls: (c.append(1), loss_of(m, batch))[1],
            matched=model.head,
            one_pass=True,
            **settings,
        )
        assert len(calls) == DOMAINS  # each is evaluated once
        both.append([torch.zeros_like(m) if g is None else g for g, m in zip(found, mean, strict=True)])
    assert_direction([(a + b) / 2 for a, b in zip(*both, strict=True)], mean, term, GAMMA)


def test_gamma_zero_is_ordinary_training_and_an_optimizer_may_train_a_part():
    model = Network()
    mean, *_ = by_autograd(model, model.head, "variance", domains())
    found, report = direction(Network(), domains(), gamma=0.0, matched=None)
    model = Network()
    again, again_report = direction(model, domains(), gamma=0.0, matched=model.head)
    assert_direction(again, mean, mean, 0.0)
    torch.testing.assert_close([g for g in found if g is not None], [g for g in again if g is not None])
    assert again_report.grad_norms.max() < report.grad_norms.max()  # the head's alone
    model.body.requires_grad_(False)
    before = model.head.weight.grad.clone()
    optimizer = GradMatch(SGD(model.top.parameters(), lr=0.0), IDGM(model, GAMMA, matched=model.head))  # head: no part
    optimizer.meta_step(partial(loss_of, model), domains())
    assert torch.equal(model.head.weight.grad, before)
    reference = Network()
    reference.body.requires_grad_(False)
    mean, term, _ = by_autograd(reference, reference.head, "variance", domains())
    position = [n for n, p in reference.named_parameters() if p.requires_grad].index("top.weight")
    torch.testing.assert_close(model.top.weight.grad, mean[position] - GAMMA * term[position], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------ what is differentiated once only


def compiled(model: Network, backend: str) -> Callable[[Any], Tensor]:
    body = torch.compile(model.features, backend=backend)
    return lambda batch: F.cross_entropy(model.head(F.gelu(model.top(body(batch[0])))), batch[1])


@pytest.mark.parametrize("keep_graphs", [False, True])
@pytest.mark.parametrize("kind", ["plain", "attention", "checkpointed", "frozen", "low_rank", "compiled"])
def test_goes_through_what_has_first_derivatives_only(kind: str, keep_graphs: bool):
    """Fused attention, reentrant checkpointing and compiled code below the head; a frozen body; low-rank adapters."""
    model = Network("plain" if kind == "checkpointed" else kind)
    if kind == "checkpointed":
        model.body[3] = nn.LayerNorm(8).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        mean, term, _ = by_autograd(model, model.head, "variance", domains())
    model = Network(kind)
    loss = compiled(model, "aot_eager") if kind == "compiled" else partial(loss_of, model)
    for meta_steps in (1, 2):
        settings = {"gamma": GAMMA, "matched": model.head, "keep_graphs": keep_graphs, "meta_steps": meta_steps}
        with nullcontext() if kind == "compiled" else Operations() as operations:
            found, _ = direction(model, domains(), loss, **settings)
        assert_direction(found, mean, term, GAMMA)
        if kind == "attention":
            assert any("flash_attention_for_cpu_backward" in name for name in operations.counts)


def test_what_has_no_second_derivative_above_is_refused_in_words():
    model = Network("attention")
    batches, before = domains(), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="match parameters above it, the last layer for instance"):
        direction(model, batches, gamma=GAMMA, matched=model.body)
    assert_identical(model.state_dict(), before)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("above", [False, True])
def test_once_differentiable_functions_may_stand_below_and_not_above(above: bool):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()

    def loss(batch: Any) -> Tensor:
        z = model[1](OnceOnly.apply(model[0](batch[0])))
        return F.cross_entropy(model[2](OnceOnly.apply(z) if above else z.sin()), batch[1])

    if above:
        with pytest.raises(RuntimeError, match=r"matched=.*once_differentiable"):
            direction(model, domains(), loss, gamma=GAMMA, matched=model[1])
    else:
        direction(model, domains(), loss, gamma=GAMMA, matched=model[1])


def test_weight_norm_may_stand_below_and_is_refused_among_the_matched():
    """torch takes its second derivative wrongly on a CPU (2.13), in silence."""
    model = Network()
    torch.nn.utils.parametrizations.weight_norm(model.body[0])
    mean, term, _ = by_autograd(model, model.head, "variance", domains())
    found, _ = direction(model, domains(), gamma=GAMMA, matched=model.head)
    assert_direction(found, mean, term, GAMMA)
    torch.nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(RuntimeError, match="weight_norm"):
        direction(model, domains(), gamma=GAMMA, matched=model.head)


def test_a_hook_that_changes_a_matched_gradient_is_found():
    model = Network()

    def double(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(2)

    model.head.weight.register_post_accumulate_grad_hook(double)
    for settings in ({}, {"keep_graphs": True}, {"one_pass": True}):
        for gamma in (GAMMA, None):
            with pytest.raises(ValueError, match=r"'head.weight' by backward\(\) is another one"):
                direction(model, domains(), gamma=gamma, matched=model.head, **settings)


def test_compiled_graphs_that_are_kept_cannot_be_traversed_twice_to_find_gamma():
    model = Network("compiled")
    loss = compiled(model, "aot_eager")
    with pytest.raises(RuntimeError, match=r"leave out keep_graphs=True and one_pass=True or pass gamma="):
        direction(model, domains(), loss, matched=model.head, keep_graphs=True)
    assert direction(model, domains(), loss, matched=model.head)[1].gamma > 0


def test_autocast_around_the_loss():
    """In bfloat16 the direction is that of single precision to the digits that it has."""
    directions = []
    for half in (False, True):
        model = Network().float()

        def loss(batch: Any, half: bool = half, model: Any = model) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                return F.cross_entropy(model(batch[0].float()).float(), batch[1])

        found, _ = direction(model, domains(), loss, gamma=GAMMA, matched=model.head, meta_steps=2)
        directions.append(torch.cat([g.flatten() for g in found if g is not None]))
    assert directions[1].dtype == torch.float32
    assert F.cosine_similarity(*directions, dim=0) > 0.99


# ----------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_an_error_in_words_and_changes_nothing():
    model, other = Network(), Network()
    frozen = Network("frozen")
    sgd = partial(SGD, lr=0.1)
    for wrong in ("head", 3, {"head": model.head}, ["head.weight"]):
        with pytest.raises(TypeError, match="matched should be a module of the model or parameters of it"):
            IDGM(model, matched=wrong)
    for matched, message in (
        ([], "holds no parameter that requires a gradient"),
        (nn.GELU(), "holds no parameter that requires a gradient"),
        (other.head, "is it another model's, or a copy"),
    ):
        with pytest.raises(ValueError, match=message):
            GradMatch(sgd(model.parameters()), IDGM(model, matched=matched))
    with pytest.raises(ValueError, match="holds no parameter that requires a gradient"):
        GradMatch(sgd(frozen.head.parameters()), IDGM(frozen, matched=frozen.body))
    for hvp in ("forward", "finite_difference"):
        with pytest.raises(ValueError, match=r"matched=\.\.\. needs hvp='reverse'"):
            GradMatch(sgd(model.parameters()), IDGM(model, matched=model.head, hvp=hvp))
    before = copy.deepcopy(model.state_dict())
    optimizer = GradMatch(sgd(model.parameters()), IDGM(model, matched=model.attend))  # in the model, not in the loss
    with pytest.raises(ValueError, match="batch 0 depends on none of the matched parameters"):
        optimizer.meta_step(partial(loss_of, model), domains())
    assert_identical(model.state_dict(), before)
    shown = repr(IDGM(model, matched=[model.head.weight]))
    assert "matched='1 parameters'" in shown
    assert "matched='Linear'" in repr(IDGM(model, matched=model.head))


def test_a_loss_linear_in_the_head_and_alone_has_nothing_to_match():
    model = nn.Linear(6, 1).double()
    with pytest.raises(RuntimeError, match="there is nothing to match"):
        direction(model, domains(), lambda batch: model(batch[0]).mean(), gamma=GAMMA, matched=model)


# ------------------------------------------------------------------------------------------------ several processes


def part(batch: tuple[Tensor, Tensor], rank: int, size: int) -> tuple[Tensor, Tensor]:
    return batch[0][rank::size], batch[1][rank::size]


def one_rank(scheme: str, settings: dict[str, Any], meta_steps: int) -> Any:
    """Gradients found, gamma, losses, and how much was reduced by us."""
    model: Any = Network("ranks")
    rank, size = dist.get_rank(), dist.get_world_size()
    batches, matched = [part(batch, rank, size) for batch in domains()], model.head
    called: Any = model
    if scheme == "ddp":
        called = DistributedDataParallel(model, find_unused_parameters=True)
    elif scheme == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model.body, mesh=mesh)
    elif scheme == "domains":
        batches, settings = domains()[rank::size], {**settings, **world(parallel="domains")}
    else:
        settings = {**settings, **world(parallel="data")}
    trained = [p for n, p in model.named_parameters() if "attend" not in n]
    optimizer = GradMatch(SGD(trained, lr=0.0, foreach=False), IDGM(called, matched=matched, **settings))
    for _ in range(meta_steps):
        with Collectives() as reduced:
            report = optimizer.meta_step(partial(loss_of, called), batches)
    gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return gradients, report.gamma, reduced.reductions()


@pytest.mark.parametrize("meta_steps", [1, 2])
@pytest.mark.parametrize("mode", ["streaming", "keep_graphs", "one_pass"])
@pytest.mark.parametrize("scheme", ["ddp", "fsdp", "data", "domains"])
def test_on_two_ranks_is_what_one_process_finds(scheme: str, mode: str, meta_steps: int):
    settings: dict[str, Any] = {} if mode == "streaming" else {mode: True}
    if scheme == "domains" and mode == "one_pass":
        assert all("pass parallel='data'" in error for error in on_ranks(2, one_pass_by_domains))
        return
    for gamma in (GAMMA, None):
        model = Network("ranks")
        trained = [p for n, p in model.named_parameters() if "attend" not in n]
        optimizer = GradMatch(SGD(trained, lr=0.0), IDGM(model, gamma, matched=model.head, **settings))
        for _ in range(meta_steps):
            report = optimizer.meta_step(partial(loss_of, model), domains())
        of_matched, of_all = 8 * 27, 8 * sum(p.numel() for p in trained)
        for gradients, found, reduced in on_ranks(2, one_rank, scheme, {"gamma": gamma, **settings}, meta_steps):
            assert found == pytest.approx(report.gamma, rel=1e-9)
            if scheme != "fsdp":
                assert reduced.count(of_matched) == (1 if scheme == "domains" else DOMAINS)
                assert reduced.count(of_all) == (2 if gamma is None and meta_steps == 1 else 1)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    torch.testing.assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-9, msg=name)


def one_pass_by_domains() -> str:
    model = Network("ranks")
    method = IDGM(model, matched=model.head, one_pass=True, **world())
    return error_of(lambda: GradMatch(SGD(model.parameters(), lr=0.0), method))


def sharded_head() -> str:
    model = Network("ranks")
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return error_of(lambda: GradMatch(SGD(model.parameters(), lr=0.1), IDGM(model, matched=model.head)))


def test_a_sharded_head_is_refused():
    assert all("DTensors" in error for error in on_ranks(2, sharded_head))
