"""A run that ends unfaithful says so in one line, with settings that mend it."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

import apd_minimal as apd
from apd_minimal.advice import UNFAITHFUL, advice


def network() -> apd.Network:
    torch.manual_seed(0)
    return apd.Network(nn.Sequential(nn.Linear(6, 4)), ["0.weight"])


def exact(wrapped: apd.Network, scale: float) -> apd.Components:
    return apd.Components.from_matrices({path: scale * w[None] for path, w in wrapped.weights.items()})


@pytest.mark.parametrize("scale", [1.0, 0.9, 0.7, 0.0])
def test_it_speaks_above_the_bound_with_the_error_in_closed_form(scale: float) -> None:
    # A sum of `scale` times the weights has the squared error (1 - scale)^2.
    wrapped = network()
    says = advice(wrapped, exact(wrapped, scale), apd.Config(1, 1.0, rank=3))
    error = (1 - scale) ** 2
    if error < UNFAITHFUL:
        assert says is None
    else:
        assert says is not None and "\n" not in says
        assert f"the squared error is {error:.2g}" in says
        for name in ("faithfulness from 1 ", "steps (now 2000)", "rank (now 3)", "n_components (now 1)"):
            assert name in says


def test_the_weight_it_names_makes_up_for_small_weights() -> None:
    wrapped = network()
    small = {path: 0.01 * w for path, w in wrapped.weights.items()}
    named = {}
    for name, weights in (("plain", dict(wrapped.weights)), ("small", small)):
        wrapped.weights = weights
        says = advice(wrapped, exact(wrapped, 0.0), apd.Config(1, 1.0, minimality=1e4))
        assert says is not None
        named[name] = float(re.findall(r"to about (\S+);", says)[0])
    # Weights a hundredth as large have squared errors ten thousand times smaller; it is told to one digit.
    assert 0.5e4 < named["small"] / named["plain"] < 2e4
    # And never less than ten times what there is.
    says = advice(wrapped, exact(wrapped, 0.0), apd.Config(1, 1.0, faithfulness=1e9))
    assert says is not None and "to about 1e+10;" in says


@pytest.mark.parametrize("peak", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_weight_it_counts_from_is_the_largest_of_the_run(peak: float) -> None:
    wrapped = network()
    points = tuple(sorted({max(0.0, peak - 0.2): 1.0, peak: 50.0, min(1.0, peak + 0.2): 1.0}.items()))
    points = tuple((t, 50.0 if t == peak else 1.0) for t, _ in points)
    says = advice(wrapped, exact(wrapped, 0.0), apd.Config(1, 1.0, faithfulness=points))
    assert says is not None and "faithfulness from 50 to" in says


def test_it_is_silent_where_faithfulness_was_not_asked_for() -> None:
    wrapped = network()
    assert advice(wrapped, exact(wrapped, 0.0), apd.Config(1, 1.0, faithfulness=0.0)) is None


def test_decompose_warns_and_the_advice_mends_it() -> None:
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for p in target.parameters():
        p.data *= 0.3  # small weights: their squared errors count for little

    def go(faithfulness: float) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            apd.decompose(
                target,
                apd.data.SparseFeatures(6, 0.5, batch_size=64),
                ["0.weight", "2.weight"],
                8,
                2.0,
                faithfulness=faithfulness,
                rank=2,
                steps=400,
                progress=False,
            )
        return [str(w.message) for w in caught if "do not sum to the weights" in str(w.message)]

    (says,) = go(1.0)
    assert go(float(re.findall(r"to about (\S+);", says)[0])) == []
