"""Trying methods out at one point of training, and leaving no trace of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_gradmatch._checks import check_loss
from torch_gradmatch.gradients.replay import RandomState, devices_of
from torch_gradmatch.methods.base import Method
from torch_gradmatch.optimizer import GradMatch
from torch_gradmatch.slow.buffers import Buffers
from torch_gradmatch.slow.inner_state import members

__all__ = ["Trial", "copy_optimizer", "linear_layers_called"]


class Trial:
    """A model, a loss and one batch of each of S domains, at the model's present parameters.

    As a context manager: on leaving it parameters, buffers, ``.grad``, training modes and every random state
    are bit for bit what they were on entering, and the optimizer was never touched: steps are taken by copies.

    Args:
        model: The model.
        loss_fn: ``loss_fn(batch)`` returns a scalar.
        batches: One batch of each domain.
        optimizer: The optimizer whose copies take the steps.

    Attributes:
        parameters: The optimizer's parameters, in order, each once.
        batches: The batches, each with its domain's number.
        evaluations: How often the loss was evaluated since this was last set to 0.
        devices: Where the parameters and batches are.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], optimizer: Optimizer
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.parameters = list(dict.fromkeys(p for group in optimizer.param_groups for p in group["params"]))
        self.batches = list(enumerate(batches))
        self.evaluations = 0
        self.devices = devices_of(self.parameters, list(batches)) or {torch.device("cpu")}
        self._loss_fn = loss_fn
        self._all_parameters = list(dict.fromkeys([*self.parameters, *model.parameters()]))
        self._random_of_domain: list[RandomState] | None = None

    def __enter__(self) -> Trial:
        self._random = RandomState.capture(self.devices)
        self._gradients = [p.grad for p in self._all_parameters]
        self._values = [p.detach().clone() for p in self._all_parameters]
        self._places = Buffers(self.model)
        self._buffers = self._places.save()
        self._training = [(owner, owner.training) for owner in self.model.modules()]
        for p in self._all_parameters:
            p.grad = None  # what is there is left alone, not zeroed
        return self

    def __exit__(self, *exception: object) -> None:
        self.reset()
        for p, gradient in zip(self._all_parameters, self._gradients, strict=True):
            p.grad = gradient
        self._random.restore()

    @torch.no_grad()
    def reset(self) -> None:
        """Return parameters, buffers and training modes to what they were on entering, and drop all gradients."""
        for p, value in zip(self._all_parameters, self._values, strict=True):
            p.copy_(value)
            p.grad = None
        self._places.restore(self._buffers)
        for owner, training in self._training:
            owner.training = training
        torch.clear_autocast_cache()

    def loss_fn(self, batch: tuple[int, Any]) -> Tensor:
        """Evaluate the loss of a numbered batch.

        Args:
            batch: An element of :attr:`batches`.

        Returns:
            The loss.
        """
        self.evaluations += 1
        index, content = batch
        if self._random_of_domain is not None:
            self._random_of_domain[index].restore()
        return self._loss_fn(content)

    def fix_random_numbers(self) -> None:
        """From here on let a domain's loss see the same random numbers (dropout) whenever it is evaluated."""
        self._random.restore()
        self._random_of_domain = []
        for _, content in self.batches:
            self._random_of_domain.append(RandomState.capture(self.devices))
            self._loss_fn(content)  # draws what the next domain's must not; may take gradients itself
        self.reset()

    def wrap(self, method: Method) -> GradMatch[Method]:
        """Return a copy of the optimizer, wrapped with a method."""
        return GradMatch(copy_optimizer(self.optimizer), method)

    def differentiate_mean_loss(self) -> Tensor:
        """Leave the gradient of the mean loss in ``.grad``: ordinary training (ERM).

        Returns:
            The mean loss.
        """
        mean: Tensor = torch.zeros((), device=self.parameters[0].device)
        for p in self.parameters:
            p.grad = None
        for batch in self.batches:
            loss = check_loss(self.loss_fn(batch), batch[0]) / len(self.batches)
            loss.backward()
            mean = mean + loss.detach()
        return mean

    def synchronize(self) -> None:
        """Wait until every device has done what it was told."""
        for device in self.devices:
            if device.type not in ("cpu", "meta"):
                torch.get_device_module(device).synchronize(device)


@contextmanager
def linear_layers_called(model: nn.Module) -> Iterator[list[str]]:
    """Note the names of the linear layers below a model that are called inside the block, in order.

    Args:
        model: The model.

    Yields:
        The names; the last one is that of the head.
    """
    called: list[str] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and type(module) is nn.Linear:
                hooks.enter_context(module.register_forward_hook(lambda *_, name=name: called.append(name)))
        yield called


def copy_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer in the same state over the same parameters, which shares nothing else with the original.

    Hooks do not come along, and neither does what a scheduler wrapped around ``step``: whatever they do, they do to
    the original.

    Args:
        optimizer: The original.

    Returns:
        The copy.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(()))
        >>> original = torch.optim.SGD([w], lr=0.5)
        >>> copied = copy_optimizer(original)
        >>> copied.param_groups[0]["params"][0] is w, copied.param_groups is original.param_groups
        (True, False)
    """
    inside = members(optimizer)
    copies = [object.__new__(type(member)) for member in inside]
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    memo |= {id(member): copied for member, copied in zip(inside, copies, strict=True)}
    for member, copied in zip(inside, copies, strict=True):
        attributes = {k: v for k, v in vars(member).items() if k != "step" and not k.startswith("_optimizer_")}
        vars(copied).update(copy.deepcopy(attributes, memo))
        Optimizer.__setstate__(copied, {})
    return copies[0]
