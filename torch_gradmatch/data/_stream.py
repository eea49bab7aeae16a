"""One domain's loader: its batches one after the other, and a place in it that can be saved and found again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Generic, NamedTuple, TypeVar, cast

from torch.utils.data import Dataset, IterableDataset

from torch_gradmatch._checks import add_note
from torch_gradmatch.data._labels import _check_label, shown

__all__ = ["DomainStream", "check_loaders", "check_saves", "check_state"]

Batch = TypeVar("Batch")
ENTRIES = {"loader": object, "taken": int, "ended": bool, "over": bool}  # of a stream's state
END = object()


class _Place(NamedTuple):
    """A place in a loader: its state, and whether the pass that this belongs to is over, and had come to its end."""

    state: Any
    over: bool = False
    ended: bool = False


class DomainStream(Generic[Batch]):
    """The batches of one domain's loader, in passes: one iterator over the loader is one pass.

    With ``cycle`` a new pass begins where one ends. Without, to know whether a batch is left is to fetch it, so the
    loader may be one batch ahead of what was handed out; the state to save is the one from before that batch.

    Between ``iter(loader)`` and the first batch, a loader's state cannot be trusted: where a generator function makes
    the iterator, the loader's or its data set's, not a line of it has run, and the state is that of the pass before. So
    the start of a pass is saved as that pass, one batch before it was left, and the word that it is over: to find
    the place again, that batch is fetched once more and let go.

    Args:
        label: The domain's.
        loader: Its loader.
        cycle: Whether a new pass begins by itself.

    Attributes:
        label: The domain's.
        loader: Its loader.
        length: Batches in a pass, None where that is unknown.
        saves: Whether the loader can save its place.
        taken: Batches handed out in this pass.
    """

    def __init__(self, label: str | int, loader: Iterable[Batch], cycle: bool) -> None:
        self.label = label
        self.loader = loader
        self.length = _length(loader)
        self.saves = all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))
        self.taken = 0
        self._cycle = cycle
        self._ended = False  # this pass has no batch left
        self._iterator: Iterator[Batch] | None = None
        self._held: list[Batch] = []  # fetched and not handed out: one at most
        self._place: _Place | None = None  # None: where the loader says it is
        self._loaded = False  # the loader was given a state, and has made no iterator since
        self._resumed = False  # the same, and no batch was fetched since

    def has_batch(self) -> bool:
        """Return whether this pass has a batch left; with ``cycle`` there always is one.

        Returns:
            Whether.

        Raises:
            RuntimeError: If the loader is empty.
        """
        if not self._cycle:
            self._look()
        return not self._ended

    def take(self) -> Batch:
        """Hand out the next batch.

        Returns:
            The batch.

        Raises:
            RuntimeError: If there is none.
        """
        if not self._cycle:
            self._look()
        elif not self._fetch():
            self.taken, self._ended = 0, False
            self._fetch()
        if not self._held:
            raise RuntimeError(
                f"the loader of domain {shown(self.label)} has no batch left where it had one when its state was "
                "saved: resume with the same loader over the same data"
            )
        self.taken += 1
        self._place = None
        return self._held.pop()

    def leave(self) -> None:
        """Let a new pass begin with the next batch. A pass of which nothing was handed out is as good as new."""
        if not self.taken:
            return
        if self.saves:
            self._look()
        if self._place is not None:
            self._place = self._place._replace(over=True, ended=self._ended)
        self.taken, self._ended, self._iterator = 0, False, None
        self._held.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last batch that was handed out.

        Returns:
            The loader's state and how it is meant.
        """
        place = self._place or _Place(self._saved())
        ended = place.ended if place.over else self._ended
        return {"loader": place.state, "taken": self.taken, "ended": ended, "over": place.over}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a place.

        Args:
            state: From :meth:`state_dict`.
        """
        try:
            # A copy: what the loader does with it should not change the state dict of whoever loads it.
            cast("Any", self.loader).load_state_dict(copy.deepcopy(state["loader"]))
        except Exception as error:
            self._note(error, "while it loaded its state")
            raise
        self._place = _Place(state["loader"], over=state["over"], ended=state["ended"])
        self.taken, self._ended = state["taken"], state["ended"] and not state["over"]
        self._iterator, self._loaded, self._resumed = None, True, True
        self._held.clear()

    def _look(self) -> None:
        """Fetch the next batch and keep it, or learn that there is none."""
        if not self._held and not self._ended:
            if self.saves and self._place is None:
                self._place = _Place(self._saved())
            self._fetch()

    def _fetch(self) -> bool:
        """Fetch a batch; return whether there was one."""
        try:
            if self._iterator is None:
                self._iterator = self._start()
            batch = next(self._iterator, END)
            if batch is END and self._resumed and not self.taken:
                # A DataLoader that has saved that its data set is at the end does not ask it again, so a generator
                # function in there goes to the place it was given only now, in the pass after.
                self._resumed, self._iterator = False, iter(self.loader)
                batch = next(self._iterator, END)
        except Exception as error:
            self._note(error)
            raise
        if batch is not END:
            self._resumed = False
            self._held.append(cast("Batch", batch))
            return True
        if not self.taken:
            raise RuntimeError(
                f"the loader of domain {shown(self.label)} yields no batch: it is empty or, like a generator, can be "
                f"iterated over only once (got {type(self.loader).__name__}); pass a DataLoader or leave the domain out"
            )
        self._ended, self._iterator = True, None
        return False

    def _start(self) -> Iterator[Batch]:
        """Return an iterator over the pass, or over a new one."""
        iterator = iter(self.loader)
        if self._loaded and self._place is not None and self._place.over:
            if (next(iterator, END) is END) is not self._place.ended:
                raise RuntimeError(
                    "the loader did not find its place again: a state from behind its last batch should have no batch "
                    "left, any other should have one"
                )
            iterator = iter(self.loader)
        self._loaded = False
        return iterator

    def _saved(self) -> Any:
        """Return a copy of the loader's state: the batch that is fetched next may change it in place."""
        try:
            return copy.deepcopy(cast("Any", self.loader).state_dict())
        except Exception as error:
            self._note(error, "while it saved its state")
            raise

    def _note(self, error: Exception, when: str = "") -> None:
        """Let an error say whose loader raised it."""
        add_note(error, f"raised by the loader of domain {shown(self.label)} {when}".rstrip())


def _length(loader: Iterable[Any]) -> int | None:
    """Return the batches of a pass, if the loader knows them."""
    # Over an IterableDataset, len(DataLoader) is a guess, and asking for it makes the DataLoader warn where it is off.
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    try:
        return len(cast("Sized", loader))
    except (TypeError, NotImplementedError):
        return None


# Checks


def check_loaders(loaders: Any) -> None:
    """Raise unless every domain is given a loader of its own.

    Args:
        loaders: A mapping from label to loader.

    Raises:
        TypeError: If it is none, or a loader is no iterable or a data set.
        ValueError: If there are fewer than two domains, a label is none, or two domains have the same loader.
    """
    if not isinstance(loaders, Mapping):
        raise TypeError(f"loaders should be a mapping from each domain's label to its loader (got {shown(loaders)})")
    if len(loaders) < 2:
        raise ValueError(f"loaders should hold the loaders of at least 2 domains (got {len(loaders)})")
    owner_of: dict[int, object] = {}
    for label, loader in loaders.items():
        _check_label("a key of loaders", label)
        name = f"loaders[{shown(label)}]"
        if isinstance(loader, Dataset):
            raise TypeError(
                f"{name} is a data set, a {type(loader).__name__}, and should be a loader of batches: pass "
                "DataLoader(dataset, batch_size=...), with batch_size=None if the data set itself yields batches"
            )
        if not isinstance(loader, Iterable) or isinstance(loader, str | bytes):
            raise TypeError(f"{name} should be a loader of batches, such as a DataLoader (got {shown(loader)})")
        owner = owner_of.setdefault(id(loader), label)
        if owner != label:
            raise ValueError(
                f"{name} is the same object as loaders[{shown(owner)}]: give every domain a loader of its own, which "
                "has a place of its own"
            )


def check_saves(streams: Sequence[DomainStream[Any]]) -> None:
    """Raise unless every domain's loader can save its place, apart from the others'.

    Args:
        streams: The domains'.

    Raises:
        TypeError: If one has no state dict.
        ValueError: If one keeps no order, or two share a generator.
    """
    owner_of: dict[int, str | int] = {}
    for stream in streams:
        named = f"the loader of domain {shown(stream.label)}, a {type(stream.loader).__name__},"
        if not stream.saves:
            raise TypeError(
                f"{named} cannot save its place: it has no state_dict and load_state_dict. Use "
                "torchdata.stateful_dataloader.StatefulDataLoader, or a loader that has them"
            )
        if not getattr(stream.loader, "in_order", True):
            raise ValueError(f"{named} should keep its order (got in_order=False): nobody knows its place then")
        for holder in (stream.loader, getattr(stream.loader, "sampler", None)):
            generator = getattr(holder, "generator", None)
            owner = stream.label if generator is None else owner_of.setdefault(id(generator), stream.label)
            if owner != stream.label:
                raise ValueError(
                    f"{named} has the same generator as that of domain {shown(owner)}: one state cannot serve two "
                    "places; give each its own torch.Generator"
                )


def check_state(label: str | int, state: object) -> None:
    """Raise unless a state is one of :meth:`DomainStream.state_dict`.

    Args:
        label: The domain's.
        state: The state.

    Raises:
        ValueError: If it is malformed.
    """
    if (
        not isinstance(state, Mapping)
        or set(state) != set(ENTRIES)
        or not all(isinstance(state[name], kind) for name, kind in ENTRIES.items())
    ):
        raise ValueError(f"the state dict's state of domain {shown(label)} is malformed (got {shown(state)})")
