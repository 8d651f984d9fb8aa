"""What each method finds: what puts parts together by the truth, and the unit of the penalty."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from experiments import each_method
from experiments.each_method import by_truth, nothing_active, singular, target_of


@pytest.mark.parametrize("kind", each_method.KINDS)
def test_pieces_of_the_truth_are_put_together_to_the_truth(kind: str) -> None:
    target, truth = target_of(kind, 1)
    network = apd.Network(target, target.weights)
    pieces = {}
    for path, Z in truth.items():
        U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
        split = torch.einsum("jir,jr,jro->jrio", U, S, Vh).flatten(0, 1)
        rest = torch.zeros(400 - len(split), *Z.shape[1:])
        pieces[path] = torch.cat([split, rest])[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
    assert apd.metrics.ownership(by_truth(apd.Components.from_matrices(pieces, 1), truth), truth).complete
    directions = singular(network)
    assert directions.n_components == sum(min(w.shape) for w in network.weights.values())
    for path, w in network.weights.items():
        torch.testing.assert_close(directions.sum(path), w, atol=1e-4, rtol=0)
    alone = torch.stack([(directions.matrices(path).flatten(1).norm(dim=1) > 0).float() for path in network.weights])
    assert alone.sum(0).max() == 1, "each lies in one weight"
    owned = apd.metrics.ownership(by_truth(directions, truth), truth).owned
    # Where each group has tokens of its own, the truth tells whose every direction is, and nothing has to be found.
    assert owned.all() if kind == "apart" else not owned.any()


def test_the_error_with_nothing_active_is_that_of_silence() -> None:
    target, _ = target_of("shared", 1)
    x = target.data(64)(0, torch.Generator().manual_seed(0))
    found = nothing_active(apd.Network(target, target.weights), x)
    assert found == pytest.approx(float(target(x).detach().square().mean()), rel=1e-5)


def test_jobs_are_distinct_and_reported_seeds_are_fresh() -> None:
    assert len(set(each_method.jobs())) == len(each_method.jobs()) == 4 * len(each_method.METHODS) * each_method.SEEDS
    assert {seed for *_, seed in each_method.jobs()} == set(range(9010, 9015))
