"""Sparse features: the law of the samples, with and without the empty ones."""

from __future__ import annotations

import itertools
import re
from collections import UserDict
from dataclasses import MISSING, fields
from typing import Any

import pytest
import runs
import torch
from scipy.stats import chi2, kstest
from torch import Tensor
from torch.utils.data import DataLoader

import apd_minimal as apd
from apd_minimal import checks
from apd_minimal.data import SparseFeatures


def draw(source: SparseFeatures, seed: int = 0) -> Tensor:
    return source(0, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("nonempty", [False, True])
@pytest.mark.parametrize("probability", [0.05, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_every_pattern_has_its_probability(n: int, probability: float, nonempty: bool) -> None:
    """Chi-square over all 2^n patterns against the (conditional) product law."""
    B = 40_000
    on = draw(SparseFeatures(n, probability, 0.5, 1.0, B, nonempty)) > 0
    codes = (on * 2 ** torch.arange(n)).sum(1)
    counts = torch.bincount(codes, minlength=2**n).tolist()
    law = {}
    for code, pattern in enumerate(itertools.product([0, 1], repeat=n)):
        number = sum(bit << i for i, bit in enumerate(reversed(pattern)))
        assert number == code
        k = sum(pattern)
        law[code] = probability**k * (1 - probability) ** (n - k)
    if nonempty:
        assert counts[0] == 0
        share = 1 - law.pop(0)
        law = {code: p / share for code, p in law.items()}
    statistic, degrees = 0.0, -1
    for code, p in law.items():
        if p == 0:
            assert counts[code] == 0
        elif B * p > 5:
            statistic += (counts[code] - B * p) ** 2 / (B * p)
            degrees += 1
    if degrees:
        assert statistic < chi2.ppf(1 - 1e-4, degrees)
    else:
        assert max(counts) == B


@pytest.mark.parametrize("nonempty", [False, True])
def test_values_are_uniform_where_a_feature_is_on(nonempty: bool) -> None:
    x = draw(SparseFeatures(3, 0.2, low=-1.0, high=2.0, batch_size=20_000, nonempty=nonempty))
    values = x[x != 0].numpy()
    assert kstest(values, "uniform", (-1.0, 3.0)).pvalue > 1e-3
    assert values.min() < -0.99
    assert values.max() > 1.99


def test_the_stated_means_are_those_of_the_samples() -> None:
    for nonempty in (False, True):
        source = SparseFeatures(5, 0.05, batch_size=100_000, nonempty=nonempty)
        on = draw(source) > 0
        assert float(on.sum(1).float().mean()) == pytest.approx(source.mean_active, rel=0.03)
    share = (draw(SparseFeatures(5, 0.05, batch_size=100_000)) > 0).any(1).float().mean()
    assert float(share) == pytest.approx(source.share_nonempty, rel=0.03)
    assert source.share_nonempty == pytest.approx(1 - 0.95**5)


@pytest.mark.parametrize("nonempty", [False, True])
def test_the_generator_is_the_only_source_of_randomness(nonempty: bool) -> None:
    source = SparseFeatures(5, 0.3, batch_size=16, nonempty=nonempty)
    before = torch.get_rng_state()
    assert torch.equal(draw(source), draw(source))
    assert not torch.equal(draw(source, seed=1), draw(source))
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(0)
    first, state = source(0, generator), generator.get_state()
    second = source(1, generator)
    assert not torch.equal(first, second)
    generator.set_state(state)
    assert torch.equal(source(1, generator), second)
    assert list(first.shape) == [16, 5]


def test_settings_that_make_no_sense() -> None:
    for p in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="probability must be above 0 and at most 1"):
            apd.data.SparseFeatures(5, p)
    for n, batch, name in ((0, 4, "n_features"), (5, 0, "batch_size")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            SparseFeatures(n, 0.5, batch_size=batch)


def test_a_list_of_as_many_batches_as_steps() -> None:
    """No step outside of 0 to steps - 1 is asked for, and whoever counts steps sees all of them again, not one."""
    items = [runs.batches(i, torch.Generator().manual_seed(i)) for i in range(20)]
    asked: list[int] = []

    def source(step: int, generator: torch.Generator) -> Tensor:
        asked.append(step)
        return items[step]

    result = runs.decompose(source, steps=20)
    assert result.finished
    assert set(asked) == set(range(20))
    assert asked[-128:] == [i % 20 for i in range(128)], "held out: 8,192 samples, 64 in a batch"
    assert max(asked[: asked.index(10)]) < 10, "merging asks for no batch before its step"


def test_held_out_inputs_of_a_source_that_draws() -> None:
    """They are those of a generator of their own, whatever the steps are called."""
    seen: list[Tensor] = []

    def source(step: int, generator: torch.Generator) -> Tensor:
        seen.append(runs.batches(step, generator))
        return seen[-1]

    runs.decompose(source, steps=5, tidy_every=0.0, seed=3)
    generator = torch.Generator().manual_seed(3 + 1_000_003)
    held_out = seen[-8192 // 64 :]
    assert len(held_out) == 128
    assert all(torch.equal(x, runs.batches(0, generator)) for x in held_out)


@pytest.mark.parametrize("kind", [apd.targets.TMS, apd.targets.GatedFunctions, apd.targets.Induction])
def test_a_target_s_inputs_are_those_that_its_source_has_unasked(kind: Any) -> None:
    data = kind().data()
    unasked = {f.name: f.default for f in fields(data) if f.default is not MISSING}
    assert "batch_size" in unasked and "probability" in unasked
    assert {name: getattr(data, name) for name in unasked} == unasked


HINTS = r"batch\[[^\]]+\]|torch\.as_tensor\(batch\)|items\[[^\]]+\]"
ROWS: Any = [(torch.rand(3), i) for i in range(8)]
INPUTS = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (INPUTS, "got a dict of ['input_ids', 'attention_mask']: give the entry that is the input, such as "),
        (UserDict(INPUTS), "got a UserDict of ['input_ids', 'attention_mask']: give the entry "),
        ((torch.rand(2, 3), [0, 1]), "got a tuple of ['Tensor', 'list']: give the part that is the input, such as "),
        ([torch.rand(2, 3), torch.zeros(2)], "got a list of ['Tensor', 'Tensor']: give the part that is the input"),
        (torch.rand(2, 3).numpy(), "got a ndarray: give torch.as_tensor(batch); wrap a network that takes several "),
        (DataLoader(ROWS, batch_size=4), "got a DataLoader: make a list of its batches once, items = list(loader)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_tensor_gets_a_line_that_says_what_to_do(batch: Any, says: str) -> None:
    with pytest.raises(ValueError, match=r"batches\(step=3\) must give a tensor \[B, \.\.\.\]") as caught:
        checks.batch(batch, 3)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert len(message) < 300
    # And the advice works.
    (hint,) = re.findall(HINTS, message)
    names = {"batch": batch, "torch": torch, "step": 3}
    if isinstance(batch, DataLoader):
        names["items"] = [inputs for inputs, labels in batch]
    assert eval(hint, names).shape in ((2, 3), (4, 3))


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (None, "a NoneType"),
        ({}, "a dict"),
        ("text", "a str"),
        (torch.rand(0, 3), r"one of shape \[0, 3\]"),
        ((), "a tuple"),
    ],
)
def test_what_is_nothing_gets_no_advice(batch: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"got {got}$"):
        checks.batch(batch, 0)


def test_the_data_are_as_sparse_as_the_docstring_says() -> None:
    """By default 77% of the samples of five features are empty, 0.95^5."""
    x = draw(SparseFeatures(5, batch_size=40_000))
    assert abs((x == 0).all(1).float().mean() - 0.77) < 0.01
