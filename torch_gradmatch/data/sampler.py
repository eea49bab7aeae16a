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

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from torch_gradmatch._checks import check_bool, check_choice, check_int
from torch_gradmatch.data._draw import Groups, IntArray, random_stream
from torch_gradmatch.data._epochs import Epochs, check_groups
from torch_gradmatch.data._labels import domain_weights, indices_by_domain

__all__ = ["DomainBatchSampler"]


class DomainBatchSampler(Epochs, Sampler[list[int]]):
    """A ``batch_sampler`` whose consecutive groups of S batches come from S distinct domains.

    In each epoch the samples of every domain are shuffled and cut into batches. A group draws S domains without
    replacement from those with a batch left and serves them in random order. The next group serves the same domains in
    reverse order, with their next batches, and so on in pairs.

    With ``exhausted="stop"`` the epoch ends when fewer than S domains have a batch left, with S equal to the number of
    domains when the smallest has run out, and no sample is served twice. With ``exhausted="cycle"`` a domain that has
    run out is shuffled anew and goes on. An epoch then has

        max(max_d n_d, ⌈(Σ_d n_d) / S⌉) groups, n_d the batches of domain d:

    the fewest in which every domain could be served whole. With S equal to the number of domains, that is until the
    largest has been served whole. With S smaller it is at least as many batches as the data has, and each domain
    serves as many of them as its weight gives it.

    Epochs advance by themselves: each new iterator serves the next one, also after one that was broken off. An epoch
    depends only on the arguments and its number; global random state is neither read nor changed. ``len(sampler)`` is
    exactly the number of batches of the epoch of the iterator in progress, or else of the next one. It is that of the
    whole epoch also where that is resumed in the middle: frameworks count the batches before the checkpoint themselves.

    ``accumulate=k`` is for loops that add up the gradients of k batches before they step: each domain of a group serves
    k batches in a row, all of which are added up. So a step still has one domain. What a domain has beyond a multiple
    of k is not served in that epoch, but others in each. A loss that is a mean over its batch weighs a smaller batch as
    much as a full one; ``drop_last=True`` leaves smaller ones out.

    Each of R ranks of ``torch.distributed`` has a sampler of its own, with the same arguments but for ``rank``; nothing
    is communicated. In every epoch all ranks have the same number of batches. ``split`` says what they share:

    - ``"batch"``, for DDP, FSDP2 and methods with ``parallel="data"``: all serve the same domain at the same time, and
      each the r-th of R equal consecutive parts of the batch. Together they serve what one process would.
    - ``"walks"``, for methods whose ranks walk by themselves (``Fish`` and ``SmoothFish`` with a ``process_group``): in
      each group all have the same S domains, each rank in an order of its own, the ranks 2k and 2k + 1 in opposite
      ones. R batches of a domain are dealt out at a time; no sample is served by two ranks.
    - ``"domains"``, for ``IDGM`` with ``parallel="domains"``: the S batches of each group are dealt out, S / R
      consecutive ones to each rank.

    With ``"batch"`` and ``"walks"`` all ranks have equally many samples of a domain at a time. What a domain has last
    is cut so that R divides it: fewer than R samples of a domain are not served in an epoch, others in each.

    To resume in the middle of an epoch, save and load the ``state_dict()`` of torchdata's ``StatefulDataLoader`` over
    the sampler: it holds the sampler's. A ``DataLoader`` with workers fetches batches ahead of the loop, and the
    sampler's own state is then that of the batch which was fetched last. Where :func:`~torch_gradmatch.meta_batches` or
    :func:`~torch_gradmatch.check_loader` have seen such a loader, ``state_dict()`` is an error in the middle of an
    epoch. The sampler alone cannot know.

    Args:
        domains: One label, string or integer, per sample of the data set: a list or tuple, or a tensor, array or column
            of NumPy, pandas, Polars or Arrow. Or a mapping from label to the indices of that domain's samples, which
            need not cover the data set.
        batch_size: Samples in a batch; a domain's last batch may be smaller. With ``split="batch"``, in the batch of
            all ranks together, a multiple of R.
        domains_per_step: S; ``None`` for all domains, of which there should be two then. With 1, and also with one
            domain, it serves ordinary training. With ``split="domains"``, S of all ranks together, a multiple of R.
        weighting: The probabilities p_d with which a group's domains are drawn, one after the other among those not
            yet in it. ``"uniform"``: equal. ``"proportional"``: p_d ∝ the batches that the domain has left
            (``stratified`` in the authors' code), so that large and small domains last about equally long; in a cycle
            p_d ∝ n_d. A mapping from every label to a positive number: p_d ∝ that.
        order: ``"flipflop"`` serves groups in pairs, the second in the reverse order of the first; where one of the
            first's domains has no batch left, the second is drawn anew. In a cycle, and with S equal to the number of
            domains, the last group of an epoch and the first of the next may be a pair, too. ``"random"`` draws every
            group, each in an order of its own.
        exhausted: What happens when domains run out, ``"stop"`` or ``"cycle"``, see above.
        batches_per_epoch: With ``exhausted="cycle"``, the length of every epoch instead: a multiple of S times k. With
            ``split="domains"``, of all ranks together.
        accumulate: k, the batches of a domain in a row, see above.
        num_replicas: R, the number of ranks. With 1, ``split`` makes no difference.
        rank: This one's number, from 0 to R - 1.
        split: ``"batch"``, ``"walks"`` or ``"domains"``, see above.
        seed: Integer of at least 0.
        drop_last: Leave out a domain's last batch if it is smaller than ``batch_size``. With ``split="walks"``, leave
            out the last fewer than R · ``batch_size`` samples, which otherwise are one smaller batch on every rank.

    Attributes:
        batches_per_group: How many batches of a group this rank has: S k, with ``split="domains"`` S k / R.

    Raises:
        ValueError: If an argument is out of range, a label is missing or neither string nor integer, all samples have
            the same one although S is not 1, a string and an integer read the same, an index is negative or given
            twice, or a domain has too few samples for k batches (with ``drop_last``: full ones) on every rank.
        TypeError: If ``domains`` is neither a sequence nor a mapping.

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
        domains: Any,
        batch_size: int,
        domains_per_step: int | None = None,
        weighting: str | Mapping[str, float] | Mapping[int, float] = "uniform",
        order: str = "flipflop",
        exhausted: str = "stop",
        batches_per_epoch: int | None = None,
        accumulate: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        split: str = "batch",
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.order = check_choice("order", order, ("flipflop", "random"))
        self.exhausted = check_choice("exhausted", exhausted, ("stop", "cycle"))
        self.accumulate = check_int("accumulate", accumulate, 1)
        self.num_replicas = check_int("num_replicas", num_replicas, 1)
        self.rank = check_int("rank", rank, 0)
        self.split = check_choice("split", split, ("batch", "walks", "domains"))
        self.seed = check_int("seed", seed, 0)
        self.drop_last = check_bool("drop_last", drop_last)
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank should be less than num_replicas={num_replicas} (got {rank}): both of one group")
        if self.exhausted == "stop" and batches_per_epoch is not None:
            raise ValueError(f"batches_per_epoch={batches_per_epoch!r:.80} should come with exhausted='cycle'")
        labels, self._indices = indices_by_domain(domains)
        if len(labels) == 1 and domains_per_step != 1:
            which = f"one label, {labels[0]!r:.80}, for all samples"
            raise ValueError(f"domains has {which}: for ordinary training, pass domains_per_step=1")
        self._num_labels = None if isinstance(domains, Mapping) else sum(indices.size for indices in self._indices)
        size = check_groups(domains_per_step, batches_per_epoch, len(labels), self.accumulate)
        divided = {"batch": ("batch_size", self.batch_size), "domains": ("domains_per_step", size)}.get(self.split)
        if divided is not None and divided[1] % self.num_replicas:
            raise ValueError(
                f"{divided[0]}={divided[1]} should be a multiple of num_replicas={num_replicas}, as split={split!r} "
                f"gives each rank an equal part: {divided[0]}={-(-divided[1] // num_replicas) * num_replicas} would do"
            )
        # W samples of a domain are taken at a time, and cut into parts, of which each rank has one.
        self._parts = 1 if self.split == "domains" else self.num_replicas
        self._whole_batch = self.batch_size * (self.num_replicas if self.split == "walks" else 1)
        # The unit of the draw is a run, the k batches that a domain serves in a row.
        self._runs = self._count_runs(labels)
        per_epoch = min(self._runs) if size == len(labels) else None
        if self.exhausted == "cycle":
            per_epoch = max(max(self._runs), -(-sum(self._runs) // size))  # McNaughton's bound
            per_epoch = per_epoch if batches_per_epoch is None else batches_per_epoch // (size * self.accumulate)
        weights = domain_weights(weighting, labels)
        groups = Groups(self._runs, size, weights, self.seed, self.order == "flipflop", per_epoch)
        of_samples = (self.batch_size, self.accumulate, self.drop_last, self.num_replicas, self.split, self.exhausted)
        settings = repr((groups, of_samples, [own.size for own in self._indices])).encode()
        batches = size * self.accumulate // (self.num_replicas if self.split == "domains" else 1)
        super().__init__(groups, labels, batches, settings + np.concatenate(self._indices).tobytes())
        self.runs_ahead = False  # of the loop, does the loader, as meta_batches and check_loader find out

    def __iter__(self) -> Iterator[list[int]]:
        """Serve the next epoch.

        Yields:
            The sample indices of one batch.
        """
        shuffled: dict[int, tuple[int, IntArray]] = {}
        counts: Iterator[list[int]] | None = None
        for epoch, position in self._places():
            number, place = divmod(position, self.batches_per_group)
            if counts is None or place == 0:
                counts = counts or self._groups.served(epoch, number)
                served, walk = next(counts), self._group(epoch, number)
            run, repeat = divmod(place, self.accumulate)
            domain = walk[run]
            past_round, run = divmod(served[domain], self._runs[domain])
            if domain not in shuffled or shuffled[domain][0] != past_round:
                # Each domain and round has its own generator, so a resumed epoch shuffles it the same way.
                generator = random_stream(self.seed, 1, epoch, domain, past_round)
                shuffled[domain] = past_round, generator.permutation(self._indices[domain])
            first = (run * self.accumulate + repeat) * self._whole_batch
            whole = shuffled[domain][1][first : first + self._whole_batch]
            length = whole.size // self._parts
            first = length * self.rank if self._parts > 1 else 0
            batch: list[int] = whole[first : first + length].tolist()
            if run + 1 == self._runs[domain] and repeat + 1 == self.accumulate:
                del shuffled[domain]
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iterator serves; without this, epochs follow one another.

        To choose the epoch that ``load_state_dict`` is about to resume keeps the position in it, so a loop that
        calls this before every epoch resumes rightly.

        Args:
            epoch: Integer of at least 0.

        Raises:
            ValueError: If it is not.
        """
        epoch = check_int("epoch", epoch, 0)
        self._go_to(epoch, self._following[1] if epoch == self._following[0] else 0)

    def total_batches(self, epochs: int) -> int:
        """Return how many batches the epochs 0, 1, ..., ``epochs`` - 1 serve in all, for a learning rate schedule.

        Args:
            epochs: Their number.

        Returns:
            The sum of their lengths on one rank, which is the same on all.

        Raises:
            ValueError: If ``epochs`` is not an integer of at least 0.

        Example:
            >>> DomainBatchSampler(["a", "b", "b"] * 4, batch_size=2, exhausted="cycle").total_batches(5)
            40
        """
        return sum(self._length(epoch) for epoch in range(check_int("epochs", epochs, 0)))

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last batch that the sampler has served, and a hash of the settings.

        It is the same on every rank.

        Returns:
            Numbers and strings; ``torch.load(weights_only=True)`` loads them.

        Raises:
            RuntimeError: In an epoch over a loader that is known to fetch batches ahead of the loop.
        """
        if self.runs_ahead and self._begun:
            raise RuntimeError(
                "the loader fetches batches ahead of the loop, so its DomainBatchSampler does not know which batch the "
                "loop received last: use torchdata's StatefulDataLoader in place of the DataLoader, and save its "
                "state_dict() (pip install torch_gradmatch[data]). Between two epochs, call set_epoch() with the "
                "number of the next one first"
            )
        return self._state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where a state dict was taken: the next iterator serves the rest of that epoch.

        Args:
            state_dict: From ``state_dict`` of a sampler of the same domains and arguments, on any rank.

        Raises:
            ValueError: If it is malformed, or of other domains or arguments; nothing changes then.
        """
        self._load_state(state_dict)

    def _group(self, epoch: int, number: int) -> list[int]:
        """Return the domains of a group in the order in which this rank serves them."""
        group = self._groups.group(epoch, number)
        if self.split == "domains":
            share = len(group) // self.num_replicas
            return group[share * self.rank : share * (self.rank + 1)]
        if self.split == "batch":
            return group
        pair_of_ranks, opposite = divmod(self.rank, 2)
        if pair_of_ranks:
            # Both groups of a pair take the same draw. So the second is the reverse where it has the same domains;
            # where it was drawn anew, this is as random an order as any.
            key, second = self._groups.pair(epoch, number)
            group = random_stream(self.seed, 2, *key, pair_of_ranks).permutation(sorted(group)).tolist()
            opposite ^= second
        return group[::-1] if opposite else group

    def _count_runs(self, labels: tuple[str | int, ...]) -> list[int]:
        """Return how often each domain can serve k batches on every rank, at least once."""
        runs = []
        for label, indices in zip(labels, self._indices, strict=True):
            rest = indices.size % self._whole_batch
            served = indices.size - (rest if self.drop_last else rest % self._parts)
            num_batches = -(-served // self._whole_batch)
            if num_batches < self.accumulate:
                raise ValueError(
                    f"domain {label!r:.80} has {indices.size} samples, which make {num_batches} batches for batch_size="
                    f"{self.batch_size}, num_replicas={self.num_replicas}, split={self.split!r} and drop_last="
                    f"{self.drop_last}, fewer than accumulate={self.accumulate}: lower these or leave it out"
                )
            runs.append(num_batches // self.accumulate)
        return runs

    def check_dataset(self, num_samples: int) -> None:
        """Raise ``ValueError`` unless the domains are of a data set of ``num_samples``. For loaders, which know it."""
        if self._num_labels not in {None, num_samples}:
            raise ValueError(
                f"domains holds {self._num_labels} labels, but the loader's data set {num_samples} samples: give one "
                "label per sample, in the data set's order, or map labels to indices"
            )
        for label, indices in zip(self._labels, self._indices, strict=True):
            if (largest := indices.max()) >= num_samples:
                raise ValueError(
                    f"domains[{label!r:.80}] has the index {largest}, but the loader's data set {num_samples} samples"
                )
