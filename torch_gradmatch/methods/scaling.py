"""Loss scaling: what a ``torch.amp.GradScaler`` asks of an optimizer that steps by itself whatever the gradients hold.

A ``GradScaler`` leaves out the steps of an ordinary optimizer whose gradients hold infinity or NaN. Then the inner loop
would not know that a domain had its turn. An optimizer with ``_step_supports_amp_scaling`` is called every time and is
told, by two attributes, how the gradients are scaled and whether they overflowed.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch._foreach import local_of

__all__ = ["LossScaling", "refuse_scaled"]


@dataclass(frozen=True)
class LossScaling:
    """What a ``GradScaler`` says of the gradients that a step finds.

    Attributes:
        scale: What they are still multiplied by, shape () or (1,); None if they were unscaled already.
        found_inf: Greater than 0 if any of them holds infinity or NaN.
    """

    scale: Tensor | None
    found_inf: Tensor | float

    @staticmethod
    def of(optimizer: Optimizer) -> LossScaling | None:
        """Return what a ``GradScaler`` has just told an optimizer, or None if it was not one that called."""
        told = vars(optimizer)  # which is where a GradScaler sets them
        found_inf = told.get("found_inf")
        return None if found_inf is None else LossScaling(told.get("grad_scale"), found_inf)

    def overflowed(self) -> bool:
        """Return whether a gradient holds infinity or NaN, waiting for the accelerator."""
        return float(self.found_inf) > 0

    def unscale(self, optimizer: Optimizer) -> LossScaling:
        """Divide the gradients by the scale, as ``GradScaler.unscale_`` does.

        Args:
            optimizer: The wrapped optimizer.

        Returns:
            What is to be said of them then.

        Raises:
            ValueError: If a gradient is in half precision.
        """
        if self.scale is not None:
            _unscale(optimizer, self.scale)
        return LossScaling(None, self.found_inf)

    def step(self, optimizer: Optimizer) -> Any:
        """Take a step of the wrapped optimizer on unscaled gradients, or none if they overflowed.

        A fused optimizer that handles scaling by itself is told the same and does so without a wait.

        Args:
            optimizer: The wrapped optimizer.

        Returns:
            What its ``step`` returns.

        Raises:
            ValueError: If a gradient is in half precision, as ``GradScaler.unscale_`` does.
        """
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            told: Any = optimizer  # a GradScaler sets and deletes these, which Optimizer does not declare
            told.grad_scale, told.found_inf = self.scale, self.found_inf
            try:
                return optimizer.step()
            finally:
                del told.grad_scale, told.found_inf
        unscaled = self.unscale(optimizer)
        return None if unscaled.overflowed() else optimizer.step()


@torch.no_grad()
def _unscale(optimizer: Optimizer, scale: Tensor) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for p in dict.fromkeys(p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None:
            if p.grad.dtype is torch.float16:
                raise ValueError("Attempting to unscale FP16 gradients: keep the parameters in torch.float32")
            values = p.grad._values() if p.grad.is_sparse else local_of(p.grad)
            by_device.setdefault(values.device, []).append(values)
    for device, gradients in by_device.items():
        torch._foreach_mul_(gradients, scale.double().reciprocal().float().to(device).reshape(()))


def refuse_scaled(loss: Tensor) -> None:
    """Raise if a loss was scaled by a ``GradScaler`` that ``meta_step`` was not given: nobody would unscale.

    ``GradScaler.scale`` multiplies by a tensor of its own, which the loss's graph still holds. Whose it is, is asked of
    the garbage collector: some milliseconds, so this is for the first loss of a training run.

    Args:
        loss: What ``loss_fn`` returned, itself and no view of it.

    Raises:
        ValueError: If it was.
    """
    node = loss.grad_fn
    if node is None or node.name() != "MulBackward0":
        return
    for factor in (getattr(node, "_saved_other", None), getattr(node, "_saved_self", None)):
        if factor is None or factor.numel() != 1 or factor.dtype is not torch.float32 or factor.requires_grad:
            continue
        if any(_is_scaler(owner, factor) for owner in gc.get_referrers(factor)):
            raise ValueError(
                "loss_fn returned a loss scaled by a GradScaler, which meta_step() would not unscale: return the plain "
                "loss and pass the scaler, meta_step(loss_fn, batches, scaler=scaler)"
            )


def _is_scaler(owner: object, factor: Tensor) -> bool:
    """Whether an object, or the attribute dictionary of one, is a ``GradScaler`` with this scale."""
    attributes = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
    return attributes.get("_scale") is factor and "_growth_tracker" in attributes
