"""Create data/spd.*: stochastic parameter decomposition (bushnaq2025) of the targets of chapter 7 and of an OR.

python -m experiments.spd [--only tms-5-2 | tms-40-10 | or] [--processes N]     (about 25 minutes on one core)

The targets are those of experiments/tms.py. "tied" takes them as they are, with one matrix that is used twice; "untied"
gives the decoder a matrix of its own, with components of its own, as published. Settings were chosen on target seed
100, which is not reported. "short" has about the processor time of the recipe of chapter 7, "long" four times as many
steps and three starts; a third and three times the coefficient, rotated inputs, and the smooth count are run as long.
So are "dearer", the smooth count at twice the price, "frequency", the same count with a charge on frequency, and "VPD",
that with half of the samples under gates that are attacked (bushnaq2026).
The OR is also taken apart with other attributions, by the rule without a k (chapter 28) and by `tune`, all with the
settings that were there for gradients; and by VPD, with SPD's settings but for the penalty, whose weight was chosen on
seed 100.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal import bottleneck
from apd_minimal.attributions import Attribution, inner_activation
from apd_minimal.config import Schedule
from apd_minimal.importance import Importance
from apd_minimal.losses import minimality
from apd_minimal.study.rate import Judge
from apd_minimal.study.tune import tune
from experiments.experiment import Row, Rows, Study, Tensors, factors, ownership_lists, prefix, taken_apart
from experiments.tms import stored_target

Job = tuple[str, str, str, int]  # target, tied or untied, setting, seed
STEPS = {"tms-5-2": {"short": 1000, "long": 4000}, "tms-40-10": {"short": 2500}}
COEFFICIENT = {"tms-5-2": 3e-3, "tms-40-10": 3e-4}
FACTOR = {"a third": 1 / 3, "three times": 3.0}
SMOOTH = {"coefficient": 3e-3, "gamma": ((0.0, 1.0), (1.0, 0.01))}  # the penalty of the later code
FREQUENCY = SMOOTH | {"coefficient": 8e-4, "frequency": 0.5}
VPD = FREQUENCY | {"ascents": 2, "rate": 0.01}
# As dear for a feature as with the charge: f is 0.22 on samples that are not empty, 8e-4 (1 + log2(1 + 32768 f) / 2).
DEARER = SMOOTH | {"coefficient": 6e-3}
LATER: dict[str, dict[str, Any]] = {"smooth": SMOOTH, "dearer": DEARER, "frequency": FREQUENCY, "VPD": VPD}


class Untied(nn.Module):
    """The function of a TMS with a decoder of its own: relu((x Q) W D Q^T + b), D = W^T."""

    def __init__(self, tms: apd.targets.TMS) -> None:
        super().__init__()
        self.encode, self.decode = (nn.Linear(n, d, bias=False) for n, d in _sizes(tms))
        with torch.no_grad():
            self.encode.weight.copy_(tms.encode.weight)
            self.decode.weight.copy_(tms.encode.weight.T)
        self.bias, self.rotation = nn.Parameter(tms.bias.detach().clone()), tms.rotation

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct x [..., n_features]."""
        Q = self.rotation
        out: Tensor = self.decode(self.encode(x if Q is None else x @ Q))
        return torch.relu((out if Q is None else out @ Q.T) + self.bias)


@dataclass(eq=False)
class Attacked(Importance):
    """Importances whose gates are drawn at random on half of the samples, and attacked on the others (bushnaq2026).

    The gates of attacked samples are g + (1 - g) r, for all weights at once. One r [R, sources, C] is kept for the
    whole run, a row for each place in a batch, and goes up the error for some steps of Adam before it is used. The
    scrub loss is the mean of both halves. `scores` must be the run's attribution: by it the attack sees the network.

    Args:
        sources: places in a batch, at least half of the samples that are worked on.
        ascents: steps of the attack on each batch.
        rate: learning rate of the attack.
    """

    sources: int = 512
    ascents: int = 2
    rate: float = 0.01

    def start(self, n_restarts: int, n_components: int, like: Tensor) -> None:
        """Draw the networks, and r in [0, 1]."""
        super().start(n_restarts, n_components, like)
        drawn = torch.rand(n_restarts, self.sources, n_components, generator=torch.Generator().manual_seed(self.seed))
        self.r = drawn.to(like).requires_grad_()
        self.attack = torch.optim.Adam([self.r], lr=self.rate, betas=(0.01, 0.99), maximize=True)

    def scores(self, network: nn.Module | apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        """Give the inner activations [R, B, C], and note what the gates will run."""
        self.runs = network, components, x
        return inner_activation(network, components, x)

    def draw(self, gates: Tensor, noise: Tensor) -> Tensor:
        """Attack the first half of the samples, and draw the gates of the others: [R, B, C]."""
        (network, components, x), n = self.runs, gates.shape[1] // 2
        if len(x) != gates.shape[1]:
            raise ValueError(f"the attack needs the whole batch, got gates of {gates.shape[1]} of {len(x)} samples")
        assert isinstance(network, apd.Network)
        at, own = x[:n], gates[:, :n]
        with torch.no_grad():
            wanted = network(at)
        for _ in range(self.ascents):
            error = minimality(network(at, components, hostile(own.detach(), self.r[:, :n])), wanted).sum()
            self.attack.zero_grad()
            torch.autograd.backward(error, inputs=[self.r])
            self.attack.step()
            self.r.data.clamp_(0, 1)
        attacked = hostile(own, self.r[:, :n].detach())
        return torch.cat([attacked, super().draw(gates[:, n:], noise[:, n:])], 1)


def hostile(gates: Tensor, r: Tensor) -> Tensor:
    """Give gates between the importances and 1, [R, B, C]."""
    return gates + (1 - gates) * r


def _sizes(tms: apd.targets.TMS) -> tuple[tuple[int, int], tuple[int, int]]:
    return (tms.n_features, tms.d_hidden), (tms.d_hidden, tms.n_features)


def after_warm_up(value: float, steps: int) -> Schedule:
    """Give a schedule of 0 for 200 steps, in which only faithfulness is trained, and then of this value."""
    start = min(0.1, 200 / steps)
    return ((0.0, 0.0), (start, 0.0), (start + 1e-6, value))


def recipe(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of `decompose`, and those of `Importance`."""
    name, kind, setting, seed = job
    small = name == "tms-5-2"
    steps = STEPS[name]["short" if setting == "short" else "long"]
    importance: dict[str, Any] = {"coefficient": COEFFICIENT[name] * FACTOR.get(setting, 1.0), "p": 1.0}
    C = 20 if small else 60
    if (later := setting.removesuffix(" rotated")) in LATER:
        importance = dict(LATER[later])
    importance |= {"per_weight": None if kind == "tied" else (C, C)}
    settings = {
        "n_components": C if kind == "tied" else 2 * C,
        "rank": 1,
        "per_weight": None if kind == "tied" else (C, C),
        "steps": steps,
        "lr": 1e-2,
        "warmup": 0.0,
        "init_std": 0.3,
        "faithfulness": 1.0,
        "minimality": 0.0,
        "simplicity": 0.0,
        "scrub": after_warm_up(1.0, steps),
        "tidy_every": 0.0,
        "reseed_until": 0.0,
        "restarts": 3 if small and setting != "short" else 1,
        "seed": seed,
    }
    return settings, importance | {"coefficient": after_warm_up(importance["coefficient"], steps)}


def settings_of(job: Job) -> Row:
    """Return a run's settings, as they are stored."""
    settings, importance = recipe(job)
    config = asdict(apd.Config.from_dict(settings | {"top_k": settings["n_components"]}))
    return config | {"batch_size": batch_size(job), "importance": importance}


def batch_size(job: Job) -> int:
    """Return the number of samples in a batch, empty ones included."""
    return 1024 if job[0] == "tms-5-2" else 512


def target_of(name: str, kind: str, seed: int, rotated: bool = False) -> tuple[apd.targets.TMS, nn.Module, list[str]]:
    """Return a stored target, the network that is decomposed, and its weights."""
    tms = stored_target(name, seed)
    if rotated:
        tms = apd.targets.TMS(tms.n_features, tms.d_hidden)
        tms.load_state_dict(stored_target(name, seed).state_dict())
        tms.rotate(seed=seed)
    if kind == "tied":
        return tms, tms, tms.weights
    return tms, Untied(tms), ["encode.weight", "decode.weight"]


def encoder(components: apd.Components, C: int) -> apd.Components:
    """Keep the first C components, those of the encoder, and of these the encoder's factors."""
    path = "encode.weight"
    return apd.Components({path: components.A[path][:C]}, {path: components.B[path][:C]})


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target, and measure."""
    name, kind, setting, seed = job
    tms, network, weights = target_of(name, kind, seed, setting.endswith("rotated"))
    settings, importance = recipe(job)
    selection = Attacked(**importance) if setting.startswith("VPD") else Importance(**importance)
    result, seconds = taken_apart(
        network,
        settings | {"batches": tms.data(batch_size(job)), "weights": weights, "selection": selection},
        attribution=selection.scores if isinstance(selection, Attacked) else inner_activation,
    )
    C, truth, every = len(selection.parameters()[0][0]), tms.mechanisms(), result.restarts
    assert every is not None
    C = C if kind == "tied" else C // 2
    own = apd.metrics.ownership(encoder(result.components, C), truth)
    x = tms.data(8192)(0, torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        gates = result.final_selection.gates(inner_activation(network, result.components, x))
        wrapped = apd.Network(network, weights)
        wanted, coin = wrapped(x), torch.rand(gates.shape, generator=torch.Generator().manual_seed(seed))
        masks = {"sparse": gates, "rounded": (gates > 0.1).float(), "drawn": gates + (1 - gates) * coin}
        masks["scrubbed"] = torch.maximum(masks["rounded"], (coin < 0.5).float())
        errors = {f"{k}_error": float(minimality(wrapped(x, result.components, m), wanted)) for k, m in masks.items()}
    on = (gates > 0.1)[(x > 0).any(1)].float()
    facts = {
        "seconds": seconds,
        **ownership_lists(own),
        "mmcs": apd.metrics.mmcs(encoder(result.components, C), truth).item(),
        "ml2r": apd.metrics.ml2r(encoder(result.components, C), truth).item(),
        "faithfulness": result.history["faithfulness"][-1][result.chosen],
        **errors,
        "active": [float(part.sum(1).mean()) for part in on.split(C, dim=1)],
        "used": [int((part.mean(0) > 0.001).sum()) for part in on.split(C, dim=1)],
        "scores": result.scores,
        "restarts_owned": [
            int(apd.metrics.ownership(encoder(every.restart(r), C), truth).owned.sum())
            for r in range(len(result.scores))
        ],
    }
    learned = {f"{prefix(job)}importance.{i}": p.detach()[result.chosen] for i, p in enumerate(selection.parameters())}
    return [facts], factors(result.components, prefix(job)) | {k: t.contiguous() for k, t in learned.items()}


def jobs() -> list[Job]:
    """List every run on TMS."""
    small, large = STEPS
    listed: list[Job] = [(small, "untied", setting, seed) for setting in ("long", "short") for seed in range(10, 15)]
    listed += [(small, "tied", "short", seed) for seed in range(10, 13)]
    listed += [(small, "untied", s, seed) for s in ("three times", "a third", "long rotated") for seed in (10, 11)]
    listed += [(small, "untied", setting, seed) for setting in LATER for seed in range(10, 14)]
    listed += [(small, "untied", "VPD rotated", seed) for seed in (10, 11)]
    listed += [(large, "untied", "short", seed) for seed in range(20, 25)]
    return [*listed, (small, "tied", "long", 10)]


class Either(nn.Module):
    """A or B, and C apart: x [B, n] -> [B, 2], the first output min(1, h_0 + h_1), the second h_2, h = relu(W x).

    With two readers of one input, h_0 and h_1 both read A, and each alone would do.
    """

    def __init__(self, readers: int = 1) -> None:
        super().__init__()
        matrix = torch.eye(3) if readers == 1 else torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        self.read = nn.Linear(matrix.shape[1], 3, bias=False)
        with torch.no_grad():
            self.read.weight.copy_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., 2] from x [..., n]."""
        h = torch.relu(self.read(x))
        both = h[..., 0] + h[..., 1]
        return torch.stack([both - torch.relu(both - 1), h[..., 2]], -1)


# Shapley values are exact: six components have 64 coalitions.
BY_TOP_K: dict[str, Attribution] = {
    "top k": apd.attributions.gradient,
    "integrated gradients": partial(apd.attributions.integrated_gradients, n_steps=4),
    "ablation": apd.attributions.ablation,
    "shapley": apd.attributions.shapley,
}
WITHOUT_K: dict[str, Attribution] = {
    "no k": apd.attributions.gradient,
    "no k, shapley": apd.attributions.shapley,
    "tuned": apd.attributions.gradient,
}
BY_IMPORTANCE = ("importance", "VPD")
EITHER_METHODS = (*BY_TOP_K, *BY_IMPORTANCE, *WITHOUT_K)
EITHER_VPD = 5e-3  # of 8e-4, 2e-3 and 5e-3, on seed 100: all are right, and this has nothing on where no input is
EitherJob = tuple[str, int, str, int]  # "or", readers, method, seed


def either_settings(job: EitherJob) -> Row:
    """Return the settings of a run on `Either`.

    By APD's top k at the mean number of inputs that are on, by SPD, by VPD, by the rule without a k, which makes its
    own settings and may use all ranks, or by `tune`, which makes its own k.
    """
    _, readers, method, seed = job
    common = {"n_components": 6, "rank": 1, "steps": 1500, "lr": 1e-2, "restarts": 4, "seed": seed}
    simplicity = {"simplicity": ((0.0, 1.0), (0.7, 0.0))}
    if method in BY_TOP_K:
        return common | {"top_k": 0.3 * (4 - readers)} | simplicity
    if method.startswith("no k"):
        return {"n_components": 6, "rank": 4 - readers, "seed": seed}
    if method == "tuned":
        return {name: value for name, value in common.items() if name != "restarts"} | simplicity
    spd = {"minimality": 0.0, "simplicity": 0.0, "tidy_every": 0.0, "warmup": 0.0, "init_std": 0.5}
    charge: Row = VPD if method == "VPD" else {"p": 1.0}
    price = after_warm_up(EITHER_VPD if method == "VPD" else 1e-2, 1500)
    return common | spd | charge | {"scrub": after_warm_up(1.0, 1500), "coefficient": price}


def take_either_apart(job: EitherJob) -> tuple[apd.Decomposition, Attribution, float]:
    """Decompose `Either`: the result, the attributions that it goes by, and CPU seconds."""
    _, readers, method, _ = job
    settings, target = either_settings(job), Either(readers)
    data = apd.data.SparseFeatures(4 - readers, 0.3, 1.0, 1.0, batch_size=128)
    attribution = (BY_TOP_K | WITHOUT_K).get(method, inner_activation)
    if method in BY_IMPORTANCE:
        own = {name: settings.pop(name) for name in {*VPD, "p"} & set(settings)}
        settings["selection"] = Attacked(**own) if method == "VPD" else Importance(**own)
        attribution = getattr(settings["selection"], "scores", inner_activation)
    given: Row = {"batches": data, "weights": ["read.weight"]}
    if method != "top k":
        given["attribution"] = attribution
    if method == "tuned":
        start = time.process_time()
        best = tune(target, progress=False, **given, **settings).best
        return best, attribution, round(time.process_time() - start, 1)
    if method.startswith("no k"):
        network, x = apd.Network(target, given["weights"]), data(0, torch.Generator().manual_seed(7))
        settings = bottleneck.settings(network, x, 6) | settings | {"judge": Judge(attribution=attribution)}
    result, seconds = taken_apart(target, settings | given)
    return result, attribution, seconds


def run_either(job: EitherJob) -> tuple[list[Row], Tensors]:
    """Decompose `Either`, and say who is active on each of its inputs."""
    _, readers, method, _ = job
    result, attribution, seconds = take_either_apart(job)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * (4 - readers))  # all inputs
    network = apd.Network(Either(readers), ["read.weight"])
    scores, last = attribution(network, result.components, x), result.final_selection
    gates = last.gates(scores) if method in BY_IMPORTANCE else last.active(scores).float()
    with torch.no_grad():
        errors = (network(x, result.components, gates) - network(x)).abs()
    facts = {"seconds": seconds, "inputs": x.tolist(), "gates": gates.tolist(), "errors": errors.tolist()}
    return [facts | {"scores": result.scores}], factors(result.components, prefix(job))


def either_jobs() -> list[EitherJob]:
    """List every run on `Either`; settings were tried on seed 100, with gradients and with SPD."""
    return [("or", readers, method, s) for readers in (1, 2) for method in EITHER_METHODS for s in range(3)]


EITHER = Rows(
    fields=("target", "readers", "method", "seed"),
    jobs=lambda rows: either_jobs(),
    run=run_either,
    settings=either_settings,
)
RUNS = Rows(
    fields=("target", "kind", "setting", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=settings_of,
)
STUDY = Study("spd", {"runs": RUNS, "either": EITHER}, about=lambda processes: {"processes": processes})

if __name__ == "__main__":
    STUDY.main(__doc__)
