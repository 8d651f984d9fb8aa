"""Time and memory of a step with each trick off and on (chapter 19).

python -m experiments.tricks --only steps --again     (5 minutes)

One thread, CPU seconds, both sides of a ratio in alternation in one run; memory in a separate process each. Run nothing
else meanwhile.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.attributions import MODES, gradient
from apd_minimal.attributions.choose import cheapest
from apd_minimal.kernels import grouped
from apd_minimal.kernels.totals import Totals
from apd_minimal.targets import ResidualMLP
from benchmarks.small_moments import has_torchao, optimiser_of
from benchmarks.steps import Plain, Size, Step, ours, peak, timed

MLP = Size(512, 4, 32, 256, 32, 4)  # 0.8 million entries
MOMENTS = ("float32", "both", "8-bit")
LARGE_BATCH = replace(MLP, batch=1024, n_out=4)


@dataclass(frozen=True)
class Residual:
    """The residual MLP of the paper, 100 functions in 50 neurons, its weights drawn; fields as those of `Size`."""

    batch: int = 256
    n_components: int = 130
    rank: int | None = None
    top_k: float = 1.28

    def target(self) -> nn.Module:
        """Create the network."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ResidualMLP(100, 1000, (50,))

    def inputs(self) -> Tensor:
        """Draw one batch of sparse features [B, 100]."""
        source = apd.data.SparseFeatures(100, 0.01, -1.0, 1.0, batch_size=self.batch, nonempty=True)
        return source(0, torch.Generator().manual_seed(1))


def plain(size: Any, **changes: Any) -> Step:
    """Create a step of `decompose`."""
    return ours(size, **changes).advance


def probing(size: Any, n_probes: int) -> Step:
    """Create a step with random probes for the outputs."""
    return plain(size, attribution=partial(gradient, n_probes=n_probes, generator=torch.Generator().manual_seed(3)))


def dense(size: Any) -> Step:
    """Create a step without the grouped forward pass."""
    step = plain(size)

    def without() -> None:
        with patch.object(grouped, "group", lambda mask, rank: None):
            step()

    return without


def autocast(size: Any) -> Step:
    """Create a step under autocast to bfloat16."""
    step = plain(size)

    def lower() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            step()

    return lower


def optimising(kind: str, n: int = 2**23) -> Step:
    """Create a step of an optimiser on n numbers, in two tensors."""
    parameters = [torch.zeros(n // 2, requires_grad=True) for _ in range(2)]
    for p in parameters:
        p.grad = torch.full_like(p, 0.1)
    if kind == "float32":
        return torch.optim.Adam(parameters, lr=1e-3, fused=True).step
    return optimiser_of(kind, parameters, 1e-3).step


def state_bytes(kind: str, n: int = 2**20) -> float:
    """Count the bytes that an optimiser keeps for each number that it trains."""
    p = torch.zeros(n, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimiser = torch.optim.Adam([p]) if kind == "float32" else optimiser_of(kind, [p], 1e-3)
    optimiser.step()
    kept = [t for t in optimiser.state[p].values() if isinstance(t, Tensor) and t.numel() == n]
    inner = [getattr(t, name) for t in kept if hasattr(t, "__tensor_flatten__") for name in t.__tensor_flatten__()[0]]
    return sum(t.nbytes for t in inner or kept) / n


def comparisons() -> dict[str, dict[str, Callable[[], Step]]]:
    """List, per trick, how to make a step; the first has the trick off."""
    mlp, res, batch = MLP, Residual(), LARGE_BATCH
    made: dict[str, dict[str, Callable[[], Step]]] = {
        "rank, MLP": {str(m or "full"): partial(plain, replace(mlp, rank=m)) for m in (None, 4, 2, 1)},
        "rank, residual MLP": {str(m or "full"): partial(plain, replace(res, rank=m)) for m in (None, 4, 2, 1)},
        "probes, MLP": {"exact": partial(plain, mlp), **{str(n): partial(probing, mlp, n) for n in (16, 4, 1)}},
        "probes, residual MLP": {
            "exact": partial(plain, replace(res, rank=1)),
            **{str(n): partial(probing, replace(res, rank=1), n) for n in (16, 4, 1)},
        },
        "memory, MLP, B = 1024, scrub loss": {
            "off": partial(plain, batch, scrub=0.5),
            "recompute": partial(plain, batch, scrub=0.5, recompute=True),
            "micro_batch": partial(plain, batch, scrub=0.5, micro_batch=128),
            "both": partial(plain, batch, scrub=0.5, micro_batch=128, recompute=True),
        },
        "bfloat16, MLP": {"off": partial(plain, mlp), "on": partial(autocast, mlp)},
        "bfloat16, MLP, m = 64": {
            "off": partial(plain, replace(mlp, rank=64)),
            "on": partial(autocast, replace(mlp, rank=64)),
        },
        "bfloat16, residual MLP": {"off": partial(plain, res), "on": partial(autocast, res)},
    }
    for C, m in ((32, 32), (128, 32), (512, 4)):
        size = replace(mlp, n_components=C, rank=m, n_out=4)
        made[f"grouped, MLP, C = {C}, m = {m}"] = {"off": partial(dense, size), "on": partial(plain, size)}
    made["grouped, residual MLP"] = {"off": partial(dense, res), "on": partial(plain, res)}
    # Without memory: compilation in each fresh process would dominate it.
    made["moments"] = {kind: partial(optimising, kind) for kind in MOMENTS if kind != "8-bit" or has_torchao()}
    return made


def modes() -> list[dict[str, Any]]:
    """Time every exact way to attributions by shape, and by the share of outputs that are not off."""
    rows = []
    for n_out in (1, 16, 128):
        for C in (4, 32, 256):
            for on in (1.0, 0.05) if n_out == 128 else (1.0,):
                size = Size(64, 3, n_out, 64, C, 4)
                target, x = size.target(), size.inputs()
                if on < 1:
                    with torch.no_grad():
                        last = target[-1]
                        assert isinstance(last, nn.Linear)
                        last.bias.copy_(last.bias - target(x).quantile(1 - on, dim=0))
                    target.append(nn.ReLU())
                network = apd.Network(target, [f"{i}.weight" for i in (0, 2, 4)])
                parts = apd.Components.random(network.shapes, C, 4, generator=torch.Generator().manual_seed(0))
                ways = {mode: partial(gradient, network, parts, x, mode=mode) for mode in MODES}
                values = {mode: run() for mode, run in ways.items()}
                off = max((v - values["backward"]).abs().max().item() for v in values.values())
                times = timed({mode: partial(_itself, run) for mode, run in ways.items()}, 2, 0.05)
                counted = cheapest(network, parts.stacked(), None, x)
                off /= values["backward"].abs().max().item()
                rows.append({"n_out": n_out, "C": C, "on": on, "seconds": times, "counted": counted, "difference": off})
    return rows


def _itself(run: Step) -> Step:
    return run


def losses_of(size: Size) -> Callable[[], Tensor]:
    """Write out faithfulness and simplicity of random factors for the compiler."""
    run = ours(size)
    paths, weights = run.components.paths, run.network.weights
    factors = [(run.components.A[p][0], run.components.B[p][0], weights[p]) for p in paths]

    def loss() -> Tensor:
        total = torch.zeros(())
        for a, b, w in factors:
            whole = a.transpose(0, 1).flatten(1) @ b.flatten(0, 1)
            lengths = (a.square().sum(1) * b.square().sum(2) + 1e-16).pow(0.45)
            total = total + (whole - w).square().sum() + lengths.sum()
        return total

    return loss


def mixture_of(size: Size) -> Callable[[], Tensor]:
    """Write out the gated sum of all components of one layer, as in the scrub loss."""
    g = torch.Generator().manual_seed(0)
    C, m, d = size.n_components, size.rank or size.width, size.width
    rows, gates = torch.randn(size.batch, d, generator=g), (torch.rand(size.batch, C, generator=g) < 0.5).float()
    first, second = (0.1 * torch.randn(*shape, generator=g) for shape in ((C, d, m), (C, m, d)))
    first.requires_grad_(), second.requires_grad_()

    def mix() -> Tensor:
        u = (rows @ first.transpose(0, 1).flatten(1)).view(len(rows), C, m) * gates[..., None]
        return torch.relu(u.flatten(1) @ second.flatten(0, 1)).square().sum()

    return mix


def training_of(size: Size) -> Callable[[], Tensor]:
    """Return the loss of a plain training step."""
    plainly = Plain(size)
    return lambda: F.mse_loss(plainly.target(plainly.x), plainly.labels)


def compiled() -> list[dict[str, Any]]:
    """Time functions where torch's compiler could win: forward and backward, eager and compiled."""
    cases = {
        "plain training, MLP": training_of(MLP),
        "faithfulness and simplicity, MLP": losses_of(MLP),
        "gated components of a layer, MLP": mixture_of(MLP),
    }
    rows = []
    torch._inductor.config.force_disable_caches = True  # otherwise a second run would use the first one's compiled code
    for name, function in cases.items():
        torch._dynamo.reset()
        fast = torch.compile(function)
        start = time.perf_counter()
        fast().backward()
        compiling = time.perf_counter() - start
        error = abs(fast().item() / function().item() - 1)
        steps: dict[str, Callable[[], Step]] = {
            "eager": lambda f=function: lambda: f().backward(),  # type: ignore[misc]
            "compiled": lambda f=fast: lambda: f().backward(),  # type: ignore[misc]
        }
        rows.append({"name": name, "seconds": timed(steps, 4), "compile": compiling, "difference": error})
    run = ours(MLP)
    mask = torch.ones(1, 8, MLP.n_components)

    def in_place() -> None:
        totals = Totals(run.components)
        faithful = apd.losses.faithfulness(totals, run.network.weights)
        totals.backward((faithful + apd.losses.simplicity(totals, mask)).sum())

    name = "faithfulness and simplicity, MLP, as the library has them"
    rows.append({"name": name, "seconds": timed({"eager": lambda: in_place}, 4)})
    return rows


class Doubled(Size):
    """A `Size` in double precision."""

    def target(self) -> nn.Sequential:
        """Create the network, its weights drawn."""
        return super().target().double()

    def inputs(self) -> Tensor:
        """Draw one batch [B, width]."""
        return super().inputs().double()


def agreement(size: Size) -> dict[str, float]:
    """Measure how far apart components are train 30 steps with and without a trick that should change nothing.

    Args:
        size: of the network and the step.

    Returns:
        dict[str, float]: per trick, the largest difference over the largest entry; and the share of passes in which
            pairs were gathered.
    """
    groupings = []

    def grouping(mask: Tensor, rank: int) -> Any:
        groupings.append(group(mask, rank))
        return groupings[-1]

    def train(run: Any, grouping: Any) -> Tensor:
        with patch.object(grouped, "group", grouping):
            for _ in range(30):
                run.advance()
        return torch.cat([p.detach().flatten() for p in run.components.parameters()])

    group = grouped.group
    base = train(ours(size, scrub=0.5), grouping)
    share = sum(groups is not None for groups in groupings) / len(groupings)
    components = {
        "recompute": train(ours(size, scrub=0.5, recompute=True), group),
        "micro_batch": train(ours(size, scrub=0.5, micro_batch=100), group),
        "grouped": train(ours(size, scrub=0.5), lambda mask, rank: None),
    }
    differences = {name: ((t - base).abs().max() / base.abs().max()).item() for name, t in components.items()}
    return differences | {"grouped in": share}


def steps(stored: dict[str, Any]) -> dict[str, Any]:
    """Measure memory, then time.

    Args:
        stored: current contents of data/tricks.json, for the 8-bit moments if torchao is missing.

    Returns:
        dict[str, Any]: the new value of its key `steps`.
    """
    start = time.perf_counter()

    def report(what: str) -> None:
        print(f"{time.perf_counter() - start:4.0f} s  {what}", file=sys.stderr, flush=True)

    made = comparisons()
    before = {c["name"]: c for c in stored.get("steps", {}).get("comparisons", [])}
    memory = {
        name: {kind: peak(make) for kind, make in kinds.items()} for name, kinds in made.items() if name != "moments"
    }
    report("memory measured")
    rows = []
    for name, kinds in made.items():
        row = {"name": name, "seconds": timed(kinds, seconds=0.1)}
        rows.append(
            row | ({"megabytes": memory[name]} if name in memory else {"bytes": {k: state_bytes(k) for k in kinds}})
        )
        report(name)
    if not has_torchao() and "moments" in before:
        rows = [before["moments"] if row["name"] == "moments" else row for row in rows]
    sizes = {"MLP": MLP.asdict(), "residual MLP": asdict(Residual())}
    results: dict[str, Any] = {"sizes": sizes, "comparisons": rows, "modes": modes()}
    report("modes")
    shape = (64, 4, 8, 512, 32, 32)
    same = {"float32": agreement(Size(*shape)), "float64": agreement(Doubled(*shape))}
    return results | {"compiled": compiled(), "agreement": same, "seconds": time.perf_counter() - start}
