"""Gradient matching as algorithms of DomainBed, https://github.com/facebookresearch/DomainBed.

============================== =============================================================================
``GradMatchFish``              Fish; the same update as DomainBed's own ``Fish``, without a second network
``GradMatchSmoothFish``        first order, strength of matching chosen freely; one step in an update
``GradMatchIDGMInnerProduct``  the exact objective with the paper's inner product, which is unbounded
``GradMatchIDGMVariance``      the exact objective with minus the variance of the domains' gradients
``GradMatchIDGMCosine``        the exact objective with their cosine
============================== =============================================================================

``train.py`` beside this file runs DomainBed's own scripts with them. In a script of your own, with the checkout on the
path, :func:`register` makes DomainBed know the five names and their hyperparameters; the checkout is not changed.

An algorithm's state dict holds the optimizer's state, too (``_extra_state``), so a checkpoint is as large as the
network and Adam's two moments together, and training continues from it where it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from domainbed import algorithms, hparams_registry, networks
from domainbed.lib import misc
from torch import Tensor
from torch.nn import functional

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish
from torch_gradmatch.methods.base import Method

Batch = tuple[Tensor, Tensor]
# A hyperparameter's default, and how to draw a random value of it.
Entry = tuple[Any, Callable[[np.random.RandomState], Any]]


class GradMatchAlgorithm(algorithms.Algorithm, ABC):
    """What the algorithms have in common: network, Adam with DomainBed's settings, and ``GradMatch`` around it.

    The network is that of DomainBed's ``Fish``; for one seed of torch it begins with the weights that ``Fish`` and
    ``ERM`` begin with.

    Args:
        input_shape: Shape of one input.
        num_classes: Number of classes.
        num_domains: S, the number of training domains.
        hparams: Hyperparameters, as ``hparams_registry`` gives them after :func:`register`.

    Attributes:
        HPARAMS: The hyperparameters that no other algorithm has, by name.
        MIN_DOMAINS: The fewest training domains that the method works with.
        network: The network.
        optimizer: The ``GradMatch``.

    Raises:
        ValueError: If a hyperparameter is missing or out of range, or there are too few domains.
    """

    HPARAMS: ClassVar[dict[str, Entry]]
    MIN_DOMAINS: ClassVar[int] = 2

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        name = type(self).__name__
        missing = [key for key in self.HPARAMS if key not in hparams]
        if missing:
            raise ValueError(
                f"hparams lacks {missing[0]!r}: take them from hparams_registry.default_hparams({name!r}, dataset), "
                "after domainbed_algorithms.register()"
            )
        if num_domains < self.MIN_DOMAINS:
            raise ValueError(
                f"num_domains should be at least {self.MIN_DOMAINS} for {name} (got {num_domains}): there is nothing "
                "to match in a single training domain. Hold out fewer with --test_envs (sweeps: --single_test_envs)"
            )
        self.network = networks.WholeFish(input_shape, num_classes, hparams)
        adam = torch.optim.Adam(self.network.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"])
        self.optimizer = GradMatch(adam, self.method())

    @abstractmethod
    def method(self) -> Method:
        """Make the method from the hyperparameters.

        Returns:
            The method, around ``self.network``.
        """

    def loss(self, batch: Batch) -> Tensor:
        """Work out the loss of one domain's batch.

        Args:
            batch: Inputs and labels.

        Returns:
            The mean cross-entropy, shape ().
        """
        x, y = batch
        return functional.cross_entropy(self.predict(x), y)

    def update(self, minibatches: list[Batch], unlabeled: list[Tensor] | None = None) -> dict[str, float]:  # noqa: ARG002
        """Carry out one meta-iteration.

        Args:
            minibatches: Inputs and labels of each training domain.
            unlabeled: Not used.

        Returns:
            What DomainBed logs, see ``MetaStep.scalars``: the mean of the domains' losses (its own ``Fish`` shows only
            that of the last domain) and each, as ``loss/0``, in the order of the training domains; where the method
            measures them, the same of the norms of their gradients, and how well these agree.
        """
        batches = {domain: minibatches[domain] for domain in self.order(len(minibatches))}
        return self.optimizer.meta_step(self.loss, batches).scalars()

    def order(self, domains: int) -> Iterable[int]:
        """Say in which order to take the domains.

        Args:
            domains: S.

        Returns:
            Their numbers: as they come.
        """
        return range(domains)

    def predict(self, x: Tensor) -> Tensor:
        """Classify inputs.

        Args:
            x: Inputs, shape (batch, ...).

        Returns:
            Logits, shape (batch, num_classes).
        """
        return self.network(x)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the optimizer's state, which becomes part of ``state_dict()``.

        Returns:
            Plain tensors, numbers and containers: ``torch.load(..., weights_only=True)`` reads them.
        """
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over the optimizer's state in ``load_state_dict()``.

        Args:
            state: What :meth:`get_extra_state` returned.
        """
        self.optimizer.load_state_dict(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GradMatchAlgorithm:
        # What .to(), .double() and the like go through. A module moves its parameters and nothing else, but an
        # optimizer that has a state needs it where they are; loading a state puts it there.
        super()._apply(fn, recurse)
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        return self


class GradMatchFish(GradMatchAlgorithm):
    r"""Fish: walk through the domains with Adam, whose state is carried on, then keep ``meta_lr`` of the way.

    Given the same weights and batches, parameters and floating-point buffers become those of DomainBed's ``Fish``, up
    to rounding: :math:`\theta + \epsilon(\tilde\theta - \theta)` is evaluated in another order. As there, the domains
    are walked through in the order given. Three things differ around the update:

    - DomainBed's ``Fish`` builds a network in every update, whose initial weights are random numbers. This one builds
      none, so with dropout, and in a whole run of ``scripts.train`` with the same seed, later random numbers differ:
      other masks and other batches.
    - ``num_batches_tracked`` of BatchNorm, an integer, counts the forward passes. There it is interpolated and rounded
      down: with ``meta_lr`` 0.5 and three domains it goes 1, 2, 3 instead of 3, 6, 9. Only a BatchNorm with
      ``momentum=None`` uses it, and DomainBed has none.
    - An inner walk that ends in NaN or infinity is a ``RuntimeError``, and the network is left as it was before.

    Hyperparameters: ``meta_lr``, as DomainBed's; ``track_alignment``, to log inner product and cosine along the walk,
    which costs two vectors of the size of the parameters.
    """

    HPARAMS: ClassVar[dict[str, Entry]] = {
        "meta_lr": (0.5, lambda r: float(r.choice([0.05, 0.1, 0.5]))),
        "track_alignment": (False, lambda _: False),
    }
    MIN_DOMAINS: ClassVar[int] = 1

    def method(self) -> Method:
        """Make the method. See ``GradMatchAlgorithm.method``."""
        return Fish(
            meta_lr=self.hparams["meta_lr"],
            inner_state="carry",
            model=self.network,
            track_alignment=self.hparams["track_alignment"],
        )


class GradMatchSmoothFish(GradMatchAlgorithm):
    """SmoothFish: Adam gets the mean gradient of a walk by SGD; at another gamma than 1 that at its start counts, too.

    The domains are walked through in an order drawn anew in each update, from torch's random state.

    Hyperparameters: ``gamma``, the strength of the matching; ``inner_lr``, the step of the walk. To first order this is
    IDGM by the inner product with ``gamma * fish_gamma(inner_lr, S)``.
    """

    HPARAMS: ClassVar[dict[str, Entry]] = {
        "gamma": (1.0, lambda r: 10 ** r.uniform(-1, 1)),
        "inner_lr": (0.01, lambda r: 10 ** r.uniform(-3, -1)),
    }

    def method(self) -> Method:
        """Make the method. See ``GradMatchAlgorithm.method``."""
        return SmoothFish(
            gamma=self.hparams["gamma"],
            inner_lr=self.hparams["inner_lr"],
            model=self.network,
            track_alignment=True,
        )

    def order(self, domains: int) -> Iterable[int]:
        """Draw an order. See ``GradMatchAlgorithm.order``."""
        return torch.randperm(domains).tolist()


def _idgm_hparams(name: str, default: float, log10_low: float, log10_high: float) -> dict[str, Entry]:
    return {
        name: (default, lambda r: 10 ** r.uniform(log10_low, log10_high)),
        "hvp": ("reverse", lambda _: "reverse"),
        "keep_graphs": (False, lambda _: False),
    }


class GradMatchIDGM(GradMatchAlgorithm):
    """IDGM: the exact objective, one step of Adam in each update. Its subclasses say by which agreement.

    Hyperparameters, as of ``torch_gradmatch.IDGM``: ``strength``, how long the matching term is at first, relative to
    the mean gradient (by the inner product ``gamma`` instead); ``hvp`` and ``keep_graphs``: how second derivatives are
    taken, and whether to hold the graphs of all domains at the same time, which is faster.

    Attributes:
        AGREEMENT: The agreement's name.
    """

    AGREEMENT: ClassVar[str]

    def method(self) -> Method:
        """Make the method. See ``GradMatchAlgorithm.method``."""
        return IDGM(
            self.network,
            agreement=self.AGREEMENT,
            **{name: self.hparams[name] for name in ("gamma", "strength") if name in self.HPARAMS},
            hvp=self.hparams["hvp"],
            keep_graphs=self.hparams["keep_graphs"],
            track_alignment=True,
        )


class GradMatchIDGMInnerProduct(GradMatchIDGM):
    """IDGM by the paper's inner product. It is unbounded: an update that diverges raises ``RuntimeError``.

    ``gamma`` is therefore small. In a sweep a run that diverges ends there, with the records logged until then.
    """

    AGREEMENT: ClassVar[str] = "inner_product"
    HPARAMS: ClassVar[dict[str, Entry]] = _idgm_hparams("gamma", 1e-4, -6, -3)


class GradMatchIDGMVariance(GradMatchIDGM):
    """IDGM by minus the variance of the domains' gradients, which is bounded above."""

    AGREEMENT: ClassVar[str] = "variance"
    HPARAMS: ClassVar[dict[str, Entry]] = _idgm_hparams("strength", 0.1, -1.5, -0.5)


class GradMatchIDGMCosine(GradMatchIDGM):
    """IDGM by the mean cosine of the domains' gradients, between -1 and 1."""

    AGREEMENT: ClassVar[str] = "cosine"
    HPARAMS: ClassVar[dict[str, Entry]] = _idgm_hparams("strength", 0.1, -1.5, -0.5)


ALGORITHMS: dict[str, type[GradMatchAlgorithm]] = {
    algorithm.__name__: algorithm
    for algorithm in (
        GradMatchFish,
        GradMatchSmoothFish,
        GradMatchIDGMInnerProduct,
        GradMatchIDGMVariance,
        GradMatchIDGMCosine,
    )
}


def register() -> None:
    """Make DomainBed know the algorithms and their hyperparameters, in this process. A second call changes nothing.

    Random hyperparameters are drawn as ``hparams_registry`` draws its own: each from a generator that is seeded with
    the run's seed and the hyperparameter's name. What it gives every algorithm stays as it is.

    Raises:
        RuntimeError: If DomainBed has something else by one of these names.
    """
    for name, algorithm in ALGORITHMS.items():
        if vars(algorithms).get(name, algorithm) is not algorithm:
            raise RuntimeError(f"this DomainBed has an algorithm {name!r} of its own: {vars(algorithms)[name]!r}")
    for name, algorithm in ALGORITHMS.items():
        setattr(algorithms, name, algorithm)
        if name not in algorithms.ALGORITHMS:
            algorithms.ALGORITHMS.append(name)
    if hparams_registry._hparams is not _hparams_with_ours:
        hparams_registry._hparams = _hparams_with_ours


_hparams_of_domainbed = hparams_registry._hparams


def _hparams_with_ours(algorithm: str, dataset: str, random_seed: int) -> dict[str, tuple[Any, Any]]:
    hparams = _hparams_of_domainbed(algorithm, dataset, random_seed)
    if algorithm in ALGORITHMS:
        for name, (default, draw) in ALGORITHMS[algorithm].HPARAMS.items():
            hparams[name] = (default, draw(np.random.RandomState(misc.seed_hash(random_seed, name))))
    return hparams
