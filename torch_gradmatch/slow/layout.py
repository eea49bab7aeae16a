r"""The layout of a checkpoint in which ours stands beside the wrapped optimizer's, where checkpointers look for it.

``torch.distributed.checkpoint`` keeps of an optimizer's state dict what stands in ``state[p]`` and in the parameter
groups, and reshards what has a parameter's placements. So tensors go to the entries of the parameters to which they
belong, in the parameter's shape: ``state[p]["slow"]``, ``state[p]["slow_z"]``, ``state[p]["alignment_sums"]``. Buffers
of the model have no parameter: they go to the entry of the first one that is trained, ``"slow_buffer:NAME"``. A group
would take them, too, but if it is flattened once for each parameter in it. All numbers are one string of JSON, under
``"gradmatch"`` in every group: a leaf of a fixed name and any length. JSON of Python keeps every digit of a float.

What is restored are the entries that the optimizer that loads has already. So the entries are always the same ones,
whether or not an inner loop is open; where there is nothing to say they hold present values or zeros, and which of them
count is said by the numbers, ``"places"``. An entry that was lost on the way is noticed so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_gradmatch._foreach import is_sharded, local_of
from torch_gradmatch.parallel.shards import sharded_like
from torch_gradmatch.wrapped.members import NUMBERS

__all__ = [
    "BUFFER",
    "SLOW",
    "alignment_entries",
    "check_tensors",
    "host_of",
    "is_own",
    "is_standard",
    "join",
    "part",
    "read_numbers",
    "take_out",
]

SLOW = "slow"
BUFFER = "slow_buffer:"
SUMS, UNITS, GRADIENT = "alignment_sums", "alignment_units", "alignment_gradient_"
_SCALARS = ("squares", "products", "cosines")


def is_own(key: str) -> bool:
    """Return whether an entry beside the wrapped optimizer's is ours by its name, apart from slow iterates."""
    return key in (SLOW, SUMS, UNITS) or key.startswith((BUFFER, GRADIENT))


def is_standard(state_dict: Mapping[str, Any], count: int) -> bool:
    """Return whether an optimizer's state dict is laid out as ``torch.optim.Optimizer`` does it.

    Args:
        state_dict: What the wrapped optimizer returned.
        count: Number of its parameters.

    Returns:
        False for optimizers that hold another one and save it in a way of their own, for instance.
    """
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        return False
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        return False
    return len(_names(groups)) == count and all(isinstance(entry, dict) for entry in state.values())


def host_of(parameters: Iterable[Tensor]) -> Tensor | None:
    """Return the parameter in whose entry the buffers are: the first that is trained.

    Args:
        parameters: Those that have slow copies, in order.

    Returns:
        None if there is no such parameter.
    """
    return next((p for p in parameters if p.requires_grad), None)


def alignment_entries(alignment: Mapping[str, Any], index: int, parameter: Tensor) -> dict[str, Tensor]:
    """Return the running sums that belong to one parameter, in its shape.

    Args:
        alignment: The state of a ``GradientAlignment``; what it lacks is zero.
        index: Position of the parameter.
        parameter: It itself.

    Returns:
        The entries: ``"alignment_sums"``, ``"alignment_units"`` and, if pairs are measured, the gradients.
    """
    entries = {SUMS: _shaped(alignment["sums"].get(index), parameter)}
    entries[UNITS] = _shaped(alignment["unit_sums"].get(index), parameter)
    for number, gradients in enumerate(alignment.get("gradients", ())):
        gradient = gradients.get(index)
        if gradient is None:
            gradient = torch.zeros_like(local_of(parameter.detach()), memory_format=torch.contiguous_format)
        dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
        entries[f"{GRADIENT}{number}"] = sharded_like(dense, parameter)
    return entries


def join(state_dict: Mapping[str, Any], own: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any] | None:
    """Return the wrapped optimizer's state dict with ours in it.

    Args:
        state_dict: The wrapped optimizer's, in the standard layout.
        own: What a loop's ``state_dict`` returned, with what is said of the whole.
        parameters: The optimizer's, each once.

    Returns:
        A state dict of the same layout, or None if the wrapped optimizer has entries of the same names as ours.
    """
    numbers = dict(own)
    entries: dict[int, dict[str, Any]] = {i: {SLOW: t} for i, t in numbers.pop("slow_weights", {}).items()}
    for i, copies in numbers.pop("slow_iterates", {}).items():
        entries.setdefault(i, {}).update(copies)
    alignment = numbers.get("alignment")
    if alignment is not None:
        for i in sorted({*entries, *alignment["reached"]}):
            entries.setdefault(i, {}).update(alignment_entries(alignment, i, parameters[i]))
        numbers["alignment"] = _numbers_of(alignment)
    buffers = numbers.pop("slow_buffers", {})
    host = host_of(parameters[i] for i in sorted(entries))
    if buffers:
        if host is None:
            return None
        index = next(i for i, p in enumerate(parameters) if p is host)
        entries[index].update({f"{BUFFER}{name}": value for name, value in buffers.items()})
    for key in ("held", "held_iterates"):
        if key in numbers:
            numbers[key] = _ranges(numbers[key])
    keys = dict.fromkeys(key for entry in entries.values() for key in entry)
    numbers["places"] = {key: _ranges([i for i, entry in sorted(entries.items()) if key in entry]) for key in keys}

    names = _names(state_dict["param_groups"])
    state = dict(state_dict["state"])
    for i, entry in entries.items():
        wrapped = state.pop(names[i], {})
        if not entry.keys().isdisjoint(wrapped):
            return None
        entries[i] = {**wrapped, **entry}
    ordered: dict[Any, Any] = {}
    for i, name in enumerate(names):
        if i in entries:
            ordered[name] = entries[i]
        elif name in state:
            ordered[name] = state.pop(name)
    text = json.dumps(numbers, default=lambda scalar: scalar.item())
    groups = [{**group, NUMBERS: text} for group in state_dict["param_groups"]]
    return {**state_dict, "state": {**ordered, **state}, "param_groups": groups}


def read_numbers(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the numbers that :func:`join` has put into the groups.

    Args:
        state_dict: Any.

    Returns:
        None if there are none: it is a plain optimizer's.

    Raises:
        ValueError: If they are malformed.
    """
    groups = state_dict.get("param_groups")
    for group in groups if isinstance(groups, list) else ():
        text = group.get(NUMBERS) if isinstance(group, dict) else None
        if text is None or (isinstance(text, str) and not text):
            continue
        try:
            numbers = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{NUMBERS!r} in the state dict's groups is malformed (got {text!r:.80})") from error
        if not isinstance(numbers, dict) or not isinstance(numbers.get("places"), dict):
            raise ValueError(f"{NUMBERS!r} in the state dict's groups is malformed (got {text!r:.80})")
        return numbers
    return None


def part(
    state_dict: Mapping[str, Any], numbers: Mapping[str, Any], parameters: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take apart what :func:`join` has put together.

    Args:
        state_dict: The state dict; parameters are numbers in it or, from ``torch.distributed.checkpoint``, names.
        numbers: What :func:`read_numbers` returned.
        parameters: Those to load it for, each once, in the same order.

    Returns:
        The wrapped optimizer's state dict and ours, parameters by position.

    Raises:
        ValueError: If an entry is missing or the numbers are malformed.
    """
    try:
        return _part(state_dict, dict(numbers), parameters)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{NUMBERS!r} in the state dict's groups is malformed: {error!r:.80}") from error


def _part(
    state_dict: Mapping[str, Any], own: dict[str, Any], parameters: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    position = {name: i for i, name in enumerate(_names(state_dict["param_groups"]))}
    if len(position) != len(parameters):
        raise ValueError(f"the state dict is of {len(position)} parameters and this optimizer has {len(parameters)}")
    count = len(parameters)
    state = {position.get(name, name): _entry(name, entry) for name, entry in state_dict["state"].items()}
    own |= {"slow_weights": {}, "slow_iterates": {}, "slow_buffers": {}}
    found: dict[str, dict[int, Any]] = {}
    for key, ranges in own.pop("places").items():
        for i in _positions(ranges, count):
            if i not in range(count):
                raise ValueError(f"the state dict holds {key!r} of parameter {i}, which does not exist here")
            entry = state.get(i, {})
            if key in entry:
                value = entry.pop(key)
                _check_plain(key, i, value, parameters[i])
                found.setdefault(key, {})[i] = value if key.startswith(BUFFER) else _fitted(value, parameters[i])
            elif parameters[i].requires_grad:  # of others torch.distributed.checkpoint keeps nothing
                what = "the slow weights" if key == SLOW else repr(key)
                raise ValueError(
                    f"the state dict lacks {what} of parameter {i}: torch.distributed.checkpoint restores only what "
                    "the optimizer has that loads, which was asked for its state dict in another state"
                )
    for key, values in found.items():
        if key == SLOW:
            own["slow_weights"] = values
        elif key.startswith(BUFFER):
            own["slow_buffers"] |= {key.removeprefix(BUFFER): value for value in values.values()}
        elif not is_own(key):
            for i, value in values.items():
                own["slow_iterates"].setdefault(i, {})[key] = value
    for key in ("held", "held_iterates"):
        if key in own:
            own[key] = _positions(own[key], count)
    if own.get("alignment") is not None:
        own["alignment"] = _alignment_of(own["alignment"], found, parameters)
    groups = [{k: v for k, v in group.items() if k != NUMBERS} for group in state_dict["param_groups"]]
    for group in groups:
        group["params"] = [position[name] for name in group["params"]]
    kept = {key: entry for key, entry in state.items() if entry}
    return {**state_dict, "state": kept, "param_groups": groups}, own


def check_tensors(own: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
    """Raise if a tensor among ours is not one that can be copied from: sparse, or without values.

    Args:
        own: What a loop's ``state_dict`` returned, or something else.
        parameters: Those to load it for, each once.
    """
    alignment = own.get("alignment")
    sources = {
        "slow_weights": own,
        "slow_iterates": own,
        "slow_buffers": own,
        "sums": alignment,
        "unit_sums": alignment,
    }
    for key, source in sources.items():
        entries = source.get(key) if isinstance(source, Mapping) else None
        for i, value in entries.items() if isinstance(entries, Mapping) else ():
            is_known = key != "slow_buffers" and isinstance(i, int) and i in range(len(parameters))
            for one in value.values() if isinstance(value, Mapping) else (value,):
                _check_plain(key, i, one, parameters[i] if is_known else None)


def _check_plain(key: str, i: Any, value: Any, parameter: Tensor | None) -> None:
    if not isinstance(value, Tensor):
        return  # which will be refused
    where = f"the state dict's {key!r} of {i!r:.80}"
    if value.layout is not torch.strided or (value.is_meta and not (parameter is not None and parameter.is_meta)):
        raise ValueError(f"{where} should be a dense tensor with values (got {value.layout} on {value.device})")
    if value.is_complex() and parameter is not None and not parameter.is_complex():
        raise ValueError(f"{where} should be real as that is (got {value.dtype})")


def _entry(name: Any, entry: Any) -> dict[str, Any]:
    """Return a copy of what the state dict holds of one parameter."""
    if not isinstance(entry, dict):
        raise ValueError(f"the state dict's state of parameter {name!r:.80} should be a dictionary (got {entry!r:.80})")
    return dict(entry)


def take_out(groups: Iterable[dict[str, Any]], state: Mapping[Any, Any]) -> None:
    """Remove ours from an optimizer that has loaded a state dict in which it is.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state.
    """
    groups = list(groups)
    numbers = read_numbers({"param_groups": groups})
    if numbers is None:
        return
    for entry in state.values():
        for key in numbers["places"] if isinstance(entry, dict) else ():
            entry.pop(key, None)
    for group in groups:
        group[NUMBERS] = ""


# ------------------------------------------------------------------------------------------------------------ alignment


def _numbers_of(alignment: Mapping[str, Any]) -> dict[str, Any]:
    scalars = {key: [[t.item(), str(t.dtype).removeprefix("torch.")] for t in alignment[key]] for key in _SCALARS}
    numbers = {**scalars, "reached": _ranges(alignment["reached"])}
    numbers |= {key: _ranges(sorted(alignment[key])) for key in ("sums", "unit_sums")}
    if "gradients" in alignment:
        numbers["gradients"] = [_ranges(sorted(gradient)) for gradient in alignment["gradients"]]
    return numbers


def _scalar(key: str, pair: Any, device: torch.device) -> Tensor:
    """Read a scalar from its value and the name of its dtype."""
    value, dtype = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
    kind = getattr(torch, dtype) if isinstance(dtype, str) and hasattr(torch, dtype) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(kind, torch.dtype):
        raise ValueError(f"the state dict's alignment's {key!r} is malformed (got {pair!r:.80})")
    try:
        return torch.tensor(value, dtype=kind, device=device)
    except (OverflowError, RuntimeError) as error:
        raise ValueError(f"the state dict's alignment's {key!r} is malformed (got {pair!r:.80})") from error


def _alignment_of(
    numbers: Mapping[str, Any], found: Mapping[str, Mapping[int, Any]], parameters: Sequence[Tensor]
) -> dict[str, Any]:
    count = len(parameters)
    places = [i for i in _positions(numbers["sums"], count) if i in range(count)]
    device = parameters[places[0]].device if places else torch.device("cpu")
    alignment: dict[str, Any] = {key: [_scalar(key, pair, device) for pair in numbers[key]] for key in _SCALARS}
    alignment["reached"] = _positions(numbers["reached"], count)
    for key, name in (("sums", SUMS), ("unit_sums", UNITS)):
        alignment[key] = {}
        for i in _positions(numbers[key], count):
            of_name = found.get(name, {})
            if i not in of_name and i in alignment["reached"]:
                raise ValueError(f"the state dict lacks {name!r} of parameter {i}")
            # Frozen parameters have a place, too, where ranks are to have the same ones.
            alignment[key][i] = _flat(of_name[i] if i in of_name else _shaped(None, parameters[i]))
    if "gradients" in numbers:
        alignment["gradients"] = [
            {i: local_of(found[f"{GRADIENT}{number}"][i]) for i in _positions(ranges, count)}
            for number, ranges in enumerate(numbers["gradients"][: len(alignment["squares"])])
        ]
    return alignment


@torch.no_grad()
def _shaped(flat: Tensor | None, parameter: Tensor) -> Tensor:
    """Return a vector of pairs of reals in a parameter's shape, complex if that is; zeros if there is none."""
    if flat is None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        zeros = torch.zeros_like(local_of(parameter.detach()), dtype=dtype, memory_format=torch.contiguous_format)
        return sharded_like(zeros, parameter)
    local = local_of(parameter.detach())
    if parameter.is_complex():
        return sharded_like(torch.view_as_complex(flat.contiguous().view(*local.shape, 2)), parameter)
    return sharded_like(flat.contiguous().view(local.shape), parameter)


def _flat(tensor: Tensor) -> Tensor:
    local = local_of(tensor)
    return (torch.view_as_real(local) if local.is_complex() else local).reshape(-1)


def _fitted(value: Any, parameter: Tensor) -> Any:
    """Return a tensor with a parameter's placements, whether it comes whole or in shards."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value  # which will be refused
    sharded: Any = value
    if not is_sharded(parameter):
        return sharded.full_tensor() if is_sharded(value) else value
    like: Any = parameter
    if is_sharded(value):
        same = sharded.device_mesh == like.device_mesh and sharded.placements == like.placements
        return value if same else sharded.redistribute(like.device_mesh, like.placements)
    from torch.distributed.tensor import distribute_tensor  # to import it takes seconds

    # Every rank has the whole and takes its shard: whether others have to is not known here.
    return distribute_tensor(value.detach().to(like.device), like.device_mesh, like.placements, src_data_rank=None)


# ------------------------------------------------------------------------------------------------------------ positions


def _names(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return what stands for each parameter, in order: a number or a name."""
    return list(dict.fromkeys(name for group in groups for name in group["params"]))


def _ranges(positions: Any) -> Any:
    """Write positions as ``[first, end]`` of each run: most often there is one."""
    if isinstance(positions, dict):
        return {key: _ranges(value) for key, value in positions.items()}
    found: list[list[int]] = []
    for i in positions:
        if found and found[-1][1] == i:
            found[-1][1] += 1
        else:
            found.append([i, i + 1])
    return found


def _positions(ranges: Any, count: int) -> Any:
    """Read what :func:`_ranges` wrote; what is something else stays so, to be refused by whoever checks it."""
    # Of a run's positions that do not exist, below 0 and from count on, the first stands for all: of 10^12, too.
    if isinstance(ranges, dict):
        return {key: _positions(value, count) for key, value in ranges.items()}
    if not isinstance(ranges, list):
        return ranges
    if not all(isinstance(run, list) and len(run) == 2 and all(type(i) is int for i in run) for run in ranges):
        raise TypeError(f"no positions: {ranges!r:.60}")
    known = [(first, min(end, first + 1 if first < 0 else max(first, count) + 1)) for first, end in ranges]
    positions = [i for first, end in known for i in range(first, end)]
    if not all(first < end for first, end in ranges) or len(set(positions)) < len(positions):
        raise TypeError(f"no positions, each once: {ranges!r:.60}")
    return positions
