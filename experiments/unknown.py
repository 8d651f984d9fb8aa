"""Create data/unknown.*: a perceptron whose mechanisms nobody knows, taken apart with several C and k (chapter 12).

python -m experiments.unknown [--processes N]     (two minutes of one core)

Short runs choose C and k, the long one is judged; all starts are kept. There is one network, seed 0.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from experiments.experiment import Row, Rows, Study, Tensors, factors, numbers, taken_apart

WEIGHTS = ["0.weight", "2.weight", "4.weight"]
N_QUESTIONS = 8
POWERS = torch.tensor([4, 2, 1])
SETTINGS: dict[str, dict[str, Any]] = {
    "losses": {"faithfulness": 100.0, "minimality": 1.0, "scrub": 0.5, "simplicity": ((0.0, 3.0), (0.7, 0.0))},
    "short": {"steps": 200, "restarts": 2},
    "full": {"steps": 800, "restarts": 4},
}
JOBS = [("short", C, k) for C, k in ((12, 0.5), (12, 1.0), (12, 2.0), (12, 4.0), (6, 2.0), (24, 2.0))]
JOBS += [("full", 12, 2.0)]
Job = tuple[str, int, float]  # length, C, k


def answers(b: Tensor) -> Tensor:
    """Answer all questions about bits [n, 8]: 0 or 1, [n, 8]."""
    asked = [
        b[:, 0],
        b[:, 0] * b[:, 1],
        b[:, 0] ^ b[:, 1],
        (b[:, 2:5].sum(1) >= 2).long(),
        b[:, 2] ^ b[:, 3],
        b[:, 4] ^ b[:, 5] ^ b[:, 6],
        (b[:, :3] @ POWERS > b[:, 3:6] @ POWERS).long(),
        (b[:, 4:].sum(1) >= 2).long(),
    ]
    return torch.stack(asked, 1)


def samples(generator: torch.Generator, n: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Draw inputs [n, 16], the question asked [n], the right answer [n]."""
    bits = torch.randint(0, 2, (n, 8), generator=generator)
    asked = torch.randint(0, N_QUESTIONS, (n,), generator=generator)
    token = nn.functional.one_hot(asked, N_QUESTIONS)
    return torch.cat([2 * bits - 1, token], 1).float(), asked, answers(bits).gather(1, asked[:, None])[:, 0]


@cache
def network() -> nn.Sequential:
    """Train the perceptron."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    net = nn.Sequential(*layers)
    adam = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2500):
        inputs, _, answer = samples(generator)
        loss = nn.functional.cross_entropy(net(inputs), answer)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return net


def settings_of(job: Job) -> dict[str, Any]:
    """Return the settings of a run."""
    length, n_components, k = job
    return {
        "weights": WEIGHTS,
        "n_components": n_components,
        "top_k": k,
        "divergence": "kl",
        "rank": 4,
        "seed": 0,
        **SETTINGS["losses"],
        **SETTINGS[length],
    }


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take the network apart with one setting."""
    length, n_components, k = job
    net = network()
    batches = {"batches": lambda step, generator: samples(generator, 256)[0]}
    result, seconds = taken_apart(net, settings_of(job), **batches)
    assert result.restarts is not None
    tensors = {f"net.{name}": t.detach() for name, t in net.state_dict().items()}
    for r in range(result.config.restarts):
        tensors |= factors(result.restarts.restart(r), f"{length}/{n_components}/{k}/{r}/")
    return [{"seconds": seconds, "chosen": result.chosen, "scores": list(result.scores)}], tensors


RUNS = Rows(("length", "C", "k"), lambda rows: JOBS, run, lambda job: numbers(settings_of(job)), JOBS.index)
STUDY = Study("unknown", {"runs": RUNS}, prefixes=lambda job: ("net.", "/".join(map(str, job)) + "/"))

if __name__ == "__main__":
    STUDY.main(__doc__)
