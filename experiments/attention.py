"""Create data/attention.*: a head of attention decomposed with each estimator, k chosen for each (chapter 15).

python -m experiments.attention [--only runs | heads | truth | scratch] [--processes N]  (ten minutes of one core)

The head is made by hand, and its six components are known. Runs start near them ("truth") or at random ("scratch").
Every estimator has the same settings and numbers of steps, but a k of its own: the smallest with which, in five starts
with the seed SEARCH_SEED, the components come as close to the known ones as with any other. Then ten starts with the
seed REPORT_SEED are run with this k, and with the k that the known components need.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import apd_minimal as apd
from apd_minimal import attributions
from apd_minimal.attributions import Attribution
from apd_minimal.selection import batch_top_k
from experiments.experiment import Row, Rows, Study, Tensors, numbers, prefix, taken_apart

N = 3  # kinds of token, and channels
PATHS = ["query.weight", "value.weight"]  # the others are the same for all inputs and are not taken apart
SHARPNESS = 8.0
SEARCH_SEED, REPORT_SEED = 100, 0
N_STARTS = {SEARCH_SEED: 5, REPORT_SEED: 10}
NEEDED = 2.0  # components that a sample needs: one look and one move
KS = (1.0, 1.5, NEEDED, 2.5, 3.0, 3.5, 4.0, 5.0)
CLOSE = 0.01
OPTIONS: dict[str, dict[str, Any]] = {  # few samples, since they are computed at every step
    "gradient": {},
    "integrated gradients": {"n_steps": 4},
    "path shapley": {"n_samples": 4},
    "ablation": {},
    "shapley": {"n_samples": 2},
}
FROM_TRUTH: dict[str, Any] = {
    "steps": 250,
    "batch": 64,
    "noise": 0.02,
    "lr": 5e-3,
    "faithfulness": 10.0,
    "minimality": 10.0,
}
FROM_SCRATCH: dict[str, Any] = {
    "n_components": 7,
    "steps": 400,
    "faithfulness": 10.0,
    "simplicity": ((0.0, 10.0), (0.7, 0.0)),
}
HEADS: dict[str, Any] = {"n": 5, "marks": (50, 200, 1000, 2000), "batch": 128, "lr": 2e-2, "std": 0.5}
Job = tuple[str, str, float, int]  # start, estimator, k, seed


class Lookup(nn.Module):
    """A head of attention; x [B, 1 + N, 2 N] has a wish at token 0, kind and content at the others."""

    def __init__(self, sharpness: float = SHARPNESS) -> None:
        super().__init__()
        for name in ("query", "key", "value", "out"):
            layer = nn.Linear(N, N, bias=False)
            with torch.no_grad():
                layer.weight.copy_(torch.eye(N) * (sharpness if name == "key" else 1.0))
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, out = self.children()
        scores = query(x[:, :1, :N]) @ key(x[:, 1:, :N]).mT
        found: Tensor = out(scores.softmax(-1) @ value(x[:, 1:, N:]))
        return found[:, 0]


def lookups(batch: int, crosstalk: float = 0.05) -> Callable[[int, torch.Generator], Tensor]:
    """Create batches(step, generator): a message in one channel, small random numbers in the others."""

    def draw(step: int, g: torch.Generator) -> Tensor:
        rows = torch.arange(batch)
        wish, channel = torch.randint(N, (2, batch), generator=g)
        x = torch.zeros(batch, 1 + N, 2 * N)
        x[rows, 0, wish] = 1
        x[:, 1:, :N] = torch.eye(N)[torch.rand(batch, N, generator=g).argsort(1)]
        content = crosstalk * torch.randn(batch, N, N, generator=g)
        sign = 2.0 * torch.randint(2, (batch, N), generator=g) - 1
        content[rows, :, channel] = sign * (0.5 + torch.rand(batch, N, generator=g))
        x[:, 1:, N:] = content
        return x

    return draw


def mechanisms() -> apd.Components:
    """Create the six known components: a look for each row of the query's matrix, a move for each of the value's."""
    P = {path: torch.zeros(2 * N, N, N) for path in PATHS}
    for i in range(N):
        P["query.weight"][i, i, i] = P["value.weight"][N + i, i, i] = 1.0
    return apd.Components.from_matrices(P)


def estimator_of(name: str) -> Attribution:
    """Create an estimator; those that sample draw anew at every step."""
    options = dict(OPTIONS[name])
    if "n_samples" in options:
        options["generator"] = torch.Generator().manual_seed(0)
    return partial(getattr(attributions, name.replace(" ", "_")), **options)


def stored_settings(job: Job) -> Row:
    """Return the settings as stored; they identify a run."""
    start, estimator, k, seed = job
    if start == "truth":
        return {"options": OPTIONS[estimator], "sharpness": SHARPNESS, "starts": N_STARTS[seed], **FROM_TRUTH}
    return {"options": OPTIONS[estimator], "sharpness": SHARPNESS, **numbers(scratch(k, seed), batch=64)}


def scratch(k: float, seed: int) -> Row:
    """Return the arguments of `decompose` for a run that starts at random."""
    batches = {"batches": lookups(64), "weights": PATHS}
    return {**FROM_SCRATCH, **batches, "top_k": k, "restarts": N_STARTS[seed], "seed": seed}


def from_truth(network: apd.Network, scores: Attribution, k: float, seed: int) -> apd.Components:
    """Train the known components with a little noise on them, with APD's three losses."""
    g, s = torch.Generator().manual_seed(seed), FROM_TRUTH
    start = mechanisms().map(lambda t: t + s["noise"] * torch.randn(N_STARTS[seed], *t.shape, generator=g))
    components = start.map(lambda t: t.requires_grad_())
    adam = torch.optim.Adam(components.parameters(), lr=s["lr"])
    for step in range(int(s["steps"])):
        x = lookups(int(s["batch"]))(step, g)
        mask = batch_top_k(scores(network, components.map(torch.Tensor.detach), x), k)
        loss = s["minimality"] * apd.losses.minimality(network(x, components, mask), network(x))
        loss = loss + s["faithfulness"] * apd.losses.faithfulness(components, network.weights)
        loss = loss + apd.losses.simplicity(components, mask, 0.9)
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
    return components.map(torch.Tensor.detach)


def cosines(components: apd.Components) -> Tensor:
    """Compute the largest cosine of any component with each of the known ones, [starts, 2 N]."""
    P, Z = (nn.functional.normalize(c.flat(), dim=-1) for c in (components, mechanisms()))
    return (P @ Z.T).amax(1)


@torch.no_grad()
def error_of(network: apd.Network, components: apd.Components, mask: Tensor, x: Tensor) -> list[float]:
    """Compute the error of the network run with a mask, relative to its outputs, for each start."""
    wanted = network(x)
    gap: Tensor = (network(x, components, mask) - wanted).square().mean((1, 2)) / wanted.square().mean()
    return gap.tolist()


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose the head with one estimator, from all starts at once."""
    start, estimator, k, seed = job
    target, scores = Lookup(), estimator_of(estimator)
    network, began = apd.Network(target, PATHS), time.process_time()
    if start == "truth":
        components, seconds = from_truth(network, scores, k, seed), 0.0
        seconds = round(time.process_time() - began, 1)
    else:
        result, seconds = taken_apart(target, scratch(k, seed), attribution=scores)
        assert result.restarts is not None
        components = result.restarts
    x = lookups(1024)(0, torch.Generator().manual_seed(20_000 + seed))
    found = scores(network, components, x)
    facts = {
        "cosines": cosines(components).tolist(),
        "error": error_of(network, components, batch_top_k(found, k), x),
        "error_needed": error_of(network, components, batch_top_k(found, NEEDED), x),
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, network.weights).tolist(),
        "seconds": seconds,
    }
    factors = ((path, name, getattr(components, name)[path]) for path in PATHS for name in "AB")
    return [facts], {f"{prefix(job)}{path}.{name}": t.contiguous() for path, name, t in factors}


def chosen(rows: list[Row], start: str, estimator: str) -> float:
    """Choose the smallest k whose search runs come within CLOSE of the largest mean cosine with the known components.

    With nearly all components active little is chosen, so that of equals the smallest k says most.
    """
    searched = [r for r in rows if (r["start"], r["estimator"], r["seed"]) == (start, estimator, SEARCH_SEED)]
    means = {float(r["k"]): torch.tensor(r["cosines"]).mean().item() for r in searched}
    return min(k for k, mean in means.items() if mean >= max(means.values()) - CLOSE)


def jobs(rows: list[Row]) -> list[Job]:
    """List every run; the reported ones are known when an estimator's search is done."""

    def listed() -> Iterator[Job]:
        done = list(map(RUNS.job_of, rows))
        for start in ("truth", "scratch"):
            for estimator in OPTIONS:
                searched = [(start, estimator, k, SEARCH_SEED) for k in KS]
                yield from searched
                yield (start, estimator, NEEDED, REPORT_SEED)
                if set(searched) <= set(done):
                    yield (start, estimator, chosen(rows, start, estimator), REPORT_SEED)
                else:  # no report is lost while the search is made again
                    yield from (job for job in done if job[:2] == (start, estimator))

    return list(dict.fromkeys(listed()))


def train_heads(job: tuple[int]) -> tuple[list[Row], Tensors]:
    """Train heads of the same form on the task itself, and keep their weights at some steps."""
    (seed,) = job
    g, marks = torch.Generator().manual_seed(seed), HEADS["marks"]
    paths = [f"{name}.weight" for name in ("query", "key", "value", "out")]
    drawn = {path: HEADS["std"] * torch.randn(HEADS["n"], N, N, generator=g) for path in paths}
    parameters = {path: t.requires_grad_() for path, t in drawn.items()}
    adam = torch.optim.Adam(parameters.values(), lr=HEADS["lr"])
    blank, kept = Lookup(), Tensors()
    for step in range(marks[-1] + 1):
        if step in marks:
            kept |= {f"{prefix(job)}{step}/{path}": t.detach().clone() for path, t in parameters.items()}
        x = lookups(HEADS["batch"])(step, g)
        asked = x[:, 1:, :N] @ x[:, 0, :N, None]  # 1 at the wished token
        wanted = (asked * x[:, 1:, N:]).sum(1)
        y = vmap(lambda p, x=x: functional_call(blank, p, (x,)))(parameters)
        loss = (y - wanted).square().mean((1, 2))
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
    return [{"loss": loss.tolist()}], kept


RUNS = Rows(("start", "estimator", "k", "seed"), jobs, run, stored_settings)
TRAINED = Rows(("seed",), lambda rows: [(0,)], train_heads, lambda job: dict(HEADS))
STUDY = Study("attention", {"runs": RUNS, "heads": TRAINED}, about=lambda processes: {"processes": processes})

if __name__ == "__main__":
    STUDY.main(__doc__)
