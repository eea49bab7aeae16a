"""Batches for meta-iterations: S batches at a time, each from one domain, the S domains distinct.

Algorithm 1 of Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, visits the
domains in random order. Where there are more domains than inner steps, the authors' code draws S of them without
replacement, as here. There each domain has its own loader; here one ``batch_sampler`` serves any ``DataLoader``.

By default every second group reverses the order of the one before. To first order in the step size, the mean of a
walk of SGD through the domains and of the reverse walk is the mean over all orders, the direction that Fish stands
for; that of two walks in random orders is not. This is FlipFlop of Rajput, Lee and Papailiopoulos, *Permutation-Based
SGD: Is Random Optimal?*, ICLR 2022, whose walks are whole epochs, and the *paired reversal* of Nguyen et al.,
arXiv 2604.00260, who prove that it cancels the leading term that depends on the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Sampler

from torch_gradmatch._checks import check_bool, check_choice, check_int
from torch_gradmatch.data._draw import plan_epochs, random_stream, warn_if_little_is_served
from torch_gradmatch.data._labels import IntArray, ListLike, check_short, domain_weights, indices_by_domain, shown

__all__ = ["DomainBatchSampler"]

STATE_VERSION = 3
# What was added to the state in versions 2 and 3, with the value of everything saved before.
ADDED_SETTINGS: dict[int, dict[str, int | str]] = {
    2: {"order": "random"},
    3: {"exhausted": "stop", "batches_per_epoch": 0},
}
Item = TypeVar("Item")


@dataclass
class _Progress:
    """How far one iterator of a sampler is: counts of batches of ``epoch`` since ``start``."""

    epoch: int
    start: int
    yielded: int = 0  # by the sampler, which a DataLoader with workers makes run ahead of the loop
    handed_out: int | None = None  # to the loop, if _track counts that
    exhausted: bool = False  # the sampler came to the end of the epoch
    over: bool = False  # exhausted or broken off, and _track hands out no more


class DomainBatchSampler(Sampler[list[int]]):
    """A ``batch_sampler`` whose consecutive groups of S batches come from S distinct domains.

    In each epoch the samples of every domain are shuffled and cut into batches. A group draws S domains without
    replacement from those with a batch left and serves them in random order; the next group serves the same domains in
    reverse order, with their next batches, and so on in pairs. To first order the mean of a walk and its reverse does
    not depend on the order, so Fish is steadier for the same work.

    With ``exhausted="stop"`` the epoch ends when fewer than S domains have a batch left, with S equal to the number of
    domains when the smallest has run out, and no sample is served twice (with ``overlapping``: by the same domain).
    With ``exhausted="cycle"`` a domain that has run out is shuffled anew and goes on. An epoch then has

        max(max_d n_d, ⌈(Σ_d n_d) / S⌉) groups, n_d the batches of domain d:

    the fewest in which every domain could be served whole. With S equal to the number of domains, that is until the
    largest has been served whole. With S smaller it is at least as many batches as the data has, and each domain
    serves as many of them as its weight gives it: a large one may not get through in one epoch.

    Epochs advance by themselves: each new iterator serves the next one, also after one that was broken off. An epoch
    depends only on the arguments and its number; global random state is neither read nor changed.

    ``len(sampler)`` is exactly what the iterator in progress, or else the next one, yields in all. With
    ``exhausted="stop"`` it may differ between epochs, and after ``load_state_dict`` it is what is left of the epoch.

    Args:
        domains: One label, string or integer, per sample of the data set (list, tuple, array, tensor, Series of
            pandas or Polars); or a mapping from label to the indices of that domain's samples, which need not cover
            the data set.
        batch_size: Samples in a batch; a domain's last batch may be smaller.
        domains_per_step: S; ``None`` for all domains, of which there should be two then. With 1, and also with one
            domain, it serves ordinary training.
        weighting: The probabilities p_d with which a group's domains are drawn, one after the other among those not
            yet in it. ``"uniform"``: equal. ``"proportional"``: p_d ∝ the batches that the domain has left
            (``stratified`` in the authors' code), so that large and small domains last about equally long; in a cycle
            p_d ∝ n_d. A number t from 0 to 1: p_d ∝ (its samples)^t, from uniform to by size. A mapping from every
            label to a positive number: p_d ∝ that.
        seed: Integer of at least 0.
        drop_last: Leave out a domain's last batch if it is smaller than ``batch_size``.
        overlapping: A mapping may give a sample to several domains, as the identities that a comment mentions do.
            Each domain serves it; without this it is an error.
        order: ``"flipflop"`` serves groups in pairs, the second in the reverse order of the first; where one of the
            first's domains has no batch left, the second is drawn anew. With S equal to the number of domains and an
            odd number of groups in an epoch, the last group of an even epoch and the first of the next are a pair
            too; with S smaller, an epoch leaves a few batches more unserved. ``"random"`` draws every group, each in
            an order of its own.
        exhausted: What happens when domains run out, ``"stop"`` or ``"cycle"``, see above. In a cycle all groups are
            in pairs, also where an epoch ends between the two.
        batches_per_epoch: With ``exhausted="cycle"``, the length of every epoch instead: a multiple of S.

    Raises:
        ValueError: If an argument is out of range, a label is missing or neither string nor integer, all samples have
            the same one although S is not 1, a string and an integer read the same, an index is negative or given
            twice, a flag is not a ``bool``, or a domain is empty (with ``drop_last``: has no full batch).
        TypeError: If ``domains`` is neither a sequence nor a mapping.

    Warns:
        UserWarning: If an epoch of ``exhausted="stop"`` serves less than a tenth of the samples.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from torch_gradmatch import meta_batches
        >>> hospitals = ["north"] * 4 + ["south"] * 6 + ["west"] * 5
        >>> sampler = DomainBatchSampler(hospitals, batch_size=2, domains_per_step=2)
        >>> loader = DataLoader(range(15), batch_sampler=sampler)
        >>> for one, other in meta_batches(loader, 2):
        ...     assert len({hospitals[index] for index in one}) == 1
        ...     assert hospitals[one[0]] != hospitals[other[0]]
        >>> sampler = DomainBatchSampler(["a", "b", "c"] * 2, batch_size=1)
        >>> served = ["abc"[index % 3] for (index,) in sampler]
        >>> served[3:] == served[2::-1]
        True
    """

    def __init__(
        self,
        domains: Sequence[str | int] | ListLike | Mapping[str, Any] | Mapping[int, Any],
        batch_size: int,
        domains_per_step: int | None = None,
        weighting: str | float | Mapping[str, float] | Mapping[int, float] = "uniform",
        seed: int = 0,
        drop_last: bool = False,
        overlapping: bool = False,
        order: str = "flipflop",
        exhausted: str = "stop",
        batches_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = check_short(check_int, "batch_size", batch_size, 1)
        self.seed = check_short(check_int, "seed", seed, 0)
        self.drop_last = check_short(check_bool, "drop_last", drop_last)
        self.order = check_short(check_choice, "order", order, ("flipflop", "random"))
        self.exhausted = check_short(check_choice, "exhausted", exhausted, ("stop", "cycle"))
        overlapping = check_short(check_bool, "overlapping", overlapping)

        self._labels, self._indices = indices_by_domain(domains, overlapping)
        self._num_labels = None if isinstance(domains, Mapping) else sum(indices.size for indices in self._indices)
        sizes = [indices.size for indices in self._indices]
        rounding = 0 if self.drop_last else self.batch_size - 1
        self._num_batches = [(size + rounding) // self.batch_size for size in sizes]
        if 0 in self._num_batches:
            first = self._num_batches.index(0)
            raise ValueError(
                f"domain {shown(self._labels[first])} has {sizes[first]} samples, with drop_last=True not one batch of "
                f"batch_size={shown(self.batch_size)} (so have {self._num_batches.count(0)} of {len(sizes)} domains): "
                "lower batch_size, pass drop_last=False or leave such domains out"
            )
        if len(sizes) == 1 and domains_per_step != 1:
            raise ValueError(
                f"domains has one label, {shown(self._labels[0])}, for all {sizes[0]} samples, and there is no other "
                "domain whose gradients could be matched: give every sample the label of its own domain or, for "
                "ordinary training, pass domains_per_step=1"
            )
        self.domains_per_step = len(sizes)
        if domains_per_step is not None:
            self.domains_per_step = check_short(check_int, "domains_per_step", domains_per_step, 1)
            if self.domains_per_step > len(sizes):
                raise ValueError(
                    f"domains_per_step should be at most {len(sizes)}, the number of domains "
                    f"(got {shown(domains_per_step)})"
                )
        self.weighting = dict(weighting) if isinstance(weighting, Mapping) else weighting
        weights, weights_id = domain_weights(weighting, self._labels, sizes)
        drawing = (self._num_batches, self.domains_per_step, weights, self.seed, self.order == "flipflop")
        self._plan = plan_epochs(*drawing, self.exhausted, batches_per_epoch)
        self._settings: dict[str, int | str | bool] = {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "domains_per_step": self.domains_per_step,
            "weighting": weights_id,
            "drop_last": self.drop_last,
            "num_domains": len(sizes),
            "num_samples": sum(sizes),
            # The labels themselves do not matter, only which samples they set apart, and in which order.
            "domains_checksum": hashlib.blake2b(
                np.concatenate([sizes, *self._indices]).astype("<i8").tobytes(), digest_size=16
            ).hexdigest(),
            "order": self.order,  # last but for what is newer, so that another mismatch is named first
            "exhausted": self.exhausted,
            "batches_per_epoch": self._plan.length(0) if self.exhausted == "cycle" else 0,  # 0: they may differ
        }
        # No other class touches these two: loaders call _track, _next_epoch, _epoch_length and _labels_at.
        self._next = (0, 0)  # epoch and position at which the next iterator starts
        self._progress: _Progress | None = None  # of the latest iterator, unless an epoch was chosen since
        if self.exhausted == "stop":
            num_samples = np.unique(np.concatenate(self._indices)).size if overlapping else sum(sizes)
            warn_if_little_is_served(self._plan, sizes, self.batch_size, num_samples)

    @property
    def labels(self) -> tuple[str | int, ...]:
        """The domains' labels, in the order in which they first appear."""
        return tuple(self._labels)

    def __len__(self) -> int:
        epoch, start = self._current()
        return self._epoch_length(epoch) - start

    def __iter__(self) -> Iterator[list[int]]:
        """Serve the next epoch.

        The first ``next()`` claims the epoch, not this call: a ``DataLoader`` with workers calls ``iter`` twice.

        Yields:
            The sample indices of one batch.
        """
        epoch, start = self._next
        self._next = (epoch + 1, 0)
        progress = self._progress = _Progress(epoch, start)
        try:
            served = self._plan.served(epoch, start).tolist()
            shuffled: dict[int, IntArray] = {}
            for domain in chain.from_iterable(map(np.ndarray.tolist, self._plan.stretches(epoch, start))):
                past_round, batch_number = divmod(served[domain], self._num_batches[domain])
                if domain not in shuffled:
                    # Each domain and round has its own generator, so a resumed epoch shuffles it the same way.
                    key = (epoch, 1 + domain, past_round) if past_round else (epoch, 1 + domain)
                    shuffled[domain] = random_stream(self.seed, *key).permutation(self._indices[domain])
                first = batch_number * self.batch_size
                batch: list[int] = shuffled[domain][first : first + self.batch_size].tolist()
                served[domain] += 1
                if batch_number + 1 == self._num_batches[domain]:
                    del shuffled[domain]
                progress.yielded += 1
                yield batch
            progress.exhausted = True
        finally:
            progress.over = True

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iterator serves; without this, epochs follow one another.

        To choose the epoch that ``load_state_dict`` is about to resume keeps the position in it, so a loop that
        calls this before every epoch resumes rightly.

        Args:
            epoch: Integer of at least 0.

        Raises:
            ValueError: If it is not.
        """
        epoch = check_short(check_int, "epoch", epoch, 0)
        if epoch != self._next[0]:
            self._next = (epoch, 0)
        self._progress = None

    def total_batches(self, epochs: int) -> int:
        """Return how many batches the epochs 0, 1, ..., ``epochs`` - 1 serve in all, for a learning rate schedule.

        Epochs are equally long with ``exhausted="cycle"``, with S equal to the number of domains and with S = 1; this
        then takes no time. Otherwise they are planned one by one, at about 1 µs per batch.

        Args:
            epochs: Their number.

        Returns:
            The sum of their lengths. A schedule that steps once for every group, not for every batch, takes this
            divided by ``domains_per_step``.

        Raises:
            ValueError: If ``epochs`` is not an integer of at least 0.

        Example:
            >>> DomainBatchSampler(["a", "b", "b"] * 4, batch_size=2, exhausted="cycle").total_batches(5)
            40
        """
        return self._plan.total(check_short(check_int, "epochs", epochs, 0))

    def state_dict(self, served: int | None = None) -> dict[str, int | str | bool]:
        """Return the position, and the settings by which ``load_state_dict`` notices other data or arguments.

        A ``DataLoader`` with workers takes batches ahead of the loop. Under ``meta_batches`` or ``ResumableLoader``
        the position is still what the loop received. In a plain loop over such a loader, pass ``served``; after its
        end there is no need.

        Args:
            served: Batches the loop has taken from its present iterator, also if that one resumed an epoch:
                ``i + 1`` in ``for i, batch in enumerate(loader)``. By default all that the sampler has served.

        Returns:
            Numbers and strings; ``torch.load(weights_only=True)`` loads them.

        Raises:
            ValueError: If ``served`` is not an integer, is negative, or exceeds what the sampler has served.
        """
        progress = self._progress
        yielded = 0 if progress is None else progress.yielded
        if served is not None and check_short(check_int, "served", served, 0) > yielded:
            raise ValueError(f"served should be at most {yielded}, what the sampler has served (got {shown(served)})")
        if served is None and progress is not None:
            # An exhausted sampler is at the start of the next epoch, unless _track still hands out the tail.
            served = (0 if progress.exhausted else yielded) if progress.handed_out is None else progress.handed_out
        epoch, position = self._next
        # After an exhausted epoch, a loop that has taken nothing yet is the next epoch's.
        if progress is not None and served is not None and (served > 0 or not progress.exhausted):
            epoch, position = progress.epoch, progress.start + int(served)
        return {"version": STATE_VERSION, "epoch": epoch, "position": position, **self._settings}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where a state dict was taken: the next iterator serves the rest of that epoch.

        Args:
            state_dict: From ``state_dict`` of a sampler of the same domains and arguments. One from before there was
                ``order`` (version 1) continues with ``order="random"``, one from before there was ``exhausted``
                (version 2) with ``exhausted="stop"``.

        Raises:
            ValueError: If it is malformed or of another version, other domains or arguments; nothing changes then.
        """
        expected = {"version": STATE_VERSION, "epoch": 0, "position": 0, **self._settings}
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"the state dict should hold exactly {list(expected)} (got {shown(state_dict)})")
        state_dict = _upgraded(state_dict)
        if set(state_dict) != set(expected):
            missing, unknown = (
                [name for name in ones if name not in others]
                for ones, others in ((expected, state_dict), (state_dict, expected))
            )
            raise ValueError(
                f"the state dict should hold exactly {list(expected)} (it lacks {missing}, and has {shown(unknown)})"
            )
        for name, own in {"version": STATE_VERSION, **self._settings}.items():
            if type(state_dict[name]) is not type(own) or state_dict[name] != own:
                found, advice = shown(state_dict[name]), "resume with the same domains and arguments"
                if (name, found) == ("order", "'random'"):
                    advice = 'it was saved in random order, DomainBatchSampler(order="random") resumes it'
                raise ValueError(f"the state dict's {name} is {found}, but this sampler's is {shown(own)}: {advice}")
        epoch, position = (
            check_short(check_int, f"the state dict's {name}", state_dict[name], 0) for name in ("epoch", "position")
        )
        if position > (length := self._epoch_length(epoch)):
            raise ValueError(
                f"the state dict's position is {shown(position)}, but epoch {shown(epoch)} has {shown(length)} batches"
            )
        self._next = (epoch, position)
        self._progress = None

    def _track(self, loader: Iterable[Item], group_size: int = 1) -> Iterator[Item]:
        """Pass on what a loader over this sampler yields, and count it as handed out.

        The loader may have taken more from the sampler, even all. Until the loop ends, ``state_dict()`` is behind
        the last item: position = start + ``group_size`` · items. If the loop is broken off, it stays there.

        Args:
            loader: Iterated over once; it should keep the sampler's order.
            group_size: Batches in an item.

        Yields:
            The loader's items.

        Raises:
            RuntimeError: If the next iterator would start in the middle of a group.
        """
        if self._next[1] % group_size:
            raise RuntimeError(
                f"the sampler resumes at batch {self._next[1]}, in the middle of a group of {group_size}: take the "
                f"state dict under meta_batches, or set its 'position' to a multiple of {group_size}"
            )
        progress = None
        try:
            for item in loader:
                if progress is None:
                    progress = self._progress  # of the iterator that the loader has just started
                if progress is not None:
                    progress.handed_out = (progress.handed_out or 0) + group_size
                    progress.over = False  # although workers may have taken the last batch
                yield item
                del item  # or a group the loop is done with stays in memory while the loader fetches the next
            if progress is not None:
                progress.handed_out = None
        finally:
            if progress is not None:
                progress.over = True

    @property
    def _next_epoch(self) -> int:
        """Number of the epoch that the next iterator serves or, after ``load_state_dict``, resumes."""
        return self._next[0]

    def _current(self) -> tuple[int, int]:
        """Return epoch and start of the iterator in progress, or else of the next one."""
        if self._progress is not None and not self._progress.over:
            return self._progress.epoch, self._progress.start
        return self._next

    def _epoch_length(self, epoch: int | None = None) -> int:
        """Return the batches of a whole epoch: by default the one in progress, or else the next one."""
        return self._plan.length(self._current()[0] if epoch is None else epoch)

    def _labels_at(self, epoch: int, start: int, number: int) -> tuple[str | int, ...]:
        """Return the labels of the batches from ``start`` to ``start + number`` of an epoch, as far as it goes."""
        stretches = self._plan.stretches(epoch, start, start + number)
        return tuple(self._labels[domain] for domains in stretches for domain in domains.tolist())

    def _check_dataset(self, num_samples: int) -> None:
        """Raise ``ValueError`` unless the domains are of a data set of ``num_samples``. For loaders, which know it."""
        if self._num_labels not in {None, num_samples}:
            raise ValueError(
                f"domains holds {self._num_labels} labels, but the loader's data set {num_samples} samples: give one "
                "label per sample, in the data set's order, or map labels to indices"
            )
        largest = max(int(indices.max()) for indices in self._indices)
        if largest >= num_samples:
            label = next(
                label for label, indices in zip(self._labels, self._indices, strict=True) if largest in indices
            )
            raise ValueError(
                f"domains[{shown(label)}] has the index {largest}, but the loader's data set has {num_samples} "
                "samples: indices should count within that data set"
            )


def _upgraded(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state of an earlier version as it would be saved today."""
    for version, added in ADDED_SETTINGS.items():
        found = state_dict.get("version")
        if type(found) is int and found == version - 1 and not any(name in state_dict for name in added):
            state_dict = {**state_dict, "version": version, **added}
    return state_dict
