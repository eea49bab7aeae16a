"""Pictures of the agreement over training."""

from __future__ import annotations

import matplotlib as mpl
import pytest

from torch_gradmatch.compare.plots import plot_alignment

mpl.use("Agg")
from matplotlib import pyplot as plt


def test_plot_draws_every_curve_thin_and_its_running_mean_thick():
    _, axes = plt.subplots()
    plot_alignment({"ERM": ([0, 1, 2], [3.0, 0.0, 0.0]), "Fish": ([0, 5], [1.0, -0.5])}, axes, smoothing=1)
    thick = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in thick] == ["ERM", "Fish"]
    assert list(thick[0].get_ydata()) == [1.5, 1.0, 0.0]
    assert list(thick[1].get_xdata()) == [0, 5]
    assert any(list(line.get_ydata()) == [3.0, 0.0, 0.0] for line in axes.get_lines())
    assert len({line.get_color() for line in thick}) == 2
    assert axes.get_ylabel() == "inner product"
    with pytest.raises(ValueError, match="from 1 to 8 curves"):
        plot_alignment({}, axes)
    with pytest.raises(ValueError, match="'ERM' has 2 positions and 1 values"):
        plot_alignment({"ERM": ([0, 1], [1.0])}, axes)
    plt.close("all")
