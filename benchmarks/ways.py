"""One model, S batches, and every way to spend a meta-iteration on them: ordinary, by this package, by hand, by peers.

``ERM`` is the reference cost: one backward pass for each domain, and a step. ``create_graph`` is the exact objective
written down: each domain's gradient with ``create_graph=True``, every graph kept, the agreement of the gradients, one
``backward`` through it all. ``curvlinops`` is the two passes with the Hessian-vector products of
``curvlinops-for-pytorch``. The others are ``meta_step``.

The wrapped optimizer is SGD with learning rate 0: every way is timed at the same parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._models import NETWORKS, Batch
from torch_gradmatch import IDGM, Fish, Fishr, GradMatch, SmoothFish
from torch_gradmatch.methods.base import Method

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what it imports warns of itself
        from curvlinops import HessianLinearOperator
except ImportError:
    HessianLinearOperator = None

Way = Callable[[], None]
ERM, NAIVE, CURVLINOPS = "ERM", "create_graph", "curvlinops"
SMOOTH_FISH_LR = 1e-3
SYMMETRIC_LR = 1e-2  # of a difference: longer is better for networks with kinks, as these are
SYMMETRIC = "SmoothFish, symmetric"

METHODS: dict[str, Callable[[nn.Module, float], Method]] = {
    "Fish": lambda model, _: Fish(model=model),
    "SmoothFish": lambda model, _: SmoothFish(1.0, SMOOTH_FISH_LR, model),
    "SmoothFish, gamma=2": lambda model, _: SmoothFish(2.0, SMOOTH_FISH_LR, model),
    SYMMETRIC: lambda model, gamma: SmoothFish(gamma, SYMMETRIC_LR, model, symmetric=True),
    "IDGM": lambda model, gamma: IDGM(model, gamma, "inner_product"),
    "IDGM, keep_graphs": lambda model, gamma: IDGM(model, gamma, "inner_product", keep_graphs=True),
    "IDGM, one_pass": lambda model, gamma: IDGM(model, gamma, "inner_product", one_pass=True),
    "IDGM, forward": lambda model, gamma: IDGM(model, gamma, "inner_product", hvp="forward"),
    "IDGM, finite_difference": lambda model, gamma: IDGM(model, gamma, "inner_product", hvp="finite_difference"),
    # These match the gradients of the head alone.
    "head: IDGM": lambda model, gamma: IDGM(model, gamma, matched=head_of(model)),
    "head: IDGM, keep_graphs": lambda model, gamma: IDGM(model, gamma, matched=head_of(model), keep_graphs=True),
    "head: IDGM, one_pass": lambda model, gamma: IDGM(model, gamma, matched=head_of(model), one_pass=True),
    "head: Fishr": lambda model, gamma: Fishr(model, head_of(model), gamma),
}
EXACT = [CURVLINOPS, SYMMETRIC, *(name for name in METHODS if name.startswith("IDGM"))]
SMOOTH = [name for name in METHODS if name.startswith("SmoothFish")]


def head_of(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def names() -> list[str]:
    """Every way that can be gone here."""
    return [ERM, *METHODS, NAIVE, *([] if HessianLinearOperator is None else [CURVLINOPS])]


def inner_product(gradients: Sequence[Sequence[Tensor]], one_pass: bool) -> Tensor:
    """Of every gradient with those before it, which in one pass are numbers and count twice."""
    before, products = [torch.zeros_like(g) for g in gradients[0]], []
    for gradient in gradients:
        products += [(g * b).sum() for g, b in zip(gradient, before, strict=True)]
        before = [b + (g.detach() if one_pass else g) for b, g in zip(before, gradient, strict=True)]
    return (4 if one_pass else 2) / (len(gradients) * (len(gradients) - 1)) * torch.stack(products).sum()


class Problem:
    """A network with S batches, and how often the loss of one was evaluated."""

    def __init__(self, network: str, domains: int) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = NETWORKS[network].make().train()
        self.parameters = list(self.model.parameters())
        self.batches: list[Batch] = NETWORKS[network].batches(domains)
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.0)
        self.evaluations = 0

    def loss(self, batch: Batch) -> Tensor:
        self.evaluations += 1
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def way(self, name: str, gamma: float) -> Way:
        """A way by its name; ``gamma`` is the strength of the exact methods' matching."""
        by_hand = {ERM: self.erm, NAIVE: partial(self.naive, gamma), CURVLINOPS: partial(self.curvlinops, gamma)}
        return by_hand[name] if name in by_hand else self.meta_step(METHODS[name](self.model, gamma))

    def meta_step(self, method: Method) -> Way:
        optimizer = GradMatch(self.optimizer, method)

        def run() -> None:
            optimizer.zero_grad()
            optimizer.meta_step(self.loss, dict(enumerate(self.batches)))

        return run

    def erm(self) -> None:
        self.optimizer.zero_grad()
        for batch in self.batches:
            (self.loss(batch) / len(self.batches)).backward()
        self.optimizer.step()

    def naive(self, gamma: float, one_pass: bool = False) -> None:
        """Differentiate the objective; with ``one_pass``, each domain with those before it, counted twice."""
        self.optimizer.zero_grad()
        losses, gradients = [], []
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            for batch in self.batches:
                losses.append(self.loss(batch))
                gradients.append(torch.autograd.grad(losses[-1], self.parameters, create_graph=True))
            (torch.stack(losses).mean() - gamma * inner_product(gradients, one_pass)).backward()
        self.optimizer.step()

    def curvlinops(self, gamma: float) -> None:
        self.optimizer.zero_grad()
        domains = len(self.batches)
        gradients = [torch.autograd.grad(self.loss(batch), self.parameters) for batch in self.batches]
        total = [sum(parts) for parts in zip(*gradients, strict=True)]
        result = [t / domains for t in total]
        scale = 2 / (domains * (domains - 1))
        for batch, gradient in zip(self.batches, gradients, strict=True):
            self.evaluations += 1
            cotangent = [scale * (t - g) for t, g in zip(total, gradient, strict=True)]
            products = hessian_product(self.model, self.parameters, batch, cotangent)
            result = [r - gamma * h for r, h in zip(result, products, strict=True)]
        for p, r in zip(self.parameters, result, strict=True):
            p.grad = r
        self.optimizer.step()


def hessian_product(model: nn.Module, parameters: list[Tensor], batch: Batch, vector: list[Tensor]) -> Sequence[Tensor]:
    """By curvlinops."""
    with sdpa_kernel(SDPBackend.MATH):
        hessian = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), parameters, [batch], check_deterministic=False, num_data=len(batch[0])
        )
        product: Sequence[Tensor] = hessian @ vector
    return product


def direction(problem: Problem, way: Way) -> Tensor:
    """Return the gradient that a way finds after seeding."""
    torch.manual_seed(1)
    way()
    return torch.cat([p.grad.flatten() for p in problem.parameters if p.grad is not None]).double()


class Reference:
    """What the naive way finds, at the gamma at which both terms of the objective have gradients of one length."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        mean = direction(problem, problem.erm)
        matched = direction(problem, partial(problem.naive, 1.0))
        self.length = mean.norm()
        self.gamma = float(self.length / (matched - mean).norm())
        self.expected = mean + self.gamma * (matched - mean)

    def error(self, name: str, way: Way) -> float | None:
        """Return an exact way's distance from the naive direction, over the length of the second term."""
        found, expected = direction(self.problem, way), self.expected
        if name not in EXACT:
            return None
        if "one_pass" in name:
            expected = direction(self.problem, partial(self.problem.naive, self.gamma, one_pass=True))
        return float((found - expected).norm() / self.length)
