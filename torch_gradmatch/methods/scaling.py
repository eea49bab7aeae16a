"""Loss scaling: what a ``torch.amp.GradScaler`` tells ``GradMatch``.

A ``GradScaler`` skips the step of an ordinary optimizer whose gradients hold infinity or NaN. Then the inner loop would
not know that a domain had its turn. An optimizer with ``_step_supports_amp_scaling`` is called every time. Two
attributes tell it how the gradients are scaled and whether they overflowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch.parallel.foreach import local_of

__all__ = ["LossScaling"]


@dataclass(frozen=True)
class LossScaling:
    """What a ``GradScaler`` says of the gradients that a step finds.

    Attributes:
        scale: The factor of the gradients, shape () or (1,); None if they were unscaled already.
        found_inf: Greater than 0 if any gradient holds infinity or NaN.
    """

    scale: Tensor | None
    found_inf: Tensor | float

    def overflowed(self) -> bool:
        """Return whether a gradient holds infinity or NaN; synchronizes."""
        return float(self.found_inf) > 0

    @torch.no_grad()
    def unscale(self, optimizer: Optimizer) -> LossScaling:
        """Divide the gradients by the scale, as ``GradScaler.unscale_`` does.

        Args:
            optimizer: The wrapped optimizer.

        Returns:
            What is to be said of them then.

        Raises:
            ValueError: If a gradient is in half precision.
        """
        if self.scale is None:
            return self
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in dict.fromkeys(p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None:
                if p.grad.dtype is torch.float16:
                    raise ValueError("Attempting to unscale FP16 gradients: keep the parameters in torch.float32")
                values = p.grad._values() if p.grad.is_sparse else local_of(p.grad)
                by_device.setdefault(values.device, []).append(values)
        for device, gradients in by_device.items():
            torch._foreach_mul_(gradients, self.scale.double().reciprocal().float().to(device).reshape(()))
        return LossScaling(None, self.found_inf)

    def step(self, optimizer: Optimizer) -> Any:
        """Take a step of the wrapped optimizer on unscaled gradients, or none if they overflowed.

        A fused optimizer that handles scaling by itself is told the same and does so without synchronizing.

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
