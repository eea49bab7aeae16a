"""Batches for meta-iterations: S batches in a row, each from one domain, the S domains distinct.

Algorithm 1 of Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, visits the
domains in random order. Where there are more domains than inner steps, the authors' code draws S of them without
replacement, as here. There each domain has its own loader; here one ``batch_sampler`` serves any ``DataLoader``.

By default every second group reverses the order of the one before. To first order in the step size, the mean of a
walk of SGD through the domains and of the reverse walk is the mean over all orders; the mean of two walks in random
orders is not. For whole epochs this is FlipFlop of Rajput, Lee and Papailiopoulos, *Permutation-Based SGD: Is Random
Optimal?*, ICLR 2022, and the *paired reversal* of Nguyen et al., arXiv 2604.00260, who prove that it cancels the
leading term that depends on the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from torch_gradmatch._checks import check_bool, check_choice, check_int
from torch_gradmatch.data._draw import Groups, random_stream
from torch_gradmatch.data._labels import IntArray, domain_weights, indices_by_domain

__all__ = ["DomainBatchSampler"]

KEYS = ["epoch", "position", "ranks", "settings"]  # of a state dict


class DomainBatchSampler(Sampler[list[int]]):
    """A ``batch_sampler`` that serves groups of S batches, each batch from another domain.

    In each epoch the samples of every domain are shuffled and cut into batches. A group draws S domains without
    replacement from those with a batch left and serves them in random order. The next group serves the same domains in
    reverse order, with their next batches, and so on in pairs.

    With ``exhausted="stop"`` the epoch ends when fewer than S domains have a batch left, and no sample is served twice.
    With ``exhausted="cycle"`` a domain that has run out is shuffled anew and goes on. An epoch then has

        max(max_d n_d, ⌈(Σ_d n_d) / S⌉) groups, n_d the batches of domain d:

    the fewest in which every domain could be served whole. With S equal to the number of domains, that is until the
    largest has been served whole. With S smaller it is at least as many batches as the data has.

    Epochs advance by themselves: each new iterator serves the next epoch, also after one that was broken off. An epoch
    depends only on the arguments and its number; global random state is neither read nor changed. ``len(sampler)`` is
    the number of batches of the whole epoch of the iterator in progress, or else of the next one, also where the epoch
    is resumed in the middle: frameworks count the batches before the checkpoint themselves.

    ``accumulate=k`` is for loops that add up the gradients of k batches before they step: each domain of a group serves
    k batches in a row, so that a step has one domain. Samples beyond a multiple of k batches are not served in that
    epoch; they are other samples in each epoch. A loss that is a mean over its batch weighs a smaller batch as much as
    a full one; ``drop_last=True`` leaves smaller ones out.

    Each of R ranks of ``torch.distributed`` has a sampler of its own, with the same arguments but for ``rank``; nothing
    is communicated. In every epoch all ranks have the same number of batches. ``split`` says what they share:

    - ``"batch"``, for DDP, FSDP2 and methods with ``parallel="data"``: all ranks serve the same domain at the same
      time, rank r the r-th of R equal parts of the batch. Together they serve what one process would.
    - ``"walks"``, for ``Fish`` and ``SmoothFish`` with a ``process_group``: in each group all ranks have the same S
      domains, each rank in an order of its own; ranks 2k and 2k + 1 have opposite orders. No sample is served by two
      ranks.
    - ``"domains"``, for ``IDGM`` with ``parallel="domains"``: each rank has S / R consecutive batches of each group.

    With ``"batch"`` and ``"walks"`` all ranks have the same number of samples of a domain at a time. So fewer than R
    samples of a domain are not served in an epoch; they are other samples in each epoch.

    To resume in the middle of an epoch, save and load the ``state_dict()`` of torchdata's ``StatefulDataLoader`` over
    the sampler, which holds the sampler's. A ``DataLoader`` with workers fetches batches ahead of the loop; the
    sampler's own state is then that of the batch which was fetched last. Where :func:`~torch_gradmatch.meta_batches` or
    :func:`~torch_gradmatch.check_loader` have seen such a loader, ``state_dict()`` is an error in the middle of an
    epoch.

    Args:
        domains: One label, string or integer, per sample of the data set: a list or tuple, or a tensor, array or column
            of NumPy, pandas, Polars or Arrow. Or a mapping from label to the indices of that domain's samples, which
            need not cover the data set.
        batch_size: Samples in a batch; a domain's last batch may be smaller. With ``split="batch"``, in the batch of
            all ranks together, a multiple of R.
        domains_per_step: S; ``None`` for all domains, at least two. 1 is for ordinary training. With
            ``split="domains"``, S of all ranks together, a multiple of R.
        weighting: The probabilities p_d with which a group's domains are drawn, one after the other without
            replacement. ``"uniform"``: equal. ``"proportional"``: p_d ∝ the batches that the domain has left
            (``stratified`` in the authors' code), so that large and small domains last about equally long; in a cycle
            p_d ∝ n_d. A mapping from every label to a positive number: p_d ∝ that.
        order: ``"flipflop"`` serves groups in pairs, the second in the reverse order of the first. Where a domain of
            the first group has no batch left, the second is drawn anew. In a cycle, and with S equal to the number of
            domains, the last group of an epoch and the first of the next may be a pair, too. ``"random"`` draws every
            group in an order of its own.
        exhausted: What happens when domains run out, ``"stop"`` or ``"cycle"``, see above.
        batches_per_epoch: With ``exhausted="cycle"``, the length of every epoch: a multiple of S times k. With
            ``split="domains"``, of all ranks together.
        accumulate: k, the batches of a domain in a row, see above.
        num_replicas: R, the number of ranks. With 1, ``split`` makes no difference.
        rank: The number of this rank, from 0 to R - 1.
        split: ``"batch"``, ``"walks"`` or ``"domains"``, see above.
        seed: Integer of at least 0.
        drop_last: Leave out a domain's last batch if it is smaller than ``batch_size``. With ``split="walks"``, leave
            out the last fewer than R · ``batch_size`` samples, which otherwise are one smaller batch on every rank.

    Attributes:
        labels: The domains' labels, in the order in which they were given.
        domains_per_step: S.
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

        >>> walks = {"batch_size": 2, "num_replicas": 2, "split": "walks"}
        >>> one, other = (DomainBatchSampler(hospitals, rank=r, **walks) for r in (0, 1))
        >>> [hospitals[i] for i, _ in one] == [hospitals[i] for i, _ in other][::-1]
        True
    """

    labels: tuple[str | int, ...]
    domains_per_step: int
    batches_per_group: int

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
        labels, self._indices = indices_by_domain(domains)
        if len(labels) == 1 and domains_per_step != 1:
            raise ValueError(f"domains has one label, {labels[0]!r:.80}: pass domains_per_step=1 for ordinary training")
        size = len(labels) if domains_per_step is None else check_int("domains_per_step", domains_per_step, 1)
        if size > len(labels):
            raise ValueError(f"domains_per_step should be at most {len(labels)}, the number of domains (got {size})")
        ranks, walk, own = self.num_replicas, 0, slice(None)
        # W samples of a domain are taken at a time, and cut into parts, of which each rank has one.
        self._parts, self._whole_batch = ranks, self.batch_size
        if self.split == "walks":  # pairs of ranks walk in an order of their own, and in its reverse
            self._whole_batch *= ranks
            walk, own = self.rank // 2, slice(None, None, 1 - self.rank % 2 * 2)
        elif self.split == "domains":
            self._parts, own = 1, slice(self.rank * size // ranks, (self.rank + 1) * size // ranks)
        name, divided = ("domains_per_step", size) if self.split == "domains" else ("batch_size", self._whole_batch)
        if divided % ranks:
            raise ValueError(f"{name}={divided} should be a multiple of num_replicas={ranks} with split={split!r}")
        sizes = np.array([indices.size for indices in self._indices])
        served = sizes - sizes % self._whole_batch % (self._whole_batch if self.drop_last else self._parts)
        # The unit of the draw is a run, the k batches that a domain serves in a row.
        self._runs: list[int] = (-(-served // self._whole_batch) // self.accumulate).tolist()
        if 0 in self._runs:
            few = f"domain {labels[self._runs.index(0)]!r:.80} has {sizes[self._runs.index(0)]} samples, too few for"
            raise ValueError(f"{few} {accumulate=}, {batch_size=}, {num_replicas=}, {drop_last=}: lower these")
        per_epoch = min(self._runs) if size == len(labels) else None
        if self.exhausted == "cycle":
            per_epoch = max(*self._runs, -(-sum(self._runs) // size))  # McNaughton's bound
        if batches_per_epoch is not None:
            per_epoch, surplus = divmod(check_int("batches_per_epoch", batches_per_epoch, 1), size * self.accumulate)
            if surplus or self.exhausted == "stop":
                raise ValueError(f"{batches_per_epoch=} needs exhausted='cycle', in multiples of {size * accumulate}")
        weights, paired = domain_weights(weighting, labels), self.order == "flipflop"
        self._groups = Groups(self._runs, size, weights, self.seed, paired, per_epoch, walk)
        length = per_epoch if self.split != "walks" else batches_per_epoch
        told = [labels, size, sizes.tolist(), self.batch_size, self.accumulate, self.drop_last, self.split, weights]
        told += [self.seed, self.order, self.exhausted, length]  # all but the ranks, which may be others
        settings = repr(told).encode() + np.concatenate(self._indices).tobytes()
        self._settings = hashlib.blake2b(settings, digest_size=16).hexdigest()
        self.labels, self.domains_per_step, self._own = labels, size, own
        self.batches_per_group = len(range(size)[own]) * self.accumulate
        # Where the next iterator starts, what a state dict says, and where the latest iterator started.
        self._following = self._place = self._started = (0, 0)
        self._turn: object = None  # of the latest iterator, while it goes on
        # Since a place was chosen; and whether the loader runs ahead of the loop, as meta_batches and check_loader see.
        self._begun = self._runs_ahead = False
        self._of_labels = not isinstance(domains, Mapping)

    def __len__(self) -> int:
        return self._length((self._following if self._turn is None else self._started)[0])

    def __iter__(self) -> Iterator[list[int]]:
        """Serve the rest of the epoch after ``load_state_dict``, else the next epoch.

        Yields:
            The sample indices of one batch.
        """
        turn = self._turn = object()
        epoch, position = self._started = self._place = self._following
        self._following, self._begun = (epoch + 1, 0), True
        try:
            for place, batch in enumerate(self._batches(epoch, position), start=position + 1):
                if self._turn is turn:
                    self._place = (epoch, place)
                yield batch
            if self._turn is turn:
                self._place = self._following
        finally:
            if self._turn is turn:
                self._turn = None

    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        """Yield the batches of an epoch from a position on."""
        shuffled: dict[int, tuple[int, IntArray]] = {}
        known = start // self.batches_per_group if self.domains_per_step == len(self.labels) else 0
        served = [known] * len(self.labels)  # runs of each domain, on all ranks
        for number in range(known, self._groups.number(epoch)):
            group = self._groups.group(epoch, number)
            batches = list(product(group[self._own], range(self.accumulate)))
            for domain, repeat in batches[max(0, start - number * self.batches_per_group) :]:
                past_round, run = divmod(served[domain], self._runs[domain])
                if domain not in shuffled or shuffled[domain][0] != past_round:
                    # Each domain and round has its own generator, so a resumed epoch shuffles it the same way.
                    generator = random_stream(self.seed, 1, epoch, domain, past_round)
                    shuffled[domain] = past_round, generator.permutation(self._indices[domain])
                first = (run * self.accumulate + repeat) * self._whole_batch
                whole = shuffled[domain][1][first : first + self._whole_batch]
                equal = whole[: whole.size - whole.size % self._parts].reshape(self._parts, -1)
                yield equal[self.rank % self._parts].tolist()
            for domain in group:
                served[domain] += 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iterator serves; without this, epochs follow one another.

        Args:
            epoch: Integer of at least 0. The position that ``load_state_dict`` gave in it is kept, so that a loop that
                calls this before every epoch resumes rightly.

        Raises:
            ValueError: If it is not.
        """
        epoch = check_int("epoch", epoch, 0)
        if self._turn is None or epoch != self._started[0]:
            self._go_to(epoch, self._following[1] if epoch == self._following[0] else 0)
        else:  # state_dict() of a StatefulDataLoader begins an epoch, which then goes on
            self._following = epoch, 0

    def total_batches(self, epochs: int) -> int:
        """Return how many batches the epochs 0, 1, ..., ``epochs`` - 1 serve in all, for a learning rate schedule.

        Args:
            epochs: Their number.

        Returns:
            The sum of their lengths on one rank, which is the same on all.

        Raises:
            ValueError: If ``epochs`` is not an integer of at least 0.

        Example:
            >>> sampler = DomainBatchSampler(["a", "b", "b"] * 4, 2, exhausted="cycle")
            >>> sampler.total_batches(5)
            40
        """
        return sum(self._length(epoch) for epoch in range(check_int("epochs", epochs, 0)))

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last batch served and a hash of the settings, the same on every rank.

        Returns:
            Numbers and strings; ``torch.load(weights_only=True)`` loads them.

        Raises:
            RuntimeError: In an epoch over a loader that is known to fetch batches ahead of the loop.
        """
        if self._runs_ahead and self._begun:
            raise RuntimeError(
                "the loader fetches batches ahead of the loop: use torchdata's StatefulDataLoader (pip install "
                "torch_gradmatch[data]) and save its state_dict(), or between two epochs call set_epoch() first"
            )
        return dict(zip(KEYS, (*self._place, self.num_replicas, self._settings), strict=True))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where a state dict was taken: the next iterator serves the rest of that epoch.

        The number of ranks may differ. With ``split="walks"`` the rest of the epoch is then another draw.

        Args:
            state_dict: From ``state_dict`` of a sampler of the same domains and arguments, on any rank.

        Raises:
            ValueError: If it is malformed, or of other domains or arguments; nothing changes then.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(KEYS):
            raise ValueError(f"the state dict should hold exactly {KEYS} (got {state_dict!r:.200})")
        if state_dict["settings"] != self._settings:
            raise ValueError("the state dict was saved with other domains or arguments: resume with the same")
        epoch, position = (check_int(f"the state dict's {name}", state_dict[name], 0) for name in KEYS[:2])
        ranks = check_int("the state dict's ranks", state_dict["ranks"], 1)
        if ranks != self.num_replicas and self.split != "batch":  # where all serve the same at the same time
            of_group = self.domains_per_step * self.accumulate // (ranks if self.split == "domains" else 1)
            group, begun = divmod(position, of_group)
            if begun:
                raise ValueError(f"the state dict was saved on {ranks} ranks in a group of domains: resume on as many")
            position = min(group * self.batches_per_group, self._length(epoch))
        if position > self._length(epoch):
            raise ValueError(f"the state dict's position {position} is behind the end of epoch {epoch}")
        self._go_to(epoch, position)

    def check_dataset(self, num_samples: int) -> None:
        """Raise ``ValueError`` unless the domains are of a data set of ``num_samples``. For loaders, which know it."""
        needed = 1 + max(int(indices.max()) for indices in self._indices)
        if needed > num_samples or (self._of_labels and needed < num_samples):
            raise ValueError(f"domains is for {needed} samples, but the data set has {num_samples}: give each a label")

    def _length(self, epoch: int) -> int:
        """Return the batches of an epoch."""
        return self._groups.number(epoch) * self.batches_per_group

    def _go_to(self, epoch: int, position: int) -> None:
        """Let the next iterator start at a place; the one in progress moves the place no more."""
        self._following = self._place = (epoch, position)
        self._turn, self._begun = None, False
