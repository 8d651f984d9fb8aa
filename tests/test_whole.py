"""The truth that experiments/whole.py compares with: a feature's part of the encoder and of the decoder, as one."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from experiments import spd, whole


@pytest.mark.parametrize("rotated", [False, True])
def test_a_mechanism_does_its_feature_and_no_other(rotated: bool) -> None:
    network = spd.target_of("tms-5-2", "untied", 10, rotated)[1]
    truth = apd.Components.from_matrices(whole.truth(network))
    wrapped, x, each = apd.Network(network, truth.paths), 0.8 * torch.eye(5), torch.eye(5)
    for path, weight in wrapped.weights.items():
        torch.testing.assert_close(truth.sum(path), weight.detach(), atol=1e-5, rtol=0)
    with torch.no_grad():
        alone, without = wrapped(x, truth, each), wrapped(x, truth, 1 - each)
        torch.testing.assert_close(alone.diag(), network(x).diag(), atol=1e-5, rtol=0)
        off = torch.relu(network.bias.detach())  # type: ignore[operator, arg-type]
        torch.testing.assert_close(without.diag(), off, atol=1e-5, rtol=0)
