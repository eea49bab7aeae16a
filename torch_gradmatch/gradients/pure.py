"""A training loop's loss function as a pure function of parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from torch_gradmatch.parallel.foreach import clone_all, in_transform

__all__ = ["Buffers", "functional_loss"]

Buffers = dict[str, Tensor]


def functional_loss(
    model: nn.Module, loss_fn: Callable[[Any], Tensor]
) -> Callable[[dict[str, Tensor], Buffers, Any], tuple[Tensor, Buffers]]:
    """Turn a loss function that calls a model as usual into a pure function of parameters and buffers.

    While it runs, the model holds the tensors passed; afterwards its own again. Tied weights stay tied. What is not
    passed is used as the model has it at that time.

    Args:
        model: The model that ``loss_fn`` calls.
        loss_fn: ``loss_fn(batch)`` returns a scalar.

    Returns:
        ``pure(params, buffers, batch)``, returning the loss and the new buffers; both dictionaries have the names of
        ``model.named_parameters()`` and ``model.named_buffers()``; another name is a ``ValueError``. The buffers
        passed are not written to.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> pure = functional_loss(model, lambda x: model(x).sum())
        >>> params = {"weight": torch.tensor([[1.0, 2.0]])}
        >>> loss, buffers = pure(params, {}, torch.tensor([[3.0, 4.0]]))
        >>> loss, buffers
        (tensor(11.), {})
    """
    # A module that calls the model: what functional_call can put other parameters into.
    closure: Any = nn.Module()
    closure.model, closure.forward = model, lambda batch: loss_fn(batch)  # not itself: it may be a module

    def pure(params: dict[str, Tensor], buffers: Buffers, batch: Any) -> tuple[Tensor, Buffers]:
        own = dict(model.named_parameters(remove_duplicate=False))
        known = own.keys() | dict(model.named_buffers(remove_duplicate=False)).keys()
        if not known.issuperset([*params, *buffers]):
            unknown = [name for name in (*params, *buffers) if name not in known]
            raise ValueError(
                f"{type(model).__name__} has no parameter or buffer {unknown[0]!r}: is it another model's?"
            )
        held = {f"model.{name}": tensor for name, tensor in params.items() if own.get(name) is not tensor}
        copies = zip(buffers, clone_all(list(buffers.values())), strict=True)
        held |= {f"model.{name}": copy for name, copy in copies}
        loss = functional_call(closure, held, (batch,)) if held else loss_fn(batch)
        # functional_call leaves in the dictionary what a module put in a buffer's place.
        after = {name: held[f"model.{name}"] for name in buffers}
        wrapped = in_transform()  # where a tensor does not say whether it depends on others
        return loss, {name: b.detach() if wrapped or b.requires_grad else b for name, b in after.items()}

    pure.closure_around = model  # type: ignore[attr-defined]
    return pure
