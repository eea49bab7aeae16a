"""``torch.distributed.checkpoint`` and ZeRO: resumes bit for bit; in an inner loop it is right or an error in words."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _models import assert_identical
from _ranks import on_ranks
from _spread import (
    Batch,
    build,
    distance,
    domain_batches,
    error_of,
    full,
    loss_of,
    loss_over,
    mine,
    same,
    sharded,
    weights,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

from torch_gradmatch import IDGM, Average, Fish, GradMatch, SmoothFish

with warnings.catch_warnings():  # of torch about torch.jit.script, which it uses there
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is .* assuming the intent:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
DOMAINS = 3


def network(dtype: torch.dtype = torch.float64) -> Any:
    """Frozen weights and buffers."""
    model: Any = build("batch_norm", dtype)
    model[0].bias.requires_grad_(False)
    return model


def make_batches(count: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return domain_batches(count, 1, dtype=dtype)


def fish(model: nn.Module, **settings: Any) -> Fish:
    return Fish(0.25, inner_steps=DOMAINS, model=model, **settings)


def sgd_and_adamw(model: nn.Module) -> list[Optimizer]:
    p = list(model.parameters())
    return [SGD(p[:3], lr=0.1, momentum=0.9), AdamW([{"params": p[3:5]}, {"params": p[5:], "lr": 0.02}], lr=0.05)]


CASES: dict[str, Callable[[nn.Module], GradMatch[Any]]] = {
    "Adam": lambda m: GradMatch(Adam(m.parameters(), lr=0.05, amsgrad=True), fish(m)),
    "momentum": lambda m: GradMatch(SGD(m.named_parameters(), lr=0.1, momentum=0.9), fish(m, track_alignment=True)),
    "reset": lambda m: GradMatch(Adam(m.parameters(), lr=0.05), fish(m, inner_state="reset")),
    "SGD": lambda m: GradMatch(SGD(m.parameters(), lr=0.1), Fish(0.25, inner_steps=DOMAINS)),
    "several": lambda m: GradMatch(sgd_and_adamw(m), fish(m)),
    "SmoothFish": lambda m: GradMatch(Adam(m.parameters(), lr=0.05), SmoothFish(1.0, 0.1, m)),
    "IDGM": lambda m: GradMatch(SGD(m.parameters(), lr=0.05, momentum=0.9), IDGM(m, 0.1)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "offloaded": {"full_state_dict": True, "cpu_offload": True},
}


def train(model: nn.Module, optimizer: GradMatch[Any], batches: Sequence[Batch]) -> None:
    if not isinstance(optimizer.method, Fish):
        for begin in range(0, len(batches) - 1, DOMAINS):
            optimizer.meta_step(lambda batch: loss_of(model, batch), batches[begin : begin + DOMAINS])
        return
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def whole(model: nn.Module, optimizer: GradMatch[Any]) -> Any:
    """All that a checkpoint holds, the same on any number of ranks; plain SGD has an entry without content, or none."""
    state = optimizer.state_dict()
    entries = {i: {k: full(v) for k, v in entry.items()} for i, entry in state["state"].items() if entry}
    named = {name.removeprefix("module."): full(v) for name, v in model.state_dict().items()}
    return copy.deepcopy((named, entries, state["param_groups"], optimizer.inner_step))


def save(model: nn.Module, optimizer: GradMatch[Any], folder: Path, **options: Any) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: GradMatch[Any], folder: Path, **options: Any) -> None:
    chosen = StateDictOptions(**options)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=chosen)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=chosen
    )


def pair(case: str) -> tuple[nn.Module, GradMatch[Any]]:
    model = network()
    return model, CASES[case](model)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_between_two_inner_loops_resumes_bit_for_bit(case: str, tmp_path: Path):
    batches = make_batches(3 * DOMAINS)
    for name in OPTIONS if case in ("Adam", "several") else ["nested", "flat"]:
        (model, optimizer), (resumed_model, resumed) = pair(case), pair(case)
        train(model, optimizer, batches[:DOMAINS])
        before = whole(model, optimizer)
        save(model, optimizer, tmp_path / name, **OPTIONS[name])
        assert_identical(whole(model, optimizer), before)  # saving changes nothing
        load(resumed_model, resumed, tmp_path / name, **OPTIONS[name])
        assert_identical(whole(resumed_model, resumed), before)
        for one, its in ((model, optimizer), (resumed_model, resumed)):
            train(one, its, batches[DOMAINS:])
        assert_identical(whole(resumed_model, resumed), whole(model, optimizer))
        assert_identical(vars(resumed.last_meta_step), vars(optimizer.last_meta_step))


@pytest.mark.parametrize("case", ["Adam", "momentum", "SGD", "several"])
def test_in_the_middle_of_an_inner_loop_saving_says_what_to_do_and_changes_nothing(case: str):
    """Plain SGD keeps nothing, so it looks new to torch each time."""
    (model, optimizer), (other_model, other) = pair(case), pair(case)
    batches = make_batches(2 * DOMAINS)
    train(model, optimizer, batches[: DOMAINS + 1])
    optimizer.zero_grad()
    for options in OPTIONS.values():
        with pytest.raises(KeyError, match=r"save between two inner loops \(optimizer.inner_step is 0\), or by torch"):
            get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))
    train(model, optimizer, batches[DOMAINS + 1 :])
    train(other_model, other, batches)
    assert_identical(whole(model, optimizer), whole(other_model, other))


def test_a_state_dict_without_ours_loads_as_saved_between_two_inner_loops():
    (model, optimizer), (resumed_model, resumed) = pair("Adam"), pair("Adam")
    train(model, optimizer, make_batches(DOMAINS))
    train(resumed_model, resumed, make_batches(1))
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.optimizer.state_dict())
    assert_identical(whole(resumed_model, resumed), whole(model, optimizer))
    train(model, optimizer, make_batches(1))
    lost = {key: entry for key, entry in optimizer.state_dict().items() if key != "gradmatch"}
    with pytest.raises(ValueError, match="was saved in the middle of an inner loop"):
        resumed.load_state_dict(lost)


def test_digits_that_are_not_in_the_parameters_are_lost_with_a_warning(tmp_path: Path):
    models = [network(torch.bfloat16) for _ in range(2)]
    optimizer, resumed = (
        GradMatch(SGD(m.parameters(), lr=0.05, momentum=0.9), fish(m, meta_dtype=torch.float32)) for m in models
    )
    train(models[0], optimizer, make_batches(DOMAINS, torch.bfloat16))
    save(models[0], optimizer, tmp_path)
    with pytest.warns(UserWarning, match=r"digits of the slow weights.*torch\.save does"):
        load(models[1], resumed, tmp_path)
    assert_identical(whole(models[1], resumed), whole(models[0], optimizer))


# ----------------------------------------------------------------------------------------------- on several processes

SPREAD = [("ddp", "Adam"), ("fsdp", "Adam"), ("fsdp", "momentum"), ("fsdp", "several")]


def spread_over(kind: str, case: str) -> tuple[nn.Module, GradMatch[Any]]:
    model = sharded(network()) if kind == "fsdp" else DistributedDataParallel(network())
    return model, CASES[case](model)


def run_all(folder: Path, *, saves: bool) -> dict[Any, Any]:
    """Train, save and go on; or load and go on."""
    found = {}
    for kind, case in SPREAD:
        model, optimizer = spread_over(kind, case)
        if saves:
            train(model, optimizer, make_batches(DOMAINS))
        move = save if saves else load
        move(model, optimizer, folder / f"{kind} {case}", **OPTIONS["flat" if case == "several" else "nested"])
        found[kind, case] = whole(model, optimizer)
        train(model, optimizer, make_batches(2 * DOMAINS)[DOMAINS:])
        found[kind, case, "trained"] = whole(model, optimizer)
        train(model, optimizer, make_batches(1))
        with pytest.raises(KeyError, match="save between two inner loops"):
            get_optimizer_state_dict(model, optimizer)
    return found


def tell_from_rank_0() -> tuple[Any, Any]:
    model, optimizer = spread_over("ddp", "Adam")
    train(model, optimizer, make_batches(DOMAINS))
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    other, resumed = spread_over("ddp", "Adam")
    other.load_state_dict(model.state_dict())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other, resumed, state if dist.get_rank() == 0 else {}, options=options)
    return whole(model, optimizer), whole(other, resumed)


def test_rank_0_tells_the_others_its_state():
    for its, told in on_ranks(2, tell_from_rank_0):
        assert_identical(told, its)


def test_it_loads_on_another_number_of_ranks(tmp_path: Path):
    """All ranks see the same batches, so they train as one does: what 2 save goes to 4, and to one not sharded."""
    saved = on_ranks(2, partial(run_all, saves=True), tmp_path)
    assert_identical(saved[1], saved[0])
    for loaded in on_ranks(4, partial(run_all, saves=False), tmp_path):
        for key, found in loaded.items():
            if len(key) == 2:
                assert_identical(found, saved[0][key])
            else:
                torch.testing.assert_close(found[:2], saved[0][key][:2], rtol=1e-12, atol=1e-14)
    for kind, case in SPREAD:
        model, optimizer = pair(case)
        load(model, optimizer, tmp_path / f"{kind} {case}", **OPTIONS["flat" if case == "several" else "nested"])
        assert_identical(whole(model, optimizer), saved[0][kind, case])


# ------------------------------------------------------------------------------------------------ the step that is none


@pytest.mark.parametrize("case", ["reset", "momentum", "SGD", "several"])
def test_asking_a_new_optimizer_takes_no_inner_step(case: str):
    (model, optimizer), (fresh_model, fresh) = pair(case), pair(case)
    before = copy.deepcopy(dict(model.state_dict()))
    for _ in range(3):
        get_optimizer_state_dict(model, optimizer)
    assert optimizer.inner_step == 0
    assert optimizer.last_meta_step is None
    assert_identical(dict(model.state_dict()), before)
    with pytest.raises(RuntimeError, match=r"interpolate\(\) needs at least one inner step"):
        optimizer.interpolate()
    if case in ("reset", "SGD"):  # the others keep the step count that this leaves in a plain one, too
        train(model, optimizer, make_batches(2 * DOMAINS))
        train(fresh_model, fresh, make_batches(2 * DOMAINS))
        assert_identical(whole(model, optimizer), whole(fresh_model, fresh))


def test_a_warm_up_from_zero_counts_and_an_average_or_an_optimizer_that_needs_a_closure_says_so():
    model = network()
    optimizer = GradMatch(Adam(model.parameters(), lr=0.0), fish(model))
    optimizer.zero_grad()
    (0 * loss_of(model, make_batches(1)[0])).backward()
    optimizer.step()
    assert optimizer.inner_step == 1
    model = network()
    optimizer = GradMatch(torch.optim.LBFGS(model.parameters()), fish(model))
    with pytest.raises(RuntimeError, match="LBFGS needs a closure, so torch"):
        get_optimizer_state_dict(model, optimizer)
    assert optimizer.inner_step == 0
    optimizer = GradMatch(Adam(model.parameters()), fish(model), average=Average())
    train(model, optimizer, make_batches(DOMAINS))
    with pytest.raises(KeyError, match=r"torch\.distributed\.checkpoint does not keep"):
        get_optimizer_state_dict(model, optimizer)


def test_a_meta_iteration_that_failed_first_does_not_hide_that_there_is_no_state(tmp_path: Path):
    """Else what Adam keeps would be lost in silence: torch restores only what is there already."""
    (model, optimizer), (resumed_model, resumed) = pair("Adam"), pair("Adam")
    train(model, optimizer, make_batches(DOMAINS))
    save(model, optimizer, tmp_path)
    bad = [(x * (torch.nan if i == DOMAINS - 1 else 1), y) for i, (x, y) in enumerate(make_batches(DOMAINS))]
    with pytest.raises(ValueError, match=f"loss of batch {DOMAINS - 1} is nan"):
        resumed.meta_step(lambda batch: loss_of(resumed_model, batch), bad)
    resumed.zero_grad()
    load(resumed_model, resumed, tmp_path)
    assert_identical(whole(resumed_model, resumed), whole(model, optimizer))


# ------------------------------------------------------------------------------------------------ ZeRO, by torch.save


def from_rank_0(state: Any) -> Any:
    """What rank 0 would write to a file, read on every rank."""
    file = io.BytesIO()
    torch.save(state, file)
    sent = [file.getvalue()]
    dist.broadcast_object_list(sent, 0)
    return torch.load(io.BytesIO(sent[0]), weights_only=True)


def over_zero(steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Save after some steps, load on both ranks, go on with both."""

    def make() -> tuple[nn.Module, GradMatch[Fish]]:
        model = DistributedDataParallel(build("smooth"))
        zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
        return model, GradMatch(zero, Fish(0.3, inner_steps=3, model=model))

    model, optimizer = make()
    batches = mine([batch for seed in range(3) for batch in domain_batches(3, seed)])
    train(model, optimizer, batches[:steps])
    optimizer.consolidate_state_dict(0)
    refused = error_of(optimizer.state_dict)
    state = from_rank_0((model.state_dict(), optimizer.state_dict()) if dist.get_rank() == 0 else None)
    resumed_model, resumed = make()
    resumed_model.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    assert resumed.inner_step == optimizer.inner_step == steps % 3
    for one, its in ((model, optimizer), (resumed_model, resumed)):
        train(one, its, batches[steps:])
    return weights(model), weights(resumed_model), refused


def test_the_state_that_zero_consolidates_loads_on_all_ranks():
    """Also in the middle of an inner loop; and the parameters are those of plain Adam on one process."""
    model = build("smooth")
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=0.01), Fish(0.3, model=model))
    for seed in range(3):
        optimizer.meta_step(partial(loss_over, model, size=2), domain_batches(3, seed))
    for steps in (3, 4):
        (first, resumed, refused), (last, resumed_there, refused_there) = on_ranks(2, over_zero, steps)
        assert same(first, last)
        assert same(resumed, first)
        assert same(resumed_there, first)
        assert distance(first, weights(model)) < 1e-9
        assert not refused
        assert "consolidate_state_dict" in refused_there
