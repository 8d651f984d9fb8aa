"""Remake data/tms.json and data/tms.safetensors: TMS of both sizes taken apart over ten target seeds (chapter 7).

Two processes with one thread each; about half an hour on two cores. The seeds 0 to 9 were not used when the
recipe was found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import apd_minimal as apd

DATA = Path(__file__).resolve().parent.parent / "data"
SIZES = {"tms-5-2": (5, 2), "tms-40-10": (40, 10)}
# What the paper does, cut to the number of steps given; see data/README.md.
PLAIN = {
    "hidden": 0.0,
    "scrub": 0.0,
    "tidy_every": 0.0,
    "init_std": 0.1,
    "warmup": 0.05,
    "faithfulness": 1.0,
    "restarts": 1,
}


def plain_recipe(target: apd.targets.TMS) -> dict[str, Any]:
    """The paper's weights, k, p and learning rate (braun2025, appendix), with fewer steps and samples."""
    if target.n_features == 5:
        data = target.data(463, nonempty=True)  # the non-empty samples of a batch of 2,048
        share = data.share_nonempty
        own = {
            "batches": data,
            "n_components": 5,
            "top_k": 0.211 / share,
            "minimality": share,
            "simplicity": 0.7 * share,
            "p": 1.0,
            "lr": 3e-2,
            "steps": 5000,
            "attribute_at": "components",
        }
    else:
        own = {
            "batches": target.data(512),
            "n_components": 50,
            "top_k": 1.0,
            "minimality": 10.0,
            "simplicity": 20.0,
            "p": 0.9,
            "lr": 1e-3,
            "steps": 3000,
        }
    return {**PLAIN, "weights": target.weights, **own}


def run(job: tuple[str, bool, bool, str, int]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train one target, take it apart, measure."""
    name, identity, rotated, recipe, seed = job
    torch.set_num_threads(1)
    target = apd.targets.TMS(*SIZES[name], identity=identity).fit(seed=seed)
    if rotated:
        target.rotate(seed=seed)
    settings = target.recipe if recipe == "ours" else plain_recipe(target)
    start = time.process_time()
    result = apd.decompose(target, seed=seed, progress=False, **settings)
    seconds = time.process_time() - start
    truth, components = target.mechanisms(), result.components
    own = apd.metrics.ownership(components, truth)
    every = result.restarts
    assert every is not None
    facts: dict[str, Any] = {
        "target": name,
        "identity": identity,
        "rotated": rotated,
        "recipe": recipe,
        "seed": seed,
        "seconds": round(seconds, 1),
        "owned": own.owned.tolist(),
        "cosine": own.cosine.tolist(),
        "length_ratio": own.length_ratio.tolist(),
        "purity": own.purity.tolist(),
        "faithfulness": apd.losses.faithfulness(components, apd.Network(target, target.weights).weights).item(),
        "relative_faithfulness": apd.metrics.relative_faithfulness(
            components, apd.Network(target, target.weights).weights
        ).item(),
        "scores": result.scores,
        "restarts_complete": [
            apd.metrics.ownership(every.restart(r), truth).complete for r in range(result.config.restarts)
        ],
        "represented": int((target.encode.weight.norm(dim=0) > 0.5).sum()),
        "settings": asdict(result.config),
    }
    if not identity:
        facts["mmcs"] = apd.metrics.mmcs(components, truth).item()
        facts["ml2r"] = apd.metrics.ml2r(components, truth).item()
    kind = name + ("-identity" if identity else "") + ("-rotated" if rotated else "")
    alive = (components.norms() > 0).nonzero().flatten().tolist()
    kept = components.subset(alive)
    tensors = {f"{kind}/{recipe}/{seed}/{path}.A": t.contiguous() for path, t in kept.A.items()}
    tensors |= {f"{kind}/{recipe}/{seed}/{path}.B": t.contiguous() for path, t in kept.B.items()}
    own_state = {k: t for k, t in target.state_dict().items() if k != "decode.weight"}  # tied to encode.weight
    tensors |= {f"{kind}/{recipe}/{seed}/target.{k}": t.contiguous() for k, t in own_state.items()}
    print(kind, recipe, seed, f"owned {sum(facts['owned'])}/{len(facts['owned'])}", f"{seconds:.0f} s", flush=True)
    return facts, tensors


def write_manifest() -> None:
    """Note every artefact's hash, by which a fetched copy is checked."""
    names = sorted(p.name for p in DATA.iterdir() if p.name not in ("manifest.json", "README.md"))
    hashes = {name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in names}
    (DATA / "manifest.json").write_text(json.dumps(hashes, indent=1) + "\n")


def main() -> None:
    """Run every job, two at a time, and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = range(parser.parse_args().seeds)
    jobs = [(name, False, False, "ours", seed) for name in reversed(SIZES) for seed in seeds]
    jobs += [(name, False, True, "ours", seed) for name in SIZES for seed in seeds]
    jobs += [("tms-5-2", False, False, "plain", seed) for seed in seeds]
    jobs += [("tms-5-2", True, False, "ours", seed) for seed in seeds]
    jobs += [("tms-40-10", True, False, "ours", seed) for seed in seeds[:3]]
    jobs += [("tms-40-10", False, False, "plain", seed) for seed in seeds[:3]]
    runs: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for facts, own in pool.imap(run, jobs):
            runs.append(facts)
            tensors.update(own)
            about = {"processor": platform.machine(), "torch": torch.__version__, "threads": 1, "processes": 2}
            (DATA / "tms.json").write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
            save_file(tensors, DATA / "tms.safetensors")
    write_manifest()


if __name__ == "__main__":
    main()
