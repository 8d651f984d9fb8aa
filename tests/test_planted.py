"""The planted networks are the sums of their mechanisms, and each mechanism alone does its task."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import apd_minimal as apd
from experiments.planted import Planted
from experiments.planted_kinds import DETERMINED, KINDS

EVERY = KINDS | DETERMINED


def planted(kind: str, seed: int = 3) -> tuple[Planted, torch.Tensor, torch.Tensor]:
    """A network, a batch, and what is on in it."""
    target, source = EVERY[kind](seed=seed), EVERY[kind](seed=seed).data(32)
    on = source.on(0, torch.Generator().manual_seed(1))
    x = source(0, torch.Generator().manual_seed(1))
    return target, x, on


@pytest.mark.parametrize("kind", EVERY)
def test_weights_are_sums_of_orthogonal_mechanisms(kind: str) -> None:
    target, _, _ = planted(kind)
    network = apd.Network(target, target.weights)
    flat = torch.cat([target.mechanisms()[path].flatten(1) for path in target.weights], 1)
    for path, w in network.weights.items():
        torch.testing.assert_close(target.mechanisms()[path].sum(0), w)
    cosines = torch.nn.functional.normalize(flat, dim=1) @ torch.nn.functional.normalize(flat, dim=1).T
    torch.testing.assert_close(cosines, torch.eye(target.n), atol=1e-5, rtol=0)
    assert target.ownership(target.truth).complete


@pytest.mark.parametrize("kind", EVERY)
def test_only_the_mechanisms_that_are_on_are_needed(kind: str) -> None:
    # By brute force: each sample with a network of its own, whose weights are the sum of the mechanisms that are on.
    target, x, on = planted(kind)
    network = apd.Network(target, target.weights)
    own = {site.path: site.rule.weight for site in network.sites}
    with torch.no_grad():
        for sample, gates in zip(x, on, strict=True):
            mixed = {
                path: own[path](torch.einsum("j,jio->io", gates, p)).clone() for path, p in target.mechanisms().items()
            }
            alone = functional_call(target, mixed, (sample[None],))
            torch.testing.assert_close(alone, target(sample[None]), atol=1e-5, rtol=1e-4)
            without = {path: torch.zeros_like(w) for path, w in mixed.items()}
            assert functional_call(target, without, (sample[None],)).abs().max() < 0.1 * alone.abs().max()


@pytest.mark.parametrize("kind", EVERY)
def test_each_mechanism_alone_is_as_loud(kind: str) -> None:
    target, _, _ = planted(kind)
    with torch.no_grad():
        for j, on in enumerate(torch.eye(target.n)):
            x = target.make(on.expand(4000, -1), torch.Generator().manual_seed(j))
            assert 0.7 < target(x).square().mean() < 1.4


@pytest.mark.parametrize("kind", EVERY)
def test_rules_agree_with_the_networks(kind: str) -> None:
    target, x, _ = planted(kind)
    apd.Network(target, target.weights).check(x)
