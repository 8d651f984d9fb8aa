"""Create data/tied.json: modular addition taken apart into parts that a shift of the tokens maps to themselves.

python -m experiments.tied [--only always switched] [--processes N]      (about ten minutes of one core)

Chapter 35. The network adds modulo 13 with all six frequencies and one-hot inputs, and both matrices are taken apart.
A part is tied if a shift of the tokens of a, of b, and of the answers with them, turns the waves in it and nothing
else. By Schur's lemma that leaves one complex number for each block (what a frequency reads of a, reads of b, or
writes): how long the block is, and how far it is turned. So the tied network (`Tied`) has 18 weights of two numbers,
whose lengths are the singular values of the blocks, and `decompose` runs on it as it is. The losses are those of the
whole matrices. What is found is put back into whole matrices (`Tied.whole`) before it is judged.

- "always": every frequency is on in every sample.
- "switched": each frequency is open on a fifth of the samples, independently.

With as many components as frequencies, and as many on, or with room for the 26 tokens beside them; tied, and as a
control untied. Seeds 7700 to 7704, and 1,000 more for the decomposition. There is one network of each kind: seeds are
other searches, not other targets. The weights of `modular` to take, and twelve
starts in place of four where tied components are six, were settled on seed 90.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.study.rate import Judge
from apd_minimal.targets.modular import GRID, ModularArithmetic, ModularTask
from experiments.experiment import Row, Rows, Study, Tensors, numbers, scaled
from experiments.modular import WEIGHTS

Job = tuple[str, str, int, int]  # kind, "tied" or "untied", number of components, seed
HIDDEN, OUT = "hidden.weight", "out.weight"
ACTIVE = {("always", 6): 6.0, ("switched", 6): 1.2, ("switched", 32): 3.2}  # two tokens more where there is room


def jobs() -> list[Job]:
    """List the runs. Untied ones on a network that is always on are in `modular`."""
    ways = [("always", "tied", 6), *(("switched", way, n) for way in ("tied", "untied") for n in (6, 32))]
    return [(*way, seed) for way in ways for seed in range(7700, 7705)]


def target_of(kind: str) -> ModularArithmetic:
    """Write the network down."""
    return ModularArithmetic([ModularTask(13)], switches="frequency" if kind == "switched" else None)


class Tied(nn.Module):
    """The same function as the target's, of one complex number for each block: [B, 2 p + S] -> [B, p].

    Args:
        target: one addition with one-hot inputs, as it was written.
    """

    basis: Tensor

    def __init__(self, target: ModularArithmetic) -> None:
        super().__init__()
        self.switched, self.p, truth = target.switches is not None, target.n, target.mechanisms()
        waves = target.tasks[0].waves(self.p).unflatten(1, (-1, 2)).permute(1, 2, 0)  # [F, (cos, sin), p]
        blocks = []
        for f, (c, s) in enumerate(waves):
            quarter = 2 / self.p * (torch.outer(c, s) - torch.outer(s, c))  # turns both waves by a quarter
            own = slice(GRID * f, GRID * (f + 1))
            both, write = truth[HIDDEN][f, :, own].unflatten(0, (2, -1)), truth[OUT][f, own].T  # [(a, b), p, 9], [p, 9]
            # Answers turn the other way: in cos(w (a + b - q)) they have a minus.
            turned = torch.cat([quarter @ both, -quarter @ write[None]])
            blocks.append(torch.stack([torch.cat([both, write[None]]), turned], 1))
        found = torch.stack(blocks)  # [F, (a, b, out), (as it is, turned), p, 9]
        self.size = float(torch.linalg.matrix_norm(found[0, 0, 0], ord=2))  # both singular values of every block
        self.register_buffer("basis", found / self.size)
        self.blocks = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(3 * len(waves)))
        for block in self.blocks:
            block.weight.data = torch.tensor([[self.size, 0.0]])
        self.weights = [f"blocks.{i}.weight" for i in range(len(self.blocks))]  # of a, of b, of answers; then the next

    def opens(self, x: Tensor) -> Tensor:
        """Say which frequencies are open: [B, F]."""
        return x[:, 2 * self.p :] if self.switched else x.new_ones(len(x), len(self.basis))

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores [B, p] of inputs [B, 2 p + S]."""
        tokens, scores = x[:, : 2 * self.p].unflatten(1, (2, -1)), x.new_zeros(len(x), self.p)
        for f, is_open in enumerate(self.opens(x).T):
            *read, write = self.blocks[3 * f : 3 * f + 3]
            rows = torch.einsum("bsp,srpj->sbjr", tokens, self.basis[f, :2])
            squares = (read[0](rows[0]) + read[1](rows[1]))[..., 0].square() * is_open[:, None]
            scores = scores + write(torch.einsum("bj,rpj->bpr", squares, self.basis[f, 2]))[..., 0]
        return scores

    def attribution(self, network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        """Work out gradient attributions in closed form, [(R,) B, C]: switches count, and tokens do not.

        To first order a frequency's scores move by the sum of its three complex numbers, each over its size.
        """
        moves = torch.stack([components.matrices(path).detach()[..., 0] for path in self.weights], -2) / self.size
        lengths = moves.unflatten(-2, (-1, 3)).sum(-2).square().sum(-1)  # [..., C, F]
        return torch.einsum("...cf,bf->...bc", lengths, self.opens(x)).mul(2).sqrt() / self.p

    def whole(self, components: apd.Components) -> apd.Components:
        """Put tied components into the target's matrices, [C, 2 p, n] and [C, n, p]."""
        pairs = torch.stack([components.matrices(path).detach()[..., 0] for path in self.weights], 1)  # [C, 3 F, 2]
        a, b, out = torch.einsum("cfsr,fsrpj->scpfj", pairs.unflatten(1, (-1, 3)), self.basis).flatten(3)
        return apd.Components.from_matrices({HIDDEN: torch.cat([a, b], 1), OUT: out.mT})


def settings_of(job: Job) -> Row:
    """Give the settings. Two losses are means over entries: 36 tied numbers, each of two singular values, for 2,106."""
    kind, way, n_components, seed = job
    tied, few = way == "tied", n_components == 6
    settings: dict[str, Any] = WEIGHTS["gentle"] | {
        "n_components": n_components, "top_k": ACTIVE[kind, n_components], "seed": seed + 1000,
        "rank": None if tied or few else 4, "steps": 400 if tied else 800, "restarts": 12 if tied and few else 4,
    }  # fmt: skip
    shared = {name: scaled(settings[name], 2 * 36 / 2106) for name in ("faithfulness", "simplicity")}
    return settings | shared if tied else settings


def shares(components: apd.Components) -> Row:
    """Say how much of the parts' squared length lies in their largest frequency, and of what they read in one token."""
    reads, writes = (components.matrices(path).detach().square() for path in (HIDDEN, OUT))
    waves, tokens = (reads.sum(1) + writes.sum(2)).unflatten(1, (-1, GRID)).sum(2), reads.sum(2)
    large = int((waves.sum(1) > 0.01 * waves.sum(1).max()).sum())
    wave, token = (round((t.amax(1).sum() / t.sum()).item(), 4) for t in (waves, tokens))
    return {"wave": wave, "token": token, "used": large}


def shuffled(components: apd.Components, seed: int) -> apd.Components:
    """Draw anew which component has which part of a weight; the sum is the same."""
    generator = torch.Generator().manual_seed(seed)
    order = {path: torch.randperm(components.n_components, generator=generator) for path in components.paths}
    A, B = ({path: own[path][o] for path, o in order.items()} for own in (components.A, components.B))
    return apd.Components(A, B)


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take the network apart, and measure what is found in whole matrices, beside frequencies, a lump and chance."""
    kind, way, _, seed = job
    target, tied = target_of(kind), way == "tied"
    model, network = Tied(target), apd.Network(target, [HIDDEN, OUT])
    truth, x = target.mechanisms(), target.data(1024)(0, torch.Generator().manual_seed(20_000 + seed))

    def whole(components: apd.Components) -> apd.Components:
        return model.whole(components) if tied else components

    def bits(parts: apd.Components) -> float:
        return Judge()(network, parts, x)

    start = time.process_time()
    some, weights = (model, model.weights) if tied else (target, target.weights)
    found = apd.decompose(
        some, target.data(64 if tied else 256), weights, attribution=model.attribution if tied else None,
        judge=lambda _, components, held_out: Judge()(network, whole(components), held_out[:1024]), progress=False,
        **settings_of(job),
    )  # fmt: skip
    seconds = time.process_time() - start
    every = found.restarts
    assert every is not None and every.restarts is not None
    starts, parts = [whole(every.restart(r)) for r in range(every.restarts)], whole(found.components)
    own, made = apd.metrics.ownership(parts, truth), apd.Components.from_matrices
    dealt = whole(shuffled(found.components, seed)) if tied else controls.dealt(parts, seed)
    mix = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed)).mul(4).softmax(0)  # its columns sum to one
    row = {
        "owned": int(own.owned.sum()), "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "owned_by_restart": [int(apd.metrics.ownership(c, truth).owned.sum()) for c in starts],
        "faithfulness": apd.metrics.relative_faithfulness(parts, network.weights).item(),
        "found": shares(parts), "starts": [shares(c) for c in starts], "dealt": shares(dealt),
        "dealt_cosine": apd.metrics.ownership(dealt, truth).cosine.mean().item(),
        "scores": found.scores, "bits": bits(parts), "bits_dealt": bits(dealt), "bits_frequencies": bits(made(truth)),
        "bits_lump": bits(made({path: m.sum(0)[None] for path, m in truth.items()})),
        "bits_mixed": bits(made({path: torch.einsum("dc,cij->dij", mix, m) for path, m in truth.items()})),
        "seconds": round(seconds, 1),
    }  # fmt: skip
    return [row], {}


RUNS = Rows(
    fields=("kind", "way", "n_components", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=lambda job: numbers(settings_of(job)),
)
STUDY = Study("tied", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
