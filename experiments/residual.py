"""Create data/residual.*: residual MLPs, compressed computation (chapter 8), two and three layers (chapter 9).

python -m experiments.residual [--only 50 | 25-25 | 17-17-16 | noise]     (about 5 minutes of one core for each run)

The components are stored in half precision.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import apd_minimal as apd
from apd_minimal.targets import ResidualMLP
from experiments.experiment import (
    Row,
    Rows,
    Study,
    Tensors,
    factors,
    numbers,
    of,
    ownership_means,
    prefix,
    scrubbing_means,
    taken_apart,
)

SIZES = {"50": (50,), "25-25": (25, 25), "17-17-16": (17, 17, 16)}
SEEDS = {"50": range(5), "25-25": range(5), "17-17-16": range(3)}
NOISE = (0.0, 0.5, 1.0)
TOP_K = 1.28  # the paper's, for all comparisons with it
SINGLE_FAILS = 2e-4


def single_errors(target: ResidualMLP, components: apd.Components, n_values: int = 200) -> torch.Tensor:
    """Compute mean squared errors with one feature on and its most attributed component alone: [n_features]."""
    values = 2 * torch.rand(n_values, generator=torch.Generator().manual_seed(5)) - 1
    x = torch.zeros(target.n_features, n_values, target.n_features)
    x[torch.arange(target.n_features), :, torch.arange(target.n_features)] = values
    network, x = apd.Network(target, target.weights), x.flatten(0, 1)
    with torch.no_grad():
        mask = apd.selection.sample_top_k(target.attributions(network, components, x), 1)
        errors = (network(x, components, mask.bool()) - network(x)).square().mean(-1)
    return errors.view(target.n_features, n_values).mean(1)


def measure(target: ResidualMLP, components: apd.Components) -> dict[str, Any]:
    """Measure everything that is reported, on inputs that no run has seen."""
    own = target.ownership(components)
    strict = target.ownership(components, 0.99, (0.9, 1.1), 0.98)
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    errors = apd.metrics.scrubbing(target, components, x, TOP_K, attribution=target.attributions)
    single = single_errors(target, components)
    network = apd.Network(target, target.weights)
    return {
        **ownership_means(own),
        "owned_strictly": int(strict.owned.sum()),
        "single_error": single.mean().item(),
        "single_fails": int((single > SINGLE_FAILS).sum()),
        **scrubbing_means(errors),
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, network.weights).item(),
        "in_use": int((components.norms() > 0).sum()),
    }


def made(name: str, seed: int) -> tuple[ResidualMLP, apd.Components, Row]:
    """Train one target and decompose it by its recipe; also say how many seconds each took."""
    start = time.process_time()
    target = ResidualMLP(neurons=SIZES[name], seed=seed).fit(seed=seed)
    fitted = time.process_time() - start
    result, seconds = taken_apart(target, target.recipe, seed=seed)
    return target, result.components, {"seconds": seconds, "target_seconds": round(fitted, 1)}


def rounded(components: apd.Components) -> apd.Components:
    """Round to half precision, as what is stored."""
    return components.map(lambda t: t.half().float())


def run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Train one target, decompose it, measure."""
    target, full, took = made(*job)
    facts = {**took, **measure(target, rounded(full)), "before_rounding": measure(target, full)}
    own_target = {f"{prefix(job)}target.{p}": target.get_parameter(p).detach().contiguous() for p in target.weights}
    return [facts], factors(full, prefix(job), torch.half) | own_target


def stored_target(name: str, seed: int) -> tuple[ResidualMLP, apd.Components]:
    """Load one of the stored targets and its components, for other studies."""
    target = ResidualMLP(neurons=SIZES[name], seed=seed)
    components, state = of("residual", prefix((name, seed)))
    target.load_state_dict(state, strict=False)  # the embedding is drawn from the seed
    return target, components


def noisy(noise: float, seed: int) -> ResidualMLP:
    """Create a residual MLP with W_E W_E^T = 1 + noise (W_E' W_E'^T - 1), where W_E' is the usual target's embedding.

    At noise 1 the inner products are those of the usual target; at 0 the features are orthogonal.
    """
    usual = ResidualMLP(seed=seed).embedding
    eye = torch.eye(len(usual))
    target = ResidualMLP(d_resid=len(usual), seed=seed)
    target.embedding.copy_(torch.linalg.cholesky(eye + noise * (usual @ usual.T - eye)))
    return target


def noise_run(job: tuple[float, int]) -> tuple[list[Row], Tensors]:
    """Train a target with more or less noise in its stream; compare it with solutions without superposition."""
    noise, seed = job
    target = noisy(noise, seed).fit(seed=seed)
    x = target.data(200_000)(0, torch.Generator().manual_seed(99))
    relu, skip = torch.relu(x), x @ target.embedding @ target.embedding.T
    half = relu.clone()
    half[:, target.contributions().shape[1] :] = 0  # a neuron for each of the first 50 features
    with torch.no_grad():
        losses = {"trained": target(x), "naive": skip + half, "untouched": skip}
        facts = {name: (out - target.labels(x)).square().mean().item() for name, out in losses.items()}
    return [facts], {}


def by_seed(job: tuple[float, int]) -> tuple[int, float]:
    """Sort by seed first."""
    return job[1], job[0]


NOISY = Rows(("noise", "seed"), lambda rows: [(s, i) for i in range(3) for s in NOISE], noise_run, None, by_seed)
RUNS = Rows(
    fields=("target", "seed"),
    jobs=lambda rows: [(name, seed) for name in SIZES for seed in SEEDS[name]],
    run=run,
    settings=lambda job: numbers(ResidualMLP(neurons=SIZES[job[0]]).recipe, seed=job[1]),
)
STUDY = Study("residual", {"noise": NOISY, "runs": RUNS}, about=lambda processes: {"processes": processes})

if __name__ == "__main__":
    STUDY.main(__doc__)
