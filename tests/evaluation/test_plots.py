"""Pictures of the agreement over training."""

from __future__ import annotations

import matplotlib as mpl
import pytest
import torch

from torch_gradmatch import Fish, GradMatch
from torch_gradmatch.evaluation.plots import agreement_by_domain, plot_agreement_by_domain, smoothed
from torch_gradmatch.methods.base import MetaStep

mpl.use("Agg")
from matplotlib import pyplot as plt


def test_smoothing_is_the_mean_with_the_neighbours():
    assert smoothed([3.0, 0.0, 0.0], 1) == [1.5, 1.0, 0.0]
    assert smoothed([3.0, 0.0, 6.0], 0) == [3.0, 0.0, 6.0]


def test_the_agreement_of_each_domain_is_drawn_by_name_the_lowest_last():
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), Fish(track_alignment="pairs"))
    directions = {"north": [1.0, 0.0], "south": [-1.0, 0.1], "west": [1.0, 0.5]}
    steps = {}
    for position, order in enumerate([("north", "west", "south"), ("south", "west", "north"), ("west", "north")]):
        batches = {name: torch.tensor(directions[name]) for name in order}
        steps[10 * position] = optimizer.meta_step(lambda x: (w * x).sum(), batches)
    _, axes = plt.subplots()
    assert plot_agreement_by_domain(agreement_by_domain(steps), axes, smoothing=0)[-1] == "south"
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines() if line.get_label()[0] != "_"}
    assert drawn == {"north": [0, 10, 20], "west": [0, 10, 20], "south": [0, 10]}
    by_name = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert by_name["south"] == pytest.approx([-1.95 / (1.01 * 4.25) ** 0.5] * 2)  # (-1, .1) with (2, .5)
    along = torch.linspace(0.9, 0.1, 12)  # how far each goes where all go
    cosines = (along[:, None] * along).fill_diagonal_(1.0)
    many = MetaStep(grad_norms=torch.ones(12), cosines=cosines, domains=tuple(range(12)))
    many_axes = plt.subplots()[1]
    assert plot_agreement_by_domain(agreement_by_domain({0: many, 1: many}), many_axes) == list(range(12))
    assert [text.get_text() for text in many_axes.get_legend().get_texts()] == ["0", "1", "2", "9", "10", "11"]
    with pytest.raises(ValueError, match=r"the report at 3 lacks agreement_with_rest: pass the method track_alignment"):
        agreement_by_domain({3: MetaStep(domains=("a",))})
    with pytest.raises(ValueError, match=r"the report at 3 lacks the domains' names"):
        agreement_by_domain({3: MetaStep(grad_norms=torch.ones(1), cosines=torch.ones(1, 1))})
    with pytest.raises(ValueError, match="curves hold no measurement"):
        plot_agreement_by_domain({}, axes)
    plt.close("all")
