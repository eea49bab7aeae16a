"""Fish on several ranks: over DDP and ``fully_shard`` as on one process, and by walks whose mean counts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _reference import ReferenceFish
from _spread import build, distance, domain_batches, full, loss_of, loss_over, mine, sharded, spread, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from torch_gradmatch import Fish, GradMatch

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}
MODES: dict[str, dict[str, Any]] = {
    "carry": {"inner_state": "carry"},
    "reset": {"inner_state": "reset"},
    "tracked": {"inner_state": "carry", "track_alignment": True},
}


def reference(name: str, mode: str, size: int, iterations: int) -> dict[str, Tensor]:
    """What one process makes of the whole batches."""
    fish = ReferenceFish(
        build(name), lambda model: OPTIMIZERS["adam"](model.parameters()), 0.3, MODES[mode]["inner_state"]
    )
    for iteration in range(iterations):
        for batch in domain_batches(3, iteration):
            fish.step(lambda model, batch=batch: loss_over(model, batch, size))
        fish.interpolate()
    return weights(fish.model)


def lockstep(scheme: str, name: str, mode: str, *, manual: bool) -> tuple[float, Any, Any]:
    model = spread(scheme, build(name))
    optimizer = GradMatch(
        OPTIMIZERS["adam"](model.parameters()), Fish(0.3, inner_steps=3 if manual else None, **MODES[mode])
    )
    for iteration in range(3):
        batches = mine(domain_batches(3, iteration))
        if manual:
            for batch in batches:
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                optimizer.step()
        else:
            optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    expected = reference(name, mode, dist.get_world_size(), 3)
    last = optimizer.last_meta_step
    assert last is not None
    return distance(weights(model), expected), last.grad_norms, last.cosine


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["batch_norm", "transformer", "tied"])
@pytest.mark.parametrize(
    ("size", "scheme"), [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp"), (2, "fsdp_kept"), (4, "hsdp")]
)
def test_what_averages_gradients_is_as_one_process(size: int, scheme: str, name: str, mode: str):
    found = on_ranks(size, _lockstep, scheme, name, mode, size == 3)
    assert max(error for error, _, _ in found) < 1e-9
    if mode == "tracked":
        norms, cosine = tracked_by_one_process(name, size)
        for _, its_norms, its_cosine in found:
            torch.testing.assert_close(its_norms, norms)
            torch.testing.assert_close(its_cosine, cosine)


def _lockstep(scheme: str, name: str, mode: str, manual: bool) -> tuple[float, Any, Any]:
    return lockstep(scheme, name, mode, manual=manual)


def tracked_by_one_process(name: str, size: int) -> tuple[Tensor, Tensor]:
    """Norms and cosine of the third meta-iteration."""
    model = build(name)
    optimizer = GradMatch(OPTIMIZERS["adam"](model.parameters()), Fish(0.3, track_alignment=True))
    for iteration in range(3):
        report = optimizer.meta_step(lambda batch: loss_over(model, batch, size), domain_batches(3, iteration))
    assert report.grad_norms is not None
    assert report.cosine is not None
    return report.grad_norms, report.cosine


# ------------------------------------------------------------------------------------------------------------ FSDP2


def half_with_wide_slow_weights(meta_lr: float) -> tuple[list[str], float, float]:
    model = sharded(build("smooth", torch.bfloat16))
    plain = build("smooth", torch.bfloat16)
    optimizers = [
        GradMatch(torch.optim.SGD(m.parameters(), lr=0.1), Fish(meta_lr, meta_dtype=torch.float32))
        for m in (model, plain)
    ]
    for iteration in range(4):
        batches = domain_batches(3, iteration, dtype=torch.bfloat16)
        optimizers[0].meta_step(lambda batch: loss_of(model, batch), batches)  # the same on every rank: the mean is it
        optimizers[1].meta_step(lambda batch: loss_of(plain, batch), batches)
    slow = [
        [full(optimizer.state[p]["slow"]) for p in m.parameters()]
        for optimizer, m in zip(optimizers, (model, plain), strict=True)
    ]
    kinds = [str(optimizers[0].state[p]["slow"].placements) for p in model.parameters()]
    assert all(s.dtype is torch.float32 for s in slow[0])
    error = max(float((a - b).abs().max()) for a, b in zip(*slow, strict=True))
    return kinds, error, distance(weights(model), weights(plain))


def test_slow_weights_in_single_precision_are_sharded_like_the_parameters():
    for kinds, error, fast in on_ranks(2, half_with_wide_slow_weights, 0.01):
        assert set(kinds) == {"(Shard(dim=0),)"}
        assert error < 2e-3  # of a step's size .1, in bf16
        assert fast < 1e-2


def mixed_precision() -> float:
    model = sharded(build("smooth", torch.float32), param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(0.5))
    plain = build("smooth", torch.float32)
    by_hand = GradMatch(torch.optim.SGD(plain.parameters(), lr=0.1), Fish(0.5))
    batches = domain_batches(3, 0, dtype=torch.float32)
    for _ in range(5):
        optimizer.meta_step(lambda batch: loss_of(model, batch), mine(batches))
        by_hand.meta_step(lambda batch: loss_over(plain, batch, dist.get_world_size()), batches)
    return distance(weights(model), weights(plain))


def test_a_mixed_precision_policy_rounds_only():
    assert max(on_ranks(2, mixed_precision)) < 2e-2


def look_and_go_back() -> list[float]:
    """Distances: slow weights inside the block, fast ones after it, weights after a rollback."""
    model = sharded(build("batch_norm"))
    optimizer = GradMatch(OPTIMIZERS["adam"](model.parameters()), Fish(0.5, inner_steps=3, model=model))
    start, buffers = weights(model), {n: b.clone() for n, b in model.named_buffers()}
    for batch in mine(domain_batches(2, 0)):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    fast = weights(model)
    with optimizer.slow_weights():
        inside = distance(weights(model), start)
    after = distance(weights(model), fast)
    optimizer.rollback()
    return [
        inside,
        after,
        distance(weights(model), start),
        distance(dict(model.named_buffers()), buffers),
        -distance(fast, start),
    ]


def test_slow_weights_and_rollback_are_exact_over_shards():
    for inside, after, back, buffers, moved in on_ranks(3, look_and_go_back):
        assert [inside, after, back, buffers] == [0, 0, 0, 0]
        assert moved < -1e-3


def spoil_a_shard(scheme: str) -> tuple[str, float]:
    """A loss that is NaN on one rank only, in the second of three inner steps; then go on."""
    model = spread(scheme, build("smooth"))
    optimizer = GradMatch(OPTIMIZERS["adam"](model.parameters()), Fish(0.3))
    batches = mine(domain_batches(3, 0))
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    before = [weights(model), copy.deepcopy([full(v) for s in optimizer.optimizer.state.values() for v in s.values()])]
    if dist.get_rank() == 1:
        batches[1] = (batches[1][0] * torch.nan, batches[1][1])
    try:
        optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    except ValueError as error:
        message = str(error)
    kept = all(map(torch.equal, before[1], [full(v) for s in optimizer.optimizer.state.values() for v in s.values()]))
    moved = distance(weights(model), before[0])
    for iteration in (0, 1):  # again from there: as if nothing had been
        optimizer.meta_step(lambda batch: loss_of(model, batch), mine(domain_batches(3, iteration)))
    assert kept
    return message, moved


@pytest.mark.parametrize("scheme", ["ddp", "fsdp"])
def test_a_loss_that_is_nan_on_one_rank_raises_on_all_and_changes_nothing(scheme: str):
    found = on_ranks(2, spoil_a_shard, scheme)
    assert [moved for _, moved in found] == [0, 0]
    assert found[0][0].startswith("on rank 1: the loss of batch 1 is nan")
    assert found[1][0].startswith("the loss of batch 1 is nan")


def diverge_on_one_shard() -> str:
    model = sharded(build("smooth"))
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(0.3, inner_steps=2))
    for number, batch in enumerate(mine(domain_batches(2, 0))):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if number == 1 and dist.get_rank() == 1:  # in the rows that this rank holds, and nowhere else
            next(model.parameters()).grad.to_local().fill_(torch.inf)
        try:
            optimizer.step()
        except RuntimeError as error:
            message = str(error)
    optimizer.rollback()
    assert all(torch.isfinite(p).all() for p in weights(model).values())
    return message


def test_a_shard_that_diverged_raises_on_all_ranks():
    for message in on_ranks(2, diverge_on_one_shard):
        assert "the inner loop diverged: after 2 inner steps" in message


def try_with_different(what: str) -> str:
    model = spread("ddp", build("smooth"))
    odd = dist.get_rank() == 1
    method = Fish(0.3 + (odd and what == "meta_lr") * 0.1)
    optimizer = GradMatch(OPTIMIZERS["adam"](model.parameters()), method)
    batches = mine(domain_batches(3 + (odd and what == "batches"), 0))
    if odd and what == "empty":
        batches = []
    try:
        optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("batches", "number of batches, but it is 3 on rank 0 and 4 on rank 1"),
        ("meta_lr", "same method"),
        ("empty", "batches is empty"),
    ],
)
def test_ranks_in_lockstep_that_differ_are_told_before_anything_moves(what: str, says: str):
    assert all(says in message for message in on_ranks(2, try_with_different, what))


# ------------------------------------------------------------------------------------------------------------ walks


def own_batches(iteration: int, rank: int) -> list[Any]:
    """Every rank its own samples of the same domains, in opposite orders."""
    batches = domain_batches(3, 1000 * rank + iteration)
    return batches if rank % 2 == 0 else batches[::-1]


def mean_of_walks_by_hand(name: str, mode: str, kind: str, size: int, iterations: int) -> dict[str, Tensor]:
    """One process walks for all ranks one after the other, each time from the same point."""
    model = build(name)
    optimizers = []
    names = [*dict(model.named_parameters()), *(n for n, b in model.named_buffers() if b.is_floating_point())]
    walkers = [copy.deepcopy(model) for _ in range(size)]
    optimizers = [OPTIMIZERS[kind](walker.parameters()) for walker in walkers]
    for iteration in range(iterations):
        ends: list[dict[str, Tensor]] = []
        for rank, (walker, optimizer) in enumerate(zip(walkers, optimizers, strict=True)):
            walker.load_state_dict(model.state_dict())
            if mode == "reset":
                optimizer.state.clear()
            for batch in own_batches(iteration, rank):
                optimizer.zero_grad()
                loss_of(walker, batch).backward()
                optimizer.step()
            ends.append({n: walker.state_dict()[n].clone() for n in names})
        state = model.state_dict()
        for n in names:
            mean = torch.stack([end[n] for end in ends]).mean(0)
            state[n].copy_(state[n] + 0.3 * (mean - state[n]))
        if mode != "reset":
            for entries in zip(*(list(optimizer.state.values()) for optimizer in optimizers), strict=True):
                for key in entries[0]:
                    mean = torch.stack([entry[key].double() for entry in entries]).mean(0)
                    for entry in entries:
                        entry[key].copy_(mean)
    return {n: model.state_dict()[n] for n in names}


def walk(name: str, mode: str, kind: str, manual: bool) -> tuple[dict[str, Tensor], list[Any]]:
    model = build(name)
    method = Fish(0.3, inner_steps=3 if manual else None, model=model, process_group=dist.group.WORLD, **MODES[mode])
    optimizer = GradMatch(OPTIMIZERS[kind](model.parameters()), method)
    for iteration in range(3):
        batches = own_batches(iteration, dist.get_rank())
        if manual:
            for batch in batches:
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                optimizer.step()
        else:
            optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    found = {n: t.detach().clone() for n, t in model.state_dict().items()}
    state = [v.clone() for entry in optimizer.optimizer.state.values() for v in entry.values() if v is not None]
    return found, state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["batch_norm", "transformer", "tied"])
@pytest.mark.parametrize(("size", "kind"), [(2, "adam"), (3, "sgd")])
def test_walks_are_the_mean_of_each_and_the_same_bits_everywhere(size: int, kind: str, name: str, mode: str):
    found = on_ranks(size, walk, name, mode, kind, size == 3)
    expected = mean_of_walks_by_hand(name, mode, kind, size, 3)
    for weights_there, state in found:
        for n, tensor in found[0][0].items():
            assert torch.equal(tensor, weights_there[n])
        assert all(map(torch.equal, state, found[0][1]))
        assert bool(state) == (mode != "reset")
        assert distance({n: weights_there[n] for n in expected}, expected) < 1e-9


def count_bytes(process_group: bool, domains: int) -> tuple[int, int]:
    """Bytes reduced, and how many reductions of more than a few of them, in one meta-iteration."""
    counted: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
        counted.append(tensor.nbytes)
        return reduce(tensor, *arguments, **settings)

    model: nn.Module = build("smooth")
    group = dist.group.WORLD if process_group else None
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(0.3, process_group=group))
    if not process_group:

        def average(_optimizer: Any, _arguments: Any, _settings: Any) -> None:
            vector = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
            counting(vector)

        optimizer.optimizer.register_step_pre_hook(average)
    dist.all_reduce = counting
    try:
        optimizer.meta_step(lambda batch: loss_of(model, batch), domain_batches(domains, 0))
    finally:
        dist.all_reduce = reduce
    return sum(counted), len(counted)


@pytest.mark.parametrize("domains", [2, 5])
def test_walks_reduce_the_parameters_once_and_not_once_for_every_domain(domains: int):
    size = sum(p.numel() * 8 for p in build("smooth").parameters())
    assert on_ranks(2, count_bytes, True, domains) == [(size, 1)] * 2
    assert on_ranks(2, count_bytes, False, domains) == [(domains * size, domains)] * 2


def opposite_walks(lr: float) -> float:
    """Error of the mean of a walk and its reverse against the exact direction."""
    model = build("smooth")
    batches = domain_batches(4, 3)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=lr), Fish(1.0, process_group=dist.group.WORLD))
    exact = build("smooth")
    losses = torch.stack([loss_of(exact, batch) for batch in batches])
    parameters = list(exact.parameters())
    gradients = [torch.autograd.grad(loss, parameters, create_graph=True) for loss in losses]
    flat = torch.stack([torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients])
    gip = (flat.sum(0).square().sum() - flat.square().sum()) / 12
    direction = flat.mean(0).detach() - lr * 3 / 4 * nn.utils.parameters_to_vector(torch.autograd.grad(gip, parameters))
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches[:: 1 if dist.get_rank() == 0 else -1])
    found = (start - nn.utils.parameters_to_vector(model.parameters()).detach()) / (lr * 4)
    return float((found - direction).norm())


def test_two_opposite_walks_have_the_exact_direction_to_second_order():
    errors = [on_ranks(2, opposite_walks, lr)[0] for lr in (4e-3, 2e-3, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def walk_over_shards() -> tuple[float, dict[str, Tensor]]:
    """Four ranks: shards within two nodes of two, walks across them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("walks", "shards"))
    model = sharded(build("transformer"), mesh["shards"])
    node = mesh.get_local_rank("walks")
    optimizer = GradMatch(OPTIMIZERS["adam"](model.parameters()), Fish(0.3, process_group=mesh.get_group("walks")))
    for iteration in range(3):
        batches = [
            (x[mesh.get_local_rank("shards") :: 2], y[mesh.get_local_rank("shards") :: 2])
            for x, y in own_batches(iteration, node)
        ]
        optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    found = weights(model)
    return distance(found, mean_of_walks_by_hand("transformer", "carry", "adam", 2, 3)), found


def test_walks_across_nodes_with_shards_within():
    found = on_ranks(4, walk_over_shards)
    for error, weights_there in found:
        assert error < 1e-9
        assert distance(weights_there, found[0][1]) == 0


def fail_on_one_walk(how: str) -> tuple[str, float]:
    model = build("smooth")
    before = weights(model)
    optimizer = GradMatch(OPTIMIZERS["adam"](model.parameters()), Fish(0.3, process_group=dist.group.WORLD))
    odd = dist.get_rank() == 1
    batches = own_batches(0, 0)
    if odd and how == "nan":
        batches[1] = (batches[1][0] * torch.nan, batches[1][1])
    if odd and how == "batches":
        batches = batches[:2]
    if odd and how == "empty":
        batches = []
    if odd and how == "lr":
        optimizer.param_groups[0]["lr"] = 0.5

    def loss_fn(batch: Any) -> Tensor:
        if odd and how == "user":
            raise KeyError("no such column")
        return loss_of(model, batch)

    message = ""
    try:
        optimizer.meta_step(loss_fn, batches)
    except Exception as error:  # noqa: BLE001  whichever it is, is the result
        message = f"{type(error).__name__}: {error}"
    moved = distance(weights(model), before)
    optimizer.param_groups[0]["lr"] = 0.01
    for iteration in range(2):
        optimizer.meta_step(lambda batch: loss_of(model, batch), own_batches(iteration, dist.get_rank()))
    return message, moved


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nan", "ValueError: on rank 1: the loss of batch 1 is nan"),
        ("batches", "ValueError: the ranks should have the same number of inner steps, but it is 3 on rank 0 and 2"),
        ("empty", "ValueError: on rank 1: batches is empty"),
        ("user", "RuntimeError: on rank 1: KeyError: 'no such column'"),
        ("lr", "ValueError: the ranks should have the same learning rates, but it is [0.01] on rank 0 and [0.5]"),
    ],
)
def test_what_goes_wrong_on_one_walk_is_raised_on_all_and_training_goes_on(how: str, says: str):
    found = on_ranks(2, fail_on_one_walk, how)
    assert found[0][0].startswith(says)
    assert [moved for _, moved in found] == [0, 0]
    if how in ("nan", "empty"):
        assert found[1][0].startswith(says.replace("on rank 1: ", ""))
    if how == "user":
        assert found[1][0] == "KeyError: 'no such column'"


def refused(what: str) -> str:
    model = build("batch_norm" if what == "buffers" else "smooth")
    settings: dict[str, Any] = {"process_group": dist.group.WORLD}
    parameters = list(model.parameters())
    if what == "other parameters" and dist.get_rank() == 1:
        with torch.no_grad():
            parameters[0].add_(1e-12)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=0.01)
    if what == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if what == "lbfgs":
        optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)
    before = weights(model)
    wrapped = GradMatch(optimizer, Fish(0.3, **settings))
    try:
        wrapped.meta_step(lambda batch: loss_of(model, batch), domain_batches(2, 0))
    except (RuntimeError, ValueError) as error:
        assert distance(weights(model), before) == 0
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("ddp", "DistributedDataParallel averages their gradients in every step: leave one of the two out"),
        ("buffers", "the first is running_mean of BatchNorm1d, which Fish(process_group=...) has to average"),
        ("other parameters", "parameter"),
        ("lbfgs", 'Pass Fish(inner_state="reset")'),
    ],
)
def test_what_walks_cannot_do_right_they_refuse(what: str, says: str):
    assert all(says in message for message in on_ranks(2, refused, what))


def copied() -> bool:
    model = build("smooth")
    optimizer = GradMatch(OPTIMIZERS["adam"](model.parameters()), Fish(0.3, process_group=dist.group.WORLD))
    optimizer.meta_step(lambda batch: loss_of(model, batch), domain_batches(2, 0))
    both = copy.deepcopy((model, optimizer))
    both[1].meta_step(lambda batch: loss_of(both[0], batch), domain_batches(2, 1))
    optimizer.meta_step(lambda batch: loss_of(model, batch), domain_batches(2, 1))
    return distance(weights(both[0]), weights(model)) == 0 and both[1].method.process_group is dist.group.WORLD


def test_a_copy_walks_with_the_same_ranks():
    assert all(on_ranks(2, copied))


def test_a_group_is_shown_and_checked():
    with pytest.raises(TypeError, match=r"process_group should be a torch\.distributed\.ProcessGroup"):
        Fish(process_group="gloo")
    assert "process_group" not in repr(Fish())


def overflow_in_one_shard(tracked: bool) -> list[tuple[bool, float]]:
    """Whether each inner step has moved anything, and the scale after it."""
    model = spread("fsdp", build("smooth", torch.float32))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = GradMatch(
        torch.optim.SGD(model.parameters(), lr=0.1), Fish(0.5, inner_steps=4, track_alignment=tracked)
    )
    found = []
    for number, batch in enumerate(mine(domain_batches(3, 0, dtype=torch.float32))):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        if number == 1 and dist.get_rank() == 1:
            next(model.parameters()).grad.to_local().fill_(torch.inf)
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        found.append((distance(weights(model), before) > 0, scaler.get_scale()))
    assert optimizer.inner_step == 3
    return found


@pytest.mark.parametrize("tracked", [False, True])
def test_gradients_that_overflow_on_one_shard_are_skipped_on_all(tracked: bool):
    expected = [(True, 2.0**16), (False, 2.0**15), (True, 2.0**15)]
    assert on_ranks(2, overflow_in_one_shard, tracked) == [expected] * 2


def save_in_mid_walk() -> tuple[str, bool]:
    model = build("smooth")
    optimizer = GradMatch(
        OPTIMIZERS["adam"](model.parameters()), Fish(0.3, inner_steps=2, process_group=dist.group.WORLD)
    )
    message = ""
    for batch in domain_batches(2, dist.get_rank()):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        if optimizer.inner_step:
            try:
                optimizer.state_dict()
            except RuntimeError as error:
                message = str(error)
    return message, bool(optimizer.state_dict())


def test_a_walk_half_done_is_not_saved_as_if_it_were_that_of_all_ranks():
    for message, between in on_ranks(2, save_in_mid_walk):
        assert message.startswith("state_dict() in the middle of a walk (1 steps taken)")
        assert between
