"""Create data/fused.json: one attention network whose matrices are stored in several ways (chapter 31).

python -m experiments.fused [--only apart fused heads ...] [--processes N]      (about forty minutes of one core)

The network is chapter 33's planted attention: three heads, two mechanisms to a head. "apart" has query, key, value and
output as four weights. "fused" has the first three side by side in one, as many transformers store them. "heads" has a
weight of its own for every head of each. All three compute the same. The call is chapter 33's, with nothing changed,
and what is found is carried back to the four weights before it is compared with the mechanisms. Seeds from 8480, fixed
before, each run once.

Three ways came later: "reordered" has the heads in another order, "mapped" multiplies each head's queries by a matrix
and its keys by the inverse, which stretches them by two along two directions and by a half along two others, and
"another start" is the control: "apart" with other random numbers.
"""

from __future__ import annotations

import time

import torch
from einops import rearrange
from torch import Tensor, nn

import apd_minimal as apd
from experiments import architectures
from experiments.experiment import Row, Rows, Study, Tensors
from experiments.planted import Planted
from experiments.planted_kinds import KINDS

Job = tuple[str, int]  # way, seed
WAYS = ("apart", "fused", "heads", "another start", "reordered", "mapped")
SEEDS = range(8480, 8485)
READ = ("query.weight", "key.weight", "value.weight")


class Stored(nn.Module):
    """The function of a planted attention network, with its matrices stored in another way.

    Args:
        target: the network.
        way: one of `WAYS`; "apart" is the target itself in other words.
    """

    def __init__(self, target: Planted, way: str) -> None:
        super().__init__()
        self.way, self.n_heads = way, target.n // 2
        self.layers = nn.ModuleDict()
        matrices = {path: target.get_parameter(path).detach().T for path in target.weights}
        for name, w in stored(matrices, way).items():
            layer = nn.Linear(w.shape[0], w.shape[1], bias=False)
            layer.weight.data = w.T.clone()
            self.layers[name] = layer

    @property
    def weights(self) -> list[str]:
        """The parameter paths to decompose: all of them."""
        return [f"layers.{name}.weight" for name in self.layers]

    def read(self, names: list[str], x: Tensor) -> Tensor:
        """Apply some layers, side by side."""
        return torch.cat([self.layers[name](x) for name in names], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, d] to [B, d]."""
        heads = range(self.n_heads)
        if self.way == "fused":
            q, k, v = self.layers["all"](x).chunk(3, -1)
        else:
            q, k, v = (
                self.read([f"{name}{h}" for h in heads] if self.way == "heads" else [name], x)
                for name in ("query", "key", "value")
            )
        q = rearrange(q[:, -1], "b (h e) -> b h e", h=self.n_heads)
        k, v = (rearrange(t, "b t (h e) -> b h t e", h=self.n_heads) for t in (k, v))
        pattern = (torch.einsum("bhe,bhte->bht", q, k) / 2).softmax(-1)
        mixed = torch.einsum("bht,bhte->bhe", pattern, v)
        if self.way == "heads":
            return torch.stack([self.layers[f"out{h}"](mixed[:, h]) for h in heads]).sum(0)
        return self.layers["out"](mixed.flatten(1))


def stored(matrices: dict[str, Tensor], way: str) -> dict[str, Tensor]:
    """Store matrices [..., d_in, d_out] of the four weights in one of the ways, by the names of layers."""
    query, key, value, out = (matrices[path] for path in (*READ, "out.weight"))
    if way == "fused":
        return {"all": torch.cat([query, key, value], -1), "out": out}
    if way == "reordered":
        query, key, value = (m.roll(4, -1) for m in (query, key, value))
        out = out.roll(4, -2)
    if way == "mapped":
        G = maps(query.shape[-1] // 4).to(query)
        query, key = query @ G, key @ torch.linalg.inv(G).T
    if way != "heads":
        return {"query": query, "key": key, "value": value, "out": out}
    named = zip(("query", "key", "value"), (query, key, value), strict=True)
    cut = {f"{name}{h}": w for name, m in named for h, w in enumerate(m.split(4, -1))}
    return cut | {f"out{h}": w for h, w in enumerate(out.split(4, -2))}


def maps(heads: int) -> Tensor:
    """Draw an invertible matrix for each head, as the blocks of one [4 heads, 4 heads]: singular values 2 and 1/2."""
    U, V = torch.linalg.qr(torch.randn(2, heads, 4, 4, generator=torch.Generator().manual_seed(31)).double()).Q
    return torch.block_diag(*(U @ torch.tensor([2.0, 2.0, 0.5, 0.5]).double().diag() @ V))


def whole(components: apd.Components, way: str) -> apd.Components:
    """Carry components back to the four weights."""
    found = {path.split(".")[1]: components.matrices(path).detach() for path in components.paths}
    if way == "fused":
        found |= dict(zip(("query", "key", "value"), found.pop("all").chunk(3, -1), strict=True))
    if way == "heads":
        heads = range(len([name for name in found if name.startswith("out")]))
        found = {name: torch.cat([found[f"{name}{h}"] for h in heads], -2 if name == "out" else -1)
                 for name in ("query", "key", "value", "out")}  # fmt: skip
    if way == "reordered":
        found = {name: m.roll(-4, -2 if name == "out" else -1) for name, m in found.items()}
    if way == "mapped":
        G = maps(found["query"].shape[-1] // 4).to(found["query"])
        found |= {"query": found["query"] @ torch.linalg.inv(G), "key": found["key"] @ G.T}
    return apd.Components.from_matrices({f"{name}.weight": m for name, m in found.items()})


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one network apart as it is stored in one way."""
    way, seed = job
    target = KINDS["attention"](seed=seed)
    network = Stored(target, way)
    data, x = target.data(architectures.BATCH), target.data(2048)(0, torch.Generator().manual_seed(20_000 + seed))
    begin = seed + (2000 if way == "another start" else 1000)
    arguments = architectures.settings(network, network.weights, x, target.n, data.mean_active, begin)
    start = time.process_time()
    found = apd.decompose(network, data, network.weights, progress=False, **arguments)
    seconds, judge = time.process_time() - start, arguments["judge"]
    own = target.ownership(whole(found.components, way))
    true = {f"layers.{name}.weight": m for name, m in stored(target.mechanisms(), way).items()}
    dealt = apd.controls.dealt(found.components, seed)
    row = {
        "owned": own.owned.tolist(),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "dealt": float(target.ownership(whole(dealt, way)).cosine.mean()),
        "in_use": int((found.components.norms() > 0).sum()),
        "bits": judge(apd.Network(network, network.weights), found.components, x),
        "bits_of_the_truth": judge(apd.Network(network, network.weights), apd.Components.from_matrices(true), x),
        "seconds": round(seconds, 1),
    }
    if way == "mapped":  # an error that the matrices make small or large on the way back is neither here
        row["cosine_as_stored"] = [round(v, 4) for v in apd.metrics.ownership(found.components, true).cosine.tolist()]
    return [row], {}


RUNS = Rows(
    fields=("way", "seed"),
    jobs=lambda rows: [(way, seed) for seed in SEEDS for way in WAYS],
    run=run,
    settings=lambda job: architectures.settings_of(
        ("attention", job[1] + (1000 if job[0] == "another start" else 0), "planted")
    ),
    order=lambda job: (WAYS.index(job[0]), job[1]),
)
STUDY = Study("fused", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
