"""Cases of the study of leaks: every network is the one that its components were found in, and masks are as told."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import apd_minimal as apd
from apd_minimal.selection import FinalSelection
from experiments import architectures, groups, leaks_later, modular, spd
from experiments.experiment import of, prefix
from experiments.leaks_cases import Case
from experiments.leaks_later import GROUPS, either_learned, k_within, later, operations, patterns, planted

LEARNED = [f"or with {method}, {readers}" for method in spd.BY_IMPORTANCE for readers in (1, 2)]
STORED = {kind: own for kind, own in later().items() if kind not in ("planted", "modular", *GROUPS, *LEARNED)}
OR = ("or by", "or with")
ALIKE = (*OR, "basis", "together")  # kinds of which the first and the last are enough


def some() -> list[str]:
    """List kinds whose parts are stored, of alike ones two."""
    kept = [kind for kind in STORED if not kind.startswith(ALIKE)]
    for start in ALIKE:
        own = [kind for kind in STORED if kind.startswith(start)]
        kept += [own[0], own[-1]]
    return kept


def faithful(case: Case) -> float:
    """Measure the squared distance of the sum from the weights, over the weights' squared length."""
    found = case.sets["found"]
    return apd.metrics.relative_faithfulness(found, apd.Network(case.target, found.paths).weights).item()


@pytest.mark.parametrize("kind", some())
def test_stored_parts_are_those_of_their_network(kind: str) -> None:
    """They sum to its weights, and not to those of another seed; with all of them on, the outputs are its own."""
    seeds, build = STORED[kind]
    case, other = build(seeds[0]), build(seeds[1])
    swapped = replace(case, sets=other.sets)
    lost = 0.5 if kind.startswith(OR) else 0.05  # on an OR, what has no gradient need not be kept
    assert faithful(case) < lost
    if not kind.startswith(OR):  # whose network is always the same
        assert faithful(swapped) > 0.3
    assert len(case.x) >= 1000 and case.answer is not None and case.answer > 0.5
    assert isinstance(case.k, float) and 0 < case.k <= case.sets["found"].n_components


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("method", spd.WITHOUT_K)
def test_k_of_an_or_is_the_mean_number_of_active_components_by_enumeration(readers: int, method: str) -> None:
    """Each of the inputs that are not empty comes with the probability of its pattern."""
    (row,) = (r for r in spd.STUDY.stored()["either"] if spd.EITHER.job_of(r) == ("or", readers, method, 0))
    expected = total = 0.0
    for bits, gates in zip(row["inputs"], row["gates"], strict=True):
        p = math.prod(0.3 if bit else 0.7 for bit in bits) if any(bits) else 0.0
        expected, total = expected + p * sum(gates), total + p
    assert either_learned(readers, method, 0).k == pytest.approx(expected / total, abs=0.03)


def test_an_or_that_is_made_again_is_the_stored_one_and_its_gates_too() -> None:
    job = ("or", 2, "importance", 0)
    case, stored = either_learned(2, "importance", 0), of("spd", prefix(job))[0]
    for a, b in zip(case.sets["found"].parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    (row,) = (r for r in spd.STUDY.stored()["either"] if spd.EITHER.job_of(r) == job)
    scores = apd.attributions.inner_activation(case.target, case.sets["found"], torch.tensor(row["inputs"]))
    assert isinstance(case.k, FinalSelection)
    torch.testing.assert_close(case.k.gates(scores), torch.tensor(row["gates"]), atol=1e-2, rtol=0)


def test_inputs_are_the_same_again_and_others_for_another_seed() -> None:
    seeds, build = STORED["untied"]
    assert torch.equal(build(seeds[0]).x, build(seeds[0]).x)
    assert not torch.equal(build(seeds[0]).x, build(seeds[1]).x)


@pytest.mark.parametrize("name", ["planted", "modular", *GROUPS])
def test_true_parts_do_all_of_the_work(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With the truth in place of what a run finds, a sample's own mask gives the answers, and nothing else does."""
    if name == "planted":
        seed = leaks_later.PLANTED[1]
        truth = architectures.MADE[leaks_later.PLANTED[0]](seed=seed).mechanisms()
    elif name == "modular":
        seed = leaks_later.TASKS[2]
        truth = modular.target_of("task", seed).mechanisms("task")
    else:
        kind, _, seed = GROUPS[name]
        truth = groups.target_of(kind, seed).mechanisms(groups.by_of(kind))
    monkeypatch.setattr(leaks_later, "apart", lambda name: apd.Components.from_matrices(truth))
    case = planted(seed) if name == "planted" else operations(name, seed)
    assert faithful(case) < 1e-6
    found = apd.leakage.leakage(case.target, case.sets["found"], case.x, case.k, **case.settings)
    assert found["own mask"].components > 0.7  # of planted networks, where fewer are on than are asked for
    assert found["another's mask: its answer"].components < 0.3
    if name in ("modular", "group, three"):
        # One in three has the same mask; there the own answer comes out. Elsewhere the switch is closed.
        assert found["own mask"].components > 0.999
        assert found["another's mask: nearer to its"].components == pytest.approx(1 / 3, abs=0.05)
        assert found["own mask, tokens of another"].components < 0.2


def test_k_is_the_smallest_with_the_allowed_error() -> None:
    """Ten numbers, of which j is on with size 2^-j: the first m hold 1 - 4^-m of the square."""
    target = torch.nn.Linear(10, 10, bias=False)
    sizes = 2.0 ** -torch.arange(10)
    with torch.no_grad():
        target.weight.copy_(sizes.diag())
    components = apd.Components.from_matrices({"weight": torch.diag_embed(sizes.diag())})
    network, x = apd.Network(target, ["weight"]), torch.ones(64, 10)
    k = k_within(network, components, x, apd.attributions.gradient)
    # Three for all and the fourth for a share s of the samples leave 4^-3 - s (4^-3 - 4^-4), allowed if s >= 0.267.
    assert k == pytest.approx(10 * 2**-1.5)
    assert 10 * 2 ** (-1.5 - 1 / 8) < 3.267 < k


def test_patterns_are_counted_as_wholes() -> None:
    on = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(50, 1)
    assert patterns(on) == pytest.approx(2.0)
    assert patterns(on[:, :1]) == pytest.approx(1.0)
    assert patterns(on[:, :1].expand(-1, 2)) == pytest.approx(1.0), "two that are always on together tell one bit"
