"""One run on many processes: samples and components are spread over the ranks of a device mesh (chapter 22).

Started with torchrun, every rank calls `decompose(..., mesh=mesh())` with the same arguments. A mesh of two dimensions
says who has what: along "data" the ranks have a share of each batch, along "components" a share of the components. What
must be known of all is exchanged, by DTensor: the sum of the components at every layer, the attributions, from which
each rank picks the top k of the whole batch, and the gradients. The result is that of one process, up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .. import checks
from ..components import Components
from ..kernels.totals import Totals
from ..local import Local
from ..network import Network
from ..train import Run


class RankLost(RuntimeError):
    """Another process of the run is gone, or does not answer."""


def mesh(components: int = 1, device: str = "cpu") -> DeviceMesh:
    """Arrange the ranks that torchrun started as a mesh with the dimensions "data" and "components".

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
        """Use the same tensor on every rank; its gradient is the sum over the ranks."""
        if self.mesh is None:
            return whole
        return DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False).to_local(
            grad_placements=[Partial()]
        )

    def sum(self, part: Tensor) -> Tensor:
        """Sum over the ranks, on every rank; each part's gradient is that of the sum."""
        if self.mesh is None:
            return part
        total = DTensor.from_local(part.contiguous(), self.mesh, [Partial()], run_check=False)
        return total.redistribute(self.mesh, [Replicate()]).to_local(grad_placements=[Replicate()])

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """Concatenate the ranks' parts along `dim`: of one size on all ranks."""
        if self.mesh is None:
            return part
        return DTensor.from_local(part.contiguous(), self.mesh, [Shard(dim)], run_check=False).full_tensor()

    def share(self, whole: Tensor, dim: int) -> Tensor:
        """Take this rank's part along `dim`; the parts' sizes differ by one at most."""
        return whole.tensor_split(self.size, dim)[self.index]

    def join(self, part: Tensor, dim: int, sizes: list[int]) -> Tensor:
        """Concatenate the ranks' parts along `dim`, of these sizes."""
        if self.mesh is None:
            return part
        missing = list(part.shape)
        missing[dim] = max(sizes) - missing[dim]
        blocks = self.gather(torch.cat([part, part.new_zeros(missing)], dim), dim).split(max(sizes), dim)
        return torch.cat([block.narrow(dim, 0, size) for block, size in zip(blocks, sizes, strict=True)], dim)


class SharedNetwork(Network):
    """A network of whose components each rank has some: their outputs are summed at every layer."""

    ranks: Ranks

    def enter(self, rows: Tensor) -> Tensor:
        """Use the input rows on every rank."""
        return self.ranks.spread(rows)

    def leave(self, outputs: Tensor) -> Tensor:
        """Sum over the components of all ranks."""
        return self.ranks.sum(outputs)


class SharedTotals(Totals):
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


class Shared(Local):
    """What this rank of a mesh has of a run: a share of the samples and of the components.

    Args:
        mesh: with the dimensions "data" and "components", as `mesh` makes it.
        checkpoint: the file from which a run can go on, to be named where a rank is lost.

    Raises:
        ValueError: a mesh without the dimensions "data" and "components".
    """

    single = False

    def __init__(self, mesh: DeviceMesh, checkpoint: str | os.PathLike[str] | None = None) -> None:
        checks.kind("mesh", mesh, DeviceMesh, "a mesh as scale.processes.mesh makes it, or None")
        if mesh.mesh_dim_names != ("data", "components"):
            raise ValueError(f'mesh must have the dimensions ("data", "components"), got {mesh.mesh_dim_names}')
        self.mesh, self.checkpoint = mesh, checkpoint
        self.data, self.ranks = Ranks(mesh["data"]), Ranks(mesh["components"])
        self.writes = dist.get_rank() == 0
        self.columns: list[int] = []  # how many components each rank along "components" has
        self.rows: list[int] = []  # how many samples of the last scores each rank along "data" has
        self.idle = False  # no component does anything on this rank's samples, but on those of others

    def begin(self, run: Run) -> None:
        """Check that all ranks were given the same, and share out the components.

        Raises:
            ValueError: an attribution or a number of components that ranks cannot share, or another device.
        """
        n, size = run.config.n_components, self.ranks.size
        if n < size:
            raise ValueError(f"{n} components cannot be spread over {size} ranks")
        if self.mesh.device_type != run.device.type:
            raise ValueError(f"the mesh is on {self.mesh.device_type}, the target on {run.device.type}")
        if run.given[0] is not None and size > 1:
            raise ValueError("attribution must be None where the components are spread over ranks: gradients are exact")
        self.columns = [len(part) for part in torch.arange(n).tensor_split(size)]
        self.agree_on("targets or settings", [run.identity, run.micro_batch])
        batch = run.next_batch(0, torch.Generator().manual_seed(run.config.seed))
        self.agree_on("batches", hashlib.sha256(batch.cpu().numpy().tobytes()).hexdigest())

    def agree_on(self, what: str, given: Any) -> None:
        """Compare by a hash of the JSON.

        Raises:
            ValueError: the ranks were given different ones.
        """
        digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).digest()
        own = torch.tensor([int.from_bytes(digest[:7], "big")], device=self.mesh.device_type)
        everyones = Ranks(self.mesh["components"]).gather(Ranks(self.mesh["data"]).gather(own, 0), 0)
        if len(everyones.unique()) > 1:
            raise ValueError(f"the ranks were given different {what}")

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Turn the backend's error about a lost rank into a `RankLost`.

        Raises:
            RankLost: another rank died, or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo has no class of its own for a partner that is gone.
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            path = self.checkpoint
            left = "no checkpoint is left"
            if path is not None and Path(path).exists():
                left = f"start again, with any number of ranks, to go on from {path}"
            raise RankLost(f"rank {dist.get_rank()} lost another rank of {self.mesh.size()}; {left}") from error

    def network(self, network: Network) -> Network:
        """Sum the outputs of all ranks' components at every layer."""
        shared = SharedNetwork(network.target, list(network.weights), network.output, network.hidden, network.recompute)
        shared.ranks = self.ranks
        return shared

    def mode(self, at: str) -> str | None:
        """Exclude forward mode at the component model, where every pass sums over ranks."""
        return "backward" if at == "components" and self.ranks.size > 1 else None

    def samples(self, x: Tensor) -> Tensor:
        """Take one of as many parts as there are ranks; their sizes differ by one at most.

        Raises:
            ValueError: fewer samples than ranks.
        """
        if len(x) < self.data.size:
            raise ValueError(f"a batch of {len(x)} cannot be spread over {self.data.size} ranks")
        return self.data.share(x, 0)

    def own(self, whole: Tensor) -> Tensor:
        """Copy this rank's part in the factors' layout, since the fused optimiser takes all layouts to be one.

        What is about no component, such as Adam's count of steps, stays.
        """
        if whole.ndim < 2:
            return whole
        return self.ranks.share(whole, 1).clone(memory_format=torch.contiguous_format)

    def whole(self, own: Tensor) -> Tensor:
        """Concatenate the ranks' parts."""
        return self.ranks.join(own, 1, self.columns) if own.ndim > 1 else own

    def count(self, n_active: int, n: int) -> float:
        """Count over all ranks; one without active samples works on those that it has, which do not count."""
        active, everything = self._counts(n_active, n)
        self.idle = any(active) and not n_active
        self.rows = active if any(active) else everything
        return sum(self.rows) / sum(everything)

    def _counts(self, *own: int) -> list[list[int]]:
        """Gather these numbers from all ranks along "data"."""
        everyones = self.data.gather(torch.tensor([own], device=self.mesh.device_type), 0)
        return [column.tolist() for column in everyones.unbind(1)]

    def all_scores(self, own: Tensor) -> Tensor:
        """Concatenate the ranks' parts."""
        counted = own[:, : self.rows[self.data.index]]
        return self.data.join(self.ranks.join(counted, -1, self.columns), 1, self.rows)

    def all_gates(self, own: torch.Size) -> list[int]:
        """Give the shape over all ranks."""
        return [own[0], sum(self.rows), *own[2:-1], sum(self.columns)]

    def own_gates(self, whole: Tensor, n: int) -> Tensor:
        """Take this rank's part; zeros for samples that do not count, where no gate makes a difference."""
        own = self.ranks.share(whole.split(self.rows, 1)[self.data.index], -1).clone()
        return own.new_zeros(len(own), n, *own.shape[2:]) if self.idle else own

    def weight(self, n: int) -> float:
        """Divide the samples of this rank by the mean over ranks."""
        return n * self.data.size / sum(self._counts(n)[0])

    def mean(self, values: Tensor) -> Tensor:
        """Average over the ranks along "data"."""
        return self.data.sum(values) / self.data.size

    def losses(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum simplicity and the selection's penalty over components, and average everything over samples."""
        for name in ("simplicity", "penalty"):
            if name in losses:
                losses[name] = self.ranks.sum(losses[name])
        return dict(zip(losses, self.mean(torch.stack(list(losses.values()))), strict=True))

    def reduce(self, parameters: list[Tensor]) -> None:
        """Sum the gradients that each rank has through its own gates."""
        for p in parameters:
            own = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = self.mean(self.ranks.sum(own.contiguous()))

    def totals(self, components: Components) -> Totals:
        """Sum the factors over all ranks."""
        return SharedTotals(components, self.data, self.ranks)

    def agree(self, tensors: list[Tensor]) -> None:
        """Broadcast from rank 0."""
        for t in tensors:
            said = t.to(torch.uint8) if t.dtype == torch.bool else t
            dist.broadcast(said, src=0)
            t.copy_(said)

    def wait(self) -> None:
        """Wait, so that no rank goes on from a file that is not there yet."""
        dist.barrier()
