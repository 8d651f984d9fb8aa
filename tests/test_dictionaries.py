"""Transcoders on planted networks: what is read and cut, how latents are put together, and the causal test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apd_minimal as apd
from apd_minimal.study.baselines import Dictionary
from experiments import architectures
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
    assert max(row["shuffled"]["alone"]) < 0.9
    bare = [path for path in target.weights if path in study.BARE]
    if bare:
        lost = torch.cat([target.truth.matrices(path).flatten(1) for path in bare], 1).norm(dim=1)
        cosine = (1 - lost.square() / target.truth.norms().square()).sqrt()
        torch.testing.assert_close(torch.tensor(row["truth"]["without"]["cosine"]), cosine, atol=2e-3, rtol=0)
    else:
        assert row["truth"]["without"] == row["truth"]["all"]


def test_latents_of_both_mechanisms_do_what_both_do() -> None:
    target = MADE["MLP, all three"](seed=4)
    found = perfect(target)
    everything = {path: torch.zeros(own.n_features, dtype=torch.long) for path, own in found.items()}
    scores = study.alone(target, found, everything, torch.zeros(target.n, dtype=torch.long))
    for j, score in enumerate(scores):
        others = torch.eye(target.n)[[i for i in range(target.n) if i != j]].repeat(50, 1)
        own, other = (
            target(target.make(on, torch.Generator().manual_seed(j))).detach()
            for on in (torch.eye(target.n)[j].expand_as(others), others)
        )
        assert score == pytest.approx(max(0.0, 1 - float(other.square().sum() / own.square().sum())), abs=2e-3)


def test_only_what_stands_at_the_layers_is_changed_and_only_inside() -> None:
    target = MADE["SSM, all two"](seed=5)
    network, x = apd.Network(target, target.weights), target.data(64)(0, torch.Generator().manual_seed(0))
    y, found = target(x).detach(), perfect(target)
    nothing = {path: torch.zeros(own.n_features) for path, own in found.items()}
    with study.in_place(network, found, nothing):
        assert target(x).abs().max() == 0, "without latents nothing comes through, also not past the diagonal"
    torch.testing.assert_close(target(x).detach(), y)
    some = {path: torch.ones(own.n_features) for path, own in found.items()} | {"decay.a": nothing["decay.a"]}
    with study.in_place(network, found, some):
        s = x @ network.weights["into.weight"]  # every state is forgotten at once
        h = torch.nn.functional.leaky_relu(s @ network.weights["out.weight"], 0.2).mean(1)
        torch.testing.assert_close(target(x), h @ network.weights["head.weight"], atol=2e-3, rtol=0)


def test_the_transcoder_of_the_fewest_bits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    made: list[Dictionary] = []

    def fit(*given: Any, sparsity: float, lr: float, **more: Any) -> Dictionary:
        own = Dictionary([4], [3], 8, "relu", 0.0, seed=len(made))
        own.sparsity = sparsity
        if (sparsity, lr) == (study.SETTINGS["k"][0], study.SETTINGS["lr"]):
            both = torch.cat([torch.eye(4), -torch.eye(4)])
            own.encoder.data, own.decoder.data = both.T.contiguous(), both @ W
        made.append(own.eval())
        return made[-1]

    monkeypatch.setattr(study.baselines, "fit", fit)
    rows = torch.randn(512, 4, generator=torch.Generator().manual_seed(1))
    kept = study.trained(W, rows, rows, n=1, seed=0, steps=1)
    assert len(made) == 4 and kept is made[1]
    torch.testing.assert_close(kept(rows), rows @ W)


def test_the_networks_are_those_of_the_other_study_and_not_the_tuned_one() -> None:
    jobs = study.RUNS.jobs([])
    assert len(set(jobs)) == len(jobs)
    assert {(*job, "planted") for job in jobs} <= set(architectures.jobs())
    assert {kind for kind, _ in jobs} == set(study.ORDER) >= set(study.NOTES)
