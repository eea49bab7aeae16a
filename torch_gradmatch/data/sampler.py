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
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Sampler

from torch_gradmatch._checks import check_bool, check_choice, check_int
from torch_gradmatch.data._draw import random_stream, warn_if_little_is_served
from torch_gradmatch.data._labels import IntArray, ListLike, check_short, domain_weights, indices_by_domain, shown
from torch_gradmatch.data._saved_place import STATE_VERSION, saved_place
from torch_gradmatch.data._split import SPLITS, Split, plan_ranks

__all__ = ["DomainBatchSampler"]

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

    Each of R ranks of ``torch.distributed`` has a sampler of its own, with the same arguments but for ``rank``; nothing
    is communicated. In every epoch all ranks have the same number of batches. ``split`` says what they share:

    - ``"batch"``, for DDP, FSDP2 and methods with ``parallel="data"``: all serve the same domain at the same time, and
      each the r-th of R equal consecutive parts of the batch. Together they serve what one process would.
    - ``"walks"``, for methods whose ranks walk by themselves (``Fish`` with a ``process_group``, ``SmoothFish`` with
      ``parallel="walks"``): in each group all have the same S domains, each rank in an order of its own, the ranks 2k
      and 2k + 1 in opposite ones. R batches of a domain are dealt out at a time, so that an epoch has about n_d / R of
      them for each rank; no sample is served by two. With an odd R, the last rank's order has no opposite.
    - ``"domains"``, for ``IDGM`` with ``parallel="domains"``: the S batches of each group are dealt out, S / R
      consecutive ones to each rank.

    With ``"batch"`` and ``"walks"`` all ranks have equally many samples of a domain at a time. What a domain has last
    is cut so that R divides it: fewer than R samples of a domain are not served in an epoch, others in each.

    Args:
        domains: One label, string or integer, per sample of the data set (list, tuple, array, tensor, Series of
            pandas or Polars); or a mapping from label to the indices of that domain's samples, which need not cover
            the data set.
        batch_size: Samples in a batch; a domain's last batch may be smaller. With ``split="batch"``, in the batch of
            all ranks together, a multiple of R.
        domains_per_step: S; ``None`` for all domains, of which there should be two then. With 1, and also with one
            domain, it serves ordinary training. With ``split="domains"``, S of all ranks together, a multiple of R.
        weighting: The probabilities p_d with which a group's domains are drawn, one after the other among those not
            yet in it. ``"uniform"``: equal. ``"proportional"``: p_d ∝ the batches that the domain has left
            (``stratified`` in the authors' code), so that large and small domains last about equally long; in a cycle
            p_d ∝ n_d. A number t from 0 to 1: p_d ∝ (its samples)^t, from uniform to by size. A mapping from every
            label to a positive number: p_d ∝ that.
        seed: Integer of at least 0.
        drop_last: Leave out a domain's last batch if it is smaller than ``batch_size``. With ``split="walks"``, leave
            out the last fewer than R · ``batch_size`` samples, which otherwise are one smaller batch on every rank.
        overlapping: A mapping may give a sample to several domains, as the identities that a comment mentions do.
            Each domain serves it; without this it is an error.
        order: ``"flipflop"`` serves groups in pairs, the second in the reverse order of the first; where one of the
            first's domains has no batch left, the second is drawn anew. With S equal to the number of domains and an
            odd number of groups in an epoch, the last group of an even epoch and the first of the next are a pair
            too; with S smaller, an epoch leaves a few batches more unserved. ``"random"`` draws every group, each in
            an order of its own.
        exhausted: What happens when domains run out, ``"stop"`` or ``"cycle"``, see above. In a cycle all groups are
            in pairs, also where an epoch ends between the two.
        batches_per_epoch: With ``exhausted="cycle"``, the length of every epoch instead: a multiple of S. With
            ``split="domains"``, of all ranks together.
        num_replicas: R, the number of ranks. With 1, ``split`` makes no difference.
        rank: This one's number, from 0 to R - 1.
        split: ``"batch"``, ``"walks"`` or ``"domains"``, see above.

    Attributes:
        batches_per_group: How many batches of a group this rank has: S / R with ``split="domains"``, else S.

    Raises:
        ValueError: If an argument is out of range, a label is missing or neither string nor integer, all samples have
            the same one although S is not 1, a string and an integer read the same, an index is negative or given
            twice, a flag is not a ``bool``, or a domain is empty or has too few samples for one batch (with
            ``drop_last``: a full one) on every rank.
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

        Two ranks walk through the same domains in opposite orders:

        >>> one, other = (
        ...     DomainBatchSampler(hospitals, batch_size=2, num_replicas=2, rank=rank, split="walks") for rank in (0, 1)
        ... )
        >>> [hospitals[batch[0]] for batch in one] == [hospitals[batch[0]] for batch in other][::-1]
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
        num_replicas: int = 1,
        rank: int = 0,
        split: str = "batch",
    ) -> None:
        super().__init__()
        self.batch_size = check_short(check_int, "batch_size", batch_size, 1)
        self.seed = check_short(check_int, "seed", seed, 0)
        self.drop_last = check_short(check_bool, "drop_last", drop_last)
        self.order = check_short(check_choice, "order", order, ("flipflop", "random"))
        self.exhausted = check_short(check_choice, "exhausted", exhausted, ("stop", "cycle"))
        overlapping = check_short(check_bool, "overlapping", overlapping)
        self.num_replicas = check_short(check_int, "num_replicas", num_replicas, 1)
        self.rank = check_short(check_int, "rank", rank, 0)
        self.split = check_short(check_choice, "split", split, SPLITS)
        divided = Split(self.split, self.num_replicas, self.rank, self.batch_size, self.drop_last)

        self._labels, self._indices = indices_by_domain(domains, overlapping)
        self._num_labels = None if isinstance(domains, Mapping) else sum(indices.size for indices in self._indices)
        sizes = [indices.size for indices in self._indices]
        divided.num_batches(sizes, self._labels)
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
        self._plan_of = partial(
            plan_ranks,
            sizes=sizes,
            labels=self._labels,
            domains_per_step=self.domains_per_step,
            weights=weights,
            seed=self.seed,
            paired=self.order == "flipflop",
            exhausted=self.exhausted,
            batches_per_epoch=batches_per_epoch,
        )
        self._plan = self._plan_of(divided)
        self.batches_per_group = self._plan.batches_per_group
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
            "batches_per_epoch": self._plan.plan.length(0) if self.exhausted == "cycle" else 0,  # 0: they may differ
            "num_replicas": self.num_replicas,
            "split": self.split,
        }
        # No other class touches these two: loaders call _track, _next_epoch, _epoch_length and _labels_at.
        self._next = (0, 0)  # epoch and position at which the next iterator starts
        self._progress: _Progress | None = None  # of the latest iterator, unless an epoch was chosen since
        if self.exhausted == "stop":
            num_samples = np.unique(np.concatenate(self._indices)).size if overlapping else sum(sizes)
            warn_if_little_is_served(self._plan.plan, sizes, divided.whole_batch, num_samples)

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
            num_batches, part = self._plan.plan.num_batches, self._plan.split.part
            shuffled: dict[int, tuple[int, IntArray]] = {}
            for domain, number in self._plan.numbered(epoch, start):
                past_round, batch_number = divmod(number, num_batches[domain])
                if domain not in shuffled or shuffled[domain][0] != past_round:
                    # Each domain and round has its own generator, so a resumed epoch shuffles it the same way.
                    key = (epoch, 1 + domain, past_round) if past_round else (epoch, 1 + domain)
                    shuffled[domain] = past_round, random_stream(self.seed, *key).permutation(self._indices[domain])
                batch: list[int] = part(shuffled[domain][1], batch_number).tolist()
                if batch_number + 1 == num_batches[domain]:
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
            The sum of their lengths on one rank, which is the same on all. A schedule that steps once for every group,
            not for every batch, takes this divided by ``batches_per_group``.

        Raises:
            ValueError: If ``epochs`` is not an integer of at least 0.

        Example:
            >>> DomainBatchSampler(["a", "b", "b"] * 4, batch_size=2, exhausted="cycle").total_batches(5)
            40
        """
        return self._plan.total(check_short(check_int, "epochs", epochs, 0))

    def state_dict(self, served: int | None = None) -> dict[str, int | str | bool]:
        """Return the position, and the settings by which ``load_state_dict`` notices other data or arguments.

        It is the same on every rank. With ``split="domains"`` the position is that of all ranks together.

        A ``DataLoader`` with workers takes batches ahead of the loop. Under ``meta_batches`` or ``ResumableLoader``
        the position is still what the loop received. In a plain loop over such a loader, pass ``served``; after its
        end there is no need.

        Args:
            served: Batches the loop has taken from its present iterator, also if that one resumed an epoch:
                ``i + 1`` in ``for i, batch in enumerate(loader)``. By default all that the sampler has served. In
                any case on this rank.

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
        position *= self._plan.split.shares
        return {"version": STATE_VERSION, "epoch": epoch, "position": position, **self._settings}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where a state dict was taken: the next iterator serves the rest of that epoch.

        It may be of any rank, and of another number of ranks if the rest of the epoch is the same on this one: always
        between two epochs; with ``split="domains"`` between two groups; with ``split="batch"`` anywhere, if what each
        domain has last is cut alike, as where ``batch_size`` divides all sizes.

        Args:
            state_dict: From ``state_dict`` of a sampler of the same domains and arguments. One from before there was
                ``order`` (version 1) continues with ``order="random"``, one from before there was ``exhausted``
                (version 2) with ``exhausted="stop"``, one from before there was ``num_replicas`` (version 3) as one of
                a single rank.

        Raises:
            ValueError: If it is malformed or of another version, other domains or arguments, or the rest of the epoch
                would be another on this number of ranks; nothing changes then.
        """
        self._next = saved_place(state_dict, self._settings, self._plan, self._plan_of)
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
                "state dict under meta_batches, or set its 'position' to a multiple of "
                f"{group_size * self._plan.split.shares}"
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

    def _smaller_batches(self) -> int:
        """Return how many domains have a last batch of fewer samples than the others."""
        return 0 if self.drop_last else sum(size % self.batch_size > 0 for size in self._plan.sizes)

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
        return tuple(self._labels[domain] for domain in self._plan.domains(epoch, start, start + number))

    def _is_end(self, state_dict: Mapping[str, Any]) -> bool:
        """Return whether a state of this sampler is behind the last batch of its epoch."""
        length: int = self._plan.plan.length(int(state_dict["epoch"]))
        return bool(state_dict["position"] == length)

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
