"""Create data/dictionaries.json: transcoders on the planted networks of chapter 33, scored as APD is.

python -m experiments.dictionaries [--only RNN "SSM, all two" ...] [--processes N]         (a quarter of an hour)

The networks are the first of each kind in "runs" of data/architectures.json. Every weight gets a transcoder of its own
(BatchTopK, no skip path) of what its layer reads and writes, row by row, as the rule of the layer's class has it
(`NOTES`). Told is the number of mechanisms. k and learning rate are those of the fewest bits at a fixed error of the
layer's own output, on rows not seen in training.

A latent is a matrix of rank one, decoder times encoder (chapter 30), here times how often it is on, since a latent and
its opposite are one matrix of which a row has one half. For a diagonal and a depthwise convolution (`BARE`) that is no
part of the parameter, but a full matrix; what lies where the parameter has entries is cut out of it by a rule made for
them here, and "without" counts these parameters as not covered. Two rules put latents of all weights together: "truth",
each with the mechanism that it is most like, kinder than a rule that must find that out; and "codes", as many groups as
mechanisms, of latents that are on on the same samples, without a truth. Each group's sum in a weight gets a factor, so
that all come as near as they can to the weight. Controls: "turned" are other parts with the same sum, "untrained" are
transcoders as they begin, both put together by the truth; "shuffled" are the latents found, each with a mechanism at
random. "alone" tests what latents do: two mechanisms are on, every layer keeps the latents of one, and the outputs are
compared with those that the network has where this one is on alone.

Settings and rules were made on seed 90 of the kinds of the goal, in some thirty runs, with ownership in view; the other
kinds were run there for a hundred steps, to see that they run. "where" has the cosines in each weight on three networks
of which little is owned.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from math import isinf
from typing import Any

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize, one_hot

import apd_minimal as apd
from apd_minimal.study import baselines, controls
from apd_minimal.study.baselines import Dictionary
from experiments.architectures import FIRST, MADE, ORDER
from experiments.experiment import Row, Rows, Study, Tensors
from experiments.planted import Planted

Job = tuple[str, int]
SEEDS = dict.fromkeys(ORDER, 2) | dict.fromkeys(ORDER[:4], 3) | {"selective SSM": 1}
SETTINGS: Row = {"kind": "batch_topk", "k": (2.5, 4.0), "lr": 1e-2, "shares_of_lr": (0.3, 1.0), "latents_each": 16,
                 "steps": 2000, "batch": 256, "samples": 8192}  # fmt: skip
BARE = ("decay.a", "conv.weight")  # parameters [kernel, channels] that use every channel by itself
LEAST = 0.005  # share of the samples on which a latent is on, to be put into a group
NOTES = {
    "CNN, own colours": "a row is a patch of 3 by 3",
    "SSM, all two": "a row is a moment; cut to the diagonal",
    "RNN": "a row is a moment",
    "attention": "a row is a token; query: the last one",
    "graph": "a row is a node, or its neighbours' mean",
    "selective SSM": "a row is a moment; cut to each channel",
}  # what had to be said to run them at all; nothing for the others
WHERE = (("MLP, all three", FIRST + 1), ("experts, one gate", FIRST), ("bilinear", FIRST))  # seen after the runs
Groups = dict[str, Tensor]  # per path, the group of each latent [F], n for none


@torch.no_grad()
def rows_of(network: apd.Network, x: Tensor) -> dict[str, Tensor]:
    """Collect what every layer reads, per path [B, rows of a sample, d_in]; all channels are one row."""
    record: list[Any] = []
    network(x, record=record)
    seen: dict[str, list[Tensor]] = {path: [] for path in network.weights}
    for use in record:
        rows = use.rows.flatten(-2) if use.site.path in BARE else use.rows
        seen[use.site.path].append(rows.reshape(len(x), -1, rows.shape[-1]))
    return {path: torch.cat(rows, 1) for path, rows in seen.items()}


def full(path: str, W: Tensor) -> Tensor:
    """Give the matrix [channels * kernel, channels] of a parameter of `BARE` [kernel, channels]; others as they are."""
    return torch.diag_embed(W).movedim(1, 0).flatten(0, 1) if path in BARE else W


def cut(path: str, M: Tensor) -> Tensor:
    """Keep of matrices [C, d_in, d_out] what `full` writes: for `BARE` [C, kernel, channels]; others as they are."""
    return M.unflatten(1, (M.shape[2], -1)).diagonal(dim1=1, dim2=3) if path in BARE else M


def trained(W: Tensor, rows: Tensor, held: Tensor, n: int, seed: int, steps: int) -> Dictionary:
    """Train transcoders of a layer W [d_in, d_out] on what it reads [rows, d_in]; take the fewest bits on `held`."""
    layer = nn.Sequential(nn.Linear(len(W), W.shape[1], bias=False))
    layer[0].weight.data = W.T.contiguous()
    places: Row = {"reads": "input of 0", "writes": "output of 0"}

    def batches(step: int, generator: torch.Generator) -> Tensor:
        return rows[torch.randint(len(rows), (SETTINGS["batch"],), generator=generator)]

    tried = []
    for k, share in product(SETTINGS["k"], SETTINGS["shares_of_lr"]):
        settings = {"kind": SETTINGS["kind"], "sparsity": k, "lr": share * SETTINGS["lr"], "steps": steps, "seed": seed}
        own = baselines.fit(layer, batches, n_features=SETTINGS["latents_each"] * n, **places, **settings)
        bits = [cost.bits() for cost in baselines.costs(layer, own, held, **places)]
        error = float((own(held).detach() - held @ W).square().sum())
        tried.append(((sum(map(isinf, bits)), sum(b for b in bits if not isinf(b)), error), k, own))
    return min(tried, key=lambda one: one[:2])[2]


def by_truth(parts: apd.Components, truth: dict[str, Tensor]) -> Groups:
    """Give the mechanism that each part is most like, in each weight."""
    matrices = {path: parts.matrices(path).detach().flatten(1) for path in parts.paths}
    return {path: (normalize(P) @ normalize(truth[path].flatten(1)).T).abs().argmax(1) for path, P in matrices.items()}


def by_codes(on: dict[str, Tensor], n: int) -> Groups:
    """Put latents, on or off [B, rows of a sample, F], into n groups, by which others of all weights they come with."""
    every = torch.cat([own.any(1) for own in on.values()], 1).float()
    used = every.mean(0) > LEAST
    groups = torch.full((every.shape[1],), n)
    profiles = torch.corrcoef(torch.corrcoef(every[:, used].T).nan_to_num()).nan_to_num()  # 0 for what is always on
    i, j = torch.triu_indices(len(profiles), len(profiles), 1)
    merged = linkage((1 - profiles[i, j]).clamp_min(0).numpy(), "average")
    groups[used] = torch.as_tensor(fcluster(merged, n, "maxclust") - 1).long()
    return dict(zip(on, groups.split([own.shape[2] for own in on.values()]), strict=True))


def put_together(parts: apd.Components, groups: Groups, weights: dict[str, Tensor], n: int) -> apd.Components:
    """Sum the parts of every group, times the factors that bring the sum of all nearest to the weight."""
    found = {path: torch.zeros(n, *W.shape) for path, W in weights.items()}
    for path in parts.paths:
        P = parts.matrices(path).detach()
        sums = torch.einsum("cj,cio->jio", one_hot(groups[path], n + 1)[:, :n].to(P), P)
        wanted = weights[path].flatten()[:, None]
        factors = torch.linalg.lstsq(sums.flatten(1).T, wanted, driver="gelsd").solution
        found[path] = sums * factors[:, :, None]
    return apd.Components.from_matrices(found)


@contextmanager
def in_place(network: apd.Network, found: dict[str, Dictionary], kept: dict[str, Tensor] | None) -> Iterator[None]:
    """Put what transcoders write in the place of their layers' outputs; of the latents only those kept [F]."""

    def edit(site: Any, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        rows, own, bare = site.rule.rows(args[0]), found[site.path], site.path in BARE
        rows = rows.flatten(-2) if bare else rows
        codes = own.encode(rows.flatten(0, -2)) * (1 if kept is None else kept[site.path])
        y = own.decode(codes, rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])
        return (y if y.shape == out.shape else y.mT) if bare else site.rule.unrows(y, out)

    with ExitStack() as undo, torch.no_grad():
        for site in network.sites:
            hook = site.module.register_forward_hook(lambda *given, site=site: edit(site, *given))
            undo.callback(hook.remove)
        yield


def alone(target: Planted, found: dict[str, Dictionary], groups: Groups, owner: Tensor) -> list[float]:
    """Measure how near the group of each mechanism, owner [n], comes to what it does, where another is on as well.

    Returns 1 - the squared error over the squared outputs of the mechanism alone, 0 at least.
    """
    network, eye, scores = apd.Network(target, target.weights), torch.eye(target.n), []
    for j in range(target.n):
        others = eye[[i for i in range(target.n) if i != j]].repeat(50, 1)
        one, two = (target.make(eye[j] + o, torch.Generator().manual_seed(j)) for o in (0 * others, others))
        wanted = target(one).detach()
        with in_place(network, found, {path: group == owner[j] for path, group in groups.items()}):
            error = (target(two) - wanted).square().sum() / wanted.square().sum()
        scores.append(round(max(0.0, 1 - float(error)), 4))
    return scores


def parts_of(network: apd.Network, found: dict[str, Dictionary], x: Tensor) -> tuple[apd.Components, dict[str, Tensor]]:
    """Turn latents into components, each times how often it is on; also say when, [B, rows of a sample, F]."""
    A, B, on = {}, {}, {}
    for path, rows in rows_of(network, x).items():
        on[path] = (found[path].encode(rows.flatten(0, 1)) > 0).unflatten(0, rows.shape[:2])
        one = baselines.transcoded(found[path], path)
        one = apd.Components.from_matrices({path: cut(path, one.matrices(path))}) if path in BARE else one
        A[path], B[path] = on[path].float().mean((0, 1))[:, None, None] * one.A[path], one.B[path]
    return apd.Components(A, B), on


def measured(target: Planted, found: dict[str, Dictionary], x: Tensor, seed: int) -> Row:
    """Score transcoders and the controls made of their latents, by weights and by what they do."""
    network, truth, n = apd.Network(target, target.weights), target.mechanisms(), target.n
    parts, on = parts_of(network, found, x)
    turned, groups = controls.dealt(parts, seed, turned=True), by_truth(parts, truth)
    draws = torch.Generator().manual_seed(seed)
    shuffled = {path: own[torch.randperm(len(own), generator=draws)] for path, own in groups.items()}
    y = target(x).detach()
    with in_place(network, found, None):
        error = (target(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    row: Row = {"error": float(error)}
    ways = {
        "truth": (parts, groups), "codes": (parts, by_codes(on, n)), "turned": (turned, by_truth(turned, truth)),
        "shuffled": (parts, shuffled),
    }  # fmt: skip
    for name, (own_parts, own_groups) in ways.items():
        whole, row[name] = put_together(own_parts, own_groups, network.weights, n), {}
        for which in ("without", "all"):
            some = {p: whole.matrices(p) * (which == "all" or p not in BARE) for p in truth}
            held = apd.metrics.ownership(apd.Components.from_matrices(some), truth)
            cosine = [round(v, 4) for v in held.cosine.tolist()]
            row[name][which] = {"owned": int(held.owned.sum()), "cosine": cosine}
        row[name] |= {} if name == "turned" else {"alone": alone(target, found, own_groups, held.owner)}
    return row


def inputs(job: Job, target: Planted) -> tuple[Tensor, ...]:
    """Draw inputs to train on, to choose on and to measure on."""
    sizes = ((10_000, SETTINGS["samples"]), (15_000, 1024), (20_000, 4096))
    return tuple(target.data(size)(0, torch.Generator().manual_seed(first + job[1])) for first, size in sizes)


def transcoders(job: Job, target: Planted, steps: int) -> dict[str, Dictionary]:
    """Train a transcoder for each weight of a network."""
    network, (some, held, _) = apd.Network(target, target.weights), inputs(job, target)
    seen, kept = ({p: own.flatten(0, 1) for p, own in rows_of(network, x).items()} for x in (some, held))
    return {
        p: trained(full(p, W), seen[p], kept[p][:4096], target.n, 100 * job[1] + i, steps)
        for i, (p, W) in enumerate(network.weights.items())
    }


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train the transcoders of one network, and measure them."""
    target, start = MADE[job[0]](seed=job[1]), time.process_time()
    found, plain = (transcoders(job, target, steps) for steps in (SETTINGS["steps"], 1))
    x = inputs(job, target)[2]
    row = measured(target, found, x, job[1]) | {"untrained": measured(target, plain, x, job[1])["truth"]}
    rows = rows_of(apd.Network(target, target.weights), x[:1])
    row["k"] = {path: own.sparsity for path, own in found.items()}
    row["rows"] = {path: float(own.shape[1]) for path, own in rows.items()}
    row |= {"bare": [path for path in target.weights if path in BARE], "note": NOTES.get(job[0], "nothing")}
    return [row | {"seconds": round(time.process_time() - start, 1)}], {}


def where() -> list[Row]:
    """Give the cosines in each weight, put together by the truth, on networks of which little is owned (`WHERE`)."""
    rows = []
    for job in WHERE:
        target = MADE[job[0]](seed=job[1])
        network, truth = apd.Network(target, target.weights), target.mechanisms()
        parts, _ = parts_of(network, transcoders(job, target, SETTINGS["steps"]), inputs(job, target)[2])
        whole = put_together(parts, by_truth(parts, truth), network.weights, target.n)
        each = {p: cosine_similarity(whole.matrices(p).flatten(1), Z.flatten(1)).tolist() for p, Z in truth.items()}
        rows.append({"kind": job[0], "seed": job[1], "cosines": each})
    return rows


RUNS = Rows(
    fields=("kind", "seed"),
    jobs=lambda rows: [(kind, FIRST + i) for kind, n in SEEDS.items() for i in range(n)],
    run=run,
    settings=lambda job: SETTINGS | {"seed": job[1]},
    order=lambda job: (ORDER.index(job[0]), job[1]),
)
STUDY = Study(
    "dictionaries", {"runs": RUNS}, {"where": where}, about=lambda processes: {"processes": processes}, compact=True
)

if __name__ == "__main__":
    STUDY.main(__doc__)
