"""k without a guess: many k at once, one on each restart, and the fewest bits decide (chapter 25)."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import checks
from ..algorithm import check, decompose
from ..attributions import gradient
from ..batch import Batches
from ..config import Config
from ..decomposition import Decomposition
from ..selection import Selection, TopK
from .rate import ALPHA, EPSILONS, Judge

KS = 12  # of a run, one for each restart
LATE = ((0.0, 1.0), (0.7, 1.0), (0.701, 2.0))
"""Multiples of k along a run: it doubles where the simplicity loss ends (chapter 6)."""


class Each(Selection):
    """A selection for each restart, none with parameters.

    Args:
        selections: R of them, one for each restart; none that has to be started, as `Bottleneck` and `Importance` have.

    Raises:
        TypeError, ValueError: no list of such selections, or an empty one.
    """

    def __init__(self, selections: Sequence[Selection]) -> None:
        checks.kind("selections", selections, (list, tuple), "a list of selections")
        for selection in selections:
            checks.kind("selections", selection, Selection, "a list of selections")
            if type(selection).start is not Selection.start:
                raise ValueError(f"selections must be of those that a run need not start, got {selection!r}")
        if not selections:
            raise ValueError("selections must hold at least one, got none")
        self.selections = list(selections)

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        """Choose for every restart by its own selection.

        Args:
            scores: attributions [R, B, (positions,) C].
            t: progress of the run, in [0, 1].
            share: of the step's samples, those that are in `scores`.
        """
        return torch.cat([own.choose(part, t, share) for own, part in self._pairs(scores)])

    def threshold(self, scores: Tensor) -> Tensor | None:
        """Give each restart's threshold, [R]; None if one has none.

        Args:
            scores: attributions [R, B, (positions,) C].
        """
        pairs = self._pairs(scores)
        own = [part for selection, score in pairs if (part := selection.threshold(score)) is not None]
        return torch.cat(own) if len(own) == len(self.selections) else None

    def _pairs(self, scores: Tensor) -> Iterator[tuple[Selection, Tensor]]:
        if len(self.selections) != len(scores):
            raise ValueError(f"selections must be one for each of {len(scores)} restarts, got {len(self.selections)}")
        return zip(self.selections, scores.split(1), strict=True)


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        best: the decomposition that needs the fewest bits, the first of equals.
        k: mean number of active components per sample in its run, before the last stage.
        settings: of its run, those that were changed, and the number of components.
        runs: all of them, each with its restarts, one for each k.
        tried: a row for each restart of every run: "run", "changed", "k", "bits".
        seconds: that all took.
    """

    best: Decomposition
    k: float
    settings: dict[str, Any]
    runs: list[Decomposition]
    tried: list[dict[str, Any]]
    seconds: float

    def __str__(self) -> str:
        lines = ["run       k      bits  changed"]
        for row in self.tried:
            changed = ", ".join(f"{name}={value}" for name, value in row["changed"].items())
            lines.append(f"{row['run']:3d}  {row['k']:6.3g}  {row['bits']:8.4g}  {changed}".rstrip())
        return "\n".join(lines)


def _around(tried: list[dict[str, Any]], most: float) -> list[float]:
    """Choose the next k: around the best, and around the best of those that are not within a factor of two."""
    order = [row["k"] for row in sorted(tried, key=lambda row: row["bits"])]
    away = [k for k in order if not 0.5 <= k / order[0] <= 2]
    n = KS // 2
    return [min(k * 2 ** ((i - (n - 1) / 2) / 4), most) for k in (order[0], (away or order)[0]) for i in range(n)]


def _check(arguments: dict[str, Any], changed: dict[str, Any]) -> None:
    """Check arguments of `decompose` and settings of `Config` as a run would, and name what was changed."""
    names = set(inspect.signature(decompose).parameters) - {"n_components"}
    functions = {name: arguments.get(name) for name in ("output", "attribution", "callback")}
    functions["batches"] = lambda step, generator: None
    values = {name: value for name, value in arguments.items() if name not in names}
    try:
        config = Config.from_dict(values | {"top_k": values["n_components"]})
        check(config, arguments.get("divergence", "mse"), arguments.get("hidden_modules", ()), functions)
    except (TypeError, ValueError) as error:
        raise type(error)(f"tries: {changed} does not fit: {error}") from error


def tune(
    target: nn.Module,
    batches: Batches,
    weights: Sequence[str],
    n_components: int,
    *,
    epsilons: tuple[float, ...] = EPSILONS,
    alpha: float = ALPHA,
    tries: Mapping[str, Sequence[Any]] | None = None,
    minutes: float = math.inf,
    progress: bool = True,
    **settings: Any,
) -> Tuned:
    """Decompose without a k: a judge chooses among many, and among other settings if any are given.

    The first run has twelve k from C/256 up to C/4, in equal ratios; the second six from 0.65 to 1.5 times the best,
    and six around the best of those that are not near it: a small network as one lump may need few bits, too. Then each
    value in `tries` gets a run with k chosen in the same way; whatever needs fewer bits stays.

    Args:
        target: the network.
        batches: as for `decompose`, like all that is not named here.
        weights: parameter paths.
        n_components: C; more than the mechanisms you expect.
        epsilons: errors at which bits are counted (`rate.Judge`).
        alpha: bits for each unit of rank.
        tries: name of a setting to values that are worth a run, beside its own.
        minutes: no run begins that would end later if it took as long as the longest so far; the first always does.
        progress: show a bar over the runs.
        **settings: further arguments of `decompose`, such as `divergence`, `attribution`, and any field of `Config`. A
            `callback` is called along every run, whose steps begin at 0.

    Returns:
        Tuned: the best decomposition, and all that was tried. There is a warning if none reached an error of
        `epsilons`, since nothing can be compared then.

    Raises:
        TypeError: a k, `per_sample`, selection, judge, number of restarts, checkpoint or log, which belong to one run.
        TypeError, ValueError: as `decompose`; of `tries` before the first run.
    """
    checks.kind("tries", tries, (Mapping, type(None)), "a mapping from settings to values that are worth a run")
    for name, values in (tries or {}).items():
        if not checks.kind(f"tries: {name}", values, (list, tuple), "a list of values"):
            raise ValueError(f"tries: {name} must have at least one value, got {values!r}")
    given = settings.keys() | (tries or {}).keys()
    for name in ("top_k", "per_sample", "selection", "restarts", "judge", "checkpoint", "log"):
        if name in given:
            raise TypeError(f"{name} belongs to one run, and tune makes several: it must not be given")
    for name in {"target", "batches", "weights"} & set(tries or {}):
        raise TypeError(f"tries must be settings, and {name} is the same for all runs: got {list(tries or {})}")
    progress = checks.flag("progress", progress)
    seconds = 60 * (minutes if minutes == math.inf else checks.number("minutes", minutes, 0))
    where = {"at": settings.get("attribute_at", "target"), "per_position": settings.get("per_position", False)}
    attribution = settings.get("attribution") or partial(gradient, **where)
    judge = Judge(epsilons, alpha, settings.get("divergence", "mse"), attribution)
    C = checks.number("n_components", n_components, 1, whole=True)
    kept: dict[str, Any] = {"n_components": C}
    plan: list[dict[str, Any]] = [{}, {}, *({name: v} for name, values in (tries or {}).items() for v in values)]
    ks = [C / 256 * 2 ** (6 * i / (KS - 1)) for i in range(KS)]
    for changed in plan[2:]:  # now, and not after the runs before it
        _check(settings | kept | changed, changed)
    start, longest, least = time.monotonic(), 0.0, math.inf
    best, k, runs, tried = None, math.nan, list[Decomposition](), list[dict[str, Any]]()
    with tqdm(total=len(plan), disable=not progress, unit="run") as bar:
        for run, changed in enumerate(plan):
            begun = time.monotonic()
            if best is not None and begun - start + longest > seconds:
                break
            arguments = settings | kept | changed
            selection = Each([TopK(tuple((t, factor * k) for t, factor in LATE)) for k in ks])
            result = decompose(
                target, batches, weights, selection=selection, judge=judge, restarts=KS, progress=False, **arguments
            )
            runs.append(result)
            longest = max(longest, time.monotonic() - begun)
            pairs = zip(ks, result.scores, strict=True)
            tried += [{"run": run, "changed": changed, "k": k, "bits": bits} for k, bits in pairs]
            bits = result.scores[result.chosen]
            if best is None or bits < least:
                best, k, kept, least = result, ks[result.chosen], kept | changed, bits
            ks = _around(tried, kept["n_components"] / 2)
            bar.update()
            bar.set_postfix(k=f"{k:.3g}", bits=f"{least:.4g}")
    assert best is not None
    if least == math.inf:
        what = f"no k reached an error of {max(epsilons):g} or less, so that the first is given"
        warnings.warn(f"{what}: take more steps, or raise the weight of faithfulness", UserWarning, stacklevel=2)
    return Tuned(best, k, kept, runs, tried, time.monotonic() - start)
