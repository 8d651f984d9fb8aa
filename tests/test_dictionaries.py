"""Transcoders on planted networks: what is read and cut, how latents are put together, and the causal test."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study.baselines import Dictionary
from experiments import dictionaries as study
from experiments.architectures import MADE
from experiments.planted import Planted


def perfect(target: Planted) -> dict[str, Dictionary]:
    """Write down transcoders without any error: a latent and its opposite for each direction that a weight reads."""
    found, weights = {}, apd.Network(target, target.weights).weights
    full = {path: study.full(path, W) for path, W in weights.items()}
    for path, W in full.items():
        into = torch.eye(len(W)) if path in study.BARE else target.spaces[path][0].flatten(0, 1)  # [reads, d_in]
        into = torch.cat([into, -into, torch.zeros(2 * max(map(len, full.values())) - 2 * len(into), len(W))])
        own = Dictionary([len(W)], [W.shape[1]], len(into), "relu", 0.0)
        own.encoder.data, own.decoder.data = into.T.contiguous(), into @ W
        own.encoder_bias.data -= 1e-4  # what is zero but for rounding is off
        found[path] = own.eval()
    return found


@pytest.mark.parametrize("kind", study.ORDER)
def test_perfect_transcoders_own_everything_by_weights_and_by_what_they_do(kind: str) -> None:
    target = MADE[kind](seed=3)
    x = target.data(1024)(0, torch.Generator().manual_seed(0))
    row = study.measured(target, perfect(target), x, seed=0)
    assert row["error"] < 1e-5
    for name in ("truth", "codes") if kind not in ("experts, one gate", "attention") else ("truth",):
        assert row[name]["all"]["owned"] == target.n, name
        assert min(row[name]["all"]["cosine"]) > 0.995
        if kind != "attention":
            assert min(row[name]["alone"]) > 0.999
    for name in ("turned", "shuffled"):
        assert row[name]["all"]["owned"] == 0, name
    bare = [path for path in target.weights if path in study.BARE]
    if bare:
        lost = torch.cat([target.truth.matrices(path).flatten(1) for path in bare], 1).norm(dim=1)
        cosine = (1 - lost.square() / target.truth.norms().square()).sqrt()
        torch.testing.assert_close(torch.tensor(row["truth"]["without"]["cosine"]), cosine, atol=2e-3, rtol=0)
    else:
        assert row["truth"]["without"] == row["truth"]["all"]
