"""The recipe of a TMS: for which sizes it is doubted, and which features lie on one line."""

from __future__ import annotations

import warnings

import pytest
import torch

import apd_minimal as apd


@pytest.mark.parametrize("size", [(3, 2), (5, 2), (10, 4), (20, 6), (40, 10)])
def test_no_doubt_at_the_sizes_that_were_shown(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = apd.targets.TMS(*size).recipe
    k, n = settings["top_k"][0][1], size[0]
    assert 0 < k <= 0.25 * n and settings["n_components"] >= 1.5 * n


@pytest.mark.parametrize(("size", "identity", "why"), [
    ((60, 15), False, "above 40 features"), ((2, 1), False, "from 3-2 to 40-10"), ((20, 2), False, "for each hidden"),
    ((7, 3), True, "identity layer"),
    ((7, 3), False, "5, 7 and 7 features of three targets"),
])  # fmt: skip
def test_other_sizes_are_doubted_in_words(size: tuple[int, int], identity: bool, why: str) -> None:
    with pytest.warns(UserWarning, match=why):
        _ = apd.targets.TMS(*size, identity=identity).recipe


@pytest.mark.parametrize("rotated", [False, True])
def test_features_on_one_line(rotated: bool) -> None:
    target = apd.targets.TMS(5, 2)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [0.0, 0.001], [0.7, 0.7]])
    target.encode.weight.data = rows.T.clone()  # 0 and 2 are opposite; 3 is too short to lie anywhere
    if rotated:
        target.rotate(1)
    assert target.same_line == [(0, 2)]
