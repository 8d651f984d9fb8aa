"""Layer by layer: each group of weights taken apart alone, and the parts stitched by co-activation (chapter 21).

A group is a matrix, a block, or any other set of weights. While one group is taken apart, every other weight stays the
target's, so that groups know nothing of each other and can run in processes of their own. What belongs together across
groups is found afterwards: parts that are active on the same inputs.

    groups = {"read": ["read.0.weight"], "write": ["write.0.weight"]}
    parts = decompose_groups(target, batches, groups, processes=2, n_components=200, top_k=1.0)
    masks = activity(target, parts, x)
    components = stitch(parts, cluster(masks, min_similarity=0.3))
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import checks
from ..algorithm import decompose
from ..attributions import Attribution
from ..batch import Batches
from ..components import Components, usable
from ..decomposition import Decomposition
from ..network import Network

Member = tuple[str, int]  # a part: the name of its group, and its number there


def decompose_groups(
    target: nn.Module,
    batches: Batches,
    groups: Mapping[str, Sequence[str]],
    *,
    processes: int = 1,
    per_group: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    **arguments: Any,
) -> dict[str, Decomposition]:
    """Decompose each group of weights alone, while all other weights stay the target's.

    A group's run is `decompose(target, batches, weights=groups[name], ...)` and nothing else, with the same result
    in whatever process, bit for bit on one thread. The seeds are `seed`, `seed + 1`, ... in the order of the groups:
    with one seed for all, matrices of equal shape would start from equal components.

    Args:
        target: any network; it is left exactly as it is.
        batches: as for `decompose`.
        groups: parameter paths by name of group; a weight belongs to one group at most.
        processes: runs at a time, each with one thread in a fresh process; with 1, all run here, one after another.
            With more, everything given must be picklable, and a script needs `if __name__ == "__main__":`.
        per_group: arguments that differ for a group, by its name, such as {"read": {"n_components": 50}}.
        seed: of the first group.
        **arguments: of `decompose`, for all groups.

    Returns:
        dict[str, Decomposition]: by group, in the order of `groups`.

    Raises:
        KeyError: an unknown parameter path, or settings for a group that does not exist.
        TypeError: an argument that cannot be sent to another process; the message says which.
        ValueError: no groups, a weight in two groups, a checkpoint for all, fewer than one process.
        RuntimeError: a run failed; the message names the group, and what went wrong there.
        KeyboardInterrupt: Ctrl-C stops all groups; only checkpoints keep what is done, one for each in per_group.
    """
    _check_groups(target, groups, per_group := {} if per_group is None else per_group)
    processes = checks.number("processes", processes, 1, whole=True)
    seed = checks.number("seed", seed, 0, 2**62, whole=True)
    if arguments.get("checkpoint") is not None:
        raise ValueError("one checkpoint cannot serve all groups: give each its own with per_group")
    jobs: dict[str, dict[str, Any]] = {}
    for i, (name, weights) in enumerate(groups.items()):
        own = {"progress": processes == 1, "seed": seed + i, **arguments, **per_group.get(name, {})}
        jobs[name] = {"target": target, "batches": batches, "weights": list(weights), **own}
    if processes == 1:
        return {name: _run(name, job) for name, job in jobs.items()}
    sent = {name: _pickled(name, job) for name, job in jobs.items()}
    one_thread = partial(torch.set_num_threads, 1)
    with ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn"), one_thread) as pool:
        futures = {name: pool.submit(_unpickle_and_run, name, job) for name, job in sent.items()}
        try:
            return {name: pickle.loads(future.result()) for name, future in futures.items()}
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process ended before its run did: out of memory, or killed, or a script that calls decompose_groups "
                'outside of `if __name__ == "__main__":`'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, what has not begun is not begun


def _check_groups(target: nn.Module, groups: Mapping[str, Sequence[str]], per_group: Mapping[str, Any]) -> None:
    if not checks.kind("groups", groups, Mapping, "a mapping from names to lists of parameter paths"):
        raise ValueError("groups must name at least one group of weights, got none")
    checks.kind("per_group", per_group, Mapping, "a mapping from names of groups to arguments")
    for name, weights in groups.items():
        checks.kind("names of groups", name, str, "text")
        if not isinstance(weights, (list, tuple)) or not weights:
            raise ValueError(f"group {name!r} must be a list of at least one parameter path, got {weights!r}")
    Network(target, [path for weights in groups.values() for path in weights])  # each exists, and is there once
    if unknown := sorted(set(per_group) - set(groups)):
        raise KeyError(f"per_group has settings for {unknown}, but the groups are {list(groups)}")


def _run(name: str, job: dict[str, Any]) -> Decomposition:
    try:
        result = decompose(**job)
    except Exception as error:
        raise RuntimeError(f"group {name!r}: {type(error).__name__}: {error}") from error
    if not result.finished:  # `decompose` has met Ctrl-C
        raise KeyboardInterrupt(f"group {name!r} was stopped")
    return result


def _pickled(name: str, job: dict[str, Any]) -> bytes:
    for key, value in job.items():
        try:
            pickle.dumps(value)
        except Exception as error:
            raise TypeError(
                f"group {name!r}: {key}={value!r} cannot be sent to another process ({error}); functions must be "
                "defined by name in a module, not as a lambda or inside another function. Or use processes=1."
            ) from error
    return pickle.dumps(job)  # all at once, so that a method of the target comes out as one of the copied target


def _unpickle_and_run(name: str, job: bytes) -> bytes:
    """Run in a process of its own. Results go back as bytes, and errors as text: not all of them can be pickled."""
    try:
        return pickle.dumps(_run(name, pickle.loads(job)))
    except AttributeError as error:
        raise RuntimeError(
            f"group {name!r}: {error}; functions must be in a module, not in a notebook. Or use processes=1."
        ) from None
    except RuntimeError as error:
        raise RuntimeError(*error.args) from None


@torch.no_grad()
def activity(
    target: nn.Module,
    parts: Mapping[str, Decomposition],
    x: Tensor,
    *,
    attribution: Attribution | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Say when each part is active, by every group's own attributions and selection at the end of its run.

    Args:
        target: the network.
        parts: as `decompose_groups` gave them.
        x: a large batch of inputs [B, ...], from the source that the runs had (the mean number of active components
            is meant for it).
        attribution: as given to `decompose`; None for gradients.
        output: as given to `decompose`.

    Returns:
        dict[str, Tensor]: by group, masks of zeros and ones [B, C of the group].

    Raises:
        ValueError: parts that have a mask for each position of a sequence, or whose attribution or selection is not
            known (as for `Decomposition.active`).
    """
    checks.function("output", output)
    masks = {}
    for name, part in checks.kind("parts", parts, Mapping, "a mapping from names of groups to decompositions").items():
        if checks.kind(f"parts: {name}", part, Decomposition, "a Decomposition").config.per_position:
            raise ValueError(f"group {name!r} was trained per position; stitching is for masks per sample")
        network = Network(target, part.components.paths, output)
        scores = part.attributions(network, x, attribution)
        masks[name] = part.final_selection.mask(scores).to(scores)
    return masks


def similarity(masks: Mapping[str, Tensor]) -> tuple[list[Member], Tensor]:
    """Measure how often parts are active together: the Jaccard index of their samples, both over either.

    Args:
        masks: by group, which parts are active [B, C of the group], on the same samples.

    Returns:
        tuple[list[Member], Tensor]: all parts, group after group, and [parts, parts] in [0, 1]; 0 where one of the two
        is never active.

    Raises:
        ValueError: no masks, or masks of other shapes, or of different samples.
    """
    checks.kind("masks", masks, Mapping, "a mapping from names of groups to masks")
    shapes = {name: list(checks.gates(f"masks: {name}", mask, "B", ..., "C").shape) for name, mask in masks.items()}
    if not masks or any(len(shape) != 2 for shape in shapes.values()) or len({s[0] for s in shapes.values()}) != 1:
        raise ValueError(f"masks must be [B, C of the group], with the same B, for at least one group; got {shapes}")
    members = [(name, c) for name, mask in masks.items() for c in range(mask.shape[1])]
    on = torch.cat([(mask > 0).double() for mask in masks.values()], dim=1)
    both, counts = on.T @ on, on.sum(0)
    return members, both / (counts[:, None] + counts - both).clamp_min(1)


def cluster(masks: Mapping[str, Tensor], min_similarity: float) -> list[list[Member]]:
    """Group parts that are active together: average linkage on the Jaccard index (scipy.cluster.hierarchy).

    Nobody says how many clusters there are. Two clusters are joined while the mean similarity between their parts is at
    least `min_similarity`. Of several thresholds, take the one whose stitched components leave the smallest sparse
    reconstruction error, as `decompose` does among its restarts.

    Args:
        masks: by group, which parts are active [B, C of the group], on the same samples.
        min_similarity: above 0, at most 1. Parts that are never active have similarity 0, and stay alone.

    Returns:
        list[list[Member]]: every part is in one of them; in the order of their first parts.

    Raises:
        ValueError: a threshold out of range, or masks that do not fit together.
    """
    min_similarity = checks.number("min_similarity", min_similarity, 0, 1, above=True)
    members, close = similarity(masks)
    if len(members) == 1:
        return [members]
    distance = (1 - close).fill_diagonal_(0).numpy()
    tree = linkage(squareform(distance, checks=False), method="average")
    labels = fcluster(tree, t=1 - min_similarity + 1e-9, criterion="distance")
    found: dict[int, list[Member]] = {}
    for member, label in zip(members, labels.tolist(), strict=True):
        found.setdefault(label, []).append(member)
    return list(found.values())


@torch.no_grad()
def stitch(
    parts: Mapping[str, Decomposition | Components], clusters: Sequence[Sequence[Member]], rank: int | None = None
) -> Components:
    """Make one component of each cluster of parts: their sum, in all weights.

    Args:
        parts: by group, a decomposition or its C components, without restarts.
        clusters: parts by name of group and number, each in one cluster; as from `cluster`.
        rank: if given, cut each component to this rank in each weight (the best in squared error); the sum over
            components is then no longer exact.

    Returns:
        Components: one for each cluster, in that order, over the weights of all groups. In a weight, the rank is the
        sum of the ranks of the cluster's parts there, filled up with zeros to that of the widest cluster; where a
        cluster has no part, the factors are zero.

    Raises:
        ValueError: parts with restarts, a weight in two groups, clusters that miss a part or name one twice.
    """
    checks.kind("parts", parts, Mapping, "a mapping from names of groups to decompositions or Components")
    pieces = {
        name: usable(p.components if isinstance(p, Decomposition) else p, alone=True) for name, p in parts.items()
    }
    for members in checks.kind("clusters", clusters, (list, tuple), "a list of lists of parts"):
        for member in checks.kind("clusters", members, (list, tuple), "a list of lists of parts"):
            if not isinstance(member, tuple) or tuple(map(type, member)) != (str, int):
                raise TypeError(f"clusters must have parts (name of a group, number), got {checks.given(member)}")
    paths = [path for piece in pieces.values() for path in piece.paths]
    if len(set(paths)) != len(paths):
        raise ValueError(f"a weight belongs to one group at most, got {paths}")
    given = sorted(member for members in clusters for member in members)
    expected = sorted((name, c) for name, piece in pieces.items() for c in range(piece.n_components))
    if given != expected:
        wrong = sorted({m for m in (*given, *expected) if given.count(m) != expected.count(m)})
        raise ValueError(f"every part must be in exactly one cluster; this does not hold for {wrong[:5]}")
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for name, piece in pieces.items():
        inside = [[c for group, c in members if group == name] for members in clusters]
        for path in piece.paths:
            # Factors of a cluster's parts side by side: their product is the sum of the parts.
            A[path] = pad_sequence([piece.A[path][own].mT.flatten(0, 1) for own in inside], batch_first=True).mT
            B[path] = pad_sequence([piece.B[path][own].flatten(0, 1) for own in inside], batch_first=True)
    stitched = Components(A, B)
    if rank is None:
        return stitched
    return Components.from_matrices({path: stitched.matrices(path) for path in paths}, rank)
