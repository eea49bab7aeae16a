"""Where a sampler goes on from a state dict: one of an earlier version, or saved on another number of ranks, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch_gradmatch._checks import check_choice, check_int
from torch_gradmatch.data._labels import check_short, shown
from torch_gradmatch.data._split import SPLITS, RankPlan, Split

__all__ = ["STATE_VERSION", "saved_place"]

STATE_VERSION = 4
# What was added to the state in versions 2, 3 and 4, with the value of everything saved before.
ADDED_SETTINGS: dict[int, dict[str, int | str]] = {
    2: {"order": "random"},
    3: {"exhausted": "stop", "batches_per_epoch": 0},
    4: {"num_replicas": 1, "split": "batch"},
}


def saved_place(
    state_dict: Any, settings: Mapping[str, int | str | bool], plan: RankPlan, plan_of: Callable[[Split], RankPlan]
) -> tuple[int, int]:
    """Return the place at which a rank goes on.

    Args:
        state_dict: Of any rank of a sampler with the same settings; R and the split may be others.
        settings: Of this sampler.
        plan: Of this rank.
        plan_of: Returns the plan of the same sampler with another split.

    Returns:
        An epoch, and how many of the rank's batches in it were served.

    Raises:
        ValueError: If the state is malformed or of other settings, or the rest of the epoch is another on this number
            of ranks.
    """
    state_dict = _with_expected_names(state_dict, ["version", "epoch", "position", *settings])
    for name, own in {"version": STATE_VERSION, **settings}.items():
        if name not in {"num_replicas", "split", "batches_per_epoch"}:  # these may be of another number of ranks
            _check_same(name, state_dict[name], own)
    saved = _plan_of_saved(state_dict, plan, plan_of)
    if settings["exhausted"] == "cycle":
        _check_same("batches_per_epoch", state_dict["batches_per_epoch"], saved.plan.length(0))
    else:
        _check_same("batches_per_epoch", state_dict["batches_per_epoch"], settings["batches_per_epoch"])
    epoch, position = (
        check_short(check_int, f"the state dict's {name}", state_dict[name], 0) for name in ("epoch", "position")
    )
    if position > (length := saved.plan.length(epoch)):
        raise ValueError(
            f"the state dict's position is {shown(position)}, but epoch {shown(epoch)} has {shown(length)} batches"
        )
    if saved is plan:
        if position % plan.split.shares:
            raise ValueError(
                f"the state dict's position is {shown(position)}, but should be a multiple of "
                f"num_replicas={plan.split.num_replicas}: with split='domains' it counts the batches of all ranks"
            )
    elif position in {0, length}:  # between two epochs any number of ranks goes on
        return epoch, plan.length(epoch) if position else 0
    else:
        _check_same_rest(saved, plan, position)
    return epoch, position // plan.split.shares


def _with_expected_names(state_dict: Any, expected: list[str]) -> dict[str, Any]:
    """Return a state as it would be saved today, or raise ``ValueError`` if it holds other names."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"the state dict should hold exactly {expected} (got {shown(state_dict)})")
    for version, added in ADDED_SETTINGS.items():
        found = state_dict.get("version")
        if type(found) is int and found == version - 1 and not any(name in state_dict for name in added):
            state_dict = {**state_dict, "version": version, **added}
    if set(state_dict) != set(expected):
        missing, unknown = (
            [name for name in ones if name not in others]
            for ones, others in ((expected, state_dict), (state_dict, expected))
        )
        raise ValueError(
            f"the state dict should hold exactly {expected} (it lacks {missing}, and has {shown(unknown)})"
        )
    return dict(state_dict)


def _check_same(name: str, saved: Any, own: object) -> None:
    """Raise ``ValueError`` unless a setting was saved with this sampler's value."""
    if type(saved) is not type(own) or saved != own:
        found, advice = shown(saved), "resume with the same domains and arguments"
        if (name, found) == ("order", "'random'"):
            advice = 'it was saved in random order, DomainBatchSampler(order="random") resumes it'
        raise ValueError(f"the state dict's {name} is {found}, but this sampler's is {shown(own)}: {advice}")


def _plan_of_saved(state_dict: Mapping[str, Any], plan: RankPlan, plan_of: Callable[[Split], RankPlan]) -> RankPlan:
    """Return the plan of a rank of the sampler that saved a state, which is this one's if R is the same."""
    own = plan.split
    num_replicas = check_short(check_int, "the state dict's num_replicas", state_dict["num_replicas"], 1)
    kind = check_short(check_choice, "the state dict's split", state_dict["split"], SPLITS)
    if num_replicas == 1:
        kind = own.kind  # one rank serves the same with every split
    elif own.num_replicas > 1:
        _check_same("split", kind, own.kind)
    if num_replicas == own.num_replicas:
        return plan
    try:
        return plan_of(replace(own, kind=kind, num_replicas=num_replicas, rank=0))
    except ValueError as error:
        raise ValueError(f"the state dict's num_replicas is {shown(num_replicas)}, but {error}") from None


def _check_same_rest(saved: RankPlan, plan: RankPlan, position: int) -> None:
    """Raise ``ValueError`` unless the rest of an epoch is the same on another number of ranks."""
    before, now = saved.split, plan.split
    kind = now.kind if now.num_replicas > 1 else before.kind
    size = plan.plan.domains_per_step
    if kind == "walks":
        reason = "split='walks' deals a domain's samples out to the ranks"
    elif kind == "domains":
        if position % size == 0:
            return
        reason = f"with split='domains' the ranks are in the middle of a group of {size} batches"
    else:
        cut = [size for size in plan.sizes if before.num_samples(size) != now.num_samples(size)]
        if not cut:
            return
        reason = (
            f"split='batch' cuts a domain's last batch to a multiple of num_replicas, and {len(cut)} of "
            f"{len(plan.sizes)} domains then end elsewhere, for instance one of {cut[0]} samples"
        )
    places = "between two groups or two epochs" if kind == "domains" else "between two epochs (at position 0)"
    raise ValueError(
        f"the state dict's num_replicas is {before.num_replicas}, but this sampler's is {now.num_replicas}, and what "
        f"follows position {shown(position)} in the epoch would be another: {reason}. Any number of ranks resumes "
        f"{places}; here resume with num_replicas={before.num_replicas}"
    )
