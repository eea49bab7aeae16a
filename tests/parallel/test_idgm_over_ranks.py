"""IDGM on several ranks: the direction of one process that has everything, the same bits on every rank."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _reference import mean_pairwise_cosine, mean_pairwise_inner_product, naive_idgm, with_rest
from _spread import Batch, build, domain_batches, loss_of, loss_over, mine, part
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from torch_gradmatch import IDGM, GradMatch, SmoothFish

AGREEMENTS = ("inner_product", "variance", "cosine")
HVPS = {"reverse": 1e-12, "forward": 1e-12, "finite_difference": 1e-5}
NETWORKS = ("batch_norm", "transformer", "tied")
COUNTS = {2: (2, 1), 3: (1, 3, 1)}  # domains of each rank
GAMMA = 0.3


def cases() -> list[tuple[str, str, str]]:
    """All on two ranks; on three, which share one machine's cores, every network with every hvp and agreement."""
    if dist.get_world_size() == 2:
        return list(itertools.product(NETWORKS, AGREEMENTS, HVPS))
    others = [("batch_norm", agreement, "reverse") for agreement in AGREEMENTS if agreement != "variance"]
    return [*itertools.product(NETWORKS, ["variance"], HVPS), *others]


def world(**settings: Any) -> dict[str, Any]:
    return {"process_group": dist.group.WORLD, **settings}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): b.clone() for name, b in model.named_buffers()}


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    _ = optimizer.param_groups  # to which it has added an entry of its own by then
    return copy.deepcopy([model.state_dict(), optimizer.optimizer.state_dict(), gradients_of(model)])


def same(one: Any, other: Any) -> bool:
    """The same bits, whatever the structure."""
    if isinstance(one, Tensor):
        return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def share(domains: list[Batch]) -> list[Batch]:
    """This rank's of the domains."""
    counts = COUNTS[dist.get_world_size()]
    first = sum(counts[: dist.get_rank()])
    return domains[first : first + counts[dist.get_rank()]]


# --------------------------------------------------------------------------------------------------------------- parity


def one_step(name: str, batches: list[Batch], **settings: Any) -> Any:
    model = build(name)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), IDGM(model, GAMMA, **world(**settings)))
    report = optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    found = vars(report) | {"agreement_with_rest": report.agreement_with_rest}
    found |= {"gradients": gradients_of(model), "buffers": buffers_of(model)}
    return {key: value for key, value in found.items() if value is not None}


def by_domains() -> dict[Any, Any]:
    domains = sum(COUNTS[dist.get_world_size()])
    found = {}
    for name, agreement, hvp in cases():
        batches = share(domain_batches(domains, 1))
        found[name, agreement, hvp] = one_step(name, batches, agreement=agreement, hvp=hvp, track_alignment=True)
    found["tied", "variance", "reverse", "kept"] = one_step(
        "tied", batches, agreement="variance", keep_graphs=True, track_alignment=True
    )
    return found


def by_data() -> dict[Any, Any]:
    found = {}
    for name, agreement, hvp in cases():
        batches = mine(domain_batches(3, 1))
        found[name, agreement, hvp] = one_step(
            name, batches, agreement=agreement, hvp=hvp, track_alignment=True, parallel="data"
        )
    return found


def check(found: dict[str, Any], name: str, losses: list[Callable[[nn.Module], Tensor]], key: Any) -> None:
    """Against plain autograd in this process."""
    _, agreement, hvp, *_ = key
    model = build(name)
    parameters = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = naive_idgm(parameters, [lambda f=f: f(model) for f in losses], GAMMA, agreement)[1]
        values = [f(model) for f in losses]
        gradients = [torch.autograd.grad(value, parameters) for value in values]
    vectors = [torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients]
    flat, wanted = (torch.cat([g.reshape(-1) for g in gs]) for gs in (found["gradients"], expected))
    assert float((flat - wanted).norm() / wanted.norm()) <= HVPS[hvp], key
    close = {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(found["losses"], torch.stack(values).detach(), **close)
    torch.testing.assert_close(found["inner_product"], mean_pairwise_inner_product(vectors), **close)
    torch.testing.assert_close(found["cosine"], mean_pairwise_cosine(vectors), **close)
    torch.testing.assert_close(found["grad_norms"], torch.stack([v.norm() for v in vectors]), **close)
    torch.testing.assert_close(found["agreement_with_rest"], with_rest(vectors), **close)


def expected_buffers(name: str, shares: list[list[Batch]]) -> dict[str, Tensor]:
    """The mean over ranks of what each rank's batches leave, the largest of integers."""
    left = []
    for batches in shares:
        model = build(name)
        for batch in batches:
            loss_of(model, batch)
        left.append(buffers_of(model))
    together = {name: torch.stack([one[name] for one in left]) for name in left[0]}
    return {n: b.mean(0) if b.is_floating_point() else b.max(0).values for n, b in together.items()}


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.large), 3])
def test_domains_on_several_ranks_are_those_of_one_process(size: int):
    everywhere = on_ranks(size, by_domains)
    domains = domain_batches(sum(COUNTS[size]), 1)
    losses = [lambda model, batch=batch: loss_of(model, batch) for batch in domains]
    splits = [0, *itertools.accumulate(COUNTS[size])]
    for key, found in everywhere[0].items():
        assert all(same(found, other[key]) for other in everywhere), key
        check(found, key[0], losses, key)
        shares = [domains[a:b] for a, b in itertools.pairwise(splits)]
        torch.testing.assert_close(found["buffers"], expected_buffers(key[0], shares))


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.large), 3])
def test_samples_on_several_ranks_are_those_of_one_process(size: int):
    everywhere = on_ranks(size, by_data)
    domains = domain_batches(3, 1)
    losses = [lambda model, batch=batch: loss_over(model, batch, size) for batch in domains]
    for key, found in everywhere[0].items():
        assert all(same(found, other[key]) for other in everywhere), key
        check(found, key[0], losses, key)
        shares = [[part(batch, rank, size) for batch in domains] for rank in range(size)]
        torch.testing.assert_close(found["buffers"], expected_buffers(key[0], shares))


def any_agreement(gradients: list[dict[str, Tensor]]) -> Tensor:
    """A function of the user's own: the mean inner product, where the last parameter counts twice."""
    vectors = [torch.cat([g.reshape(-1) * (1 + n.endswith("bias")) for n, g in sorted(gs.items())]) for gs in gradients]
    return mean_pairwise_inner_product(vectors)


def by_data_only() -> dict[str, Any]:
    batches = mine(domain_batches(3, 1))
    torch.manual_seed(dist.get_rank())  # every rank would draw other domains
    found = {
        "function": one_step("tied", batches, agreement=any_agreement, parallel="data"),
        "pairs": one_step("tied", batches, track_alignment="pairs", parallel="data"),
        "kept": one_step("tied", batches, keep_graphs=True, parallel="data"),
        "drawn": one_step("tied", batches, hvp_domains=2, parallel="data"),
    }
    return found | {where: through_ddp(where) for where in ("model", "module")}


def through_ddp(where: str) -> Any:
    """Three meta-iterations, of which ``loss_fn`` calls the wrapped model, and an ordinary backward pass."""
    model = build("batch_norm")
    ddp = DistributedDataParallel(model, find_unused_parameters=where == "module")
    method = IDGM(ddp if where == "model" else model, GAMMA, **world(parallel="data"))
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), method)
    for seed in range(3):
        optimizer.meta_step(lambda batch: loss_of(ddp, batch), mine(domain_batches(3, seed)))
    state = state_of(model, optimizer)
    ddp.zero_grad()
    loss_of(ddp, mine(domain_batches(3, 1))[0]).backward()  # it reduces as ever
    return state, gradients_of(model)


def test_what_needs_all_gradients_works_by_samples_and_ddp_is_the_plain_module():
    everywhere = on_ranks(2, by_data_only)
    found = everywhere[0]
    assert same(found, everywhere[1])
    losses = [lambda model, batch=batch: loss_over(model, batch, 2) for batch in domain_batches(3, 1)]
    model = build("tied")
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss(model), parameters) for loss in losses]
    vectors = [torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients]
    cosines = torch.stack([torch.stack([torch.cosine_similarity(a, b, dim=0) for a in vectors]) for b in vectors])
    torch.testing.assert_close(found["pairs"]["cosines"], cosines)
    for left, right in zip(found["kept"]["gradients"], found["pairs"]["gradients"], strict=True):
        torch.testing.assert_close(left, right)
    names = [n for n, _ in model.named_parameters()]

    def flat_agreement(flat: list[Tensor]) -> Tensor:
        sizes = [p.numel() for p in parameters]
        return any_agreement([dict(zip(names, one.split(sizes), strict=True)) for one in flat])

    expected = naive_idgm(parameters, [lambda f=f: f(model) for f in losses], GAMMA, flat_agreement)[1]
    for left, right in zip(found["function"]["gradients"], expected, strict=True):
        torch.testing.assert_close(left, right)
    oracle = build("batch_norm")  # one process with every batch in two parts
    optimizer = torch.optim.Adam(oracle.parameters(), lr=1e-2)
    for seed in range(3):
        batches = domain_batches(3, seed)
        calls = [lambda b=b: loss_over(oracle, b, 2) for b in batches]
        for p, g in zip(
            oracle.parameters(), naive_idgm(list(oracle.parameters()), calls, GAMMA, "inner_product")[1], strict=True
        ):
            p.grad = g
        optimizer.step()
    for where in ("model", "module"):
        state = found[where][0][0]
        for name, p in oracle.named_parameters():
            torch.testing.assert_close(state[name], p.detach(), rtol=1e-9, atol=1e-11)
    assert found["drawn"]["losses"].shape == (3,)


# ------------------------------------------------------------------------------------- many iterations, and collectives


class Counting:
    """Counts the all-reduces inside the block and their bytes."""

    def __enter__(self) -> Counting:
        self.bytes: list[int] = []
        self._all_reduce = dist.all_reduce

        def all_reduce(tensor: Tensor, *args: Any, **settings: Any) -> Any:
            self.bytes.append(tensor.nbytes)
            return self._all_reduce(tensor, *args, **settings)

        dist.all_reduce = all_reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._all_reduce

    def large(self, model: nn.Module) -> list[float]:
        """Sizes of those that are not of a few numbers, in parameters."""
        size = sum(p.nbytes for p in model.parameters())
        return [n / size for n in self.bytes if n > size / 4]


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 100), nn.BatchNorm1d(100), nn.GELU(), nn.Linear(100, 7)).double()


def count_and_train(each: int, parallel: str) -> Any:
    found = {}
    for agreement in AGREEMENTS:
        model = wide()
        method = IDGM(model, GAMMA, agreement, **world(parallel=parallel))
        optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), method)
        loss_fn = partial(loss_of, model)
        for seed in range(4):
            own = domain_batches(each, 10 * seed + dist.get_rank())
            batches = own if parallel == "domains" else mine(domain_batches(each, seed))
            with Counting() as counted:
                optimizer.meta_step(loss_fn, batches)
        found[agreement] = counted.large(model), len(counted.bytes)
        found[agreement, "state"] = state_of(model, optimizer)
    return found


@pytest.mark.parametrize("each", [1, 4])
def test_domains_take_two_all_reduces_whatever_their_number(each: int):
    everywhere = on_ranks(3, count_and_train, each, "domains")
    assert same(everywhere[0], everywhere[1])
    assert same(everywhere[0], everywhere[2])
    for agreement in AGREEMENTS:
        large, number = everywhere[0][agreement]
        assert large == [1.0] * (3 if agreement == "cosine" else 2)
        assert number == len(large) + 3  # numbers of the sums, buffers of two kinds


def test_samples_take_one_for_each_domain_and_one():
    everywhere = on_ranks(2, count_and_train, 4, "data")
    assert same(*everywhere)
    for agreement in AGREEMENTS:
        large, number = everywhere[0][agreement]
        assert large == [1.0] * 5
        assert number == len(large) + 3


# --------------------------------------------------------------------------------------------------------------- errors


def fails(optimizer: Any, loss_fn: Any, batches: Any) -> tuple[str, str] | None:
    try:
        optimizer.meta_step(loss_fn, batches)
    except Exception as error:  # noqa: BLE001  whichever it is, is the result
        return type(error).__name__, str(error)
    return None


class BoomError(Exception):
    """The user's."""


def go_wrong(make: Callable[[nn.Module], Any], parallel: str) -> Any:
    """A good meta-iteration, several in which rank 1 alone goes wrong, and a good one."""
    last = dist.get_rank() == dist.get_world_size() - 1
    model = build("batch_norm")
    method = make(model)
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), method)

    def loss_fn(batch: Batch) -> Tensor:
        return loss_of(model, batch)

    def batches(seed: int) -> list[Batch]:
        if parallel == "data":
            return mine(domain_batches(3, seed))
        return domain_batches(3, seed + 100 * dist.get_rank())

    def nan(batch: Batch) -> Tensor:
        return loss_fn(batch) * (float("nan") if last else 1.0)

    calls = 0

    def boom(batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if last and calls == 4:  # in the second pass
            raise BoomError("out of order")
        return loss_fn(batch)

    def unrelated(batch: Batch) -> Tensor:
        return torch.ones((), requires_grad=True) if last else loss_fn(batch)

    calls_again = [0]

    def with_a_memory(batch: Batch) -> Tensor:
        calls_again[0] += last
        return loss_fn(batch) * (1 + 0.1 * calls_again[0])

    found: list[Any] = [fails(optimizer, loss_fn, batches(0))]
    before = state_of(model, optimizer)
    named = {f"{name} of {dist.get_rank()}": batch for name, batch in zip("abc", batches(1), strict=True)}
    found.append(fails(optimizer, nan, named))
    for wrong in (boom, unrelated, with_a_memory):
        found.append(fails(optimizer, wrong, batches(1)))
    if not last:
        optimizer.method.gamma = 0.7
    found.append(fails(optimizer, loss_fn, batches(1)))
    optimizer.method.gamma = 0.7
    optimizer.param_groups[0]["lr"] = 1e-2 * (1 + last)
    found.append(fails(optimizer, loss_fn, batches(1)))
    optimizer.param_groups[0]["lr"] = 1e-2
    unchanged = same(before, state_of(model, optimizer))
    found.append(fails(optimizer, loss_fn, batches(1)[last:]))
    found.append(fails(optimizer, loss_fn, batches(2)))
    after = state_of(model, optimizer)
    with torch.no_grad():
        next(model.parameters()).add_(float(last))
    optimizer.load_state_dict(optimizer.state_dict())
    found.append(fails(optimizer, loss_fn, batches(2)))
    return found, unchanged, after


def by_domains_of(model: nn.Module) -> IDGM:
    return IDGM(model, GAMMA, "variance", **world())


def by_samples_of(model: nn.Module) -> IDGM:
    return IDGM(model, GAMMA, "variance", **world(parallel="data"))


@pytest.mark.parametrize(
    ("make", "parallel"), [(by_domains_of, "domains"), (by_samples_of, "data")], ids=["domains", "data"]
)
def test_what_goes_wrong_on_one_rank_is_raised_on_all_and_changes_nothing(make: Any, parallel: str):
    everywhere = on_ranks(2, go_wrong, make, parallel)
    expected = [
        None,
        ("ValueError", "the loss of batch"),
        ("RuntimeError", "BoomError: out of order"),
        ("ValueError", "depends on none of the parameters"),
        ("ValueError", "is not the same twice"),
        ("ValueError", "the same method"),
        ("ValueError", "the same learning rates, but it is [0.01] on rank 0 and [0.02] on rank 1"),
        None
        if parallel == "domains"
        else ("ValueError", "the same number of batches, but it is 3 on rank 0 and 2 on rank 1"),
        None,
        ("ValueError", "number 0 of the optimizer, of shape (5, 7), holds other values"),
    ]
    for rank, (found, unchanged, _) in enumerate(everywhere):
        assert unchanged
        for error, wanted in zip(found, expected, strict=True):
            if wanted is None:
                assert error is None
                continue
            kind, message = error
            assert wanted[1].removeprefix("BoomError: ") in message, error
            assert kind in (wanted[0], "BoomError" if rank == 1 else wanted[0]), error
        assert "nan" in found[1][1]
        if parallel == "domains":
            assert "batch 3 (domain 'a of 1')" in found[1][1]
    assert same(everywhere[0][2], everywhere[1][2])


def refusals() -> dict[str, str]:
    found = {}

    def attempt(name: str, make: Callable[[], Any]) -> None:
        try:
            make()
        except ValueError as error:
            found[name] = str(error)

    plain = build("smooth")
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    batches = domain_batches(2, dist.get_rank())
    for name, settings in {
        "function": {"agreement": any_agreement},
        "pairs": {"track_alignment": "pairs"},
        "drawn": {"hvp_domains": 1},
    }.items():
        attempt(name, lambda settings=settings: GradMatch(sgd, IDGM(plain, 0.1, **settings, **world())))
    optimizer = GradMatch(sgd, IDGM(plain, 0.1, **world()))
    optimizer.method.hvp_domains = 1
    attempt("drawn later", lambda: optimizer.meta_step(lambda b: loss_of(plain, b), batches))
    attempt("one domain", lambda: GradMatch(sgd, IDGM(plain, 0.1, parallel="walks")))
    before = copy.deepcopy(plain.state_dict())
    ddp = DistributedDataParallel(plain)
    for name, method in {
        "IDGM": IDGM(ddp, 0.1),
        "SmoothFish": SmoothFish(1.0, 0.1),
        "domains": IDGM(plain, 0.1, **world()),
        "walks": SmoothFish(1.0, 0.1, **world()),
        "alone": IDGM(plain, 0.1, process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True)),
    }.items():
        optimizer = GradMatch(sgd, method)
        attempt(f"ddp {name}", lambda optimizer=optimizer: optimizer.meta_step(lambda b: loss_of(ddp, b), batches))
    assert same(before, plain.state_dict())
    inside = FullyShardedDataParallel(build("smooth"), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = GradMatch(torch.optim.SGD(inside.parameters(), lr=0.1), SmoothFish(1.0, 0.1))
    attempt("fsdp1", lambda: optimizer.meta_step(lambda b: loss_of(inside, b), batches))
    return found


def test_what_cannot_be_shared_is_refused():
    for found in on_ranks(2, refusals):
        assert "parallel='data'" in found["function"]
        assert "track_alignment='pairs' needs" in found["pairs"]
        assert "hvp_domains=1 draws" in found["drawn"]
        assert found["drawn"] == found["drawn later"]
        assert "parallel should be one of" in found["one domain"]
        for name in ("IDGM", "SmoothFish"):
            assert f"{name}(..., process_group=torch.distributed.group.WORLD, parallel='data')" in found[f"ddp {name}"]
        assert "use torch.distributed.fsdp.fully_shard" in found["fsdp1"]
        for name in ("domains", "walks", "alone"):
            assert "pass and call the plain module" in found[f"ddp {name}"]


def names() -> Any:
    model = build("smooth")
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), IDGM(model, 0.1, **world()))
    rank = dist.get_rank()
    named = {f"{rank}{number}": batch for number, batch in enumerate(domain_batches(1 + rank, rank))}
    return optimizer.meta_step(lambda batch: loss_of(model, batch), named).domains


def test_a_report_names_the_domains_of_all_ranks():
    assert on_ranks(2, names) == [("00", "10", "11")] * 2


def nothing_on_one_rank() -> tuple[str, str] | None:
    model = build("smooth")
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), IDGM(model, 0.1, **world()))
    return fails(optimizer, lambda batch: loss_of(model, batch), domain_batches(2, 0) if dist.get_rank() else [])


def test_a_rank_without_domains_is_told_to_all():
    assert all("batches is empty" in error[1] for error in on_ranks(2, nothing_on_one_rank))


def copies() -> bool:
    model = build("smooth")
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), IDGM(model, 0.1, **world()))
    optimizer.meta_step(lambda batch: loss_of(model, batch), domain_batches(1, dist.get_rank()))
    _, duplicate = copy.deepcopy((model, optimizer))
    with pytest.raises(TypeError, match="with a process_group cannot be pickled"):
        pickle.dumps(optimizer)
    assert "process_group='2 ranks', parallel='domains'" in repr(optimizer.method)
    inner = duplicate.method.model
    duplicate.meta_step(lambda batch: loss_of(inner, batch), domain_batches(1, dist.get_rank()))
    return duplicate.method.process_group is optimizer.method.process_group


def test_a_copy_trains_among_the_same_ranks():
    assert on_ranks(2, copies) == [True, True]
