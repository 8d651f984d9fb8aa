"""Create data/grokked.json: networks that learned to add modulo 17, taken apart as they learn (chapter 35).

python -m experiments.grokked [--only runs] [--processes N]      (about twenty minutes of one core)

Each network has one hidden layer of 64 neurons that square, and sees six tenths of the 289 pairs. Weight decay makes it
fit them at once and get the others right much later: it groks. The weights are stored in five states: "untrained";
"fitted", the first time that all training pairs are right; "half", when half of the others are; "grokked", when 99% of
them are; and "end". "random" is the end with both matrices replaced by random ones of the same singular values.

Each state is taken apart with two active components a sample, as many as tokens, and two states also with nine, which
leaves room for all eight frequencies and what no wave reads. The settings are those of chapter 35 for tokens, under the
weights of the losses that its judge picked on every target. Training was settled on seeds 90 to 92; the reported ones
are 8800 to 8804.

"spd" takes the first matrix of "end" and of "random" apart by SPD, as experiments/each_method.py does: components of
rank one, half as many again as the rank, three penalties, of which the judge picks one; nothing was settled here. Its
components are compared one by one with tokens and frequencies, and put together by the truth, each with what it is most
like ("as_tokens", "as_frequencies": the mean cosine of these sums). The same of parts dealt anew.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.study.rate import Judge
from apd_minimal.targets import ModularArithmetic, ModularTask, Pairs
from experiments import each_method
from experiments.experiment import Row, Rows, Study, Tensors, numbers, stored
from experiments.modular import WEIGHTS, like

P, NEURONS = 17, 64
SEEDS = tuple(range(8800, 8805))
STATES = ("untrained", "fitted", "half", "grokked", "end", "random")
TOKENS, WAVES = 2, 9  # active ones: two tokens; eight frequencies and the constant
TRAINING: dict[str, Any] = {
    "p": P, "neurons": NEURONS, "share": 0.6, "steps": 12_000, "lr": 0.005, "weight_decay": 0.5, "betas": (0.9, 0.98),
    "every": 25,
}  # fmt: skip
HIDDEN = "hidden.weight"
Job = tuple[Any, ...]


class Squares(nn.Module):
    """Two one-hot vectors side by side [B, 2p] -> [B, p]: one hidden layer, whose neurons square what they read."""

    def __init__(self, p: int = P, neurons: int = NEURONS) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(2 * p, neurons, bias=False), nn.Linear(neurons, p, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores [B, p]."""
        scores: Tensor = self.out(self.hidden(x).square())
        return scores


def table(p: int = P) -> tuple[Tensor, Tensor]:
    """List every pair [p^2, 2p], and the right answers [p^2]."""
    written = ModularArithmetic([ModularTask(p)])
    return written.inputs(), written.answers(written.inputs())


def by_wave(W: Tensor) -> Tensor:
    """Split what is read into waves, both numbers together: [..., 2p, n] -> [..., 1 + (p - 1) / 2, 2p, n].

    The first is the constant, the others are the frequencies 1, 2, ...; they sum to W.
    """
    p = W.shape[-2] // 2
    waves = ModularTask(p).waves(p).unflatten(1, (-1, 2)) * (2 / p) ** 0.5  # [p, F, 2]
    planes = torch.cat([torch.full((1, p, p), 1 / p), torch.einsum("ifs,jfs->fij", waves, waves)])
    return torch.einsum("fij,...hjn->...fhin", planes, W.unflatten(-2, (2, p))).flatten(-3, -2)


def wave_share(W: Tensor) -> Tensor:
    """Compute the share of the largest frequency in what is read, the constant left out: [..., 2p, n] -> [...]."""
    energy = by_wave(W).square().sum((-2, -1))[..., 1:]
    return energy.amax(-1) / energy.sum(-1).clamp_min(1e-30)  # nothing read, nothing shared


def neuron_share(W: Tensor) -> float:
    """Compute the mean of `wave_share` over the neurons of [2p, n], each with the weight of its squared length."""
    each, size = wave_share(W.T[..., None]), W.square().sum(0)
    return float((each * size).sum() / size.sum())


def run_network(job: Job) -> tuple[list[Row], Tensors]:
    """Train one network; store its curves, and its weights in five states."""
    (seed,) = job
    generator = torch.Generator().manual_seed(seed)
    x, answers = table()
    order = torch.randperm(len(x), generator=generator)
    seen, others = order.split([round(TRAINING["share"] * len(x)), len(x) - round(TRAINING["share"] * len(x))])
    model, wanted = Squares(), torch.eye(P)[answers]
    for linear in (model.hidden, model.out):
        nn.init.normal_(linear.weight, 0, linear.weight.shape[1] ** -0.5, generator=generator)
    optimiser = torch.optim.AdamW(
        model.parameters(), TRAINING["lr"], TRAINING["betas"], weight_decay=TRAINING["weight_decay"]
    )
    curves: dict[str, list[float]] = {name: [] for name in ("step", "train", "test", "share")}
    reached: dict[str, dict[str, float]] = {}
    kept: Tensors = {}
    for step in range(TRAINING["steps"] + 1):
        scores = model(x)
        if step % TRAINING["every"] == 0:
            right = (scores.argmax(1) == answers).float()
            W = model.hidden.weight.detach().T
            now = {"step": step, "train": right[seen].mean().item(), "test": right[others].mean().item()}
            now["share"] = neuron_share(W)
            if step % (8 * TRAINING["every"]) == 0:
                for name, value in now.items():
                    curves[name].append(round(value, 4))
            bars = {
                "untrained": step == 0, "fitted": now["train"] == 1, "half": now["test"] >= 0.5,
                "grokked": now["test"] >= 0.99, "end": step == TRAINING["steps"],
            }  # fmt: skip
            for state in [name for name, there in bars.items() if there and name not in reached]:
                energy = by_wave(W).square().sum((1, 2))
                S = torch.linalg.svdvals(W)
                reached[state] = now | {
                    "rank": int((S > 0.1 * S[0]).sum()),
                    "energy": [round(v, 4) for v in (energy / energy.sum()).tolist()],
                }
                kept |= {f"{seed}/{state}/{n}": w.detach().clone() for n, w in model.named_parameters()}
        loss = (scores - wanted)[seen].square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return [{"curves": curves, "states": reached}], kept


def network_of(state: str, seed: int) -> Squares:
    """Load a network in a state; "random" from its end, with random matrices of the same singular values."""
    model, generator = Squares(), torch.Generator().manual_seed(seed)
    start = f"{seed}/{'end' if state == 'random' else state}/"
    found = {name.removeprefix(start): t for name, t in stored("grokked").items() if name.startswith(start)}
    model.load_state_dict(found)
    if state == "random":
        with torch.no_grad():
            for w in model.parameters():
                w.copy_(like(w, generator))
    return model


def settings_of(job: Job) -> Row:
    """Give the settings: those of chapter 35 for tokens, with half as many components again as there are tokens."""
    _, active, seed = job
    return {
        "n_components": 52, "rank": 4, "top_k": float(active), "steps": 800, "restarts": 2, "seed": seed + 1000,
        **WEIGHTS["gentle"],
    }  # fmt: skip


def shapes(parts: apd.Components, W: Tensor) -> Row:
    """Say how much like tokens and how much like frequencies components are.

    Args:
        parts: of the matrix W.
        W: [2p, n].

    Returns:
        Row: `token_cosine` and `wave_cosine`, mean cosines of the best one-to-one match with the rows and with the
            frequencies; `near`, rows with a cosine above 0.9; `token_share` and `wave_share`, the share of a
            component's squared length that lies in one row, or in one frequency: each the largest, and the mean over
            components by their squared length.
    """
    rows, waves = torch.eye(len(W))[:, :, None] * W, by_wave(W)[1:]
    matrices = parts.matrices(HIDDEN).detach()
    matrices = matrices[_in_use(parts)]
    size = matrices.square().sum((1, 2))
    own_rows = matrices.square().sum(2)
    cosines = {name: apd.metrics.ownership(parts, {HIDDEN: t}).cosine for name, t in (("r", rows), ("w", waves))}
    shares = {"token_share": own_rows.amax(1) / own_rows.sum(1), "wave_share": wave_share(matrices)}
    return {
        "token_cosine": cosines["r"].mean().item(), "wave_cosine": cosines["w"].mean().item(),
        "near": int((cosines["r"] > 0.9).sum()),
        **{name: ((v * size).sum() / size.sum()).item() for name, v in shares.items()},
    }  # fmt: skip


@torch.no_grad()
def removed(network: apd.Network, parts: apd.Components, x: Tensor) -> Row:
    """Take parts away one at a time, and give the errors on pairs with the part's token, and on all others.

    Args:
        network: whose first matrix the parts are of.
        parts: C of them; only those in use are taken away. A part's token is the one that it reads most.
        x: every pair [p^2, 2p].

    Returns:
        Row: `own` and `others`, means over parts, as shares of the variance of the outputs.
    """
    y = network.target(x)
    variance = (y - y.mean(0)).square().sum(1).mean()
    errors = []
    for c in _in_use(parts).nonzero().flatten().tolist():
        gates = torch.ones(len(x), parts.n_components)
        gates[:, c] = 0
        error = (network(x, parts, gates) - y).square().sum(1) / variance
        own = x[:, int(parts.matrices(HIDDEN)[c].norm(dim=1).argmax())] > 0
        errors.append(torch.stack([error[own].mean(), error[~own].mean()]))
    return dict(zip(("own", "others"), torch.stack(errors).mean(0).tolist(), strict=True))


def _in_use(parts: apd.Components) -> Tensor:
    """Say which parts are longer than a hundredth of the longest: [C]."""
    norms = parts.matrices(HIDDEN).detach().norm(dim=(1, 2))
    return norms > 0.01 * norms.max()


def cuts(W: Tensor) -> dict[str, apd.Components]:
    """Cut [2p, n] by waves (and the constant), by tokens, and not at all."""
    every = {"frequencies": by_wave(W), "tokens": torch.eye(len(W))[:, :, None] * W, "lump": W[None]}
    return {name: apd.Components.from_matrices({HIDDEN: m}, min(W.shape)) for name, m in every.items()}


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one network apart in one state, and measure what the components are."""
    state, _, seed = job
    target, judge = network_of(state, seed), Judge()
    x = table()[0]
    start = time.process_time()
    found = apd.decompose(target, Pairs(x, 256), [HIDDEN], judge=judge, progress=False, **settings_of(job))
    seconds = time.process_time() - start
    network = apd.Network(target, [HIDDEN])
    W = network.weights[HIDDEN].detach()
    dealt = controls.dealt(found.components, seed, turned=True)
    row = {
        "found": shapes(found.components, W), "dealt": shapes(dealt, W),
        "removed": removed(network, found.components, x), "removed_dealt": removed(network, dealt, x),
        "bits": {"found": judge(network, found.components, x), "dealt": judge(network, dealt, x)}
        | {name: judge(network, parts, x) for name, parts in cuts(W).items()},
        "in_use": int(_in_use(found.components).sum()),
        "seconds": round(seconds, 1),
    }  # fmt: skip
    return [row], {}


def spd_settings(job: tuple[str, int]) -> Row:
    """Give the settings of SPD, those of chapter 38."""
    return each_method.settings_of(("frequency", "SPD", job[1]))


def run_spd(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Take one network apart by SPD, and measure what the components are, one by one and put together."""
    state, seed = job
    target, judge, x, settings = network_of(state, seed), Judge(), table()[0], spd_settings(job)
    network, start = apd.Network(target, [HIDDEN]), time.process_time()
    found = each_method.by_spd(network, Pairs(x, settings.pop("batch")), x, judge, settings)
    seconds = time.process_time() - start
    W = network.weights[HIDDEN].detach()
    row: Row = {"bits_of_cuts": {name: judge(network, parts, x) for name, parts in cuts(W).items()}}
    truths = {"as_tokens": torch.eye(len(W))[:, :, None] * W, "as_frequencies": by_wave(W)}
    for name, parts in (("found", found), ("dealt", controls.dealt(found, seed, turned=True))):
        row[name] = shapes(parts, W) | {"bits": judge(network, parts, x), "in_use": int(_in_use(parts).sum())}
        for what, matrices in truths.items():
            together = each_method.by_truth(parts, {HIDDEN: matrices})
            row[name][what] = apd.metrics.ownership(together, {HIDDEN: matrices}).cosine.mean().item()
    return [row | {"removed": removed(network, found, x), "seconds": round(seconds, 1)}], {}


NETWORKS = Rows(("seed",), lambda rows: [(seed,) for seed in SEEDS], run_network, lambda job: dict(TRAINING))
RUNS = Rows(
    fields=("state", "active", "seed"),
    jobs=lambda rows: (
        [(state, TOKENS, seed) for seed in SEEDS for state in STATES]
        + [(state, WAVES, seed) for seed in SEEDS for state in ("fitted", "end")]
    ),
    run=run,
    settings=lambda job: numbers(settings_of(job)),
    order=lambda job: (STATES.index(job[0]), *job[1:]),
)
BY_SPD = Rows(
    fields=("state", "seed"),
    jobs=lambda rows: [(state, seed) for state in ("end", "random") for seed in SEEDS],
    run=run_spd,
    settings=spd_settings,
)
STUDY = Study("grokked", {"networks": NETWORKS, "runs": RUNS, "spd": BY_SPD}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
