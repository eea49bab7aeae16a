"""Which domains come next, one group after the other, where nobody knows beforehand how many batches a domain has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from torch_gradmatch._checks import check_int
from torch_gradmatch.data._draw import random_stream
from torch_gradmatch.data._labels import check_short, shown

__all__ = ["DomainWalk"]


class DomainWalk:
    """A place in the sequence of groups of S distinct domains, and how it goes on.

    A group depends on the seed, on the epoch and the group's number in it, on the domains that have a batch left and,
    where it is the second of a pair, on the group before: no generator has a state to save.

    Args:
        weights: Every domain's, positive.
        domains_per_step: S.
        paired: Whether the reverse of a group follows it wherever all its domains have a batch left; across epochs,
            too.
        seed: Integer of at least 0.

    Attributes:
        epoch: Number of the epoch.
        position: Batches of this epoch that were handed out.
        group: The latest group, by number, in the order of the walk, shape (S,); empty before the first.
        unpaired: Whether the group's reverse is still to follow.
    """

    def __init__(self, weights: Sequence[float], domains_per_step: int, paired: bool, seed: int) -> None:
        self.weights = np.array(weights, dtype=np.float64)
        self.domains_per_step = domains_per_step
        self.paired = paired
        self.seed = seed
        self.epoch = self.position = 0
        self.group: list[int] = []
        self.unpaired = False

    @property
    def in_group(self) -> int:
        """How many of the group's batches were handed out, 0 if all."""
        return self.position % self.domains_per_step

    def next_group(self, has_batch: Callable[[int], bool]) -> bool:
        """Go on to the next group.

        The domains are tried in the order of independent times, exponentially distributed with the weights as rates:
        that is the order in which draws without replacement, in proportion to the weights, would give them
        (Efraimidis and Spirakis, *Weighted random sampling with a reservoir*, 2006). One without a batch is passed
        over as if it had not been there.

        Args:
            has_batch: Whether a domain has a batch left; asked of no more domains than need be.

        Returns:
            Whether there is one: False if fewer than S domains have a batch left.
        """
        if self.unpaired and all(map(has_batch, self.group)):
            self.group, self.unpaired = self.group[::-1], False
            return True
        generator = random_stream(self.seed, self.epoch, self.position // self.domains_per_step)
        times = generator.standard_exponential(self.weights.size) / self.weights
        order = generator.permutation(self.domains_per_step)  # the heaviest are in general drawn first
        drawn: list[int] = []
        for domain in times.argsort(kind="stable").tolist():
            if has_batch(domain):
                drawn.append(domain)
            if len(drawn) == self.domains_per_step:
                self.group, self.unpaired = [drawn[place] for place in order], self.paired
                return True
        return False

    @property
    def following(self) -> int:
        """The domain whose batch in the group comes next."""
        return self.group[self.in_group]

    def advance(self) -> None:
        """Count that batch as handed out."""
        self.position += 1

    def next_epoch(self) -> None:
        """Go to the start of the next epoch. A group that was broken off has no reverse."""
        self.unpaired = self.unpaired and self.in_group == 0
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the place.

        Returns:
            Numbers, and the group as a list of numbers.
        """
        return {"epoch": self.epoch, "position": self.position, "group": [*self.group], "unpaired": self.unpaired}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place.

        Args:
            state: From :meth:`state_dict`, perhaps with more beside it.

        Raises:
            ValueError: If it is malformed; nothing changes then.
        """
        epoch, position = (
            check_short(check_int, f"the state dict's {name}", state[name], 0) for name in ("epoch", "position")
        )
        group, unpaired = state["group"], state["unpaired"]
        if (
            not isinstance(group, list)
            or not all(type(number) is int and 0 <= number < self.weights.size for number in group)
            or len(group) != len(set(group))
            or len(group) != (self.domains_per_step if group or position else 0)
        ):
            raise ValueError(
                f"the state dict's group should be {self.domains_per_step} different numbers of domains "
                f"(got {shown(group)})"
            )
        if not isinstance(unpaired, bool) or unpaired > (self.paired and bool(group)):
            raise ValueError(
                f"the state dict's unpaired should be True after a group, or False (got {shown(unpaired)})"
            )
        self.epoch, self.position, self.group, self.unpaired = epoch, position, [*group], unpaired
