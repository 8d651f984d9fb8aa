"""Other selections without a k: the fewest pairs by trying all, and learned thresholds against closed forms."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from experiments.thresholds import Concrete, Share, Straight


def drawn(*shape: int) -> torch.Tensor:
    """Scores, some of them much smaller than others."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).pow(3)


def begun(kind: type[Straight], log: float, n_components: int = 3) -> Straight:
    """A selection with one threshold for all components."""
    selection = kind(0.1)
    selection.start(1, n_components, torch.zeros(1, dtype=torch.double))
    selection.log.data.fill_(log)
    return selection


@pytest.mark.parametrize("left", [0.6, 0.3, 0.05, 0.02])
def test_the_fewest_pairs_that_hold_a_share_of_the_squares(left: float) -> None:
    scores = drawn(3, 2, 4)
    selection = Share(left)
    gates = selection.choose(scores, 0.0)
    for own, on, k in zip(scores.square().flatten(1), gates.flatten(1), selection.k, strict=True):
        sets = [list(s) for n in range(9) for s in combinations(range(8), n)]
        fewest = min(len(s) for s in sets if own[s].sum() >= (1 - left) * own.sum())
        assert int(on.sum()) == fewest == round(float(k) * 2)
        assert own[on].sum() >= (1 - left) * own.sum() - 1e-6
    final = Share(((0.0, 0.6), (1.0, left)))
    assert torch.equal(final.active(scores, final.threshold(scores)), gates), "at the end, by a threshold"
    assert not selection.choose(torch.zeros(1, 2, 4), 0.0).any(), "what scores 0 is never active"


def test_a_hard_gate_has_the_slope_of_a_soft_one() -> None:
    scores = drawn(1, 20, 3).double()
    selection = begun(Straight, -2.0)
    gates = selection.choose(scores, 0.5)
    assert torch.equal(gates > 0.5, scores.log() > -2.0)
    assert set(gates.detach().flatten().tolist()) == {0.0, 1.0}
    (slope,) = torch.autograd.grad(selection.penalty(gates, 0.5).sum(), selection.parameters())
    soft = torch.sigmoid(scores.log() + 2.0)
    torch.testing.assert_close(slope[0], -0.1 * (soft * (1 - soft)).mean(1)[0])
    assert torch.equal(selection.active(scores, None), gates > 0.5)


def test_thresholds_begin_where_every_other_sample_has_a_pair() -> None:
    selection = Straight(0.1)
    selection.start(2, 3, torch.zeros(1))
    assert selection.choose(drawn(2, 40, 3), 0.0).flatten(1).sum(1).tolist() == [19, 19]  # the 20th is the threshold


def test_how_often_a_drawn_gate_is_open() -> None:
    """The stretched sigmoid is above 0 where the noise is above -log(11) / 1.5 - margin."""
    selection = begun(Concrete, 0.0)
    for margin in (-2.0, 0.0, 1.0):
        scores = torch.full((1, 100_000, 1), margin, dtype=torch.double).exp().expand(-1, -1, 3)
        gates = selection.choose(scores, 0.5).detach()
        shift = float(torch.tensor(11.0).log()) / 1.5
        for share, wanted in ((gates > 0, margin + shift), (gates == 1, margin - shift)):
            assert abs(float(share.double().mean()) - float(torch.sigmoid(torch.tensor(wanted)))) < 0.005
    middle = selection.choose(torch.ones(1, 1, 3, dtype=torch.double), 1.0)
    torch.testing.assert_close(middle.detach(), torch.full((1, 1, 3), 0.5, dtype=torch.double))
