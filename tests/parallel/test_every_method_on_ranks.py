"""Every method on several ranks: it finds what one process finds; what goes wrong on one is raised on all."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import _spread as ranks
import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _reference import mean_pairwise_inner_product
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_gradmatch import ERM, IDGM, Aggregate, Average, Fish, Fishr, GradMatch, GroupDRO, SmoothFish, VREx

FIRST_ORDER: dict[str, Callable[..., Any]] = {  # of a model and its head; or of second order in the head
    "ERM": lambda m, _, **s: ERM(model=m, **s),
    "VREx": lambda m, _, **s: VREx(0.7, model=m, **s),
    "GroupDRO": lambda m, _, **s: GroupDRO(0.5, model=m, **s),
    "Aggregate": lambda m, _, **s: Aggregate(lambda matrix: matrix.mean(0), model=m, **s),
    "Fishr": lambda m, head, **s: Fishr(m, head, 100.0, **s),
    "Fishr by strength": lambda m, head, **s: Fishr(m, head, **s),
}
METHODS: dict[str, Callable[..., Any]] = FIRST_ORDER | {
    "Fish, walks": lambda m, _, **s: Fish(0.3, inner_state="reset", model=m, **s),
    "SmoothFish, walks": lambda m, _, **s: SmoothFish(1.0, 0.05, model=m, **s),
    "SmoothFish, data": lambda m, _, **s: SmoothFish(1.0, 0.05, model=m, parallel="data", **s),
    "SmoothFish, data, DDP": lambda m, _, **s: SmoothFish(1.0, 0.05, DistributedDataParallel(m), parallel="data", **s),
    "IDGM, domains": lambda m, _, **s: IDGM(m, 0.3, **s),
    "IDGM, data": lambda m, _, **s: IDGM(m, 0.3, parallel="data", **s),
    "matched": lambda m, head, **s: IDGM(m, matched=head, parallel="data", **s),
}
TWICE = ("IDGM, domains", "IDGM, data")  # evaluate every loss again
UNEQUAL = "the same number of batches, but it is 3 on rank 0 and 2 on rank 1"
EXPECTED = {
    "nan": "the loss of batch",
    "raises": "out of order",
    "unrelated": "depends on none of the parameters",
    "infinite on the way": "inner walk of SmoothFish diverged: the loss of batch 1|the loss of batch 1 is inf",
    "not the same twice": "is not the same twice",
    "empty": "batches is empty",
    "fewer": UNEQUAL,
    "learning rate": r"the same learning rates, but it is \[0.01\] on rank 0 and \[0.02\] on rank 1",
    "setting": "same method",
}


NETWORKS = ("batch_norm", "transformer", "tied")
GAMMA_ROUNDING = {"strength": 1e-9, "differences by strength": 1e-6}


class BoomError(Exception):
    """The user's."""


def go_wrong(name: str) -> tuple[dict[str, str], bool, Any, str]:
    """Rank 1 alone goes wrong, in one way after the other; then all go on, and at last drift apart."""
    last = dist.get_rank() == 1
    model: Any = ranks.build("batch_norm")
    method = METHODS[name](model, model[-1], **ranks.world())
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=0.01), method)
    loss_fn = partial(ranks.loss_of, method.model)
    own = name.endswith(("walks", "domains"))

    def batches(seed: int) -> list[ranks.Batch]:
        return (
            ranks.domain_batches(3, seed + 100 * dist.get_rank()) if own else ranks.mine(ranks.domain_batches(3, seed))
        )

    calls, calls_again = itertools.count(1), itertools.count(1)

    def raises(batch: ranks.Batch) -> Tensor:
        if last and next(calls) == (4 if name in TWICE else 2):  # in the second pass, or in the middle of the first
            raise BoomError("out of order")
        return loss_fn(batch)

    def unrelated(batch: ranks.Batch) -> Tensor:
        return torch.ones((), requires_grad=True) if last else loss_fn(batch)

    def infinite_on_the_way(batch: ranks.Batch) -> Tensor:
        at_start = torch.equal(next(model.parameters()), start)
        return loss_fn(batch) * (float("inf") if last and not at_start else 1.0)

    def with_a_memory(batch: ranks.Batch) -> Tensor:
        return loss_fn(batch) * (1 + 0.1 * last * next(calls_again))

    optimizer.meta_step(loss_fn, batches(0))
    start = next(model.parameters()).detach().clone()
    before = ranks.state_of(model, optimizer)
    named = {f"{label} of {dist.get_rank()}": batch for label, batch in zip("abc", batches(1), strict=True)}
    found = {
        "nan": ranks.error_of(
            optimizer.meta_step, ranks.not_a_number_on_last(loss_fn), named if "domains" in name else batches(1)
        ),
        "raises": ranks.error_of(optimizer.meta_step, raises, batches(1)),
        "empty": ranks.error_of(optimizer.meta_step, loss_fn, [] if last else batches(1)),
    }
    if "Fish, " in name or "IDGM" in name:
        found["unrelated"] = ranks.error_of(optimizer.meta_step, unrelated, batches(1))
    if name in ("SmoothFish, walks", "SmoothFish, data, DDP"):
        found["infinite on the way"] = ranks.error_of(optimizer.meta_step, infinite_on_the_way, batches(1))
    if name in TWICE:
        found["not the same twice"] = ranks.error_of(optimizer.meta_step, with_a_memory, batches(1))
    if name != "IDGM, domains":
        found["fewer"] = ranks.error_of(optimizer.meta_step, loss_fn, batches(1)[last:])
    optimizer.param_groups[0]["lr"] = 0.02 if last else 0.01
    found["learning rate"] = ranks.error_of(optimizer.meta_step, loss_fn, batches(1))
    optimizer.param_groups[0]["lr"] = 0.01
    setting = "meta_lr" if name.startswith("Fish,") else "gamma" if hasattr(method, "gamma") else None
    if setting is not None:
        kept = getattr(method, setting)
        setattr(method, setting, 0.4 if last else kept)
        found["setting"] = ranks.error_of(optimizer.meta_step, loss_fn, batches(1))
        setattr(method, setting, kept)
    unchanged = ranks.same(before, ranks.state_of(model, optimizer))
    optimizer.meta_step(loss_fn, batches(2))
    after = ranks.state_of(model, optimizer)
    with torch.no_grad():
        next(model.parameters()).add_(float(last))
    optimizer.load_state_dict(optimizer.state_dict())
    return found, unchanged, after, ranks.error_of(optimizer.meta_step, loss_fn, batches(2))


@pytest.mark.parametrize("name", METHODS)
def test_what_goes_wrong_on_one_rank_is_raised_on_all_and_training_goes_on(name: str):
    everywhere = on_ranks(2, go_wrong, name)
    for rank, (found, unchanged, _, drifted) in enumerate(everywhere):
        assert unchanged
        for way, message in found.items():
            assert re.search(EXPECTED[way], message), (way, message)
        if "walks" in name or "DDP" in name:
            assert found["nan"].startswith(f"ValueError: {'' if rank else 'on rank 1: '}the loss of batch")
        if "domains" in name:
            assert "batch 3 (domain 'a of 1') is nan" in found["nan"]
        assert found["raises"].startswith("BoomError: " if rank else "RuntimeError: on rank 1: BoomError: ")
        assert "parameter number 0 of the optimizer" in drifted
    if "walks" not in name:
        assert ranks.same(everywhere[0][2], everywhere[1][2])


LOCKSTEP: dict[str, Callable[[Any], Any]] = {
    "Fish, DDP": lambda m: Fish(0.3, model=DistributedDataParallel(m)),
    "Fish, shards": lambda m: Fish(0.3, model=ranks.sharded(m)),
    "SmoothFish, DDP": lambda m: SmoothFish(0.3, 0.05, DistributedDataParallel(m)),
    "SmoothFish, shards": lambda m: SmoothFish(0.3, 0.05, ranks.sharded(m), symmetric=True),
    "IDGM, shards": lambda m: IDGM(ranks.sharded(m), 0.3, hvp="finite_difference"),
}


def spoil(name: str) -> tuple[str, bool]:
    """A loss that is NaN on one rank only, in the second of three domains; then go on."""
    model: Any = ranks.build("batch_norm")
    method = LOCKSTEP[name](model)
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=0.01), method)
    loss_fn, batches = partial(ranks.loss_of, method.model), ranks.mine(ranks.domain_batches(3, 0))
    optimizer.meta_step(loss_fn, batches)
    before = ranks.state_of(model, optimizer)
    factors = [1.0, float("nan") if dist.get_rank() == 1 else 1.0, 1.0]
    bad = [(x * factor, y) for (x, y), factor in zip(batches, factors, strict=True)]
    message = ranks.error_of(optimizer.meta_step, loss_fn, bad)
    unchanged = ranks.same(ranks.state_of(model, optimizer), before)
    optimizer.meta_step(loss_fn, batches)
    return message, unchanged


@pytest.mark.parametrize("name", LOCKSTEP)
def test_nan_on_one_rank_in_lockstep_is_raised_on_all_and_training_goes_on(name: str):
    (first, first_unchanged), (last, last_unchanged) = on_ranks(2, spoil, name)
    assert first.startswith("ValueError: on rank 1: the loss of batch 1 is nan")
    assert last.startswith("ValueError: the loss of batch 1 is nan")
    assert first_unchanged
    assert last_unchanged


# ------------------------------------------------------------------------------------------ and when nothing goes wrong


FISH: dict[str, Callable[..., Any]] = {
    "Fish": lambda m, _: Fish(0.3, model=m, track_alignment=True),
    "Fish, reset": lambda m, _: Fish(0.3, model=m, inner_state="reset"),
    "Fish without model": lambda *_: Fish(0.3),
    "SmoothFish without model": lambda *_: SmoothFish(0.3, 0.05, symmetric=True),
}
WALKS: dict[str, Callable[..., Any]] = {
    "walk": lambda m, _, **s: SmoothFish(1.0, 0.05, m, **s),
    "mean": lambda m, _, **s: SmoothFish(0.0, 0.05, m, **s),
    "strong": lambda m, _, **s: SmoothFish(2.5, 0.05, m, track_alignment="pairs", **s),
    "symmetric": lambda m, _, **s: SmoothFish(0.3, 0.05, m, symmetric=True, track_alignment="pairs", **s),
}


def any_agreement(gradients: list[dict[str, Tensor]]) -> Tensor:
    """A function of the user's own: the mean inner product, where biases count twice."""
    vectors = [torch.cat([g.reshape(-1) * (1 + n.endswith("bias")) for n, g in sorted(gs.items())]) for gs in gradients]
    return mean_pairwise_inner_product(vectors)


def idgm(gamma: float | None = 0.3, **settings: Any) -> Callable[..., IDGM]:
    return lambda m, _, **shared: IDGM(m, gamma, **settings, **shared)


DIFFERENCES = {
    name: idgm(agreement=name, hvp="finite_difference", track_alignment=True)
    for name in ("inner_product", "variance", "cosine")
} | {
    "differences, one pass": idgm(hvp="finite_difference", one_pass=True),
    "differences by strength": idgm(None, hvp="finite_difference"),
}
EXACT = {
    "exact": idgm(agreement="inner_product", track_alignment=True),
    "kept": idgm(keep_graphs=True),
    "forward": idgm(agreement="cosine", hvp="forward"),
    "function": idgm(agreement=any_agreement),
    "pairs": idgm(track_alignment="pairs"),
    "one pass": idgm(one_pass=True),
    "strength": idgm(None),
}
EVERY = FIRST_ORDER | FISH | WALKS | DIFFERENCES | EXACT
SCHEMES = {
    "ddp": [*FIRST_ORDER, *FISH, *WALKS, "exact"],
    "fsdp": [*FIRST_ORDER, *FISH, *WALKS, *DIFFERENCES],
    "kept": [*FISH, *WALKS, *DIFFERENCES],
    "hsdp": ["Fish", "symmetric", "cosine"],
    "data": [*FIRST_ORDER, *WALKS, *EXACT, "variance"],
}


def wrap(scheme: str, name: str, network: str) -> tuple[nn.Module, GradMatch[Any]]:
    whole: Any = ranks.build(network)
    head = whole[-1] if network == "batch_norm" or network == "smooth" else None
    model = whole if scheme in ("one", "data") else ranks.spread(scheme, whole)
    shared = ranks.world() if name in FIRST_ORDER else ranks.world(parallel="data")
    method = EVERY[name](model, head, **(shared if scheme == "data" or (scheme, name) == ("ddp", "exact") else {}))
    optimizer = torch.optim.Adam if name in FIRST_ORDER or name in FISH else torch.optim.SGD
    average = None if name.endswith("without model") else Average()
    return model, GradMatch(optimizer(model.parameters(), lr=0.01), method, average)


def averaged(model: nn.Module, optimizer: GradMatch[Any]) -> list[Any]:
    """The average, and what the model makes of a batch with it."""
    if optimizer.average is None:
        return []
    with optimizer.averaged_weights():
        return [ranks.weights(model), model(ranks.domain_batches(1, 9)[0][0]).detach()]


def networks_of(name: str) -> tuple[str, ...]:
    """Fishr's head may be called once only, so there is no batch norm that would see one part at a time."""
    return ("smooth",) if "Fishr" in name else ("batch_norm",) if name in FIRST_ORDER else NETWORKS


def one_rank(scheme: str, name: str) -> Any:
    found = {}
    torch.manual_seed(dist.get_rank())  # which makes no difference
    for network in networks_of(name):
        model, optimizer = wrap(scheme, name, network)
        for number in range(2):
            batches = ranks.mine(ranks.domain_batches(3, number))
            report = optimizer.meta_step(partial(ranks.loss_of, model), batches)
            gradients = ranks.gradients_of(model)
            with torch.no_grad():
                model(batches[0][0])  # leaves whole parameters where a model is sharded
        model.zero_grad()
        ranks.loss_of(model, batches[0]).backward()  # which is averaged by the model as ever
        later = None if scheme == "data" else ranks.gradients_of(model)
        weights, average = ranks.weights(model), averaged(model, optimizer)
        assert ranks.same(weights, ranks.weights(model))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert ranks.same(average[:1], averaged(model, optimizer)[:1])
        found[network] = (weights, gradients, average, later), vars(report)
    return found


@pytest.mark.parametrize(("scheme", "name"), [(scheme, name) for scheme, names in SCHEMES.items() for name in names])
def test_it_finds_what_one_process_finds(scheme: str, name: str):
    size = 4 if scheme == "hsdp" else 2
    if scheme == "fsdp" and name == "Aggregate":
        refused = on_ranks(2, ranks.error_of, wrap, scheme, name, "batch_norm")
        assert all("needs whole gradients in one matrix" in error for error in refused)
        return
    everywhere = on_ranks(size, one_rank, scheme, name)
    for network, (found, report) in everywhere[0].items():
        assert all(ranks.same(found, one[network][0]) for one in everywhere)
        losses = torch.stack([one[network][1]["losses"] for one in everywhere]).mean(0)
        model, optimizer = wrap("one", name, network)
        loss_fn = partial(ranks.loss_of if "Fishr" in name else partial(ranks.loss_over, size=size), model)
        for number in range(2):
            expected = vars(optimizer.meta_step(loss_fn, ranks.domain_batches(3, number)))
            with torch.no_grad():
                loss_fn(ranks.domain_batches(3, number)[0])
        close = {"rtol": 1e-7, "atol": 1e-9} if name in DIFFERENCES else {"rtol": 1e-8, "atol": 1e-9}
        torch.testing.assert_close(found[0], ranks.weights(model), **close)
        torch.testing.assert_close(found[2], averaged(model, optimizer), **close)
        if name in WALKS or name in EXACT:
            close = {"rtol": 1e-9, "atol": 1e-12} if name in WALKS else {"rtol": 1e-11, "atol": 1e-13}
        torch.testing.assert_close(found[1], ranks.gradients_of(model), **close)
        for measured in ("inner_product", "cosine", "cosines", "grad_norms"):
            torch.testing.assert_close(report[measured], expected[measured])
        gamma = expected["gamma"]
        assert report["gamma"] == (None if gamma is None else pytest.approx(gamma, rel=GAMMA_ROUNDING.get(name, 1e-7)))
        torch.testing.assert_close(losses, expected["losses"], rtol=1e-9, atol=1e-9)


def average_of_an_unknown_model() -> str:
    model = ranks.spread("fsdp", ranks.build("smooth"))
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(0.5), average=Average())
    optimizer.meta_step(partial(ranks.loss_of, model), ranks.mine(ranks.domain_batches(2, 0)))
    return ranks.error_of(optimizer.averaged_weights().__enter__)


def test_a_sharded_model_has_to_be_known_to_show_its_average():
    assert all("pass the method model=model" in error for error in on_ranks(2, average_of_an_unknown_model))
