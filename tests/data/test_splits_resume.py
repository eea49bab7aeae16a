"""The place of a sampler over several ranks: the same for all, and on another number of them continued or refused."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from _samplers import small_sampler, through_a_file
from _splits import KINDS, grouped, ranks_of, spread
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torch_gradmatch import DomainBatchSampler, ResumableLoader, meta_batches
from torch_gradmatch.data.sampler import DomainBatchSampler as Sampler

# Domains are drawn of any sizes, so that an epoch may well serve little; test_unequal.py tests that warning.
pytestmark = pytest.mark.filterwarnings("ignore:an epoch serves:UserWarning")

LABELS = ["a"] * 16 + ["b"] * 8 + ["c"] * 8 + ["d"] * 24
PLAIN = {"batch_size": 4, "domains_per_step": 4, "seed": 1}


def joined(samplers, kind):
    """What all ranks serve together in their next epoch, the batches of one process."""
    if kind == "batch":
        return [list(itertools.chain(*parts)) for parts in zip(*samplers, strict=True)]
    size = samplers[0].batches_per_group
    dealt = zip(*(grouped(list(sampler), size) for sampler in samplers), strict=True)
    return list(itertools.chain(*itertools.chain(*dealt)))


def states_at(case, epoch, position):
    """The state dict of every rank after so many batches of an epoch."""
    states = []
    for sampler in ranks_of(*case):
        sampler.set_epoch(epoch)
        list(itertools.islice(sampler, position))
        states.append(through_a_file(sampler.state_dict()))
    return states


@given(case=spread(), data=st.data())
@settings(deadline=None)
def test_a_state_of_any_rank_continues_exactly_on_every_rank(case, data):
    references = ranks_of(*case)
    epochs = [[list(sampler) for sampler in references] for _ in range(3)]
    epoch = data.draw(st.integers(0, 1))
    position = data.draw(st.integers(0, len(epochs[epoch][0])))
    states = states_at(case, epoch, position)
    assert all(state == states[0] for state in states)
    for rank, sampler in enumerate(ranks_of(*case)):
        sampler.load_state_dict(data.draw(st.sampled_from(states)))
        assert sampler.state_dict() == states[0]
        assert len(sampler) == len(epochs[epoch][rank]) - position
        assert list(sampler) == epochs[epoch][rank][position:]
        assert list(sampler) == epochs[epoch + 1][rank]


def on_other_ranks(case, other):
    """The samplers of another number of ranks, if there can be any."""
    labels, arguments, _, kind = case
    try:
        return ranks_of(labels, arguments, other, kind)
    except ValueError:
        assume(False)


@given(case=spread("batch", even=True), other=st.integers(1, 6), data=st.data())
@settings(deadline=None)
def test_parts_of_whole_batches_go_on_on_any_number_of_ranks(case, other, data):
    resumed = on_other_ranks(case, other)
    references = ranks_of(*case)
    epochs = [joined(references, "batch") for _ in range(3)]
    epoch = data.draw(st.integers(0, 1))
    position = data.draw(st.integers(0, len(epochs[epoch])))
    (state, *_) = states_at(case, epoch, position)
    for sampler in resumed:
        sampler.load_state_dict(state)
    assert joined(resumed, "batch") == epochs[epoch][position:]
    assert joined(resumed, "batch") == epochs[epoch + 1]


@given(case=spread("domains"), other=st.integers(1, 6), data=st.data())
@settings(deadline=None)
def test_groups_are_dealt_to_any_number_of_ranks(case, other, data):
    resumed = on_other_ranks(case, other)
    references = ranks_of(*case)
    epochs = [joined(references, "domains") for _ in range(3)]
    epoch = data.draw(st.integers(0, 1))
    position = data.draw(st.integers(0, len(epochs[epoch]) // case[2]))
    (state, *_) = states_at(case, epoch, position)
    assert state["position"] == position * case[2]
    if other != case[2] and position % references[0].batches_per_group:
        for sampler in resumed:
            before = sampler.state_dict()
            with pytest.raises(ValueError, match=rf"in the middle of a group of {case[1]['domains_per_step']} batches"):
                sampler.load_state_dict(state)
            assert sampler.state_dict() == before
        return
    for sampler in resumed:
        sampler.load_state_dict(state)
    if position % references[0].batches_per_group == 0:
        assert joined(resumed, "domains") == epochs[epoch][state["position"] :]
        assert joined(resumed, "domains") == epochs[epoch + 1]


@given(case=spread("batch") | spread("walks"), other=st.integers(1, 6), data=st.data())
@settings(deadline=None)
def test_on_another_number_of_ranks_an_epoch_goes_on_as_one_of_theirs_or_not_at_all(case, other, data):
    """What they serve is what they would have served, had they served the epoch from its start; and nothing twice."""
    _, arguments, num_replicas, kind = case
    resumed, references = on_other_ranks(case, other), on_other_ranks(case, other)
    epoch = data.draw(st.integers(0, 1))
    samplers = ranks_of(*case)
    for sampler in [*samplers, *references]:
        sampler.set_epoch(epoch)
    epochs = [list(sampler) for sampler in samplers]
    position = data.draw(st.integers(0, len(epochs[0])))
    (state, *_) = states_at(case, epoch, position)
    expected = [list(sampler) for sampler in references]
    between = position in {0, len(epochs[0])}
    try:
        for sampler in resumed:
            sampler.load_state_dict(state)
    except ValueError as error:
        assert not between
        assert other != num_replicas
        assert f"num_replicas is {num_replicas}, but this sampler's is {other}" in str(error)  # noqa: PT017
        assert f"resume with num_replicas={num_replicas}" in str(error)  # noqa: PT017
        return
    rest = [list(sampler) for sampler in resumed]
    assert between or other == num_replicas or kind == "batch"
    if position == len(epochs[0]):
        assert rest == [[]] * other
    else:
        assert rest == [batches[position:] for batches in expected]
    assert [list(sampler) for sampler in resumed] == [list(sampler) for sampler in references]
    if arguments["exhausted"] == "stop":
        served = Counter(index for batches in epochs for batch in batches[:position] for index in batch)
        served.update(index for batches in rest for batch in batches for index in batch)
        assert not served or max(served.values()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_and_several_know_each_others_states(kind):
    """The batches of one rank have no split, so its state has none that could be wrong."""
    single = DomainBatchSampler(LABELS, **PLAIN)
    whole = [list(single), list(single)]
    several = ranks_of(LABELS, PLAIN, 2, kind)
    position = 0 if kind == "walks" else 4
    state = DomainBatchSampler(LABELS, **PLAIN).state_dict() | {"epoch": 1, "position": position}
    for sampler in several:
        sampler.load_state_dict(state)
    if kind != "walks":
        assert joined(several, kind) == whole[1][position:]
    single.load_state_dict({**state, "num_replicas": 2, "split": kind})
    assert list(single) == whole[1][position:]


def test_a_state_of_version_3_continues_on_several_ranks():
    whole = list(small_sampler(batch_size=1, domains_per_step=4))
    state = small_sampler(batch_size=1, domains_per_step=4).state_dict() | {"version": 3, "position": 0}
    del state["num_replicas"], state["split"]
    samplers = [
        small_sampler(batch_size=1, domains_per_step=4, num_replicas=2, rank=r, split="domains") for r in (0, 1)
    ]
    for sampler in samplers:
        sampler.load_state_dict(state)
    assert joined(samplers, "domains") == whole
    sampler = small_sampler(domains_per_step=None, batch_size=1)
    sampler.load_state_dict(state | {"position": 1})
    assert list(sampler) == whole[1:]


def test_an_epoch_of_a_cycle_may_be_as_long_as_the_number_of_ranks_makes_it():
    cycle = PLAIN | {"exhausted": "cycle"}
    (two, _), (four, *_) = (ranks_of(LABELS, cycle, number, "walks") for number in (2, 4))
    state = two.state_dict()
    assert (state["batches_per_epoch"], len(four)) == (12, 8)
    four.load_state_dict({**state, "epoch": 3})
    assert (four.state_dict()["epoch"], len(four)) == (3, 8)
    with pytest.raises(ValueError, match="batches_per_epoch is 16, but this sampler's is 12: resume with the same"):
        four.load_state_dict({**state, "batches_per_epoch": 16})


@pytest.mark.parametrize("kind", KINDS)
def test_lists_resume_behind_the_last_that_was_handed_out(kind):
    arguments = PLAIN | {"batch_size": 2}

    def make_loop(rank):
        sampler = Sampler(LABELS, **arguments, num_replicas=2, rank=rank, split=kind)
        return sampler, ResumableLoader(meta_batches(_Loader(sampler)))

    for rank in (0, 1):
        _, reference = make_loop(rank)
        epochs = [list(reference), list(reference)]
        for stop in range(1, len(epochs[0]) + 1):
            _, loop = make_loop(rank)
            taken = list(itertools.islice(loop, stop))
            state = loop.state_dict()
            end = stop == len(epochs[0])
            assert (state["epoch"], state["position"]) == ((1, 0) if end else (0, 4 * stop))
            sampler, resumed = make_loop(rank)
            resumed.load_state_dict(state)
            assert len(resumed) == len(epochs[int(end)])
            rest = [] if end else list(resumed)
            assert taken + rest == epochs[0]
            assert list(resumed) == epochs[1]
            assert sampler.state_dict()["epoch"] == 2


class _Loader:
    """A data loader without a data set."""

    def __init__(self, sampler):
        self.batch_sampler = sampler

    def __iter__(self):
        return iter(self.batch_sampler)

    def __len__(self):
        return len(self.batch_sampler)


def test_a_list_cannot_begin_in_the_middle_of_a_group():
    sampler = ranks_of(LABELS, PLAIN, 2, "domains")[0]
    sampler.load_state_dict(sampler.state_dict() | {"position": 2})
    with pytest.raises(RuntimeError, match=r"resumes at batch 1, in the middle of a group of 2: .* to a multiple of 4"):
        next(iter(meta_batches(_Loader(sampler))))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("walks", {"split": "batch"}, "split is 'batch', but this sampler's is 'walks': resume with the same"),
        ("batch", {"split": "domains", "position": 0}, "split is 'domains', but this sampler's is 'batch'"),
        ("batch", {"split": "samples"}, r"split should be one of 'batch', .* \(got 'samples'\)"),
        ("batch", {"num_replicas": 0}, r"num_replicas should be an integer of at least 1 \(got 0\)"),
        ("batch", {"num_replicas": 3}, "num_replicas is 3, but batch_size=4 should be a multiple of num_replicas=3"),
        ("walks", {"num_replicas": 9}, "num_replicas is 9, but domain 'b' has 8 samples, fewer than num_replicas=9"),
        ("domains", {"num_replicas": 8}, "num_replicas is 8, but domains_per_step=4 should be a multiple"),
        pytest.param(
            "walks",
            {"num_replicas": 1},
            r"num_replicas is 1, but this sampler's is 2, and what follows position 2 in .* split='walks' deals "
            r".*between two epochs \(at position 0\); here resume with num_replicas=1",
        ),
        (
            "domains",
            {"num_replicas": 4},
            "num_replicas is 4.* in the middle of a group of 4 batches.*between two groups or two epochs",
        ),
        ("domains", {"position": 3}, "position is 3, but should be a multiple of num_replicas=2: .*of all ranks"),
        ("walks", {"position": 5}, "position is 5, but epoch 0 has 4 batches"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(kind, changes, message):
    sampler = ranks_of(LABELS, PLAIN, 2, kind)[1]
    before, epoch = sampler.state_dict(), list(ranks_of(LABELS, PLAIN, 2, kind)[1])
    with pytest.raises(ValueError, match=f"the state dict's {message}"):
        sampler.load_state_dict({**before, "position": 2, **changes})
    assert sampler.state_dict() == before
    assert list(sampler) == epoch


def test_a_last_batch_that_is_cut_elsewhere_is_named():
    labels, arguments = ["a"] * 16 + ["b"] * 14, {"batch_size": 4, "domains_per_step": 2}
    state = ranks_of(labels, arguments, 2, "batch")[0].state_dict()
    four = ranks_of(labels, arguments, 4, "batch")[3]
    message = "cuts a domain's last batch .* 1 of 2 domains then end elsewhere, for instance one of 14 samples"
    with pytest.raises(ValueError, match=message):
        four.load_state_dict({**state, "position": 3})
    four.load_state_dict({**state, "epoch": 1})
    assert four.state_dict()["epoch"] == 1
    one = DomainBatchSampler(labels, **arguments)  # cuts as 2 do
    one.load_state_dict({**state, "position": 3})
    assert list(one) == list(DomainBatchSampler(labels, **arguments))[3:]
