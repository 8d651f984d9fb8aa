"""Figures: what is drawn is what was given, the axes say what they are, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import runs
import torch
from matplotlib.figure import Figure

import apd_minimal as apd

TRUTH = runs.tms().mechanisms()


@pytest.fixture(scope="module")
def result() -> apd.Decomposition:
    return runs.decompose(steps=12, simplicity=((0.0, 1.0), (0.5, 0.0)))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before, "the style is left as it was"


def shuffled() -> apd.Components:
    """The true mechanisms, the last one first, and one more that is zero."""
    P = TRUTH["encode.weight"].flip(0)
    return apd.Components.from_matrices({"encode.weight": torch.cat([P, torch.zeros(1, 5, 2)])})


def labels(figure: Figure) -> tuple[str, str]:
    return figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()


def picture(figure: Figure, i: int = 0) -> np.ndarray:
    return np.asarray(figure.axes[i].images[0].get_array())


MASK = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
TRIED = [{"k": k, "bits": bits} for k, bits in ((0.1, 5.0), (0.5, 2.0), (1.0, float("inf")), (2.0, 3.0))]
COSTS = [apd.rate.Cost(0.5, 1.0, 2.0, 4), apd.rate.Cost(0.1, 2.0, 3.0, 4), apd.rate.Cost(0.0, 4.0, 4.0, 4)]
FIGURES: dict[str, tuple[Callable[[apd.Decomposition], Figure], tuple[str, str]]] = {
    "columns": (
        lambda r: apd.plots.columns({"W": torch.eye(2)}),
        ("hidden dimension 1", "hidden dimension 2"),
    ),
    "components": (lambda r: apd.plots.components(r), ("input of the weight", "component")),
    "components, with a truth": (lambda r: apd.plots.components(r, TRUTH), ("true mechanism", "component")),
    "history": (lambda r: apd.plots.history(r), ("step", "loss")),
    "masks": (lambda r: apd.plots.masks(MASK), ("component", "sample")),
    "tuned": (lambda r: apd.plots.tuned(TRIED), ("k", "bits of a sample")),
    "curve": (lambda r: apd.plots.curve(COSTS), ("error", "bits of a sample")),
}


@pytest.mark.parametrize("name", FIGURES)
def test_each_makes_one_figure_with_labelled_axes(result: apd.Decomposition, name: str) -> None:
    make, expected = FIGURES[name]
    figure = make(result)
    assert isinstance(figure, Figure)
    assert [plt.figure(n) for n in plt.get_fignums()] == [figure], "one figure, and it is the one given back"
    assert labels(figure) == expected
    figure.canvas.draw()


def test_those_that_take_axes_draw_there(result: apd.Decomposition) -> None:
    figure, axes = plt.subplots(1, 3)
    assert apd.plots.columns({"W": torch.eye(2)}, axes[0]) is figure
    assert apd.plots.history(result, axes[1]) is figure
    assert apd.plots.masks(MASK, axes[2]) is figure
    assert plt.get_fignums() == [figure.number]
    assert [ax.get_xlabel() for ax in axes] == ["hidden dimension 1", "step", "component"]


def test_matrices_are_the_components_in_the_order_asked_for() -> None:
    components = shuffled()
    P = components.matrices("encode.weight")
    limit = float(P.abs().max())
    for order, shown in ((None, range(6)), ([4, 1], [4, 1]), (list(range(6)) * 2, list(range(6)) * 2)):
        figure = apd.plots.matrices(components, order=order)
        for i, c in enumerate(shown):
            np.testing.assert_allclose(picture(figure, i), P[c])
            assert figure.axes[i].get_title() == str(c)
            assert figure.axes[i].images[0].get_clim() == pytest.approx((-limit, limit))
        assert all(not ax.axison for ax in figure.axes)


def test_components_without_a_truth_show_the_length_at_every_input(result: apd.Decomposition) -> None:
    expected = result.components.matrices("encode.weight").norm(dim=2)
    np.testing.assert_allclose(picture(apd.plots.components(result)), expected, rtol=1e-5, atol=1e-7)
    figure = apd.plots.components(result.components)
    np.testing.assert_allclose(picture(figure), expected, rtol=1e-5, atol=1e-7)
    assert figure.axes[1].get_ylabel() == "length"


@pytest.mark.parametrize("rotated", [False, True])
def test_a_perfect_decomposition_is_a_diagonal(rotated: bool) -> None:
    target = runs.tms()
    if rotated:
        target.rotate(seed=2)
    truth = target.mechanisms()
    P = truth["encode.weight"].roll(2, 0)
    shown = picture(apd.plots.components(apd.Components.from_matrices({"encode.weight": P}), truth))
    lengths = truth["encode.weight"].flatten(1).norm(dim=1)
    np.testing.assert_allclose(shown, torch.diag(lengths), atol=1e-5)
    components = shuffled()
    assert picture(apd.plots.components(components, TRUTH)).shape == (6, 5), "those that own nothing come last"


def test_history_is_every_loss_of_every_restart(result: apd.Decomposition) -> None:
    figure = apd.plots.history(result)
    ax = figure.axes[0]
    assert ax.get_yscale() == "log"
    names = [name for name in result.history if name != "step"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == names
    assert len(ax.lines) == 2 * len(names)
    for i, line in enumerate(ax.lines):
        name, r = names[i // 2], i % 2
        expected = np.array(result.history[name], dtype=float)[:, r]
        np.testing.assert_array_equal(line.get_ydata(), expected)
        np.testing.assert_array_equal(line.get_xdata(), result.history["step"])
        assert (line.get_alpha() == 1.0) == (r == result.chosen)


def test_columns_reach_to_every_arrow_and_masks_are_what_was_given() -> None:
    figure = apd.plots.columns({"W": torch.tensor([[3.0, 0.0], [0.0, -4.0]]), "P": torch.tensor([[1.0, 1.0]])})
    ax = figure.axes[0]
    assert [tuple(arrow.xy) for arrow in ax.texts] == [(3.0, 0.0), (0.0, -4.0), (1.0, 1.0)]
    assert ax.get_xlim() == ax.get_ylim() == pytest.approx((-4.6, 4.6))
    np.testing.assert_array_equal(picture(apd.plots.masks(MASK)), MASK)


def test_the_best_of_what_was_tried_is_filled() -> None:
    every, best = apd.plots.tuned(TRIED).axes[0].lines
    assert sorted(zip(every.get_xdata(), every.get_ydata(), strict=True)) == [(0.1, 5.0), (0.5, 2.0), (2.0, 3.0)]
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([0.5], [2.0])
    assert every.get_markerfacecolor() == "none" != best.get_markerfacecolor()
    with pytest.raises(ValueError, match="finite bits"):
        apd.plots.tuned(TRIED[2:3])
    with pytest.raises(ValueError, match="rows with k and bits"):
        apd.plots.tuned([{"k": 1.0}])


def test_a_curve_has_bits_over_errors_above_zero() -> None:
    (line,) = apd.plots.curve(COSTS, alpha=3.0).axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.5, 0.1], [2 * 3 + 1 * 2, 3 * 3 + 2 * 2])
    axes = apd.plots.curve({"truth": COSTS, "lump": COSTS[:1]}).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["truth", "lump"]
    with pytest.raises(ValueError, match="no cost with an error above 0"):
        apd.plots.curve(COSTS[2:])
    with pytest.raises(TypeError, match=r"curves must be costs as rate\.curve gives them"):
        apd.plots.curve({"truth": [1.0]})


def test_masks_at_positions_are_to_be_flattened() -> None:
    with pytest.raises(ValueError, match=r"of positions, give mask.flatten\(0, 1\)"):
        apd.plots.masks(torch.ones(2, 3, 4))
