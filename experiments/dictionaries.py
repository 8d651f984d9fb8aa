"""Create data/dictionaries.json: transcoders on the planted networks of chapter 33, scored as APD is.

python -m experiments.dictionaries [--only RNN "SSM, all two" ...] [--processes N]      (a quarter of an hour of one core)

The networks are those of data/architectures.json (its "runs"): the same kinds, the first seeds of each. Every weight gets
a transcoder of its own, BatchTopK without a skip path, trained on what its layer reads and writes. A row is what the
rule of the layer's class calls one: a patch, a moment, a token, a node (`NOTES`). A diagonal and a depthwise convolution
have none: `BARE`. Told is the number of mechanisms, by which the number of latents is measured. k is that of the fewest
bits at a fixed error of the layer's own output, on rows that were not seen in training.

A latent is a matrix of rank one, decoder times encoder (chapter 30). It is put with the mechanism that it is most like:
by the truth, in every weight, which is kinder than any rule could be that has to find this out. "scaled" also gives each
mechanism's sum in each weight the best factor, since a latent and its opposite are one matrix, of which a sample has one
half: a perfect transcoder has twice the weight. "covered" leaves out the weights that have no transcoder. Controls get
the same kindness: "turned" are other parts of rank one with the same sum, "untrained" are transcoders as they begin;
"shuffled" are the latents found, each put with a mechanism at random, with as many for each. "alone" is a causal test of
the latents themselves: two mechanisms are on, the latents of one are kept in every layer, and the outputs are compared
with those that the network has where this one is on alone. Settings were made on seed 90, which is not reported.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import isinf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

import apd_minimal as apd
from apd_minimal.study import baselines, controls
from apd_minimal.study.baselines import Dictionary
from experiments.architectures import FIRST, MADE, ORDER
from experiments.experiment import Row, Rows, Study, Tensors
from experiments.planted import Planted

Job = tuple[str, int]
SEEDS = dict.fromkeys(ORDER, 2) | dict.fromkeys(ORDER[:4], 3) | {"selective SSM": 1}
SETTINGS: Row = {"kind": "batch_topk", "grid": (1.5, 2.5, 4.0, 6.0), "latents_each": 8, "steps": 2000, "lr": 3e-3,
                 "batch": 256, "samples": 8192}  # fmt: skip
BARE = ("decay.a", "conv.weight")  # parameters without a matrix between all that is read and all that is written
NOTES = {
    "MLP, all three": "nothing",
    "CNN, own colours": "a row is a patch of 3 by 3 with all colours, one for each place that is written",
    "SSM, all two": "a row is a moment; the decay is a diagonal, and gets none",
    "RNN": "a row is a moment; the state that is read is the network's own",
    "attention": "a row is a token; query reads the last one alone",
    "graph": "a row is a node; others reads its neighbours' mean",
    "experts, one gate": "every expert reads every sample; the router writes one number",
    "bilinear": "nothing",
    "selective SSM": "a row is a moment; the convolution is depthwise, and gets none",
}
Groups = dict[str, Tensor]  # per path, the mechanism of each latent [F]


@torch.no_grad()
def rows_of(network: apd.Network, x: Tensor) -> dict[str, Tensor]:
    """Collect what every layer with a transcoder reads, per path [rows, d_in]."""
    rows: dict[str, list[Tensor]] = {path: [] for path in network.weights if path not in BARE}
    for part in x.split(1024):
        record: list[Any] = []
        network(part, record=record)
        for use in record:
            if use.site.path in rows:
                rows[use.site.path].append(use.rows.flatten(0, -2))
    return {path: torch.cat(own) for path, own in rows.items()}


def trained(W: Tensor, rows: Tensor, held: Tensor, n: int, seed: int, steps: int) -> Dictionary:
    """Train a transcoder of a layer for every k, and keep the one with the fewest bits on rows not seen in training.

    Args:
        W: the layer's matrix [d_in, d_out].
        rows: what it reads [rows, d_in].
        held: more of them, for the choice.
        n: number of mechanisms.
        seed: of the first weights and the batches.
        steps: of training.
    """
    layer = nn.Sequential(nn.Linear(*W.shape, bias=False))
    layer[0].weight.data = W.T.contiguous()
    places: Row = {"reads": "input of 0", "writes": "output of 0"}

    def batches(step: int, generator: torch.Generator) -> Tensor:
        return rows[torch.randint(len(rows), (SETTINGS["batch"],), generator=generator)]

    tried = []
    for k in SETTINGS["grid"]:
        own = baselines.fit(
            layer, batches, n_features=SETTINGS["latents_each"] * n, kind=SETTINGS["kind"], sparsity=k, steps=steps,
            lr=SETTINGS["lr"], seed=seed, **places,
        )  # fmt: skip
        found = baselines.costs(layer, own, held, **places)
        bits = [cost.bits() for cost in found]
        error = float((own(held) - held @ W).square().sum())
        tried.append(((sum(map(isinf, bits)), sum(b for b in bits if not isinf(b)), error), k, own))
    return min(tried, key=lambda one: one[:2])[2]


def groups_of(parts: apd.Components, truth: dict[str, Tensor]) -> Groups:
    """Give the mechanism that each part is most like, in each weight: by the truth."""
    return {
        path: (
            normalize(parts.matrices(path).detach().flatten(1), dim=1) @ normalize(truth[path].flatten(1), dim=1).T
        ).abs().argmax(1)
        for path in parts.paths
    }  # fmt: skip


def put_together(parts: apd.Components, groups: Groups, truth: dict[str, Tensor], scaled: bool) -> dict[str, Tensor]:
    """Sum the parts of each group, per path [n, d_in, d_out]; zero where there are none.

    Args:
        parts: components of some of the weights.
        groups: the mechanism of each part.
        truth: the mechanisms in all weights.
        scaled: with the factor for each mechanism and weight that brings it nearest to the truth.
    """
    found = {path: torch.zeros_like(Z) for path, Z in truth.items()}
    for path in parts.paths:
        P, Z = parts.matrices(path).detach(), truth[path]
        found[path] = torch.einsum("cj,cio->jio", one_hot(groups[path], len(Z)).to(P), P)
        if scaled:
            both, own = (found[path] * Z).sum((1, 2)), found[path].square().sum((1, 2))
            found[path] *= (both / own.clamp_min(1e-12))[:, None, None]
    return found


def weighed(parts: apd.Components, groups: Groups, truth: dict[str, Tensor]) -> Row:
    """Measure what is owned: as it is, with the best factors, and of these the weights that are covered."""
    row: Row = {}
    for name in ("as it is", "scaled", "covered"):
        found = put_together(parts, groups, truth, scaled=name != "as it is")
        paths = parts.paths if name == "covered" else list(truth)
        own = apd.metrics.ownership(
            apd.Components.from_matrices({path: found[path] for path in paths}), {path: truth[path] for path in paths}
        )
        row[name] = {"owned": int(own.owned.sum()), "cosine": [round(v, 4) for v in own.cosine.tolist()]}
    return row


@contextmanager
def in_place(network: apd.Network, found: dict[str, Dictionary], kept: dict[str, Tensor] | None) -> Iterator[None]:
    """Put what transcoders write in the place of their layers' outputs; of the latents only those kept [F]."""

    def edit(site: Any) -> Any:
        own, keep = found[site.path], None if kept is None else kept[site.path]

        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            rows = site.rule.rows(args[0])
            flat = rows.flatten(0, -2)
            codes = own.encode(flat) if keep is None else own.encode(flat) * keep
            return site.rule.unrows(own.decode(codes, flat).unflatten(0, rows.shape[:-1]), out)

        return hook

    with ExitStack() as undo, torch.no_grad():
        for site in network.sites:
            if site.path in found:
                undo.callback(site.module.register_forward_hook(edit(site)).remove)
        yield


@torch.no_grad()
def alone(target: Planted, found: dict[str, Dictionary], groups: Groups, size: int = 256) -> list[float]:
    """Measure for every mechanism j how near its latents come to what it does, where another is on as well.

    Args:
        target: the network.
        found: a transcoder for each weight that has one.
        groups: the mechanism of each latent.
        size: number of samples, of which the other mechanisms get equal shares.

    Returns:
        list[float]: 1 - the squared error over the squared outputs of the mechanism alone, 0 at least.
    """
    network, found_by, eye = apd.Network(target, target.weights), [], torch.eye(target.n)
    for j in range(target.n):
        others = eye[[i for i in range(target.n) if i != j]].repeat(-(-size // (target.n - 1)), 1)
        one, two = (target.make(eye[j] + o, torch.Generator().manual_seed(30_000 + j)) for o in (0 * others, others))
        wanted = target(one)
        with in_place(network, found, {path: group == j for path, group in groups.items()}):
            error = (target(two) - wanted).square().sum() / wanted.square().sum()
        found_by.append(round(max(0.0, 1 - float(error)), 4))
    return found_by


def measured(target: Planted, found: dict[str, Dictionary], x: Tensor, seed: int, control: bool = False) -> Row:
    """Score transcoders by their weights and by what they do; and, if asked for, the controls made of their latents."""
    truth, network = target.mechanisms(), apd.Network(target, target.weights)
    parts = {path: baselines.transcoded(own, path) for path, own in found.items()}
    both = apd.Components({p: c.A[p] for p, c in parts.items()}, {p: c.B[p] for p, c in parts.items()})
    groups = groups_of(both, truth)
    y = target(x).detach()
    with in_place(network, found, None):
        error = float((target(x) - y).square().sum() / (y - y.mean(0)).square().sum())
    row: Row = {"error": error, "found": weighed(both, groups, truth) | {"alone": alone(target, found, groups)}}
    if control:
        turned = controls.dealt(both, seed, turned=True)
        generator = torch.Generator().manual_seed(seed)
        other = {path: own[torch.randperm(len(own), generator=generator)] for path, own in groups.items()}
        row["turned"] = weighed(turned, groups_of(turned, truth), truth)
        row["shuffled"] = weighed(both, other, truth) | {"alone": alone(target, found, other)}
    return row


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train the transcoders of one network, and measure them."""
    kind, seed = job
    target = MADE[kind](seed=seed)
    network, start = apd.Network(target, target.weights), time.process_time()
    draw = target.data(SETTINGS["samples"])
    rows = rows_of(network, draw(0, torch.Generator().manual_seed(10_000 + seed)))
    x = target.data(2048)(0, torch.Generator().manual_seed(20_000 + seed))
    held = {path: own[:4096] for path, own in rows_of(network, x[:1024]).items()}
    found, plain = (
        {path: trained(network.weights[path], rows[path], held[path], target.n, seed + i, steps)
         for i, path in enumerate(rows)}
        for steps in (SETTINGS["steps"], 1)
    )  # fmt: skip
    row = measured(target, found, x[1024:], seed, control=True)
    row["untrained"] = measured(target, plain, x[1024:], seed)["found"]
    row["layers"] = {path: {"k": own.sparsity, "rows": len(rows[path]) / SETTINGS["samples"]} for path, own in found.items()}
    row["bare"] = [path for path in target.weights if path in BARE]
    return [row | {"note": NOTES[kind], "seconds": round(time.process_time() - start, 1)}], {}


RUNS = Rows(
    fields=("kind", "seed"),
    jobs=lambda rows: [(kind, FIRST + i) for kind, n in SEEDS.items() for i in range(n)],
    run=run,
    settings=lambda job: SETTINGS | {"seed": job[1]},
    order=lambda job: (ORDER.index(job[0]), job[1]),
)
STUDY = Study("dictionaries", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
