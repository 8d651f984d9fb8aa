"""Figures of components and runs, all in the style of `figures.mplstyle`.

Each function draws on given axes or creates a figure, and returns the figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .. import checks
from ..components import Components, single, usable
from ..decomposition import Decomposition
from .matching import flat
from .metrics import Truth, ownership
from .rate import ALPHA, Cost

STYLE = str(files("apd_minimal") / "figures.mplstyle")
GREY = "0.5"
SIGNED = "RdBu_r"  # red is positive, blue negative, in every figure of the book


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    checks.kind("ax", ax, (Axes, type(None)), "axes of matplotlib or None")
    return ax if ax is not None else plt.subplots(figsize=size)[1]


def _figure(ax: Axes) -> Figure:
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


def matrices(components: Components, path: str | None = None, order: Sequence[int] | None = None) -> Figure:
    """Draw every component's matrix for one weight as a small picture, with one colour scale for all.

    Args:
        components: C components, without restarts.
        path: which weight; None takes the first.
        order: which components, in which order; None takes all.

    Returns:
        Figure: a row of pictures, rows are inputs and columns outputs of the weight.

    Raises:
        TypeError, ValueError: an order that is no list of components, or a path that they do not have.
    """
    P = single(usable(components, alone=True).matrices(components.paths[0] if path is None else path).detach())
    if order is not None and (isinstance(order, (str, bytes)) or not isinstance(order, Sequence) or not order):
        raise TypeError(f"order must be a list of components, at least one, or None; got {checks.given(order)}")
    chosen = range(len(P)) if order is None else [checks.number("order", c, 0, len(P) - 1, whole=True) for c in order]
    limit = float(P.abs().max())
    with plt.style.context(STYLE):
        columns = min(len(chosen), 10)
        rows = -(-len(chosen) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(min(6.0, 0.9 * columns), 1.3 * rows), squeeze=False)
        for ax in axes.flat:
            ax.axis("off")
        for ax, c in zip(axes.flat, chosen, strict=False):
            ax.imshow(P[c], cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto")
            ax.set_title(f"{c}", fontsize=8)
    return figure


def columns(vectors: Mapping[str, Tensor], ax: Axes | None = None) -> Figure:
    """Draw vectors in the plane as arrows, one colour for each name: the columns of TMS's matrix, for example.

    Args:
        vectors: name to arrows [n, 2].
        ax: where to draw; None makes a figure.

    Returns:
        Figure: with equal axes.

    Raises:
        TypeError, ValueError: no vectors, or not in the plane.
    """
    checks.kind("vectors", vectors, Mapping, "a mapping from names to arrows [n, 2]")
    if not vectors:
        raise ValueError("vectors must have at least one name, got none")
    for name, arrows in vectors.items():
        checks.tensor(f"vectors: {name}", arrows, "n", 2)
    with plt.style.context(STYLE):
        ax = _axes(ax, (3.6, 3.6))
        colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        reach = 0.0
        for colour, (name, arrows) in zip(colours * 9, vectors.items(), strict=False):
            for i, (dx, dy) in enumerate(arrows.detach().tolist()):
                ax.annotate("", (dx, dy), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.8})
                reach = max(reach, abs(dx), abs(dy))
                if i == 0:
                    ax.plot([], [], color=colour, label=name)
        ax.set(xlim=(-1.15 * reach, 1.15 * reach), ylim=(-1.15 * reach, 1.15 * reach), aspect="equal")
        ax.set(xlabel="hidden dimension 1", ylabel="hidden dimension 2")
        ax.axhline(0, color=GREY, lw=0.5)
        ax.axvline(0, color=GREY, lw=0.5)
    return _figure(ax)


def components(decomposed: Decomposition | Components, truth: Truth | None = None, path: str | None = None) -> Figure:
    """Draw where every component's length lies among the inputs of a weight: one row for each component.

    With a truth, the components are put in the order of the mechanisms that they own, so that a perfect
    decomposition shows a diagonal, and the inputs are the mechanisms' own (whatever the basis).

    Args:
        decomposed: a decomposition or its components.
        truth: per path, the true mechanisms [J, d_in, d_out].
        path: which weight; None takes the first.

    Returns:
        Figure: a heat map, lengths from 0 (pale) up.
    """
    comps = decomposed.components if isinstance(decomposed, Decomposition) else decomposed
    usable(comps, alone=True)
    path = comps.paths[0] if path is None else path
    P = single(comps.matrices(path).detach())
    lengths = P.norm(dim=-1)  # [C, d_in]
    label = "input of the weight"
    if truth is not None:
        owner = ownership(comps, truth).owner
        order = [c for c in owner.tolist() if c >= 0]
        order += [c for c in range(comps.n_components) if c not in order]
        U = torch.linalg.svd(truth[path].detach().to(P), full_matrices=False).U[:, :, 0]  # [J, d_in]
        lengths = (U @ P[order]).norm(dim=-1)  # [C, J]
        label = "true mechanism"
    with plt.style.context(STYLE):
        ax = _axes(None, (4.2, 3.4))
        picture = ax.imshow(lengths, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
        ax.set(xlabel=label, ylabel="component")
        ax.figure.colorbar(picture, ax=ax, label="length")
    return _figure(ax)


def history(result: Decomposition, ax: Axes | None = None) -> Figure:
    """Draw the losses along a run, the chosen restart in full colour, the others pale.

    Args:
        result: a decomposition.
        ax: where to draw; None makes a figure.

    Returns:
        Figure: logarithmic in the losses.
    """
    checks.kind("result", result, Decomposition, "a Decomposition")
    with plt.style.context(STYLE):
        ax = _axes(ax, (5, 3))
        steps = result.history["step"]
        colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        names = [name for name in result.history if name != "step"]
        for colour, name in zip(colours, names, strict=False):
            values = np.array(result.history[name], dtype=float)  # [logged, R]
            for r in range(values.shape[1]):
                chosen = r == result.chosen
                ax.plot(
                    steps[-len(values) :],
                    values[:, r],
                    color=colour,
                    alpha=1.0 if chosen else 0.15,
                    lw=1.4 if chosen else 0.7,
                    label=name if chosen else None,
                )
        ax.set(yscale="log", xlabel="step", ylabel="loss")
        ax.legend()
    return _figure(ax)


def masks(mask: Tensor, ax: Axes | None = None) -> Figure:
    """Draw which components (columns) are active on which samples (rows).

    Args:
        mask: zeros and ones [B, C].
        ax: where to draw; None makes a figure.

    Returns:
        Figure: filled where active.

    Raises:
        TypeError, ValueError: no mask [B, C].
    """
    flat("mask", mask)
    with plt.style.context(STYLE):
        ax = _axes(ax, (4, 3))
        ax.imshow(mask.detach().float(), cmap="Blues", vmin=0, vmax=1.3, aspect="auto", interpolation="nearest")
        ax.set(xlabel="component", ylabel="sample")
    return _figure(ax)


def tuned(tried: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Figure:
    """Draw the bits of every k that `tune` tried; the best is filled.

    Args:
        tried: rows with "k" and "bits", as in `Tuned.tried`; infinite bits are left out.
        ax: where to draw; None makes a figure.

    Returns:
        Figure: logarithmic in k.

    Raises:
        TypeError, ValueError: no rows, or none with finite bits.
    """
    checks.kind("tried", tried, (list, tuple), "rows with k and bits, as in Tuned.tried")
    for row in tried:
        checks.kind("tried", row, Mapping, "rows with k and bits, as in Tuned.tried")
        if not {"k", "bits"} <= set(row):
            raise ValueError(f"tried must be rows with k and bits, got {dict(row)}")
    there = sorted((row["bits"], row["k"]) for row in tried if row["bits"] != math.inf)
    if not there:
        raise ValueError("tried has no row with finite bits: there is nothing to draw")
    with plt.style.context(STYLE):
        ax = _axes(ax, (4, 3))
        bits, ks = zip(*there, strict=True)
        ax.plot(ks, bits, "o", mfc="none", color="C0")
        ax.plot(ks[:1], bits[:1], "o", color="C0")
        ax.set(xscale="log", xlabel="k", ylabel="bits of a sample")
    return _figure(ax)


def curve(
    curves: Sequence[Cost] | Mapping[str, Sequence[Cost]], alpha: float = ALPHA, ax: Axes | None = None
) -> Figure:
    """Draw bits against error, one line for each decomposition (chapter 25); errors of 0 are left out.

    Args:
        curves: as `rate.curve` gives it, or several by name.
        alpha: bits for each unit of rank, 0 or above.
        ax: where to draw; None makes a figure.

    Returns:
        Figure: logarithmic in the error.

    Raises:
        TypeError, ValueError: no costs, or none with an error above 0.
    """
    named = curves if isinstance(curves, Mapping) else {"": curves}
    what = "costs as rate.curve gives them, or a mapping from names to such lists"
    lines = {}
    for name, costs in named.items():
        for cost in checks.kind("curves", costs, (list, tuple), what):
            checks.kind("curves", cost, Cost, what)
        if points := [(cost.error, cost.bits(alpha)) for cost in costs if cost.error > 0]:
            lines[str(name)] = points
    if not lines:
        raise ValueError("curves has no cost with an error above 0: there is nothing to draw")
    with plt.style.context(STYLE):
        ax = _axes(ax, (4, 3))
        for name, points in lines.items():
            ax.plot(*zip(*points, strict=True), label=name)
        ax.set(xscale="log", xlabel="error", ylabel="bits of a sample")
        if any(lines):
            ax.legend()
    return _figure(ax)
