"""Makes the stored runs on residual MLPs: compressed computation (chapter 8), two and three layers (chapter 9).

python -m experiments.residual [--only 50 | 25-25 | 17-17-16]     (about 5 minutes of one core for each run)

A run that is there and was made with the settings of today is kept. The components are stored in half precision.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import apd_minimal as apd
from apd_minimal.config import completed
from apd_minimal.targets import ResidualMLP
from experiments.tms import write_manifest

DATA = Path(__file__).parent.parent / "data"
SIZES = {"50": (50,), "25-25": (25, 25), "17-17-16": (17, 17, 16)}
SEEDS = {"50": range(5), "25-25": range(5), "17-17-16": range(3)}
NOISE = (0.0, 0.5, 1.0)
TOP_K = 1.28  # the paper's, for all comparisons with it
SINGLE_FAILS = 2e-4


def settings_of(name: str, seed: int) -> dict[str, Any]:
    """The settings of a run, as they are stored."""
    recipe = ResidualMLP(neurons=SIZES[name]).recipe
    numbers = {k: v for k, v in recipe.items() if k not in ("batches", "weights", "attribution", "hidden_modules")}
    return json.loads(json.dumps(asdict(apd.Config.from_dict(numbers | {"seed": seed}))))


def single_errors(target: ResidualMLP, components: apd.Components, n_values: int = 200) -> torch.Tensor:
    """Mean squared error with one feature on and the most attributed component alone: [n_features]."""
    values = 2 * torch.rand(n_values, generator=torch.Generator().manual_seed(5)) - 1
    x = torch.zeros(target.n_features, n_values, target.n_features)
    x[torch.arange(target.n_features), :, torch.arange(target.n_features)] = values
    network, x = apd.Network(target, target.weights), x.flatten(0, 1)
    with torch.no_grad():
        mask = apd.selection.sample_top_k(target.attributions(network, components, x), 1)
        errors = (network(x, components, mask.bool()) - network(x)).square().mean(-1)
    return errors.view(target.n_features, n_values).mean(1)


def measure(target: ResidualMLP, components: apd.Components) -> dict[str, Any]:
    """Everything that is reported, on inputs that no run has seen."""
    own = target.ownership(components)
    strict = target.ownership(components, 0.99, (0.9, 1.1), 0.98)
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    errors = apd.metrics.scrubbing(target, components, x, TOP_K, attribution=target.attributions)
    single = single_errors(target, components)
    network = apd.Network(target, target.weights)
    return {
        "owned": int(own.owned.sum()),
        "owned_strictly": int(strict.owned.sum()),
        "cosine": own.cosine.mean().item(),
        "length_ratio": own.length_ratio.mean().item(),
        "purity": own.purity.mean().item(),
        "single_error": single.mean().item(),
        "single_fails": int((single > SINGLE_FAILS).sum()),
        "top_k_error": errors.top_k.mean().item(),
        "scrubbed_error": errors.scrubbed.mean().item(),
        "anti_scrubbed_error": errors.anti_scrubbed.mean().item(),
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, network.weights).item(),
        "in_use": int((components.norms() > 0).sum()),
    }


def run(job: tuple[str, int]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train one target, take it apart, measure."""
    name, seed = job
    torch.set_num_threads(1)
    start = time.process_time()
    target = ResidualMLP(neurons=SIZES[name], seed=seed).fit(seed=seed)
    fitted = time.process_time()
    result = apd.decompose(target, seed=seed, progress=False, **target.recipe)
    seconds = time.process_time() - fitted
    full = result.components
    components = full.map(lambda t: t.half().float())
    facts: dict[str, Any] = {
        "target": name,
        "seed": seed,
        "seconds": round(seconds, 1),
        "target_seconds": round(fitted - start, 1),
        **measure(target, components),
        "before_rounding": measure(target, full),
        "settings": settings_of(name, seed),
    }
    print(json.dumps({k: v for k, v in facts.items() if k not in ("settings", "before_rounding")}), flush=True)
    start_of_name = f"{name}/{seed}/"
    kept = full.subset((full.norms() > 0).nonzero().flatten().tolist())
    tensors = {f"{start_of_name}{path}.A": t.half().contiguous() for path, t in kept.A.items()}
    tensors |= {f"{start_of_name}{path}.B": t.half().contiguous() for path, t in kept.B.items()}
    return facts, tensors | {
        f"{start_of_name}target.{path}": target.get_parameter(path).detach().contiguous() for path in target.weights
    }


def noisy(noise: float, seed: int) -> ResidualMLP:
    """A residual MLP whose embedding has W_E W_E^T = 1 + noise (W_E' W_E'^T - 1), W_E' that of the usual target.

    At 1 it computes what the usual target can; at 0 the features are orthogonal.
    """
    usual = ResidualMLP(seed=seed).embedding
    eye = torch.eye(len(usual))
    target = ResidualMLP(d_resid=len(usual), seed=seed)
    target.embedding.copy_(torch.linalg.cholesky(eye + noise * (usual @ usual.T - eye)))
    return target


def noise_run(job: tuple[float, int]) -> dict[str, Any]:
    """Train a target with more or less noise in its stream; compare it with solutions that do not superpose."""
    noise, seed = job
    torch.set_num_threads(1)
    target = noisy(noise, seed).fit(seed=seed)
    x = target.data(200_000)(0, torch.Generator().manual_seed(99))
    relu, skip = torch.relu(x), x @ target.embedding @ target.embedding.T
    half = relu.clone()
    half[:, target.contributions().shape[1] :] = 0  # a neuron for each of the first 50 features
    with torch.no_grad():
        losses = {"trained": target(x), "naive": skip + half, "untouched": skip}
        facts = {name: (out - target.labels(x)).square().mean().item() for name, out in losses.items()}
    print(noise, seed, facts, flush=True)
    return {"noise": noise, "seed": seed, **facts}


def main() -> None:
    """Make what is missing, and write the files after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[*SIZES, "noise"], help="the runs of one size")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    table, arrays = DATA / "residual.json", DATA / "residual.safetensors"
    old = json.loads(table.read_text())["runs"] if table.exists() else []
    runs = [r for r in old if completed(r["settings"]) == settings_of(r["target"], r["seed"])]
    tensors = load_file(arrays) if arrays.exists() else {}
    there = {f"{r['target']}/{r['seed']}" for r in runs}
    tensors = {name: t for name, t in tensors.items() if name.rsplit("/", 1)[0] in there}
    todo = [(name, seed) for name in SIZES for seed in SEEDS[name] if f"{name}/{seed}" not in there]
    todo = [job for job in todo if arguments.only in (None, job[0])]
    noise = json.loads(table.read_text())["noise"] if table.exists() else []
    noise_todo = [] if noise or arguments.only not in (None, "noise") else [(s, i) for i in range(3) for s in NOISE]
    print(f"{len(runs)} runs kept, {len(todo)} to make, {len(noise_todo)} targets with noise", flush=True)

    def write() -> None:
        runs.sort(key=lambda r: (r["target"], r["seed"]))
        about = {"torch": torch.__version__, "threads": 1, "processes": arguments.processes}
        table.write_text(json.dumps({"about": about, "noise": noise, "runs": runs}, indent=1) + "\n")
        save_file(tensors, arrays)
        write_manifest()

    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        if noise_todo:
            noise = pool.map(noise_run, noise_todo)
            write()
        for facts, own in pool.imap_unordered(run, todo):
            runs.append(facts)
            tensors.update(own)
            write()


if __name__ == "__main__":
    main()
