"""Layer by layer: each group's run is a plain one, and the parts of one mechanism find each other."""

from __future__ import annotations

import contextlib
import pickle
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import tms
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.scale import layerwise
from apd_minimal.scale.layerwise import activity, cluster, decompose_groups, similarity, stitch
from apd_minimal.targets import ResidualMLP

TARGET = ResidualMLP(n_features=6, d_resid=12, neurons=(3, 3), probability=0.2, seed=0)
GROUPS = {"first": ["read.0.weight", "write.0.weight"], "last": ["write.1.weight"]}
BATCHES = apd.data.SparseFeatures(6, 0.2, -1.0, 1.0, batch_size=32)
SETTINGS: dict[str, Any] = {"n_components": 5, "top_k": 1.2, "steps": 12, "tidy_every": 0.25, "progress": False}
SETTINGS |= {"attribution": TARGET.attributions, "hidden_modules": ["neurons.1"], "hidden": 2.0}


def same(one: apd.Decomposition, other: apd.Decomposition) -> bool:
    """Bit for bit."""
    factors = zip(one.components.parameters(), other.components.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in factors) and (one.history, one.scores) == (other.history, other.scores)


def test_every_group_is_a_plain_run_in_whatever_process() -> None:
    per_group = {"last": {"n_components": 7, "rank": 1}}
    before = {name: p.clone() for name, p in TARGET.named_parameters()}
    here = decompose_groups(TARGET, BATCHES, GROUPS, per_group=per_group, seed=3, **SETTINGS)
    there = decompose_groups(TARGET, BATCHES, GROUPS, per_group=per_group, seed=3, processes=2, **SETTINGS)
    assert list(here) == list(there) == list(GROUPS)
    for i, (name, weights) in enumerate(GROUPS.items()):
        direct = apd.decompose(TARGET, BATCHES, weights, seed=3 + i, **{**SETTINGS, **per_group.get(name, {})})
        assert same(here[name], direct)
        for one, other in zip(there[name].components.parameters(), direct.components.parameters(), strict=True):
            # Another process has its own number of threads, and so sums in another order; steps magnify that.
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert there[name].scores == pytest.approx(direct.scores, rel=1e-3)
        assert here[name].components.paths == weights
        assert there[name].fingerprint == direct.fingerprint
    assert all(torch.equal(p, before[name]) for name, p in TARGET.named_parameters())


def test_a_bar_is_shown_by_one_process_and_not_by_several(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []
    monkeypatch.setattr(layerwise, "_run", lambda name, job: shown.append(job["progress"]))
    monkeypatch.setattr(layerwise, "_pickled", lambda name, job: pickle.dumps(shown.append(job["progress"])))
    monkeypatch.setattr(layerwise, "_unpickle_and_run", len)
    monkeypatch.setattr(layerwise, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    quiet = {name: value for name, value in SETTINGS.items() if name != "progress"}
    decompose_groups(TARGET, BATCHES, GROUPS, **quiet)
    assert shown == [True, True]
    with contextlib.suppress(Exception):  # nothing is run
        decompose_groups(TARGET, BATCHES, GROUPS, processes=2, **quiet)
    assert shown == [True, True, False, False]


def test_a_seed_of_its_own_for_every_group_and_those_that_are_given() -> None:
    matrices = {path: [path] for path in ("read.0.weight", "read.1.weight")}
    first, second = (
        decompose_groups(TARGET, BATCHES, matrices, per_group=own, **SETTINGS)
        for own in ({}, {"read.1.weight": {"seed": 0}})
    )
    assert [d.config.seed for d in first.values()] == [0, 1]
    assert [d.config.seed for d in second.values()] == [0, 0]


class TwoStep(nn.Module):
    """x [B, 4] -> 4 numbers -> 4 outputs, all on the diagonal: function i has first[i, i] and last[i, i].

    Everything is known: the true components are the four pairs of single entries.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(4, 4, bias=False) for _ in range(2))
        with torch.no_grad():
            self.first.weight.copy_(torch.diag(torch.tensor([1.0, -2.0, 3.0, 0.5])))
            self.last.weight.copy_(torch.diag(torch.tensor([2.0, 1.0, -1.0, 4.0])))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def taken_apart(target: TwoStep, orders: dict[str, list[int]]) -> dict[str, apd.Components]:
    """The right parts of both matrices, each in an order of its own, and one that does nothing."""
    parts = {}
    for name, order in orders.items():
        matrix = target.get_parameter(f"{name}.weight").detach().T
        single = torch.zeros(len(order) + 1, 4, 4)
        for c, i in enumerate(order):
            single[c, i, i] = matrix[i, i]
        parts[name] = apd.Components.from_matrices({f"{name}.weight": single}, rank=1)
    return parts


def decomposition(components: apd.Components, **settings: Any) -> apd.Decomposition:
    config = apd.Config(**{"n_components": components.n_components, "top_k": 1.0, **settings})
    return apd.Decomposition(components, config, {}, [0.0], 0, True, "")


def test_known_parts_are_stitched_right() -> None:
    target, orders = TwoStep(), {"first": [2, 0, 3, 1], "last": [1, 3, 0, 2]}
    parts = taken_apart(target, orders)
    data = apd.data.SparseFeatures(4, 0.25, 0.5, 1.5, batch_size=400)
    x = data(0, torch.Generator().manual_seed(0))
    k = (x > 0).sum().item() / len(x)
    masks = activity(target, {name: decomposition(p, top_k=k) for name, p in parts.items()}, x)
    for name, order in orders.items():
        assert torch.equal(masks[name][:, :4], (x > 0).float()[:, order])
    found = cluster(masks, 0.5)
    assert len(found) == 6
    assert sorted(map(len, found)) == [1, 1, 2, 2, 2, 2]
    whole = stitch(parts, found)
    network = apd.Network(target, ["first.weight", "last.weight"])
    for path in network.weights:
        torch.testing.assert_close(whole.sum(path), network.weights[path])
    for members, component in zip(found, range(len(found)), strict=True):
        function = {orders[name][c] for name, c in members if c < 4}
        assert len(function) == (len(members) == 2), members
        for i in function:
            for path, weight in network.weights.items():
                wanted = torch.zeros(4, 4)
                wanted[i, i] = weight[i, i]
                torch.testing.assert_close(whole.matrices(path)[component], wanted)
    # One stitched component alone does all of its function.
    one = torch.tensor([len(m) == 2 for m in found]).float() * torch.ones(len(x), 1)
    torch.testing.assert_close(network(x, whole, one), network(x))


def test_activity_takes_the_end_of_the_schedule_and_the_way_of_the_run() -> None:
    target = TwoStep()
    parts = taken_apart(target, {"first": [0, 1, 2, 3]})
    x = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    network = apd.Network(target, ["first.weight"])
    scores = apd.attributions.gradient(network, parts["first"], x)
    end = decomposition(parts["first"], top_k=((0.0, 3.0), (0.5, 1.6)))
    assert torch.equal(activity(target, {"p": end}, x)["p"], apd.selection.batch_top_k(scores, 1.6))
    each = decomposition(parts["first"], top_k=2.0, per_sample=True)
    assert torch.equal(activity(target, {"p": each}, x)["p"], apd.selection.sample_top_k(scores, 2))
    half = decomposition(parts["first"].map(lambda t: 0.5 * t), attribute_at="components", top_k=1.6)
    at = apd.attributions.gradient(network, half.components, x, at="components")
    assert torch.equal(activity(target, {"p": half}, x)["p"], apd.selection.batch_top_k(at, 1.6))
    assert not torch.equal(apd.selection.batch_top_k(at, 1.6), apd.selection.batch_top_k(scores, 1.6)), (
        "a test that tells"
    )
    given = activity(target, {"p": end}, x, attribution=lambda network, components, x: -scores)
    assert torch.equal(given["p"], apd.selection.batch_top_k(-scores, 1.6))
    first = activity(target, {"p": end}, x, output=lambda out: out[:, :1])["p"]
    assert first[:, 1:].sum() < apd.selection.batch_top_k(scores, 1.6)[:, 1:].sum()


masks_drawn = st.lists(
    st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), min_size=1, max_size=3
)


def tensors(groups: list[list[list[bool]]]) -> dict[str, Tensor]:
    return {f"g{i}": torch.tensor(group).float().T for i, group in enumerate(groups)}


@given(masks_drawn)
def test_similarity_is_both_over_either(groups: list[list[list[bool]]]) -> None:
    members, close = similarity(tensors(groups))
    sets = [{b for b, on in enumerate(part) if on} for group in groups for part in group]
    assert members == [(f"g{i}", c) for i, group in enumerate(groups) for c in range(len(group))]
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            assert close[i, j] == pytest.approx(len(a & b) / len(a | b) if a | b else 0.0)


@given(masks_drawn, st.floats(0.05, 1.0))
def test_clusters_by_average_linkage(groups: list[list[list[bool]]], threshold: float) -> None:
    """By the definition, joining the closest two again and again; draws have to be settled alike."""
    masks = tensors(groups)
    members, close = similarity(masks)
    clusters = [[i] for i in range(len(members))]
    while len(clusters) > 1:
        means = {
            (p, q): close[clusters[p]][:, clusters[q]].mean().item()
            for p in range(len(clusters))
            for q in range(p + 1, len(clusters))
        }
        (p, q), best = max(means.items(), key=lambda item: item[1])
        close_calls = sorted(means.values())[-2:]
        if len(close_calls) == 2 and close_calls[1] - close_calls[0] < 1e-6 and best < 1 - 1e-6:
            return  # another order may be as good
        if abs(best - threshold) < 1e-6:
            return
        if best < threshold:
            break
        clusters[p] += clusters.pop(q)
    wanted = sorted(sorted(members[i] for i in c) for c in clusters)
    found = cluster(masks, threshold)
    assert sorted(map(sorted, found)) == wanted
    assert [c[0] for c in found] == sorted((c[0] for c in found), key=members.index)


def test_a_threshold_decides_and_the_never_active_stay_alone() -> None:
    a = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).float()
    b = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0]).float()  # 3 of 5 together
    never = torch.zeros(8)
    masks = {"one": torch.stack([a, never], 1), "two": torch.stack([never, b], 1)}
    together, apart = [("one", 0), ("two", 1)], [("one", 1)]
    assert cluster(masks, 0.6) == [together, apart, [("two", 0)]]
    assert len(cluster(masks, 0.61)) == 4
    assert len(cluster(masks, 1e-6)) == 3
    assert cluster({"one": a[:, None]}, 0.5) == [[("one", 0)]]


def drawn(n_components: int, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> apd.Components:
    return apd.Components.random(shapes, n_components, rank, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000))
def test_a_cluster_is_the_sum_of_its_parts_and_everything_stays_the_same_sum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = {"x": drawn(4, {"a": (5, 3), "b": (3, 4)}, 2, seed), "y": drawn(3, {"c": (4, 6)}, 1, seed + 1)}
    members = [("x", c) for c in range(4)] + [("y", c) for c in range(3)]
    labels = torch.randint(3, (7,), generator=generator).tolist()
    clusters = [[m for m, label in zip(members, labels, strict=True) if label == i] for i in set(labels)]
    whole = stitch(parts, clusters)
    for name, part in parts.items():
        for path in part.paths:
            torch.testing.assert_close(whole.sum(path), part.sum(path))
            matrices = part.matrices(path)
            for i, cluster_members in enumerate(clusters):
                own = [c for group, c in cluster_members if group == name]
                torch.testing.assert_close(whole.matrices(path)[i], matrices[own].sum(0))
            most = max(sum(group == name for group, _ in c) for c in clusters)
            assert whole.A[path].shape[-1] == most * part.A[path].shape[-1]


def test_cut_to_a_rank_it_is_the_best_of_that_rank() -> None:
    parts = {"x": drawn(3, {"a": (5, 4)}, 1, 0)}
    clusters = [[("x", 0), ("x", 2)], [("x", 1)]]
    whole = stitch(parts, clusters, rank=1)
    total = parts["x"].matrices("a")[[0, 2]].sum(0)
    assert whole.A["a"].shape[-1] == 1
    s = torch.linalg.svdvals(total)
    torch.testing.assert_close((total - whole.matrices("a")[0]).norm(), s[1:].norm())
    assert s[1] > 1e-3
    torch.testing.assert_close(whole.matrices("a")[1], parts["x"].matrices("a")[1])


def test_decompositions_are_stitched_like_their_components() -> None:
    parts = {"x": drawn(2, {"a": (5, 4)}, 1, 0)}
    clusters = [[("x", 0), ("x", 1)]]
    of_run = stitch({"x": decomposition(parts["x"])}, clusters)
    assert torch.equal(of_run.flat(), stitch(parts, clusters).flat())


def broken(step: int, generator: torch.Generator) -> Tensor:
    """A source that breaks."""
    if step == 3:
        raise ArithmeticError("no more data")
    return BATCHES(step, generator)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_fails_is_named(processes: int) -> None:
    with pytest.raises(RuntimeError, match=r"group 'first': ArithmeticError: no more data"):
        decompose_groups(TARGET, broken, GROUPS, processes=processes, **SETTINGS)
    wrong = {"last": {"n_components": 1}}
    with pytest.raises(RuntimeError, match=r"group 'last': ValueError: top_k must be .* n_components=1, got 1\.2"):
        decompose_groups(TARGET, BATCHES, GROUPS, per_group=wrong, processes=processes, **SETTINGS)
    endless = {"last": {"lr": 1e30, "steps": 60}}  # NonFiniteLoss carries a result, and cannot be sent as it is
    with pytest.raises(RuntimeError, match=r"group 'last': NonFiniteLoss: step \d+: the (\w+ loss|attributions) "):
        decompose_groups(TARGET, BATCHES, GROUPS, per_group=endless, processes=processes, **SETTINGS)


BEGUN: set[int] = set()


def fails_at_once(step: int, generator: torch.Generator) -> Tensor:
    """The first group fails, the second takes its time."""
    if generator.initial_seed() == 0:
        raise ArithmeticError("no more data")
    if not BEGUN:
        time.sleep(0.2)
    BEGUN.add(generator.initial_seed())
    return BATCHES(step, generator)


def test_after_a_run_that_fails_no_other_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thread in place of the processes: what waited in the queue is dropped."""
    monkeypatch.setattr(layerwise, "ProcessPoolExecutor", lambda n, context, start: ThreadPoolExecutor(1))
    BEGUN.clear()
    groups = {name: [f"{name}.weight"] for name in ("read.0", "write.0", "read.1", "write.1")}
    settings = SETTINGS | {"steps": 1, "tidy_every": 0.0}
    with pytest.raises(RuntimeError, match=r"group 'read\.0': ArithmeticError"):
        decompose_groups(TARGET, fails_at_once, groups, processes=2, **settings)
    assert 3 not in BEGUN


def stopped(step: int, generator: torch.Generator) -> Tensor:
    """Somebody presses Ctrl-C in the first group, and in the first only."""
    if step == 3 and generator.initial_seed() == 0:
        raise KeyboardInterrupt
    assert generator.initial_seed() in (0, 1_000_003), "another group has begun"
    return BATCHES(step, generator)


def test_ctrl_c_stops_all_groups() -> None:
    with pytest.raises(KeyboardInterrupt, match="group 'first' was stopped"):
        decompose_groups(TARGET, stopped, GROUPS, **SETTINGS)


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(TypeError, match=r"group 'first': batches=<function .*lambda.* cannot be sent .* a module"):
        decompose_groups(TARGET, lambda step, generator: BATCHES(step, generator), GROUPS, processes=2, **SETTINGS)
    per_group = {"last": {"divergence": lambda outputs, wanted: (outputs - wanted).square().mean(-1)}}
    with pytest.raises(TypeError, match=r"group 'last': divergence=<function"):
        decompose_groups(TARGET, BATCHES, GROUPS, processes=2, per_group=per_group, **SETTINGS)


class Gone:
    """What a notebook defines cannot be found by another process."""

    def __reduce__(self) -> Any:
        return getattr_of_this_module, ("defined_in_a_notebook",)


def getattr_of_this_module(name: str) -> Any:
    return getattr(re, name)


def test_what_another_process_does_not_find_is_named() -> None:
    assert pickle.dumps(Gone())
    with pytest.raises(RuntimeError, match=r"group 'first': .*defined_in_a_notebook.* must be in a module"):
        decompose_groups(TARGET, BATCHES, GROUPS, processes=2, **{**SETTINGS, "output": Gone()})


def die(step: int, generator: torch.Generator) -> Tensor:
    """A source that takes its process along."""
    import os

    if step == 3:
        os._exit(1)
    return BATCHES(step, generator)


def test_a_process_that_dies_is_told_of() -> None:
    with pytest.raises(RuntimeError, match=r"a process ended before its run did"):
        decompose_groups(TARGET, die, GROUPS, processes=2, **SETTINGS)


ONE = {"x": drawn(2, {"a": (5, 4)}, 1, 0)}
run = partial(decompose_groups, TARGET, BATCHES)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: run({}, **SETTINGS), ValueError, "at least one group of weights, got none"),
        (lambda: run({"x": []}, **SETTINGS), ValueError, r"group 'x' must be a list .* got \[\]"),
        (lambda: run({"x": "read.0.weight"}, **SETTINGS), ValueError, "group 'x' must be a list .* 'read.0.weight'"),
        (lambda: run({"x": ["read.7.weight"]}, **SETTINGS), KeyError, "no parameter 'read.7.weight'; did you mean"),
        (
            lambda: run({"x": ["read.0.weight"], "y": ["write.0.weight", "read.0.weight"]}, **SETTINGS),
            ValueError,
            "read.0.weight and read.0.weight are the same tensor",
        ),
        (lambda: run(GROUPS, processes=0, **SETTINGS), ValueError, "processes must be at least 1, got 0"),
        (
            lambda: run(GROUPS, per_group={"middle": {}}, **SETTINGS),
            KeyError,
            r"settings for \['middle'\], but the groups are \['first', 'last'\]",
        ),
        (lambda: run(GROUPS, checkpoint="here", **SETTINGS), ValueError, "give each its own with per_group"),
        (
            lambda: activity(TwoStep(), {"p": decomposition(ONE["x"], per_position=True)}, torch.ones(2, 4)),
            ValueError,
            "group 'p' was trained per position",
        ),
        (lambda: similarity({}), ValueError, r"at least one group; got \{\}"),
        (
            lambda: cluster({"x": torch.ones(3, 2), "y": torch.ones(4, 2)}, 0.5),
            ValueError,
            r"the same B, .* got \{'x': \[3, 2\], 'y': \[4, 2\]\}",
        ),
        (lambda: cluster({"x": torch.ones(3, 2, 2)}, 0.5), ValueError, r"must be \[B, C of the group\], .*\[3, 2, 2\]"),
        (lambda: cluster({"x": torch.ones(3, 2)}, 0.0), ValueError, "above 0 and at most 1, got 0.0"),
        (lambda: cluster({"x": torch.ones(3, 2)}, 1.1), ValueError, "above 0 and at most 1, got 1.1"),
        (lambda: stitch(ONE, [[("x", 0)]]), ValueError, r"exactly one cluster; .* \[\('x', 1\)\]"),
        (lambda: stitch(ONE, [[("x", 0), ("x", 1)], [("x", 1)]]), ValueError, r"exactly one .* \[\('x', 1\)\]"),
        (lambda: stitch(ONE, [[("x", 0), ("x", 1), ("y", 0)]]), ValueError, r"exactly one .* \[\('y', 0\)\]"),
        (lambda: stitch({"x": ONE["x"].stacked()}, [[("x", 0), ("x", 1)]]), ValueError, "pick one restart"),
        (lambda: stitch({**ONE, "y": ONE["x"]}, []), ValueError, r"to one group at most, got \['a', 'a'\]"),
    ],
)
def test_errors_name_what_was_given(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_tied_weights_in_two_groups_are_one_weight() -> None:
    with pytest.raises(ValueError, match="the same tensor"):
        decompose_groups(
            tms(), apd.data.SparseFeatures(5), {"x": ["encode.weight"], "y": ["decode.weight"]}, **SETTINGS
        )
