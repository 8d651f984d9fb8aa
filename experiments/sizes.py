"""Create data/sizes.json: which settings own every feature of a TMS, from 3-2 to 60-15 (`TMS.recipe`, chapter 7).

Settings were tried on target seeds from 7100 up, and those of 6 to 9 features also on 90 to 95; the reported runs were
done once, on seeds from 7200 up. "gentle" on 7-3, seeds 7200 to 7202, was reported as the recipe until it was seen to
fail; the recipe of today was chosen after that, and run on the same three. At fourteen sizes more, from 4-2 to 24-6, it
was run once on 7800 to 7802; nothing was chosen after that, and what it left out there is what `TMS.recipe` warns of.
Every run is kept, including those that failed, but for nine on seeds 90 to 92 with k at 0.84 of the mean number of
active features or the former recipe, which were looked at by hand; runs on a GPU were entered by hand. One thread; a
run takes 5 s (3-2) to some minutes (60-15).
For example `python -m experiments.sizes --sizes 7-3 20-6 --seeds 7100 7101 --settings gentle "in proportion to 5-2"`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import apd_minimal as apd

FILE = Path(__file__).resolve().parent.parent / "data" / "sizes.json"


def large(n: int, **other: Any) -> dict[str, Any]:
    """Scale the recipe of 40-10 to n features, k and C in proportion, and apply changes."""
    top_k = ((0.0, 0.045 * n), (0.7, 0.045 * n), (0.701, 0.1 * n))
    own = {"n_components": 3 * n // 2, "top_k": top_k, "rank": 4, "faithfulness": 1.0, "steps": 1500, "restarts": 2}
    return own | other


def small(n: int, **other: Any) -> dict[str, Any]:
    """Scale the recipe of 5-2 to n features, k and C in proportion, and apply changes."""
    model = apd.targets.TMS(5, 2)
    own = {k: v for k, v in model.recipe.items() if k not in ("batches", "weights")}
    before, after = (apd.targets.TMS(m, 2).data(1).share_nonempty for m in (5, n))
    scale = n / 5 * before / after  # the share of the samples that are not empty grows more slowly than n
    own["top_k"] = tuple((t, k * scale) for t, k in own["top_k"])
    weigh = after / before
    own["simplicity"] = tuple((t, w * weigh) for t, w in own["simplicity"])
    own |= {"minimality": own["minimality"] * weigh, "scrub": own["scrub"] * weigh, "n_components": -(-12 * n // 5)}
    return own | other


def sparse(n: int, share_of_mean: float) -> dict[str, Any]:
    """Change `small`: k for most of the run is this share of the mean number of active features (5-2 has 0.84)."""
    own = small(n)
    mean = apd.targets.TMS(n, 2).data(1, nonempty=True).mean_active
    top_k = ((0.0, share_of_mean * mean), (0.7, share_of_mean * mean), own["top_k"][-1])
    return own | {"top_k": top_k}


def gentle(n: int, **other: Any) -> dict[str, Any]:
    """Change `large`: a weaker simplicity loss and more components."""
    return large(n, **({"n_components": 3 * n, "simplicity": ((0.0, 20.0), (0.7, 0.0))} | other))


def less(n: int, share: float) -> tuple[tuple[float, float], ...]:
    """Build a schedule of k: this share of n for most of the run, then 0.1 n."""
    return ((0.0, share * n), (0.7, share * n), (0.701, 0.1 * n))


SETTINGS: dict[str, Any] = {
    "as 40-10": large,
    "in proportion to 5-2": small,
    "in proportion to 5-2, k 0.6 of the mean": lambda n: sparse(n, 0.6),
    "in proportion to 5-2, k 0.65 of the mean": lambda n: sparse(n, 0.65),
    "in proportion to 5-2, k 0.7 of the mean": lambda n: sparse(n, 0.7),
    "gentle": gentle,
    "gentle, 3,000 steps": lambda n: gentle(n, steps=3000),
    "gentle, 3,000 steps, new starts until 0.65": lambda n: gentle(n, steps=3000, reseed_until=0.65),
    "gentle, 3,000 steps, k 0.04 n": lambda n: gentle(n, steps=3000, top_k=less(n, 0.04)),
    "gentle, 3,000 steps, simplicity from 30": lambda n: gentle(n, steps=3000, simplicity=((0.0, 30.0), (0.7, 0.0))),
    "gentle, 3,000 steps, C = 2n": lambda n: gentle(n, steps=3000, n_components=2 * n),
    "gentle, 3,000 steps, 4 restarts": lambda n: gentle(n, steps=3000, restarts=4),
}


def run(size: str, seed: int, name: str) -> dict[str, Any]:
    """Train one target, decompose it, measure."""
    n, d = map(int, size.split("-"))
    target = apd.targets.TMS(n, d).fit(seed=seed)
    nonempty = "5-2" in name
    changes = {} if name == "recipe" else SETTINGS[name](n)
    batches = target.data(128 if nonempty else 512, nonempty=nonempty)
    settings = target.recipe if name == "recipe" else {"batches": batches, "weights": target.weights} | changes
    start = time.perf_counter()
    result = apd.decompose(target, **settings, attribution=target.attributions, progress=False)
    seconds = time.perf_counter() - start
    by_restart = [target.ownership(result.restarts.restart(i)) for i in range(len(result.scores))]  # type: ignore[union-attr]
    W = torch.nn.functional.normalize(target.encode.weight.detach().T, dim=1)
    cosines = (W @ W.T).fill_diagonal_(0)
    return {
        "size": size,
        "seed": seed,
        "settings": name,
        "config": {k: v for k, v in asdict(result.config).items() if v != getattr(apd.Config(1, 1), k)},
        "batch": settings["batches"].batch_size,
        "owned": int(by_restart[result.chosen].owned.sum()),
        "least cosine": round(by_restart[result.chosen].cosine.amin().item(), 4),
        "owned by restart": [int(e.owned.sum()) for e in by_restart],
        "scores": [float(f"{s:.3g}") for s in result.scores],
        "relative faithfulness": float(
            f"{apd.metrics.relative_faithfulness(result.components, apd.Network(target, target.weights).weights):.2g}"
        ),
        "largest and least cosine between features": [round(cosines.max().item(), 3), round(cosines.min().item(), 3)],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Do the requested runs that are missing, and add them to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--settings", nargs="+", default=["recipe"], choices=["recipe", *SETTINGS])
    parser.add_argument("--file", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.settings:
        for size in args.sizes:
            for seed in args.seeds:
                runs = json.loads(args.file.read_text())["runs"] if args.file.exists() else []
                if any((r["size"], r["seed"], r["settings"]) == (size, seed, name) for r in runs):
                    continue
                facts = run(size, seed, name)
                print(
                    name, size, seed, f"{facts['owned']} {facts['owned by restart']}, {facts['seconds']} s", flush=True
                )
                args.file.write_text(json.dumps({"runs": [*runs, facts]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
