"""What the studies of bits and leaks compare with: every control sums to the weights, and says what it is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from experiments import judge
from experiments.judged import columns, halved, lump, neurons, paired, singular
from experiments.leaks_cases import Case, PartOf, random_parts, set_bits, shuffled


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {"read.0.weight": draw(9, 4), "write.0.weight": draw(4, 9, seed=1)}
FOUND = apd.Components.random(
    {p: (w.shape[0], w.shape[1]) for p, w in WEIGHTS.items()}, 5, 2, generator=torch.Generator().manual_seed(2)
)


@pytest.mark.parametrize("embedding", [None, draw(3, 9, seed=3)])
def test_controls_that_need_no_training_sum_to_the_weights(embedding: Tensor | None) -> None:
    sets = {
        "singular": singular(WEIGHTS),
        "neurons": neurons(WEIGHTS),
        "columns": columns(WEIGHTS, embedding),
        "lump": lump(WEIGHTS),
    }
    for name, components in sets.items():
        for path, W in WEIGHTS.items():
            assert torch.allclose(components.sum(path), W, atol=1e-5), (name, path)
    assert [c.n_components for c in sets.values()] == [8, 4, 9 + 4 if embedding is None else 4 + 3 + 4, 1]
    ranks = torch.stack(list(sets["neurons"].ranks().values()))
    assert (ranks == 1).all(), "a neuron reads and writes"


def test_a_rotated_target_is_rotated_once_and_the_stored_one_stays() -> None:
    """Targets are loaded once in a process, and many jobs ask for the same one."""
    W, Q = judge.target_of("tms-5-2", 10).encode.weight.clone(), torch.linalg.qr(draw(5, 5, seed=10)).Q
    for _ in range(2):
        assert torch.allclose(judge.target_of("tms-5-2 rotated", 10).encode.weight, W @ Q, atol=1e-6)
        assert torch.equal(judge.target_of("tms-5-2", 10).encode.weight, W)


def test_a_column_of_a_reading_matrix_is_what_one_feature_is_multiplied_by() -> None:
    E = draw(3, 9, seed=3)
    (first, *_) = (columns(WEIGHTS, E).matrices("read.0.weight")[c] for c in range(4, 7))
    assert torch.allclose(E @ first, torch.cat([(E @ WEIGHTS["read.0.weight"])[:1], torch.zeros(2, 4)]), atol=1e-4)


def test_halves_and_pairs_hold_what_was_found() -> None:
    for path in WEIGHTS:
        two = halved(FOUND).matrices(path)
        assert torch.allclose(two[:5], two[5:]) and torch.allclose(two[:5] * 2, FOUND.matrices(path), atol=1e-6)
    both = paired(FOUND, seed=0)
    assert both.n_components == 3
    which = []
    for pair in both.flat():
        own = [c for n in (1, 2) for c in itertools.combinations(range(5), n)]
        (match,) = (c for c in own if torch.allclose(FOUND.flat()[list(c)].sum(0), pair, atol=1e-5))
        which.append(match)
    assert sorted(c for match in which for c in match) == list(range(5))
    zero = apd.Components({p: a.clone() for p, a in FOUND.A.items()}, {p: b.clone() for p, b in FOUND.B.items()})
    for path in WEIGHTS:
        zero.B[path][1] = 0
    assert paired(zero, seed=0).n_components == 2, "what is zero has no partner"


@pytest.mark.parametrize(("n", "p"), [(3, 0.3), (5, 0.05)])
def test_the_bits_of_which_features_are_on_are_those_of_all_sets(n: int, p: float) -> None:
    every = [p ** sum(on) * (1 - p) ** (n - sum(on)) for on in itertools.product((0, 1), repeat=n) if sum(on)]
    total = sum(every)
    assert set_bits(n, p) == pytest.approx(-sum(q / total * math.log2(q / total) for q in every))


@pytest.mark.parametrize(("C", "m"), [(4, 1), (5, 2)])
def test_random_parts_sum_to_the_weights_and_have_their_ranks(C: int, m: int) -> None:
    parts = random_parts(WEIGHTS, C, m, torch.Generator().manual_seed(0))
    for path, W in WEIGHTS.items():
        assert torch.allclose(parts.sum(path), W, atol=1e-4)
        assert all(torch.linalg.matrix_rank(P, atol=1e-5) == m for P in parts.matrices(path))


def test_a_shuffled_network_has_the_same_entries_elsewhere() -> None:
    target = torch.nn.Linear(9, 4)
    found = apd.Components.random({"weight": (9, 4)}, 3, 2, generator=torch.Generator().manual_seed(0))
    case = shuffled(Case(target, draw(7, 9), 1.0, {"found": found}, {"outputs": "classes"}), seed=1)
    own, new = target.weight.detach().flatten(), case.target.weights["weight"].flatten()
    assert torch.equal(own.sort().values, new.sort().values)
    assert not torch.allclose(case.target.weights["weight"], target.weight.detach().T)
    assert case.settings == {"outputs": "classes"}


def test_what_passes_by_some_weights_is_taken_away() -> None:
    target = apd.targets.ResidualMLP(4, 8, (3, 3), seed=1)
    part = PartOf(4, 8, (3, 3), seed=1)
    part.load_state_dict(target.state_dict())
    x = draw(5, 4)
    rest = apd.targets.ResidualMLP(4, 8, (3, 3), seed=1)
    rest.load_state_dict(target.state_dict())
    rest.get_parameter("write.1.weight").data.zero_()
    with torch.no_grad():
        assert torch.allclose(part.without(["write.1.weight"])(x), target(x) - rest(x), atol=1e-6)
    assert set(dict(part.named_parameters())) == set(dict(target.named_parameters()))
