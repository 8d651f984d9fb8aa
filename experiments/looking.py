"""Create data/looking.json: what a look at the inputs gives on networks of chapters 31 and 32, without training.

python -m experiments.looking [--only rows] [--processes N]                        (about a minute of one core)

Samples whose inputs lie on one line (or, where a mechanism has two inputs, in one plane) show one mechanism. What goes
into a weight on such a group of samples spans a few directions; the weight is cut by them. Where the directions of all
groups are independent, the parts of inputs of one group are exactly what the weight does to them. It asks for much:
inputs without noise (chapters 10, 31 and 32 have a tolerance for it), samples on which one mechanism is on alone, the
number of a mechanism's inputs, and a look inside.
Nothing was tuned on other seeds; there is nothing to tune but the tolerance of rounding.

- "plain", "inputs rotated", "hidden rotated", "scaled 4": the encoders of TMS 5-2 in these bases (chapter 31).
- "circuit": the planted circuits of chapter 32. What no group shows is one more part.
- "residual": the residual MLPs of two layers. 100 functions have 200 directions in 25 neurons, which are not
  independent; they are shared out so that the parts sum to what the neurons write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import apd_minimal as apd
from experiments.basis import SEEDS as BASES
from experiments.basis import basis_of
from experiments.basis_networks import mechanisms
from experiments.causal import Model, Weights, best, scores
from experiments.circuits import PATHS, Circuit
from experiments.experiment import Row, Rows, Study, Tensors
from experiments.planes import planes
from experiments.residual import stored_target
from experiments.whole_computations import RESIDUAL, SEEDS, one_at_a_time

Job = tuple[str, int]
OTHER_BASES = ("plain", "inputs rotated", "hidden rotated", "scaled 4")
SAMPLES = 2048


def directions(rows: Tensor, tolerance: float = 1e-3) -> Tensor:
    """Give an orthonormal basis [k, d] of what rows [N, d] span, without what is smaller than a share of the largest.

    Args:
        rows: what goes into a weight on a group of samples.
        tolerance: that share.
    """
    sizes, Q = torch.linalg.eigh(rows.T @ rows)
    return Q[:, sizes > tolerance**2 * sizes[-1]].T


def cut(groups: Sequence[Tensor], W: Tensor) -> Tensor:
    """Cut a weight by what each group of samples gives it, so that the parts sum to the weight on all that they span.

    Args:
        groups: per group, rows [N, d_in] that go into the weight.
        W: the weight [d_in, d_out].

    Returns:
        Tensor: a part for each group [G, d_in, d_out].
    """
    spans = [directions(rows) for rows in groups]
    to = torch.linalg.pinv(torch.cat(spans)).split([len(s) for s in spans], 1)
    return torch.stack([t @ (s @ W) for t, s in zip(to, spans, strict=True)])


def encoder(name: str, seed: int, noise: float = 0.0) -> list[bool]:
    """Cut the encoder of a TMS in another basis; say which features own a part.

    Args:
        name: the basis.
        seed: of the target.
        noise: standard deviation of what is added to the inputs.
    """
    tms, network, moved = basis_of(name, seed)
    generator = torch.Generator().manual_seed(seed)
    x = tms.data(SAMPLES, nonempty=True)(0, generator).double() @ moved.Q
    x = x + noise * torch.randn(x.shape, generator=generator, dtype=torch.double)
    groups = planes(x[:, None], tms.n_features, 1)
    if not len(groups):
        return [False] * tms.n_features
    W = network.get_parameter("encode.0.weight").detach().T.double()
    parts = apd.Components.from_matrices({"encode": cut([x[g] for g in groups], W).float()})
    return apd.metrics.ownership(moved.back.of(parts), {"encode": mechanisms(tms)["encode"]}).owned.tolist()


@torch.no_grad()
def inside(model: Model, x: Tensor) -> list[Tensor]:
    """Collect what goes into the four weights, in the order of `PATHS`: rows [..., d_in]."""
    r, found = x @ model.embed, []
    for i in range(2):
        h = torch.relu(r @ model.reads[i])
        found += [r, h]
        r = r + h @ model.writes[i]
    return found


def matrices(model: Model) -> list[Tensor]:
    """List the four weights, in the order of `PATHS`."""
    return [weight for pair in zip(model.reads, model.writes, strict=True) for weight in pair]


def circuit(seed: int) -> Row:
    """Cut a planted circuit by planes of its inputs, and score the parts as chapter 32 does."""
    exact, target = Circuit(seed).double(), Circuit(seed)
    x = exact.batch(0, torch.Generator().manual_seed(seed), SAMPLES).double()
    groups = planes(x[:, None], exact.J, 2)
    rows, weights, parts = inside(Model.of(exact), x), matrices(Model.of(exact)), {}
    for path, into, W in zip(PATHS, rows, weights, strict=True):
        shown = cut([into[g] for g in groups], W)
        parts[path] = torch.cat([shown, (W - shown.sum(0))[None]]).float()  # the last is what no group shows
    made = apd.Components.from_matrices(parts)
    table = scores(Weights(Model.of(target), made), list(range(made.n_components)), one_at_a_time(target))
    own = apd.metrics.ownership(made, target.truth)
    return {"groups": len(groups), "owned": int(own.owned.sum()), "mean": best(table)[1][: target.J].mean().item()}


@torch.no_grad()
def residual(seed: int) -> Row:
    """Cut a residual MLP by lines of its inputs, and score the parts as chapter 32 does."""
    target, _ = stored_target("25-25", seed)
    model, inputs = Model.of(target), one_at_a_time(target)
    both = zip(inside(model, inputs), matrices(model), strict=True)
    parts = [cut(list(into.double()), W.double()).float() for into, W in both]
    made = Weights.__new__(Weights)  # of matrices that have full rank: as components they would not fit in memory
    made.model, made.P = model, [parts[:2], parts[2:]]
    own = best(scores(made, list(range(len(inputs))), inputs))[1]
    tests = dict(zip(("ablate", "keep", "swap"), own.mean(0).tolist(), strict=True))
    return {"groups": len(inputs), **tests, "mean": own.mean().item()}


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Cut one network."""
    name, seed = job
    if name in OTHER_BASES:
        return [{"owned": sum(encoder(name, seed))}], {}
    return [circuit(seed) if name == "circuit" else residual(seed)], {}


def jobs(rows: list[Row]) -> list[Job]:
    """List the networks."""
    seeds = {name: BASES for name in OTHER_BASES} | {"circuit": SEEDS, "residual": RESIDUAL}
    return [(name, seed) for name, own in seeds.items() for seed in own]


STUDY = Study("looking", {"rows": Rows(("network", "seed"), jobs, run)}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
