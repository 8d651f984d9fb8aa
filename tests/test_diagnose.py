"""Decompositions with one fault that was put there: that suspect is named, and no other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import runs
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study.diagnose import SIGNS, Diagnosis, _second_singular, diagnose

PATH = "encode.weight"


def target(rotated: bool = False) -> apd.targets.TMS:
    """Five features around a circle, untrained."""
    tms = apd.targets.TMS(5, 2)
    angle = 2 * math.pi * torch.arange(5) / 5
    with torch.no_grad():
        tms.encode.weight.copy_(1.1 * torch.stack([angle.cos(), angle.sin()]))
        tms.bias.fill_(-0.3)
    return tms.rotate(seed=1) if rotated else tms


TARGET = target()
Z = TARGET.mechanisms()[PATH]
DATA = TARGET.data(2048, nonempty=True)
X = DATA(0, torch.Generator().manual_seed(0))
K = DATA.mean_active


def look(matrices: Tensor, top_k: float = K, **thresholds: float) -> Diagnosis:
    components = apd.Components.from_matrices({PATH: matrices})
    return diagnose(TARGET, components, X, top_k, **thresholds)


def scaled(*factors: float) -> Tensor:
    return Z * torch.tensor(factors)[:, None, None]


@pytest.mark.parametrize("rotated", [False, True])
def test_the_true_mechanisms_give_no_suspect(rotated: bool) -> None:
    tms = target(rotated)
    components = apd.Components.from_matrices(tms.mechanisms())
    found = diagnose(tms, components, X, K)
    assert found.suspects == {}
    torch.testing.assert_close(found.length, torch.full((5,), 1.1))
    scores = apd.attributions.gradient(tms, components, X)
    on = scores > scores.flatten().topk(int(K * len(X)) + 1).values[-1]
    torch.testing.assert_close(found.share, on.sum(0) / on.any(1).sum(), atol=2e-3, rtol=0)
    assert found.second_singular.abs().max() < 1e-4
    assert found.other_effects.max() < 0.05
    assert found.cosine.abs().max() < 1e-5
    assert (found.factor - 1).abs().max() <= 0.021
    assert found.remainder < 1e-10
    assert found.sparse < 0.02 and found.scrubbed < 0.02 < 0.3 < found.anti_scrubbed


def test_attributions_are_taken_where_it_is_said() -> None:
    components = apd.Components.from_matrices({PATH: 0.5 * Z * torch.arange(1, 6)[:, None, None] / 5})
    shares = {}
    for at in ("target", "components"):
        scores = apd.attributions.gradient(TARGET, components, X, at=at)
        on = apd.selection.batch_top_k(scores, 0.2).bool()
        shares[at] = diagnose(TARGET, components, X, 0.2, at=at).share
        torch.testing.assert_close(shares[at], on.sum(0) / on.any(1).sum(), atol=1e-3, rtol=0)
    assert (shares["target"] - shares["components"]).abs().max() > 0.05


def test_two_mechanisms_in_one_component() -> None:
    for second in (1, 2):  # a neighbour on the circle, and one nearly opposite
        rest = [j for j in range(5) if j not in (0, second)]
        found = look(torch.cat([Z[[0, second]].sum(0, keepdim=True), Z[rest]]))
        assert found.suspects == {"doubled": [0]}
    # On one line two features make a matrix of rank one; the outputs still tell them apart.
    line = apd.targets.TMS(2, 1)
    with torch.no_grad():
        line.encode.weight.copy_(torch.tensor([[1.0, -1.0]]))
    both = line.mechanisms()[PATH]
    x = line.data(2048, nonempty=True)(0, torch.Generator().manual_seed(0))
    found = diagnose(line, apd.Components.from_matrices({PATH: both.sum(0, keepdim=True)}), x, 1.0)
    assert found.second_singular[0] == 0
    assert found.suspects == {"lump": [0]}  # it is active on every sample, too
    assert diagnose(line, apd.Components.from_matrices({PATH: both}), x, 1.05).suspects == {}


def test_everything_in_one_component() -> None:
    found = look(torch.cat([Z.sum(0, keepdim=True), torch.zeros(4, 5, 2)]), top_k=1)
    assert found.suspects == {"lump": [0]}
    assert found.empty.tolist() == [False, True, True, True, True]
    assert found.share[0] == 1 and found.sparse < 1e-9  # nothing is lost: the lump is the network


def test_one_mechanism_in_two_components() -> None:
    halves = torch.cat([0.5 * Z[:1], 0.5 * Z[:1], Z[1:]])
    found = look(halves, top_k=1.2 * K)  # two of six names for one job
    assert found.suspects == {"split": [0, 1]}
    assert found.cosine[0].item() == pytest.approx(1) and found.partner[:2].tolist() == [1, 0]
    # Two that point different ways, and are needed on the same samples.
    first, second = Z[:1].clone(), Z[:1].clone()
    first[:, 0, 1] += 0.4
    second[:, 0, 1] -= 0.4
    apart = torch.cat([0.5 * first, 0.5 * second, Z[1:]])
    found = look(apart, top_k=1.2 * K)
    assert found.cosine[:2].max() < 0.8
    assert found.overlap[0] >= 0.6 > 0.4 > found.overlap[2:].max() and found.companion[:2].tolist() == [1, 0]
    assert found.suspects == {"split": [0, 1]}


def test_a_pair_that_cancels() -> None:
    extra = 0.8 * Z[:1].flip(-1)
    found = look(torch.cat([Z, extra, -extra]), top_k=1.4 * K)
    assert found.suspects == {"cancelling": [5, 6]}
    # By either of two signs: opposite directions, or harm where it is inactive.
    for threshold in ({"stray": 9.0}, {"cancelling_cosine": -2.0}):
        assert look(torch.cat([Z, extra, -extra]), top_k=1.4 * K, **threshold).suspects == {"cancelling": [5, 6]}
    assert found.cosine[5].item() == pytest.approx(-1) and found.partner[5:].tolist() == [6, 5]


def test_what_cancels_and_is_never_active_shows_where_it_is_inactive() -> None:
    """Three vectors that sum to zero, no two of them opposite, without effect on single features to first order."""
    across = torch.stack([-Z.sum(1)[:2, 1], Z.sum(1)[:2, 0]], 1)  # at right angles to the first two features
    turn = 2 * math.pi * torch.arange(3) / 3
    three = torch.zeros(3, 5, 2)
    three[:, 0] = 2 * turn.cos()[:, None] * across[0]
    three[:, 1] = 2 * turn.sin()[:, None] * across[1]
    alone = apd.targets.TMS(5, 2, probability=1e-3).data(2048, nonempty=True)(0, torch.Generator().manual_seed(0))
    components = apd.Components.from_matrices({PATH: torch.cat([Z, three])})
    found = diagnose(TARGET, components, alone, 0.95)
    assert found.cosine[5:].min() > -0.8 and found.remainder < 1e-10
    assert found.suspects == {"cancelling": [5, 6, 7], "not independent": []}
    assert found.stray[5:].min() > 0.1 > 0.02 > found.stray[:5].max()


def test_a_mechanism_of_the_wrong_length() -> None:
    found = look(scaled(0.8, 1, 1, 1, 1))
    assert found.suspects == {"shrunken": [0]}
    # Its square and the bias decide: the output's size for feature 0 on alone is 1.21 f^2 x - 0.3 for the factor f.
    assert found.factor[0].item() == pytest.approx(1 / 0.8, abs=0.03)
    assert found.remainder == pytest.approx(0.2**2 / 5, rel=1e-4)
    found = look(scaled(1, 1, 1.3, 1, 1))
    assert {name: members for name, members in found.suspects.items() if members} == {"stretched": [2]}
    assert found.factor[2].item() == pytest.approx(1 / 1.3, abs=0.03)


def test_all_too_short_is_unfaithful_as_well() -> None:
    found = look(0.8 * Z)
    assert found.suspects["shrunken"] == [0, 1, 2, 3, 4]
    assert "unfaithful" in found.suspects
    assert found.remainder == pytest.approx(0.04, rel=1e-4)
    # A hundredth of the weights' squared length is where it begins.
    assert "unfaithful" in look(0.89 * Z).suspects
    assert "unfaithful" not in look(0.91 * Z).suspects


def test_a_component_that_no_input_uses() -> None:
    dead = 0.05 * Z[:1].flip(-1)
    found = look(torch.cat([Z, dead]))
    assert found.suspects == {"dead": [5]}
    assert found.share[5] < 0.01
    assert look(torch.cat([Z, dead, -dead])).suspects == {"dead": [5, 6]}  # and harmless, though opposite
    found = look(torch.cat([Z, 1e-4 * dead, torch.zeros(1, 5, 2)]))  # as good as nothing: a free place
    assert found.suspects == {}
    assert found.empty.tolist() == [False] * 5 + [True, True]
    # With more places than attributions above zero, a zero component is not active for that.
    assert look(torch.cat([Z, torch.zeros(1, 5, 2)]), top_k=5.5).share[5] == 0


def test_the_whole() -> None:
    assert "not minimal" in look(Z, top_k=0.3 * K).suspects
    assert "unfaithful" in look(Z[:4]).suspects
    loose = look(Z, scrubbed=-1.0)
    assert loose.suspects == {"not independent": []}


def test_a_mask_that_is_the_answer() -> None:
    """Two outputs that depend on one input, and components that write one of them each, whatever it is."""
    target = torch.nn.Linear(2, 2, bias=False)
    target.weight.data = torch.tensor([[4.0, 0], [-4.0, 0]])
    x = torch.cat([torch.tensor([[1.0], [-1.0]]).repeat(100, 1), torch.ones(200, 1)], dim=1)
    P = torch.zeros(2, 2, 2)
    P[0, 1], P[1, 1] = target.weight.data[:, 0], -target.weight.data[:, 0]

    def attribution(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] > 0, x[:, 0] < 0], 1).float()

    spelled = apd.Components.from_matrices({"weight": P})
    found = diagnose(target, spelled, x, 1, attribution=attribution)
    assert found.leak == 1 and "leaking" in found.suspects and found.sparse < 1e-6
    assert "leaking" not in diagnose(target, spelled, x, 1, attribution=attribution, leak=1.1).suspects
    # The same masks, where the input decides: all of the weight in both.
    whole = apd.Components.from_matrices({"weight": target.weight.data.T.expand(2, 2, 2)})
    assert diagnose(target, whole, x, 1, attribution=attribution).leak == 0
    # Both are needed: with the mask of another nothing comes out, as far from the one as from the other.
    x = torch.eye(2).repeat(100, 1)
    halves = apd.Components.from_matrices({"weight": torch.diag_embed(torch.eye(2))})
    target.weight.data = torch.eye(2)
    assert diagnose(target, halves, x, 1).leak == 0.5
    assert diagnose(target, halves, x[:1].repeat(9, 1), 1).leak == 0  # no other output, nothing to tell


def test_other_divergences_outputs_and_wrapped_networks() -> None:
    components = apd.Components.from_matrices({PATH: Z})
    by_mse = diagnose(TARGET, components, X, K)
    doubled = diagnose(TARGET, components, X, K, divergence=lambda out, wanted: 2 * apd.losses.mse(out, wanted))
    assert doubled.sparse == pytest.approx(by_mse.sparse)  # errors are relative
    network = apd.Network(TARGET, [PATH], output=lambda out: out[:, :2])
    part = diagnose(network, components, X, 0.3 * K)
    assert part.share[:2].min() > 5 * part.share[2:].max()  # the others hardly touch these outputs


def test_soft_gates_that_are_half_open_ask_for_twice_the_length() -> None:
    """One feature a sample: the target's outputs are right at a gate of 1, so that twice a gate of 1/2 fits best."""

    class HalfOpen(apd.selection.Selection):
        def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
            return 0.5 * self.active(scores, None)

        def active(self, scores: Tensor, threshold: Tensor | None) -> Tensor:
            return scores == scores.amax(-1, keepdim=True)

    x, components = torch.eye(5).repeat(3, 1), apd.Components.from_matrices({PATH: Z})
    found = diagnose(TARGET, components, x, HalfOpen())
    torch.testing.assert_close(found.share, torch.full((5,), 0.2))
    torch.testing.assert_close(found.factor, torch.full((5,), 2.0))
    torch.testing.assert_close(diagnose(TARGET, components, x, 1.0).factor, torch.ones(5))


def test_the_second_singular_value_is_a_share_of_the_first() -> None:
    """The largest share over the weights; a weight where a component is all but zero does not count, nor do all."""
    pairs = {"a": ((10.0, 5.0), (2.0, 0.5), (1e-3, 1e-3)), "b": ((0.0, 0.0), (4.0, 2.0), (8.0, 0.8))}
    pairs["c"] = ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    matrices = {path: torch.stack([torch.diag(torch.tensor(s)) for s in values]) for path, values in pairs.items()}
    shares = _second_singular(apd.Components.from_matrices(matrices))
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.5, 0.1]))


@pytest.mark.parametrize("numbers", [1, 5000])
def test_a_few_samples_at_a_time_find_the_same(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    components, x = apd.Components.from_matrices({PATH: torch.cat([Z[:2].sum(0, keepdim=True), 0.9 * Z[1:]])}), X[:300]
    whole = diagnose(TARGET, components, x, K)
    monkeypatch.setattr("apd_minimal.study.diagnose.NUMBERS", numbers)
    seen: list[int] = []
    handle = TARGET.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    parts = diagnose(TARGET, components, x, K)
    handle.remove()
    assert max(seen) <= max(numbers // (len(Z) * 2), 1), "a component has two numbers in each layer"
    assert parts.suspects == whole.suspects
    for name in ("share", "other_effects", "cosine", "overlap", "stray", "factor"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-5)
    for name in ("remainder", "sparse", "scrubbed", "anti_scrubbed", "leak"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-4)


def healthy(**changes: Tensor | float) -> Diagnosis:
    """Two components without a sign, and the thresholds as they are."""
    zero, one = torch.zeros(2, dtype=torch.double), torch.ones(2, dtype=torch.double)
    values: dict[str, Any] = dict.fromkeys(("second_singular", "other_effects", "cosine", "overlap", "stray"), zero)
    values |= {"partner": torch.tensor([1, 0]), "companion": torch.tensor([1, 0]), "length": one, "factor": one}
    values |= {"share": 0.5 * one, **dict.fromkeys(("remainder", "sparse", "scrubbed", "anti_scrubbed", "leak"), 0.0)}
    return Diagnosis(**values | changes, thresholds={sign: value for sign, (value, _) in SIGNS.items()})


@pytest.mark.parametrize(
    ("sign", "name", "shown", "by"),
    [
        ("cancelling_cosine", "cosine", "cancelling", -1),
        ("stray", "stray", "cancelling", 1),
        ("other_effects", "other_effects", "doubled", 1),
        ("split_cosine", "cosine", "split", 1),
        ("split_overlap", "overlap", "split", 1),
        ("factor_off", "factor", "shrunken", 1),
        ("factor_off", "factor", "stretched", -1),
        ("lump_share", "share", "lump", 1),
        ("remainder", "remainder", "unfaithful", 1),
        ("sparse", "sparse", "not minimal", 1),
        ("scrubbed", "scrubbed", "not independent", 1),
        ("leak", "leak", "leaking", 1),
    ],
)
def test_a_sign_shows_from_its_threshold_on(sign: str, name: str, shown: str, by: int) -> None:
    """At the threshold it shows, at the number next to it, on the side of what is usual, it does not."""
    at = SIGNS[sign][0] if name != "factor" else 1 + by * SIGNS[sign][0]
    more = {"other_effects": torch.full((2,), 0.5, dtype=torch.double)} if shown == "lump" else {}
    for value, there in ((at, True), (math.nextafter(at, -by * math.inf), False)):
        alone = name in ("remainder", "sparse", "scrubbed", "leak")
        given = value if alone else torch.full((2,), value, dtype=torch.double)
        found = healthy(**more, **{name: given}).suspects
        assert (shown in found) is there
        assert not there or found == {shown: [] if alone else [0, 1]}
    assert healthy().suspects == {}


def test_what_is_as_rare_or_as_short_as_allowed() -> None:
    """Dead is what is rarer than the threshold, empty what is not longer."""
    mean, least = 0.5, 0.1 * 0.5
    for rare, dead in ((least, []), (math.nextafter(least, 0), [1])):
        found = healthy(share=torch.tensor([2 * mean - least, rare], dtype=torch.double)).suspects
        assert found.get("dead", []) == dead
    for short, empty in ((0.01, True), (math.nextafter(0.01, 1), False)):
        assert healthy(length=torch.tensor([1.0, short], dtype=torch.double)).empty.tolist() == [False, empty]


def test_shares_are_of_the_samples_with_something_active_be_it_one() -> None:
    components, x = apd.Components.from_matrices({PATH: Z}), torch.eye(5)[:3] * torch.tensor([[0.5], [1.0], [0.5]])
    torch.testing.assert_close(diagnose(TARGET, components, x, 1 / 3).share, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]))


def test_the_table() -> None:
    found = look(torch.cat([Z[:2].sum(0, keepdim=True), Z[2:], torch.zeros(1, 5, 2)]))
    lines = str(found).splitlines()
    assert lines[1].endswith("doubled") and lines[1].split()[0] == "0"
    assert len([line for line in lines if line.endswith("doubled")]) == 1
    assert max(map(len, lines)) < 100
    three = f"sparse {found.sparse:.1e}, scrubbed {found.scrubbed:.1e}, anti-scrubbed {found.anti_scrubbed:.1e}"
    assert three in str(found)
    assert "1 of 5 empty" in str(found) and "of the whole: no suspect" in str(found)
    assert "0.15  doubled" in str(found)
    assert "0.9  doubled" in str(look(Z, other_effects=0.9))
    assert look(torch.cat([Z[:2].sum(0, keepdim=True), Z[2:]]), other_effects=0.9).suspects == {}


def test_input_that_does_not_fit() -> None:
    components = apd.Components.from_matrices({PATH: Z})
    with pytest.raises(ValueError, match="pick one restart first"):
        diagnose(TARGET, components.stacked(), X, K)
    with pytest.raises(ValueError, match="all components are zero"):
        diagnose(TARGET, components.map(torch.zeros_like), X, K)
    with pytest.raises(ValueError, match="x must hold at least one number"):
        diagnose(TARGET, components, X[:0], K)
    for k in (0, 6):
        with pytest.raises(ValueError, match="top_k must be above 0"):
            diagnose(TARGET, components, X, k)
    with pytest.raises(TypeError, match=r"unknown thresholds \['dead'\]; known: \['empty_length'"):
        diagnose(TARGET, components, X, K, dead=1.0)
    with pytest.raises(ValueError, match="nothing to explain"):
        diagnose(TARGET, components, torch.zeros_like(X), K)


def test_divergences_go_by_name_as_in_decompose() -> None:
    target, x = runs.tms(), runs.batches(0, torch.Generator().manual_seed(5))
    components = runs.decompose(steps=2).components
    for name, function in apd.losses.DIVERGENCES.items():
        by_name, by_function = (diagnose(target, components, x, 1.2, divergence=d) for d in (name, function))
        assert by_name.sparse == by_function.sparse
    with pytest.raises(ValueError, match="divergence must be one of"):
        diagnose(target, components, x, 1.2, divergence="l1")
