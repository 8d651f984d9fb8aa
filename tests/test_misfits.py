"""Arguments that are right one by one and do not fit each other: a result, or a clear error of the package's own.

`test_bad_input.py` has values that are malformed by themselves. Here each argument is what a function takes, though for
another network, batch or type: components of other shapes, masks of other samples, bfloat16 beside single precision, an
empty choice. Nothing is said about who must be refused, but nothing may end in an error from within torch or numpy.
"""

from __future__ import annotations

import itertools
import linecache
import traceback
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import PACKAGE, TARGET, VALID, call, components, target, tried
from torch import Tensor, nn

import apd_minimal as apd

SHAPES = {"encode.weight": (5, 2)}
OPTIONAL: dict[str, dict[str, Any]] = {  # data that VALID leaves at its default
    "leakage.information": {"given": torch.arange(12) % 2},
    "leakage.leakage": {"control": components()},
    "metrics.scrubbing": {"spared": torch.ones(4, 3)},
}
NO_DATA = ("artefacts.", "frames.", "glue.", "store.")


def other_components() -> list[apd.Components]:
    """Of other sizes, other weights and other types; none at all; zero; so large that products overflow."""
    generator, good = torch.Generator().manual_seed(3), components()
    kinds = [(SHAPES, 4, 2, None), (SHAPES, 1, 1, None), (SHAPES, 3, 2, 2), (SHAPES, 3, 2, 1)]
    kinds += [({"encode.weight": (4, 3)}, 3, 2, None), ({"other": (5, 2)}, 3, 2, None)]
    kinds += [({**SHAPES, "other": (3, 2)}, 3, 2, None)]
    made = [apd.Components.random(*kind, 0.5, generator) for kind in kinds]
    made += [good.map(Tensor.double), good.map(Tensor.bfloat16), good.map(Tensor.half), good.map(torch.zeros_like)]
    made += [good.subset([]), good.subset([0]), good.map(lambda t: t.clone().requires_grad_())]
    return [*made, good.map(lambda t: 1e20 * t)]


def other_tensors(t: Tensor) -> list[Tensor]:
    """Longer, shorter, empty, with more axes or fewer, of other types, or of other numbers."""
    sized = [t[:0], t[:1], t[1:], torch.cat([t, t]), t[None], t.expand(2, *t.shape), t.squeeze(), t.reshape(-1)]
    sized += [t[..., :0], t[..., :1], t.new_ones(())]
    if t.ndim > 1:
        sized += [t.mT, t[:, :-1], torch.cat([t, t], 1), t[:, 0], t[:, None]]
    types = [torch.float64, torch.bfloat16, torch.half, torch.long, torch.int, torch.bool, torch.complex64]
    numbers = [torch.zeros_like(t), torch.ones_like(t), t.float() * 1e25, t.float() - 2, t.float().requires_grad_()]
    return [*sized, *(t.to(kind) for kind in types), *numbers, t.to_sparse()]


def others(value: Any) -> list[Any]:
    """What could stand in the place of a valid argument; nothing for one that is no data."""
    if isinstance(value, apd.Components):
        return other_components()
    if isinstance(value, Tensor):
        return other_tensors(value)
    if isinstance(value, dict) and value and all(isinstance(part, Tensor) for part in value.values()):
        name, first = next(iter(value.items()))
        return [{}, {"other": first}, {**value, "other": first}, *({name: t} for t in other_tensors(first))]
    if isinstance(value, list) and value and all(isinstance(part, Tensor | apd.Components) for part in value):
        return [[], value + value, *([part] for part in others(value[0])), *([value[0], p] for p in others(value[0]))]
    if isinstance(value, apd.baselines.Dictionary):
        return [apd.baselines.Dictionary(*sizes, 3) for sizes in (([4], [2]), ([5], [3]), ([5, 2], [2]))]
    if isinstance(value, apd.Network):
        return [apd.Network(apd.targets.TMS(4, 3), ["encode.weight"])]
    if value is TARGET:
        deeper = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2))
        own = [apd.targets.TMS(4, 3), target().double(), target().bfloat16()]
        return [*own, deeper, nn.Linear(5, 2), nn.Linear(4, 3), nn.Identity()]
    return {bool: [not value], int: [1, 2, 7], float: [0.0, 0.3, 1.0, 7.0]}.get(type(value), [])


def data(name: str) -> dict[str, list[Any]]:
    """By argument, the others to try."""
    arguments = {**VALID[name][1], **OPTIONAL.get(name, {})}
    return {argument: found for argument, value in arguments.items() if (found := others(value))}


CASES = [name for name in tried() if not name.startswith(NO_DATA) and data(name)]


def check(name: str, changes: dict[str, Any]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(name, changes)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = linecache.getline(frame.filename, frame.lineno or 0).strip()
        if not frame.filename.startswith(PACKAGE) or not line.startswith("raise"):
            raise AssertionError(f"{name}({changes}): raised at {frame.filename}:{frame.lineno}, {line}") from error


@pytest.mark.parametrize("name", CASES)
def test_one_argument_that_does_not_fit_the_others_gets_a_clear_error(name: str) -> None:
    for argument, found in data(name).items():
        for value in found:
            check(name, {argument: value})


@pytest.mark.parametrize("name", [name for name in CASES if len(data(name)) > 1])
def test_two_arguments_that_do_not_fit_get_a_clear_error(name: str) -> None:
    pairs = list(itertools.combinations(data(name), 2))

    @settings(max_examples=25)
    @given(st.data())
    def every(drawn: st.DataObject) -> None:
        chosen = drawn.draw(st.sampled_from(pairs))
        found = data(name)
        check(name, {argument: drawn.draw(st.sampled_from(found[argument])) for argument in chosen})

    every()


def test_most_arguments_that_are_changed_are_refused_and_some_are_taken() -> None:
    """Else the tests above could pass because nothing is tried."""
    taken = refused = 0
    for argument, found in data("metrics.ownership").items():
        for value in found:
            try:
                call("metrics.ownership", {argument: value})
                taken += 1
            except (TypeError, ValueError):
                refused += 1
    assert taken > 5
    assert refused > 5
