"""What a method works out a direction with: loss function, batches, ranks, and what it keeps between two calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_gradmatch._checks import refuse_loss
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.gradients.over_ranks import Alone
from torch_gradmatch.parallel.shards import total_norm

__all__ = ["Evaluation"]

# Training diverges where the matching term is larger than the loss and has grown so many times beyond the larger of
# both at the first meta-iteration. Where it works it stays below a third of that: tests/methods/test_smooth_fish.py.
EXPLODED = 10.0


@dataclass
class Evaluation:
    """What a method is given to work out a direction with.

    Attributes:
        loss_fn: Returns the loss of a batch, times ``scale``.
        batches: One of each domain.
        parameters: Those of the optimizer that require a gradient.
        over: How ranks share the evaluations.
        scale: That of a ``GradScaler``. The direction is to be multiplied by it, too, and the report is not.
        checks: Whether to refuse what is not finite or diverges, if the method does so.
        number: How many meta-iterations there were before.
        memory: What the method keeps from one meta-iteration to the next, as plain numbers: it is in the state dict.
        kept: What it keeps in this process only.
    """

    loss_fn: Callable[[Any], Tensor]
    batches: Sequence[Any]
    parameters: list[Tensor]
    over: Alone
    scale: float = 1.0
    checks: bool = True
    number: int = 0
    memory: dict[str, float] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def is_due(self) -> bool:
        """Whether to look whether losses are the same twice: in meta-iterations number 1, 2, 4, 8 and so on."""
        return (self.number + 1) & self.number == 0

    def sums(self, *, cosines: bool, pairs: bool) -> GradientAlignment:
        """Return empty running sums of gradients, the same ones as the last time if they will do.

        Args:
            cosines: Whether to measure the mean cosine.
            pairs: Whether to measure the cosines of pairs.

        Returns:
            The sums.
        """
        found: GradientAlignment | None = self.kept.get("sums")
        if found is None or (found.cosines, found.pairs) != (cosines, pairs):
            found = self.kept["sums"] = GradientAlignment(cosines, pairs)
        found.reset()
        return found

    def read_finite(
        self, losses: Tensor, gradient: Sequence[Tensor], others: Sequence[Tensor] = ()
    ) -> tuple[list[float], list[float]]:
        """Read what tells whether an evaluation went well; synchronizes once.

        Args:
            losses: Of the domains, shape (S,).
            gradient: The direction found.
            others: Anything else that is wanted.

        Returns:
            The losses; and the norm of the gradient and the other numbers, finite or not.

        Raises:
            ValueError: If a loss is not finite.
        """
        wanted = [total_norm(gradient), *others]
        parts = [losses.double(), *(w.detach().to(losses.device).double().reshape(-1) for w in wanted)]
        values = torch.cat(parts).tolist()
        for index, loss in enumerate(values[: len(losses)]):
            refuse_loss(index, loss)
        if self.over.in_step:
            self.over.ranks.agree()  # whose loss it was that made the gradients of all not finite
        return values[: len(losses)], values[len(losses) :]

    def refuse_explosion(self, loss: float, matching: float, remedy: str) -> None:
        """Raise if the matching term outgrows the loss: then it is unbounded, and training raises the gradients alone.

        Args:
            loss: The mean loss.
            matching: What the objective takes off it.
            remedy: What to change.

        Raises:
            RuntimeError: If it does.
        """
        first = self.memory.setdefault("first", max(abs(loss), abs(matching)))
        if matching > max(abs(loss), EXPLODED * first):
            raise RuntimeError(
                f"training diverges: the matching term is {matching:.3g} and the mean loss {loss:.3g} (the larger of "
                f"both was {first:.3g} in the first meta-iteration). Nothing was changed by this meta_step(), but "
                f"earlier ones may have led here, so go back to a checkpoint. {remedy}"
            )
