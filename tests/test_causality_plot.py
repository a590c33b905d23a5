"""The heat map, and the progress bar."""

import sys

import causality_zoo as zoo
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import pytest
from draws import normal, seed

from eqx_norms.causality import check_causal, check_independent

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture
def axes():
    yield plt.subplots()[1]
    plt.close("all")


@pytest.mark.slow
def test_plot_shows_the_leak_in_red_and_what_is_allowed_in_blue(axes):
    report = check_causal(zoo.bidirectional_rnn, normal(jr.key(seed(0)), (6, 3)))
    assert report.plot(axes) is axes
    images = {image.get_cmap().name: image.get_array() for image in axes.images}
    assert np.array_equal(~np.ma.getmaskarray(images["Reds"]), ~report.allowed)
    assert np.array_equal(~np.ma.getmaskarray(images["Blues"]), report.allowed)
    assert axes.get_title() == "leak: 15 forbidden pairs (red)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("input position read", "output position")
    bar = axes.figure.axes[1]
    assert bar.get_ylabel() == "largest change of the output" and bar.get_yscale() == "log"
    axes.figure.canvas.draw()


def test_outline_runs_between_allowed_and_forbidden(axes):
    check_causal(zoo.running_max, normal(jr.key(seed(0)), (3, 2))).plot(axes)
    [outline] = axes.collections
    segments = {tuple(map(tuple, segment.tolist())) for segment in outline.get_segments()}
    steps = {((0.5, -0.5), (0.5, 0.5)), ((1.5, 0.5), (1.5, 1.5))}
    assert segments == steps | {((0.5, 0.5), (1.5, 0.5)), ((1.5, 1.5), (2.5, 1.5))}


@pytest.mark.slow
def test_a_single_pair_of_a_long_sequence_can_be_seen(axes):
    leaky = lambda x: x.at[3].add(x[150])
    report = check_causal(leaky, normal(jr.key(seed(0)), (200, 1)))
    report.plot(axes)
    reds = next(image for image in axes.images if image.get_cmap().name == "Reds")
    shown = np.argwhere(~np.ma.getmaskarray(reds.get_array()))
    assert shown.tolist() == [[3 // 3, 150 // 3]]
    assert axes.get_title() == "leak: 1 forbidden pair (red)"


@pytest.mark.slow
def test_infinite_changes_and_examples_and_a_new_figure():
    poison = lambda x: x.at[0].set(jnp.where(x[3] > 5, jnp.nan, x[0]))
    report = check_independent(poison, normal(jr.key(seed(0)), (5, 1)))
    assert report.worst == np.inf
    axes = report.plot()
    assert axes.get_xlabel() == "input example read"
    axes.figure.canvas.draw()
    plt.close("all")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    report = check_causal(zoo.running_max, normal(jr.key(seed(0)), (3, 2)))
    monkeypatch.setitem(sys.modules, "matplotlib.collections", None)
    with pytest.raises(ImportError, match=r'pip install "eqx-norms\[plot\]"'):
        report.plot()


@pytest.mark.parametrize("installed", [True, False])
def test_a_short_check_prints_nothing(installed, monkeypatch, capfd):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    check_causal(zoo.running_max, normal(jr.key(seed(0)), (3, 2)))
    assert capfd.readouterr() == ("", "")
