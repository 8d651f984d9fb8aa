"""Metrics on decompositions whose faults are known because they were put there."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import best_match, case
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.study import metrics


def target(rotated: bool = False, identity: bool = False) -> apd.targets.TMS:
    """Five features around a circle, untrained."""
    tms = apd.targets.TMS(5, 2, identity=identity)
    angle = 2 * math.pi * torch.arange(5) / 5
    with torch.no_grad():
        tms.encode.weight.copy_(1.1 * torch.stack([angle.cos(), angle.sin()]))
        tms.bias.fill_(-0.3)
    return tms.rotate(seed=1) if rotated else tms


def components(matrices: Tensor) -> apd.Components:
    return apd.Components.from_matrices({"encode.weight": matrices})


both_bases = pytest.mark.parametrize("rotated", [False, True])


@both_bases
def test_a_perfect_decomposition_in_any_order(rotated: bool) -> None:
    truth = target(rotated).mechanisms()
    Z = truth["encode.weight"]
    order = torch.tensor([3, 0, 4, 1, 2])
    found = metrics.ownership(components(Z[order]), truth)
    assert found.complete
    assert torch.equal(order[found.owner], torch.arange(5))
    for values in (found.cosine, found.length_ratio, found.purity):
        torch.testing.assert_close(values, torch.ones(5))
    torch.testing.assert_close(metrics.mmcs(components(Z), truth), torch.tensor(1.0))
    torch.testing.assert_close(metrics.ml2r(components(Z), truth), torch.tensor(1.0))
    assert str(found).count("yes") == 5


@both_bases
def test_faults_that_were_put_there(rotated: bool) -> None:
    truth = target(rotated).mechanisms()
    Z = truth["encode.weight"]
    zero = torch.zeros_like(Z[:1])

    def owned(matrices: Tensor) -> list[bool]:
        return metrics.ownership(components(matrices), truth).owned.tolist()

    doubled = torch.cat([Z[:1] + Z[1:2], Z[2:], zero])
    assert owned(doubled) == [False, False, True, True, True]
    split = torch.cat([0.5 * Z[:1], 0.5 * Z[:1], Z[1:]])
    assert owned(split) == [False, True, True, True, True]
    shrunken = Z * torch.tensor([0.89, 0.91, 1.0, 1.09, 1.11])[:, None, None]
    assert owned(shrunken) == [False, True, True, True, False]
    turned = torch.cat([-Z[:1], Z[1:], zero])
    assert owned(turned) == [False, True, True, True, True]
    assert metrics.ownership(components(doubled), truth).complete is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_truth", [torch.float32, torch.float64])
def test_types_do_not_matter_and_a_truth_may_have_gradients(dtype: torch.dtype, of_truth: torch.dtype) -> None:
    Z = target().mechanisms()["encode.weight"].detach().to(dtype)
    truth = {"encode.weight": Z.to(of_truth).requires_grad_()}
    found = components(Z[[1, 0, 2, 4, 3]])
    own = metrics.ownership(found, truth)
    assert own.complete and own.owner.tolist() == [1, 0, 2, 4, 3]
    assert metrics.mmcs(found, truth).item() == pytest.approx(1, abs=0.01)
    assert metrics.ml2r(found, truth).item() == pytest.approx(1, abs=0.01)  # factors are rounded


def test_a_mechanism_without_a_component_scores_zero() -> None:
    truth = target().mechanisms()
    found = metrics.ownership(components(truth["encode.weight"][1:]), truth)
    assert found.owner.tolist() == [-1, 0, 1, 2, 3]
    assert found.owned.tolist() == [False, True, True, True, True]
    for values in (found.cosine, found.length_ratio, found.purity):
        assert values[0] == 0


def test_the_bounds_of_ownership_belong_to_it() -> None:
    """Single entries that are powers of four, so that nothing is rounded: "least" and "largest" are still allowed."""
    Z = torch.diag_embed(torch.eye(3))
    own = torch.tensor([0.25, 1.0, 4.0])[:, None, None] * Z
    bounds = {"min_cosine": 1.0, "min_purity": 1.0}
    assert metrics.ownership(components(own), {"encode.weight": Z}, length_range=(0.25, 4.0), **bounds).complete
    found = metrics.ownership(components(own), {"encode.weight": Z}, length_range=(0.5, 2.0), **bounds)
    assert found.owned.tolist() == [False, True, False]


def test_impure_components_by_hand() -> None:
    truth = target().mechanisms()
    Z = truth["encode.weight"]
    # Feature 0's component carries a share of feature 1's: all columns are of length 1.1.
    for share in (0.1, 0.2):
        P = Z.clone()
        P[0] += share * Z[1]
        found = metrics.ownership(components(P), truth, min_cosine=0.0, length_range=(0, 9))
        purity = 1 / (1 + share**2)
        assert found.purity[0].item() == pytest.approx(purity, abs=1e-5)
        assert found.owned.tolist() == [purity >= 0.98, True, True, True, True]
        assert found.cosine[0].item() == pytest.approx(purity**0.5, abs=1e-5)
        assert found.length_ratio[0].item() == pytest.approx((1 + share**2) ** 0.5, abs=1e-5)


def test_what_mmcs_and_ml2r_do_not_see() -> None:
    truth = target().mechanisms()
    Z = truth["encode.weight"]
    dead = components(Z * 1e-3)
    torch.testing.assert_close(metrics.mmcs(dead, truth), torch.tensor(1.0))
    torch.testing.assert_close(metrics.ml2r(dead, truth), torch.tensor(1e-3))
    whole = components(Z.sum(0, keepdim=True))  # one component that does everything
    torch.testing.assert_close(metrics.mmcs(whole, truth), torch.tensor(1.0))
    torch.testing.assert_close(metrics.ml2r(whole, truth), torch.tensor(1.0))
    assert not metrics.ownership(whole, truth).owned.any()


@given(st.integers(0, 100), st.integers(1, 6), st.integers(1, 6))
def test_columns_feature_by_feature(seed: int, C: int, J: int) -> None:
    """MMCS and ML2R as they are defined: column j of the component against column j of W."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(J, 3, generator=generator, dtype=torch.float64)
    P = torch.randn(C, J, 3, generator=generator, dtype=torch.float64)
    truth = {"w": torch.einsum("ji,jd->jid", torch.eye(J, dtype=torch.float64), W)}
    cosines, ratios = [], []
    for j in range(J):
        each = [float(P[c, j] @ W[j] / (P[c, j].norm() * W[j].norm())) for c in range(C)]
        best = max(range(C), key=each.__getitem__)
        cosines.append(each[best])
        ratios.append(float(P[best, j].norm() / W[j].norm()))
    found = apd.Components.from_matrices({"w": P})
    assert float(metrics.mmcs(found, truth)) == pytest.approx(sum(cosines) / J)
    assert float(metrics.ml2r(found, truth)) == pytest.approx(sum(ratios) / J)


@given(st.integers(0, 100), st.integers(1, 6), st.integers(1, 6))
def test_the_match_is_the_best_of_all(seed: int, C: int, J: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(J, 3, 2, generator=generator, dtype=torch.float64)
    P = torch.randn(C, 3, 2, generator=generator, dtype=torch.float64)
    found = metrics.ownership(apd.Components.from_matrices({"w": P}), {"w": Z})
    cosines = torch.nn.functional.cosine_similarity(Z.flatten(1)[:, None], P.flatten(1)[None], dim=2)
    assert float(found.cosine.sum()) == pytest.approx(best_match(cosines))
    held = found.owner[found.owner >= 0]
    assert len(held.unique()) == len(held) == min(C, J)
    for j, c in enumerate(found.owner.tolist()):
        if c < 0:
            assert [float(found.cosine[j]), float(found.length_ratio[j]), bool(found.owned[j])] == [0, 0, False]
        else:
            assert float(found.cosine[j]) == pytest.approx(float(cosines[j, c]))
            assert float(found.length_ratio[j]) == pytest.approx(float(P[c].norm() / Z[j].norm()))


def test_the_input_basis_does_not_matter() -> None:
    plain = target()
    generator = torch.Generator().manual_seed(0)
    P = torch.cat([plain.mechanisms()["encode.weight"], torch.zeros(1, 5, 2)])
    P = P + 0.1 * torch.randn(P.shape, generator=generator)
    turned = target(rotated=True)
    assert turned.rotation is not None
    Q = turned.rotation
    here, there = components(P), components(Q.T @ P)
    truth_here, truth_there = plain.mechanisms(), turned.mechanisms()
    first, second = metrics.ownership(here, truth_here), metrics.ownership(there, truth_there)
    for name in ("owner", "cosine", "length_ratio", "purity", "owned"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name))
    assert not first.complete
    for function in (metrics.mmcs, metrics.ml2r):
        torch.testing.assert_close(function(here, truth_here), function(there, truth_there))


def test_mechanisms_over_two_weights() -> None:
    truth = target(identity=True).mechanisms()
    perfect = apd.Components.from_matrices(truth)
    assert metrics.ownership(perfect, truth).complete
    # The identity layer's parts handed out to the features' components: none of them is pure any more.
    mixed = {path: Z.clone() for path, Z in truth.items()}
    mixed["middle.weight"][:5] = torch.eye(2) / 5
    mixed["middle.weight"][5] = 0
    assert not metrics.ownership(apd.Components.from_matrices(mixed), truth).owned.any()


def test_relative_faithfulness_by_hand() -> None:
    weights = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]])}
    nothing = apd.Components.from_matrices({"w": torch.zeros(2, 2, 2)})
    assert metrics.relative_faithfulness(nothing, weights).item() == pytest.approx(1.0)
    half = apd.Components.from_matrices({"w": weights["w"][None] / 2})
    assert metrics.relative_faithfulness(half, weights).item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match="weights must not be all zero"):
        metrics.relative_faithfulness(nothing, {"w": torch.zeros(2, 2)})


def test_output_error_is_that_of_the_sum() -> None:
    one = case("mlp")
    x, found = one.x(), one.components()
    y = torch.tanh(x @ found.sum("0.weight") + one.target[0].bias) @ found.sum("2.weight") + one.target[2].bias
    expected = (y - one.target(x)).square().mean(1)
    torch.testing.assert_close(metrics.output_error(one.target, found, x), expected.detach())


def sparse_inputs(n: int) -> Tensor:
    return apd.data.SparseFeatures(5, 0.05, batch_size=n, nonempty=True)(0, torch.Generator().manual_seed(0))


@both_bases
def test_scrubbing_a_true_decomposition(rotated: bool) -> None:
    """On inputs with one feature each, the other components never matter; the active one does."""
    tms = target(rotated)
    inputs = torch.eye(5).repeat(40, 1)
    inputs = inputs if tms.rotation is None else inputs @ torch.eye(5)
    found = metrics.scrubbing(tms, components(tms.mechanisms()["encode.weight"]), inputs, top_k=5)
    assert found.top_k.max() < 1e-10
    assert torch.equal(found.top_k, found.scrubbed), "with every component active, there is none to scrub"
    plain = nn.Linear(5, 5, bias=False)
    with torch.no_grad():
        plain.weight.copy_(torch.eye(5))
    Z = torch.einsum("ji,jo->jio", torch.eye(5), torch.eye(5))
    truth = apd.Components.from_matrices({"weight": Z})
    error = metrics.scrubbing(plain, truth, inputs, top_k=1)
    torch.testing.assert_close(error.scrubbed, error.top_k)
    assert error.top_k.max() < 1e-10
    # Half of the ones are lost: each costs one squared output of five.
    lost = error.anti_scrubbed
    assert set(lost.mul(5).round(decimals=4).tolist()) == {0.0, 1.0}
    assert 0.05 < lost.mean() < 0.15


def test_scrubbing_exposes_the_faithful_and_meaningless_decomposition() -> None:
    tms = target()
    Z = tms.mechanisms()["encode.weight"]
    generator = torch.Generator().manual_seed(0)
    strangers = torch.randn(4, 5, 2, generator=generator)
    pathological = torch.cat([strangers, (Z.sum(0) - strangers.sum(0))[None]])
    x = sparse_inputs(500)
    good = metrics.scrubbing(tms, components(Z), x, top_k=1.2)
    bad = metrics.scrubbing(tms, components(pathological), x, top_k=1.2)
    weights = apd.Network(tms, tms.weights).weights
    assert apd.losses.faithfulness(components(pathological), weights) < 1e-8
    assert good.scrubbed.mean() < 0.5 * good.anti_scrubbed.mean()
    assert bad.scrubbed.mean() > 10 * good.scrubbed.mean()
    again = metrics.scrubbing(tms, components(Z), x, top_k=1.2)
    assert torch.equal(again.anti_scrubbed, good.anti_scrubbed)
    other = metrics.scrubbing(tms, components(Z), x, top_k=1.2, seed=1)
    assert not torch.equal(other.anti_scrubbed, good.anti_scrubbed)


def test_scrubbing_adds_half_of_the_rest_and_removes_half_of_the_active() -> None:
    """A layer whose components write to one output each shows which of them ran."""
    C, B = 8, 400
    layer = nn.Linear(1, C, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
    P = torch.zeros(C, 1, C)
    P[range(C), 0, range(C)] = torch.arange(1.0, C + 1)
    found = apd.Components.from_matrices({"weight": P})
    error = metrics.scrubbing(layer, found, torch.ones(B, 1), top_k=2)
    kept = torch.tensor([7.0, 8.0]).square().sum()
    rest = torch.arange(1.0, 7).square().sum()
    torch.testing.assert_close(error.top_k * C, kept.expand(B))
    assert (error.scrubbed * C >= kept - 1e-3).all()
    assert float((error.scrubbed * C).mean()) == pytest.approx(float(kept + rest / 2), rel=0.05)
    assert float((error.anti_scrubbed * C).mean()) == pytest.approx(float(kept + rest) / 2, rel=0.08)


def writers(lengths: list[float]) -> tuple[nn.Linear, apd.Components]:
    """A layer that is zero, and components that each write their length to an output of their own."""
    n = len(lengths)
    layer = nn.Linear(1, n, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
    return layer, apd.Components.from_matrices({"weight": torch.diag(torch.tensor(lengths))[:, None]})


def test_the_paper_s_anti_scrubbed_run_takes_all_active_components_away() -> None:
    """One inactive component, so that every error is one of two numbers that are known by hand."""
    layer, found = writers([3.0, 4.0, 6.0])
    x = torch.ones(400, 1)
    paper = metrics.scrubbing(layer, found, x, top_k=2, anti="all")
    ours = metrics.scrubbing(layer, found, x, top_k=2)

    def values(errors: Tensor) -> set[float]:
        return set(errors.mul(3).round(decimals=3).tolist())

    assert values(paper.top_k) == {52.0}
    assert values(paper.scrubbed) == {52.0, 61.0}
    assert values(paper.anti_scrubbed) == {0.0, 9.0}
    assert values(ours.anti_scrubbed) == {0.0, 9.0, 16.0, 25.0, 36.0, 45.0, 52.0, 61.0}
    assert torch.equal(paper.scrubbed, ours.scrubbed), "the definitions differ in the anti-scrubbed run only"
    assert float(paper.anti_scrubbed.mean() * 3) == pytest.approx(4.5, rel=0.15)


def features_apart() -> tuple[nn.Linear, apd.Components]:
    """The identity on 4 features, one component each, in the order 2, 0, 3, 1."""
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    Z = torch.einsum("ji,jo->jio", torch.eye(4), torch.eye(4))
    return layer, apd.Components.from_matrices({"weight": Z[[2, 0, 3, 1]]})


def test_responsible_components_are_those_of_the_features_that_are_on() -> None:
    layer, found = features_apart()
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, -0.1], [0.0, 0.2, 0.3, 0.0]])
    mask = metrics.responsible(layer, found, x)
    assert mask.tolist() == [
        [False, False, False, False],
        [False, True, False, False],
        [False, True, True, False],
        [True, False, False, True],
    ]
    flipped = metrics.responsible(layer, found, x, attribution=lambda n, c, x: -apd.attributions.gradient(n, c, x))
    assert flipped[1].tolist() != mask[1].tolist(), "an attribution of one's own decides"


def test_spared_components_decide_what_is_scrubbed() -> None:
    """With k = 1 a feature of two is inactive; its component is spared all the same, or taken away."""
    layer, found = features_apart()
    x = torch.tensor([[1.0, 0.0, 0.0, -0.5]]).repeat(50, 1)
    mask = metrics.responsible(layer, found, x)
    error = metrics.scrubbing(layer, found, x, top_k=1, anti="all", spared=mask)
    torch.testing.assert_close(error.top_k, torch.full((50,), 0.25 / 4))
    assert error.scrubbed.max() < 1e-12
    torch.testing.assert_close(error.anti_scrubbed, torch.full((50,), 1.25 / 4))
    by_k = metrics.scrubbing(layer, found, x, top_k=1, anti="all")
    assert set(by_k.scrubbed.mul(4).round(decimals=3).tolist()) == {0.0, 0.25}


def test_means_name_their_samples() -> None:
    layer, found = features_apart()
    x = torch.zeros(5, 4)
    x[0, 0], x[3, 2] = 1.0, 2.0
    error = metrics.scrubbing(layer, found, x, top_k=1, anti="all", spared=metrics.responsible(layer, found, x))
    assert error.nonempty.tolist() == [True, False, False, True, False]
    assert error.means()["anti_scrubbed"] == pytest.approx((1 + 4) / 4 / 5)
    assert error.means("nonempty")["anti_scrubbed"] == pytest.approx((1 + 4) / 4 / 2)
    assert error.means("nonempty") == {name: pytest.approx(v * 5 / 2) for name, v in error.means("all").items()}
    silent = metrics.scrubbing(layer, found, torch.zeros(3, 4), top_k=1)
    with pytest.raises(ValueError, match="nothing to average"):
        silent.means("nonempty")
    with pytest.raises(ValueError, match="samples"):
        silent.means("some")


def test_description_length_by_hand() -> None:
    P = torch.zeros(4, 3, 2)
    P[0, 0, 0] = 1
    P[1, 1, 0] = P[1, 2, 1] = 1  # rank 2
    P[2, 2, 1] = 0.01  # below the threshold
    found = apd.Components.from_matrices({"w": P, "v": P.flip(1)})
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # Ranks over both weights 2, 4, 0, 0; every active component costs log2(4) = 2 bits more.
    assert float(metrics.description_length(found, mask, alpha=3.0)) == pytest.approx((8 + 14 + 14 + 2 + 0) / 3)
    assert float(metrics.description_length(found, mask, threshold=0.001)) == pytest.approx((4 + 6 + 6 + 4) / 3)


@pytest.mark.parametrize(("alpha", "better"), [(2.7, False), (3.1, True)])
def test_five_components_of_tms_beat_one_above_about_2_9_bits(alpha: float, better: bool) -> None:
    Z = target().mechanisms()["encode.weight"]
    x = apd.data.SparseFeatures(5, 0.05, batch_size=100_000)(0, torch.Generator().manual_seed(0))
    active = (x > 0).float()
    five = metrics.description_length(components(Z), active, alpha)
    one = metrics.description_length(components(Z.sum(0)[None]), active.amax(1, keepdim=True), alpha)
    assert bool(five < one) == better


def test_truths_that_do_not_fit() -> None:
    truth = target().mechanisms()
    found = components(truth["encode.weight"])
    bad = [
        (found.stacked(), truth, "pick one restart first"),
        (found, {"w": truth["encode.weight"]}, r"the truth is about \['w'\], the components about \['encode.weight'\]"),
        (found, {"encode.weight": torch.zeros(5, 2, 5)}, r"must be \[J, 5, 2\], got \[5, 2, 5\]"),
    ]
    for function in (metrics.ownership, metrics.mmcs, metrics.ml2r):
        for c, t, message in bad:
            with pytest.raises(ValueError, match=message):
                function(c, t)


@pytest.mark.parametrize("n", [(2, 3), (0, 0)])
def test_a_truth_has_the_same_mechanisms_for_every_path(n: tuple[int, int]) -> None:
    parts = apd.Components.random({"a": (3, 2), "b": (2, 3)}, 2)
    truth = {"a": torch.ones(n[0], 3, 2), "b": torch.ones(n[1], 2, 3)}
    for measure in (metrics.ownership, metrics.mmcs, metrics.ml2r):
        with pytest.raises(ValueError, match="the truth must have the same J mechanisms for every path, at least one"):
            measure(parts, truth)
