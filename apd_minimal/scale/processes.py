"""One run on many processes: samples and components are spread over the ranks of a device mesh (chapter 22).

Started with torchrun, every rank calls `decompose` here with the same arguments. A mesh of two dimensions says who has
what: along "data" the ranks have a share of each batch, along "components" a share of the components. What must be
known of all is exchanged, by DTensor: the sum of the components at every layer, the attributions, from which each rank
picks the top k of the whole batch, and the gradients. The result is that of one process, up to rounding.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..algorithm import Callback, begin, check, follow
from ..attributions import Attribution, gradient
from ..batch import Batch
from ..checkpoint import write_state
from ..components import Components
from ..config import Config, Schedule
from ..data import Batches
from ..decomposition import Decomposition
from ..kernels.totals import Totals
from ..losses import Divergence
from ..network import Network
from ..train import Run


class RankLost(RuntimeError):
    """Another process of the run is gone, or does not answer."""


def mesh(components: int = 1, device: str = "cpu") -> DeviceMesh:
    """The ranks that torchrun started, as a mesh with the dimensions "data" and "components".

    Args:
        components: over how many ranks the components are spread; the rest of the ranks' number is for the data.
        device: "cpu" (gloo) or "cuda" (NCCL; call this before anything else uses a GPU, and move the target there).

    Returns:
        DeviceMesh: [ranks / components, components].

    Raises:
        ValueError: not started by torchrun, or a number of ranks that is no multiple of `components`.
    """
    if "WORLD_SIZE" not in os.environ:
        raise ValueError("the ranks are started by torchrun, for example torchrun --nproc-per-node 2 script.py")
    ranks = int(os.environ["WORLD_SIZE"])
    if components < 1 or ranks % components:
        raise ValueError(f"{ranks} ranks cannot be laid out with {components} along components")
    return init_device_mesh(device, (ranks // components, components), mesh_dim_names=("data", "components"))


def decompose(
    target: nn.Module,
    batches: Batches,
    weights: Sequence[str],
    n_components: int,
    top_k: Schedule,
    *,
    mesh: DeviceMesh,
    output: Callable[[Any], Tensor] | None = None,
    divergence: str | Divergence = "mse",
    hidden_modules: Sequence[str] = (),
    attribution: Attribution | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    micro_batch: int | None = None,
    recompute: bool = False,
    callback: Callback | None = None,
    progress: bool = True,
    **settings: Any,
) -> Decomposition:
    """As `apd_minimal.decompose`, on all ranks of a mesh; each calls it with the same arguments.

    Every rank draws the whole batch, with the run's generator, and takes its own samples of it. Every rank holds all
    components for a while at the start, when they are merged, and at the end. After Ctrl-C, or an exception that
    carries no result, what is left of a run is its checkpoint.

    Args:
        target: the same network on every rank.
        batches: gives the inputs of the whole batch, the same on every rank, at least a sample for each along "data".
        weights: as there.
        n_components: at least one for each rank along "components".
        top_k: over the whole batch and all components, whatever the mesh.
        mesh: as `parallel.mesh` makes it.
        output: as there.
        divergence: as there.
        hidden_modules: as there.
        attribution: as there; only where the components are not spread.
        checkpoint: written by rank 0 in the format of `apd_minimal.decompose`, and read by all: a run can go on with
            another mesh, or on one process. It must be on a disk that all ranks see.
        checkpoint_every: as there.
        micro_batch: samples that a rank works on at a time.
        recompute: as there.
        callback: as there, with the components of this rank.
        progress: show a bar on rank 0.
        **settings: any field of `Config`.

    Returns:
        Decomposition: the same on every rank, with all components.

    Raises:
        RankLost: another rank died, or did not answer in time, and the backend said so (gloo does; NCCL may end the
            process instead); the message says what can be gone on from.
        KeyError, TypeError, ValueError, NonFiniteLoss, StoreError: as there. ValueError also where ranks were given
            different targets, settings, checkpoints or batches. If a rank ends by an exception, the others lose it.
    """
    config = Config.from_dict({"n_components": n_components, "top_k": top_k, **settings})
    check(config, divergence, hidden_modules, micro_batch, attribution)
    if mesh.mesh_dim_names != ("data", "components"):
        raise ValueError(f'mesh must have the dimensions ("data", "components"), got {mesh.mesh_dim_names}')
    if attribution is not None and mesh["components"].size() > 1:
        raise ValueError("attribution must be None where the components are spread over ranks: gradients are exact")
    network = Network(target, weights, output, hidden_modules, recompute)
    try:
        run = begin(partial(ShardedRun, mesh), network, batches, config, divergence, attribution, micro_batch)
        assert isinstance(run, ShardedRun)
        run.agree("checkpoints", [checkpoint is not None, checkpoint_every])
        if checkpoint is not None and Path(checkpoint).exists():
            run.resume(checkpoint)
        run.agree("checkpoints", run.step)
        follow(run, checkpoint, checkpoint_every, callback, progress and dist.get_rank() == 0)
        return run.result()
    except RuntimeError as error:
        # gloo has no class of its own for a partner that is gone.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        there = checkpoint is not None and Path(checkpoint).exists()
        left = (
            f"start again, with any number of ranks, to go on from {checkpoint}" if there else "no checkpoint is left"
        )
        raise RankLost(f"rank {dist.get_rank()} lost another rank of {mesh.size()}; {left}") from error


class Ranks:
    """What the ranks of a mesh tell each other, along one of its dimensions; nothing if there is but one.

    Args:
        mesh: of one dimension; None for a process on its own.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.mesh = mesh if mesh is not None and mesh.size() > 1 else None
        self.size = 1 if self.mesh is None else self.mesh.size()
        self.index = 0 if self.mesh is None else self.mesh.get_local_rank()

    def spread(self, whole: Tensor) -> Tensor:
        """The same tensor on every rank; its gradient is the sum of what the ranks say."""
        if self.mesh is None:
            return whole
        return DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False).to_local(
            grad_placements=[Partial()]
        )

    def sum(self, part: Tensor) -> Tensor:
        """The sum over the ranks, on every rank; each part's gradient is that of the sum."""
        if self.mesh is None:
            return part
        total = DTensor.from_local(part.contiguous(), self.mesh, [Partial()], run_check=False)
        return total.redistribute(self.mesh, [Replicate()]).to_local(grad_placements=[Replicate()])

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """What the ranks have, one after the other along `dim`: of one size on all ranks."""
        if self.mesh is None:
            return part
        return DTensor.from_local(part.contiguous(), self.mesh, [Shard(dim)], run_check=False).full_tensor()

    def share(self, whole: Tensor, dim: int) -> Tensor:
        """What this rank has of it: parts along `dim` whose sizes differ by one at most."""
        return whole.tensor_split(self.size, dim)[self.index]

    def join(self, part: Tensor, dim: int, sizes: list[int]) -> Tensor:
        """What the ranks have, one after the other along `dim`, of these sizes."""
        if self.mesh is None:
            return part
        missing = list(part.shape)
        missing[dim] = max(sizes) - missing[dim]
        blocks = self.gather(torch.cat([part, part.new_zeros(missing)], dim), dim).split(max(sizes), dim)
        return torch.cat([block.narrow(dim, 0, size) for block, size in zip(blocks, sizes, strict=True)], dim)


class ShardedNetwork(Network):
    """A network of whose components each rank has some: their outputs are summed at every layer."""

    ranks: Ranks

    def enter(self, rows: Tensor) -> Tensor:
        """A layer's input rows."""
        return self.ranks.spread(rows)

    def leave(self, outputs: Tensor) -> Tensor:
        """The sum over all components."""
        return self.ranks.sum(outputs)


class ShardedTotals(Totals):
    """Totals of all components, of which each rank has some, and of gradients on all samples."""

    def __init__(self, components: Components, data: Ranks, ranks: Ranks) -> None:
        super().__init__(components)
        self._data, self._ranks = data, ranks

    def sum(self, path: str) -> Tensor:
        """As `Components.sum`, over the components of all ranks."""
        return self._ranks.sum(super().sum(path))

    def backward(self, loss: Tensor, also: Sequence[Tensor] = ()) -> None:
        """Add to the gradients of this rank's factors, and average them over the data."""
        super().backward(loss, also)
        for factor in self.parameters():
            assert factor.grad is not None
            if self._data.size > 1:
                factor.grad = self._data.sum(factor.grad) / self._data.size


class ShardedRun(Run):
    """A run of which this rank has a share of the samples and of the components."""

    def __init__(self, mesh: DeviceMesh, network: Network, *rest: Any) -> None:
        self.data, self.ranks = Ranks(mesh["data"]), Ranks(mesh["components"])
        self.rows: list[int] = []  # how many samples of the last mask each rank along "data" has
        self.quiet = False  # this rank's samples say nothing to any component, others' do
        super().__init__(network, *rest)
        n, size = self.config.n_components, self.ranks.size
        if n < size:
            raise ValueError(f"{n} components cannot be spread over {size} ranks")
        if mesh.device_type != self.device:
            raise ValueError(f"the mesh is on {mesh.device_type}, the target on {self.device}")
        self.columns = [len(part) for part in torch.arange(n).tensor_split(size)]
        self.mesh = mesh
        self.agree("targets or settings", [self.identity, self.micro_batch])
        # Every rank draws the components of all, so that they do not depend on the mesh.
        self.components = self.components.map(lambda t: self.own(t.detach()).requires_grad_())
        self.good = self.components.map(lambda t: t.detach().clone())
        self.optimiser = torch.optim.Adam(self.components.parameters(), lr=self.config.lr, fused=True)
        batch = self.drawn(0, torch.Generator().manual_seed(self.config.seed))
        self.agree("batches", hashlib.sha256(batch.cpu().numpy().tobytes()).hexdigest())
        self.network = ShardedNetwork(
            network.target, list(network.weights), network.output, network.hidden, network.recompute
        )
        self.network.ranks = self.ranks
        self.on_my_own = network

    def agree(self, what: str, given: Any) -> None:
        """Raise a ValueError if the ranks were given different ones, as JSON has them."""
        digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).digest()
        own = torch.tensor([int.from_bytes(digest[:7], "big")], device=self.device)
        found = Ranks(self.mesh["components"]).gather(Ranks(self.mesh["data"]).gather(own, 0), 0)
        if len(found.unique()) > 1:
            raise ValueError(f"the ranks were given different {what}")

    def own(self, factor: Tensor) -> Tensor:
        """Of something about all components, [R, C, ...], a copy of what is about those of this rank.

        What is about no component, such as Adam's count of steps, stays. The layout is that of the factors, which the
        fused optimiser takes to be the same.
        """
        if factor.ndim < 2:
            return factor
        return self.ranks.share(factor, 1).clone(memory_format=torch.contiguous_format)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, this rank works with all samples and components, as every other does."""
        kept = self.network, self.data, self.ranks
        self.network, self.data, self.ranks = self.on_my_own, Ranks(None), Ranks(None)
        try:
            yield
        finally:
            self.network, self.data, self.ranks = kept

    def _gradient(self, network: Network, components: Components, x: Tensor) -> Tensor:
        # At the component model every pass sums over ranks, which forward mode cannot.
        mode = "backward" if self.config.attribute_at == "components" and self.ranks.size > 1 else None
        at, per_position = self.config.attribute_at, self.config.per_position
        return inspect.unwrap(gradient)(network, components, x, at=at, per_position=per_position, mode=mode)

    def inputs(self, step: int, generator: torch.Generator) -> Tensor:
        """This rank's inputs of one step."""
        x = self.drawn(step, generator)
        if len(x) < self.data.size:
            raise ValueError(f"a batch of {len(x)} cannot be spread over {self.data.size} ranks")
        return self.data.share(x, 0)

    def many_inputs(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """This rank's part of what one process would take."""
        return self.data.share(super().many_inputs(n_samples, generator), 0)

    def attributions(self, x: Tensor, components: Components) -> Tensor:
        """Of all components on all samples, those of the ranks one after the other."""
        own = super().attributions(x, components)[:, : self.rows[self.data.index]]
        return self.data.join(self.ranks.join(own, -1, self.columns), 1, self.rows)

    def gates(self, x: Tensor, components: Components | None = None, share: float = 1.0) -> Tensor:
        """Of the top k of the whole batch, what is about this rank's samples and components."""
        rows, of_all = self._counts([0 if self.quiet else len(x), round(len(x) / share)])
        self.rows = rows
        mask = self._mine(super().gates(x, components, sum(rows) / sum(of_all)))
        return mask.new_zeros(len(mask), len(x), *mask.shape[2:]) if self.quiet else mask

    def _counts(self, own: list[int]) -> list[list[int]]:
        """Each of these numbers on all ranks along "data"."""
        found = self.data.gather(torch.tensor([own], device=self.device), 0)
        return [column.tolist() for column in found.unbind(1)]

    def _mine(self, whole: Tensor) -> Tensor:
        return self.ranks.share(whole.split(self.rows, 1)[self.data.index], -1).clone()

    def noise(self, shape: Sequence[int]) -> Tensor:
        """This rank's part of what one process would draw."""
        drawn = self._mine(super().noise([shape[0], sum(self.rows), *shape[2:-1], self.config.n_components]))
        return drawn.new_ones(*shape) if self.quiet else drawn

    def kept(self, busy: Tensor) -> Tensor:
        """As there; a rank with no busy samples works on those that it has, and nobody counts them."""
        somebody = max(self._counts([int(busy.any())])[0])
        self.quiet = bool(somebody) and not bool(busy.any())
        return super().kept(busy)

    def prepared(self, x: Tensor, scrubs: bool) -> Batch:
        """As there; the shares are such that the mean over ranks is that over samples."""
        batch = super().prepared(x, scrubs)
        self.quiet = False
        return replace(batch, share=batch.share * self._weight(x))

    def _weight(self, x: Tensor) -> float:
        """How many of the samples this rank has, over the mean of all ranks."""
        return len(x) * self.data.size / sum(self._counts([len(x)])[0])

    def totals(self) -> Totals:
        """What the losses see of the factors of all ranks."""
        return ShardedTotals(self.components, self.data, self.ranks)

    def checked(self, found: dict[str, Tensor]) -> dict[str, list[float]]:
        """As there; the losses are those of the whole batch."""
        if "simplicity" in found:
            found["simplicity"] = self.ranks.sum(found["simplicity"])
        values = self.data.sum(torch.stack(list(found.values()))) / self.data.size
        return super().checked(dict(zip(found, values, strict=True)))

    def errors(self, x: Tensor, components: Components) -> Tensor:
        """As there, over the samples of all ranks."""
        return self.data.sum(super().errors(x, components) * self._weight(x)) / self.data.size

    def whole(self, components: Components) -> Components:
        """A copy of the components of all ranks."""
        return components.map(lambda p: self.ranks.join(p.detach(), 1, self.columns).clone())

    def mean(self, moments: Tensor) -> Tensor:
        """Over the components of all ranks."""
        total = self.ranks.sum(torch.stack([moments.sum(), moments.new_tensor(float(moments.numel()))]))
        return total[0] / total[1]

    @torch.no_grad()
    def tidy(self) -> None:
        """Every rank tidies all components, and takes its own of what rank 0 found."""
        everything = self.whole(self.components)
        with self.alone():
            changed = self.tidied(everything).to(torch.uint8)
        for t in (*everything.parameters(), changed):
            dist.broadcast(t, src=0)
        self.replace(everything.map(self.own), self.own(changed).bool())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Rank 0 writes what one process would; the others wait, so that none goes on from what is not there yet."""
        first = dist.get_rank() == 0

        def everything(part: Tensor) -> Tensor:
            whole = self.ranks.join(part.detach(), 1, self.columns) if part.ndim > 1 else part
            return whole.cpu() if first else whole.new_empty(0)

        factors = [everything(p) for p in self.components.parameters()]
        moments = [{name: everything(t) for name, t in known.items()} for known in self.moments()]
        if first:
            write_state(path, self.identity, self.step, self.history, self.generator, factors, moments)
        dist.barrier()
