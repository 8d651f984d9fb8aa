"""Planted circuits and causal tests (chapter 32): the formulas, and what truth and hand-made features must score."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.targets import ResidualMLP
from experiments import baselines as bases
from experiments import whole_computations as study
from experiments.causal import Crossed, Features, Model, Parts, Weights, best, cut, effects, plainest, scores, stitched
from experiments.circuits import PATHS, Circuit, bend
from experiments.whole_computations import one_at_a_time


@pytest.mark.parametrize("seed", range(3))
def test_a_circuit_computes_its_formulas_on_its_inputs(seed: int) -> None:
    target = Circuit(seed)
    x = target.batch(0, torch.Generator().manual_seed(seed), 500)
    p, q, z = x[:, : target.J], x[:, target.J : -1], x[:, -1:]
    assert ((p != 0).sum(1) == 1).all() and ((q != 0) == (p != 0)).all() and 0.2 < (z != 0).float().mean() < 0.4

    def g(u: Tensor) -> Tensor:
        return torch.where(u > 0, u, -u / 4)

    with torch.no_grad():
        wanted = torch.cat([g(g(p) - g(q)), g(z)], 1)
        torch.testing.assert_close(target(x), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(target.wanted(x), wanted)
        torch.testing.assert_close(bend(p), g(p))


def test_mechanisms_share_their_neurons_and_sum_to_the_weights() -> None:
    target = Circuit(4)
    for path, own in target.truth.items():
        torch.testing.assert_close(own.sum(0).T, target.get_parameter(path))
        side = own[: target.J].square().sum(1 if path.startswith("read") else 2)  # [J, neurons]
        shared = (side > 1e-4 * side.max()).sum(0)
        assert (shared == target.J).float().mean() > 0.7, path


def truth_of(target: Circuit) -> Weights:
    return Weights(Model.of(target), apd.Components.from_matrices(target.truth))


def test_the_truth_scores_one_and_a_wrong_part_less() -> None:
    target = Circuit(2)
    inputs, groups = one_at_a_time(target), list(range(target.J + 1))
    table = scores(truth_of(target), groups, inputs)
    owner, own = best(table)
    assert owner == groups
    torch.testing.assert_close(own, torch.ones(target.J + 1, 3), atol=1e-4, rtol=0)
    off = table[~torch.eye(target.J + 1).bool()]
    assert off.max() < 0.3
    # Without its second layer, a mechanism can be taken away, and neither works alone nor moves.
    half = {path: own * (path in PATHS[:2]) for path, own in target.truth.items()}
    halves = scores(Weights(Model.of(target), apd.Components.from_matrices(half)), groups, inputs)
    own = halves.diagonal().T[: target.J]
    assert own[:, 0].min() > 0.95 and own[:, 1].max() < 0.05 and own[:, 2].max() < 0.05


class ByHand(Features):
    """Features that are the circuit's own: its slots, and its outputs, with the stream for a code."""

    def __init__(self, target: Circuit) -> None:
        super().__init__(Model.of(target))
        slots = torch.stack([torch.linalg.svd(w)[2][0] for w in target.truth[PATHS[1]][: target.J]])
        self.directions = [torch.cat([slots, target.unembed[-1:]]), target.unembed]

    def codes(self, i: int, r: Tensor) -> Tensor:
        return self.model.layer(i, r) @ self.directions[i].T


def test_features_of_two_layers_that_are_stitched_right_score_one() -> None:
    target = Circuit(3)
    parts, J = ByHand(target), target.J
    right = [((j,), (j,)) for j in range(J + 1)]
    own = scores(parts, right, one_at_a_time(target)).diagonal().T
    torch.testing.assert_close(own, torch.ones(J + 1, 3), atol=1e-4, rtol=0)
    wrong = [((j,), ((j + 1) % J,)) for j in range(J)] + [right[-1]]
    wrongly = scores(parts, wrong, one_at_a_time(target)).diagonal().T[:J]
    assert wrongly[:, 1].max() < 0.05 and wrongly.mean() < 0.6
    x = target.batch(0, torch.Generator().manual_seed(0), 300)
    table = effects(parts, x)
    torch.testing.assert_close(table[:J, :J], torch.eye(J), atol=1e-3, rtol=0)
    everything = scores(parts, [(tuple(range(J + 1)),) * 2], one_at_a_time(target))[:, 0]
    torch.testing.assert_close(everything[:, :2], torch.zeros(J + 1, 2), atol=1e-3, rtol=0)
    assert table[J, :J].max() < 1e-4, "the distractor has no effect on the second layer"


def test_moving_is_exact_where_nothing_is_shared() -> None:
    """By brute force: outputs of the truth's own run, put into another input's."""
    target = Circuit(5)
    parts, inputs = truth_of(target), one_at_a_time(target)
    x, base = inputs[0], inputs[1]
    moved = parts.moved(x, 0, base)
    with torch.no_grad():
        torch.testing.assert_close(moved, target(x) + target(base), atol=1e-4, rtol=0)
        torch.testing.assert_close(parts.kept(x, 0), target(x), atol=1e-4, rtol=0)


def test_the_short_stream_is_the_same_network() -> None:
    target = ResidualMLP(7, 40, (3, 4), seed=1)
    model = Model.of(target)
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for one in (model, model.short):
            torch.testing.assert_close(one.run(x)[0], target(x), atol=1e-5, rtol=1e-5)
    neurons, shorter = Features(model), Features(model.short)
    group = ((0, 2), (1,))
    for way in (Parts.kept, Parts.without):
        torch.testing.assert_close(way(neurons, x, group), way(shorter, x, group), atol=1e-5, rtol=1e-5)


def test_all_neurons_together_are_the_layers() -> None:
    model = Model.of(Circuit(1))
    x = Circuit(1).batch(0, torch.Generator().manual_seed(0), 50)
    every = (tuple(range(model.reads[0].shape[1])), tuple(range(model.reads[1].shape[1])))
    parts = Features(model)
    torch.testing.assert_close(parts.kept(x, every), model.run(x)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.without(x, every), x @ model.embed @ model.unembed, atol=1e-5, rtol=1e-5)


def test_a_crosscoder_that_reads_everything_is_the_layers() -> None:
    from apd_minimal.study.baselines import Dictionary

    target = Circuit(1)
    model, d = Model.of(target), target.embed.shape[1]
    own = Dictionary([d, d], [d, d], 4 * d, sparsity=0.0, centred=True)
    with torch.no_grad():  # each number of both layers as two features, of either sign
        eye = torch.eye(2 * d)
        own.decoder.copy_(torch.cat([eye, -eye]))
        own.encoder.copy_(torch.cat([eye, -eye]).T)
    parts, x = Crossed(model, [own]), target.batch(0, torch.Generator().manual_seed(0), 50)
    every = (tuple(range(4 * d)),) * 2
    torch.testing.assert_close(parts.kept(x, every), model.run(x)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.without(x, every), x @ model.embed @ model.unembed, atol=1e-5, rtol=1e-5)
    base = x.roll(1, 0)
    wanted = model.run(x)[0] - x @ model.embed @ model.unembed + base @ model.embed @ model.unembed
    torch.testing.assert_close(parts.moved(x, every, base), wanted, atol=1e-5, rtol=1e-5)


def test_the_plainest_groups_are_those_of_which_no_other_is_a_part() -> None:
    x = torch.tensor([[1, 0, 0], [2, 0, 0], [1, 1, 0], [3, 1, 0], [0, 1, 1], [0, 2, 1], [0, 0, 0], [0, 0, 9]]).float()
    assert [len(group) for group in plainest(x, 2)] == [2, 2]
    assert {tuple(group.any(0).tolist()) for group in plainest(x, 2)} == {(False, True, True), (True, False, False)}
    assert {tuple(group.any(0).tolist()) for group in plainest(x, 1)} == {(False, False, True), (True, False, False)}


def test_the_cut_without_training_is_the_truth_of_a_circuit() -> None:
    target = Circuit(6)
    groups = plainest(target.batch(0, torch.Generator().manual_seed(0), 1000))
    assert len(groups) == target.J
    found = cut(Model.of(target), groups)
    assert apd.metrics.ownership(found, target.truth).complete
    for path in PATHS:
        torch.testing.assert_close(found.matrices(path).sum(0).T, target.get_parameter(path), atol=1e-4, rtol=0)
    mixed = torch.cat(groups)  # who sees all mechanisms at once gets a lump
    lump = cut(Model.of(target), [mixed])
    assert not apd.metrics.ownership(lump, target.truth).owned[: target.J].any()


def test_the_cut_keeps_what_one_input_does() -> None:
    target = ResidualMLP(7, 40, (3, 4), seed=1)
    x = torch.eye(7)[:, None] * torch.tensor([1.0, -1.0, 0.5, 2.0])[None, :, None]  # [7, 4, 7]
    parts = Weights(Model.of(target), cut(Model.of(target), list(x)))
    for j in range(7):
        torch.testing.assert_close(parts.kept(x[j], j), target(x[j]), atol=1e-4, rtol=1e-4)


def test_stitching_joins_the_most_similar() -> None:
    similar = torch.tensor([[0.9, 0.1], [0.5, 0.4], [0.1, 0.2], [0.8, 0.8]])
    active = [torch.tensor([True, True, True, False]), torch.tensor([True, True])]
    assert stitched(similar, active) == [((0, 1), (0,)), ((), (1,)), ((2,), ())]
    assert stitched(similar, active, onto=0) == [((0,), (0,)), ((1,), (1,)), ((2,), ())]


def test_where_k_is_judged_nothing_else_is_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from apd_minimal.study import baselines

    target, asked = ResidualMLP(7, 40, (3, 4), seed=1), dict[str, list[tuple[tuple[object, ...], dict[str, object]]]]()

    def note(name: str, *arguments: object, **settings: object) -> object:
        asked.setdefault(name, []).append((arguments[2:], settings))
        return baselines.Chosen(best=None, sparsity=1.0, tried=[], seconds=0.0)  # type: ignore[arg-type]

    monkeypatch.setattr(study.baselines, "fit", lambda *a, **s: note("fixed", *a, **s))
    monkeypatch.setattr(study.baselines, "choose", lambda *a, **s: note("judged", *a, **s))
    for method in study.SPARSITY:
        for name in (method, method + study.JUDGED):
            study.dictionaries(name, target, 3)
    for (places, fixed), (others, judged) in zip(asked["fixed"], asked["judged"], strict=True):
        assert places == others and judged.pop("grid") == study.GRID and judged.pop("kind") == "batch_topk"
        assert fixed.pop("kind") == "topk" and fixed.pop("sparsity") in (2, 3) and fixed == judged


def test_k_is_judged_among_the_values_of_a_grid_on_every_network() -> None:
    """The grid is that of chapter 30 for these networks, which has every fixed k inside."""
    assert bases.WIDER["25-25"]["crosscoder"] == study.GRID
    assert all(min(study.GRID) < k < max(study.GRID) for _, k in study.SPARSITY.values())
    rows = study.STUDY.stored()["judged"]
    for method, layers in (("SAE", 2), ("transcoder", 2), ("crosscoder", 1)):
        own = [r for r in rows if r["method"] == method]
        assert [r["seed"] for r in own] == list(study.RESIDUAL)
        assert all(len(r["k"]) == layers and set(r["k"]) <= set(study.GRID) for r in own)
