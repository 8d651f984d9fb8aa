"""Create data/lp.json: TMS decomposed with the L_p form of APD, which has no top-k (chapter 17).

python -m experiments.lp [--only grid | runs | large] [--processes N]     (a few minutes of one core)

All targets and restarts of a setting are one batch of tensors. The settings were chosen on target seeds 100, 102 and
103 (101 does not represent one of its features), for TMS 40-10 on seed 100. They are reported on the targets of
data/tms.safetensors: seeds 10 to 19, and 20 to 29 for TMS 40-10, one restart each.
"""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

import apd_minimal as apd
from apd_minimal.selection import batch_top_k
from experiments.experiment import Row, Rows, Study, Tensors
from experiments.tms import stored_target

PATH = "encode.weight"
TRIED_ON, REPORTED, REPORTED_LARGE = (100, 102, 103), range(10, 20), range(20, 30)
RESTARTS = 4
USUAL: dict[str, Any] = {
    "attribution_p": 0.9,
    "attribution_p_start": None,  # initial power, if it decreases to attribution_p by mid-run
    "rank_p": 0.9,
    "faithfulness": 1.0,
    "minimality": 0.3,
    "simplicity": 0.1,
    "minimality_to_the_end": False,  # otherwise the last stage has only faithfulness
    "divide_by": None,  # each sample's attributions: by the whole target's ("target") or by their own length ("length")
    "sparse": 0.0,
    "threshold": 0.3,
    "n_components": 8,
    "std": 0.1,
    "start": "random",
    "steps": 1000,
    "batch": 64,
    "lr": 3e-2,
}
SMALL = {"attribution_p": 0.5, "rank_p": 0.5, "minimality": 0.03, "simplicity": 0.3}
LARGE = SMALL | {"n_components": 20, "std": 0.5}
RELATIVE = {"divide_by": "length", "minimality": 0.1, "simplicity": 1.0}
TO_THE_END = RELATIVE | {"minimality_to_the_end": True}
REPORTED_SETTINGS: dict[str, dict[str, Any]] = {
    "absolute": {},
    "absolute, from the truth": {"start": "truth"},
    "small powers": SMALL,
    "small powers, from the truth": SMALL | {"start": "truth"},
    "small powers, large start": LARGE,
    "falling powers": LARGE | {"attribution_p_start": 1.0},
    "with a sparse pass": LARGE | {"sparse": 1.0},
    "one scale": RELATIVE | {"divide_by": "target"},
    "relative": RELATIVE,
    "relative, strong simplicity": RELATIVE | {"simplicity": 3.0},
    "relative, C = 20": RELATIVE | {"n_components": 20},
    "relative to the end": TO_THE_END,
    "relative to the end, strong simplicity": TO_THE_END | {"simplicity": 3.0},
    "relative to the end, C = 20": TO_THE_END | {"n_components": 20},
}
# Faithfulness and simplicity are divided by the number of entries, 400 instead of 10.
LARGE_TARGET = TO_THE_END | {"faithfulness": 40.0, "simplicity": 75.0, "n_components": 60, "steps": 1500}
LARGE_TARGET |= {"batch": 128, "lr": 1e-2}
Pairs = tuple[tuple[float, float], ...]
OF_RELATIVE: tuple[Pairs, Pairs] = (
    ((0.9, 0.9), (0.7, 0.9), (0.5, 0.5)),
    ((0.03, 1.0), (0.1, 0.3), (0.1, 1.0), (0.1, 3.0), (0.3, 1.0)),
)
GRIDS: dict[str, tuple[dict[str, Any], Pairs, Pairs]] = {
    "absolute": (
        {},
        ((0.9, 0.9), (0.9, 0.5), (0.7, 0.7), (0.5, 0.9), (0.5, 0.5), (0.3, 0.7), (0.3, 0.3)),
        ((0.03, 0.1), (0.03, 0.3), (0.1, 0.1), (0.1, 0.3), (0.3, 0.1), (0.3, 0.3)),
    ),
    "relative": (RELATIVE, *OF_RELATIVE),
    "relative to the end": (TO_THE_END, *OF_RELATIVE),
}


def signed(P: Tensor, W: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Compute signed attributions [T, R, B, C, n] of P [T, R, C, n, d] at W [T, n, d], b [T, n], for x [B, n]."""
    n_components, n = P.shape[2:4]
    hidden = x @ W
    on = (hidden @ W.mT + b[:, None] > 0).to(x)  # [T, B, n]
    rows = torch.cat([x.expand(len(W), -1, -1), hidden], dim=2)
    effects = torch.cat([P @ W.mT[:, None, None], P.mT], dim=3)  # [T, R, C, n + d, n]
    flat = rearrange(effects, "t r c i o -> t r i (c o)")
    return (rows[:, None] @ flat).unflatten(-1, (n_components, n)) * on[:, None, :, None]


def sparse_outputs(P: Tensor, b: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Compute outputs [T, R, B, n] of the components in the mask [T, R, B, C] alone."""
    n_components, n, d = P.shape[2:]
    by_component = (x @ rearrange(P, "t r c n d -> t r n (c d)")).unflatten(-1, (n_components, d))  # [T, R, B, C, d]
    hidden = (by_component * mask[..., None]).sum(3)
    back = hidden @ rearrange(P, "t r c n d -> t r d (c n)")
    out = (back.unflatten(-1, (n_components, n)) * mask[..., None]).sum(3)
    return torch.relu(out + b[:, None, None])


def start(W: Tensor, s: dict[str, Any], restarts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw factors [T, R, C, n, d] and [T, R, C, d, d]: random, or the truth and small spare components."""
    (n_targets, n, d), C = W.shape, s["n_components"]
    A = s["std"] * torch.randn(n_targets, restarts, C, n, d, generator=generator)
    B = s["std"] * torch.randn(n_targets, restarts, C, d, d, generator=generator)
    if s["start"] == "truth":
        truth = torch.diag_embed(torch.ones(n))[:, :, None] * W[:, None]  # [T, n, n, d]
        own = apd.Components.from_matrices({PATH: truth.flatten(0, 1)})
        for factor, truth_factor in ((A, own.A[PATH]), (B, own.B[PATH])):
            factor[:, :, :n] *= 0.1
            factor[:, :, :n] += truth_factor.unflatten(0, (n_targets, n))[:, None]
    return A.requires_grad_(), B.requires_grad_()


def train(W: Tensor, b: Tensor, s: dict[str, Any], minimality: Tensor, simplicity: Tensor, seed: int = 0) -> Tensor:
    """Train components [T, R, C, n, d] all at once; the weights of two losses [R] may differ between restarts.

    The last 30% of the steps are without simplicity, as in chapter 6, and without minimality unless `s` keeps it.
    """
    generator = torch.Generator().manual_seed(seed)
    A, B = start(W, s, len(minimality), generator)
    optimiser = torch.optim.Adam([A, B], lr=s["lr"], fused=True)
    data = apd.targets.TMS(*W.shape[1:]).data(s["batch"], nonempty=True)
    n_entries = W[0].numel()
    for step in range(s["steps"]):
        t = step / s["steps"]
        optimiser.param_groups[0]["lr"] = s["lr"] * min(1, (step + 1) / (0.02 * s["steps"])) * math.cos(math.pi / 2 * t)
        p = s["attribution_p"]
        if s["attribution_p_start"] is not None:
            p += (s["attribution_p_start"] - p) * max(0, 1 - 2 * t)
        x, P = data(step, generator), A @ B
        loss = s["faithfulness"] * (P.sum(2) - W[:, None]).square().sum() / n_entries
        squares = signed(P, W, b, x).square().mean(-1)  # A_c(x)^2: [T, R, B, C]
        early = t < 0.7
        if early or s["minimality_to_the_end"]:
            if s["divide_by"] == "length":
                squares = squares / squares.sum(-1, keepdim=True).clamp_min(1e-12)
            if s["divide_by"] == "target":
                squares = squares / signed(W[:, None, None], W, b, x).square().mean(-1).clamp_min(1e-12)
            powers = (squares + 1e-16).pow(p / 2)
            loss = loss + (minimality * powers.sum(-1).mean(-1)).sum()
        if early:
            price = ((A * A).sum(-2) * (B * B).sum(-1) + 1e-16).pow(s["rank_p"] / 2).sum(-1)
            loss = loss + (simplicity * (powers.mean(2) * price).sum(-1)).sum() / n_entries
        if s["sparse"]:
            mask = (squares >= s["threshold"] ** 2 * squares.amax(-1, keepdim=True)).to(x)
            target_outputs = torch.relu(x @ W @ W.mT + b[:, None])
            errors = (sparse_outputs(P, b, x, mask) - target_outputs[:, None]).square()
            loss = loss + s["sparse"] * errors.mean((-1, -2)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (A @ B).detach()


def stacked(targets: list[apd.targets.TMS]) -> tuple[Tensor, Tensor]:
    """Stack the targets' matrices [T, n, d] and biases [T, n]."""
    return torch.stack([t.encode.weight.detach().T for t in targets]), torch.stack([t.bias.detach() for t in targets])


@torch.no_grad()
def measure(target: apd.targets.TMS, P: Tensor, k: float) -> dict[str, Any]:
    """Measure ownership of P [C, n, d], and its errors with the k most attributed components per nonempty sample."""
    components = apd.Components({PATH: P}, {PATH: torch.eye(P.shape[-1]).expand(len(P), -1, -1)})
    own = apd.metrics.ownership(components, target.mechanisms())
    W, b = stacked([target])
    x = target.data(2048, nonempty=True)(0, torch.Generator().manual_seed(1))
    scores = signed(P[None, None], W, b, x).square().mean(-1)
    mask = batch_top_k(scores[0, 0], k)[None, None]
    coin = (torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) < 0.5).to(x)
    target_outputs = target(x)
    errors = [
        float((sparse_outputs(P[None, None], b, x, m)[0, 0] - target_outputs).square().mean())
        for m in (mask, torch.maximum(mask, coin))
    ]
    norms = components.norms()
    return {
        "owned": int(own.owned.sum()),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "length_ratio": [round(v, 4) for v in own.length_ratio.tolist()],
        "purity": [round(v, 4) for v in own.purity.tolist()],
        "in_use": int((norms > 0.05 * W.norm()).sum()),
        "faithfulness": float((P.sum(0) - W[0]).square().mean()),
        "top_k_error": errors[0],
        "scrubbed_error": errors[1],
    }


def k_of() -> float:
    """Return the paper's k, per nonempty sample."""
    return 0.211 / apd.targets.TMS(5, 2).data(nonempty=True).share_nonempty


@cache
def tried_on(seed: int) -> apd.targets.TMS:
    """Train a target that is used for the search only, not reported."""
    return apd.targets.TMS(5, 2).fit(seed=seed)


def tune(job: tuple[str, tuple[float, float]]) -> tuple[list[Row], Tensors]:
    """Try two powers of a grid, with all weights, on the search targets."""
    kind, (first, second) = job
    extra, _, weights = GRIDS[kind]
    targets = list(map(tried_on, TRIED_ON))
    minimality, simplicity = (torch.tensor(w) for w in zip(*weights, strict=True))
    s = USUAL | extra | {"attribution_p": first, "rank_p": second}
    trained = train(*stacked(targets), s, minimality, simplicity)
    grid = [
        {"weights": weight, "seed": seed, **measure(target, own, k_of())}
        for target, seed, every in zip(targets, TRIED_ON, trained, strict=True)
        for weight, own in zip(weights, every, strict=True)
    ]
    return grid, {}


def report(job: tuple[str]) -> tuple[list[Row], Tensors]:
    """Run a setting on the ten targets of TMS 5-2."""
    targets = [stored_target("tms-5-2", seed) for seed in REPORTED]
    s, start_time = settings_of(job), time.process_time()
    every = torch.ones(RESTARTS)
    trained = train(*stacked(targets), s, s["minimality"] * every, s["simplicity"] * every, seed=1)
    seconds = round((time.process_time() - start_time) / len(targets), 2)
    rows = [
        {"seed": seed, "seconds": seconds, "restarts": [measure(target, own, k_of()) for own in P]}
        for target, seed, P in zip(targets, REPORTED, trained, strict=True)
    ]
    return rows, {}


def report_large(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Run the relative form on a target of TMS 40-10."""
    target, s = stored_target("tms-40-10", job[1]), USUAL | LARGE_TARGET
    start_time, one = time.process_time(), torch.ones(1)
    trained = train(*stacked([target]), s, s["minimality"] * one, s["simplicity"] * one, seed=1)
    seconds = round(time.process_time() - start_time, 1)
    row = measure(target, trained[0, 0], apd.targets.TMS(40, 10).data(nonempty=True).mean_active)
    return [{"seconds": seconds, "restarts": [row]}], {}


def settings_of(job: tuple[str]) -> Row:
    """Look up a setting by name."""
    return USUAL | REPORTED_SETTINGS[job[0]]


PAIRS = [(kind, pair) for kind, (_, powers, _) in GRIDS.items() for pair in powers]
NAMES = [(name,) for name in REPORTED_SETTINGS]
SEEDS = [("TMS 40-10", seed) for seed in REPORTED_LARGE]
GRID = Rows(("kind", "powers"), lambda rows: PAIRS, tune, None, PAIRS.index)
RUNS = Rows(("name",), lambda rows: NAMES, report, settings_of, NAMES.index)
LARGE_RUNS = Rows(("name", "seed"), lambda rows: SEEDS, report_large, lambda job: USUAL | LARGE_TARGET)
STUDY = Study(
    "lp",
    {"grid": GRID, "runs": RUNS, "large": LARGE_RUNS},
    about=lambda processes: {"tried_on": TRIED_ON, "k": k_of()},
)

if __name__ == "__main__":
    STUDY.main(__doc__)
