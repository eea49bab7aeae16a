"""The hooks that users register around ``state_dict`` and ``load_state_dict``, for classes with their own of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["load_with_hooks", "save_with_hooks"]

StateDict = dict[str, Any]


def save_with_hooks(optimizer: Optimizer, save: Callable[[], StateDict]) -> StateDict:
    """Call an optimizer's hooks before and after it makes its state dict.

    Args:
        optimizer: Whose hooks.
        save: Makes the state dict.

    Returns:
        The state dict, or what a hook has put in its place.
    """
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    state_dict = save()
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = post_hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    return state_dict


def load_with_hooks(optimizer: Optimizer, state_dict: StateDict, load: Callable[[StateDict], None]) -> None:
    """Call an optimizer's hooks before and after it loads a state dict.

    Args:
        optimizer: Whose hooks.
        state_dict: The state dict, of which hooks get a shallow copy.
        load: Loads it.
    """
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = dict(replaced)
    load(state_dict)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)
