"""Malformed values for every parameter of every public function: a clear error of the package's own, or it fails.

A value that makes no sense must not pass in silence, nor end in an error from within torch. What is public is found by
looking (`test_public_names.NAMES`); `VALID` has arguments that work for each function, `KINDS` the malformed values by
the parameter's name, and `OWN_KINDS` those of parameters that mean something else in one function.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import linecache
import math
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_public_names import NAMES
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal import checks, store
from apd_minimal.decomposition import fingerprint

matplotlib.use("Agg")
Strategy = st.SearchStrategy[Any]
PACKAGE = str(Path(apd.__file__).parent)


# What there is.

MORE = {  # public by the API page, and in no module of `NAMES`
    "tidy.merge": "merge_and_prune merge_by_bits shortened",
    "scale.layerwise": "decompose_groups activity similarity cluster stitch",
}
CUTS = ("input_columns", "rotated_columns", "random_split")  # of `controls`: of weights


def public() -> dict[str, Callable[..., Any]]:
    """Every public function, class and method, by name."""
    found: dict[str, Callable[..., Any]] = {}

    def add(name: str, thing: Any) -> None:
        if inspect.isclass(thing):
            found[name] = thing
            for own in vars(thing):
                if (not own.startswith("_") or own == "__call__") and callable(getattr(thing, own)):
                    found[f"{name}.{own}"] = getattr(thing, own)
        elif callable(thing):
            found[name] = thing

    for module_name, names in NAMES.items():
        module = getattr(apd, module_name) if module_name else apd
        for name in names.split():
            thing = getattr(module, name)
            if not inspect.ismodule(thing):
                add(f"{module_name}.{name}".lstrip("."), thing)
            elif name not in NAMES:
                for own, inner in vars(thing).items():
                    if not own.startswith("_") and getattr(inner, "__module__", None) == thing.__name__:
                        add(f"{name}.{own}", inner)
    for name, own in MORE.items():
        module = importlib.import_module(f"apd_minimal.{name}")
        for function in own.split():
            add(f"{name.rpartition('.')[2]}.{function}", getattr(module, function))
    return found


PUBLIC = public()
ELSEWHERE = {
    **{f"Network.{name}": "runs many times in a step" for name in ("__call__", "enter", "leave")},
    "NonFiniteLoss": "raised by the package",
    "Decomposition": "made by the package; its methods are tried here",
    "diagnose.Diagnosis": "made by the package",
    **{f"leakage.{name}": "made by the package" for name in ("Information", "Leakage", "Leakage.__getitem__", "Score")},
    "metrics.Matching": "made by the package",
    "metrics.Ownership": "made by the package",
    "metrics.Scrubbing": "made by the package",
    "rate.NEVER": "a constant",
    "baselines.GRIDS": "a constant",
    "baselines.Chosen": "made by the package",
    "rate.Cost": "made by the package",
    "targets.Certificate": "made by the package",
    "tune.Tuned": "made by the package",
    "worst.Worst": "made by the package",
    "worst.Worst.means": "takes nothing",
    "worst.Corners": "used by `worst`, as are its methods",
    **{f"worst.Corners.{name}": "used by `worst`" for name in ("ascend", "enumerate", "error", "search")},
    **{f"tune.Each.{name}": "called by the package" for name in ("choose", "threshold")},
    "selection.Selection": "a protocol: its methods are called by the package",
    **{
        f"selection.Selection.{name}": "called by the package"
        for name in ("start choose draw penalty threshold active parameters observe state tensors forget".split())
    },
    **{f"selection.TopK.{name}": "called by the package" for name in ("choose", "threshold", "active")},
    **{
        f"importance.Importance.{name}": "called by the package"
        for name in ("start", "choose", "draw", "penalty", "active", "parameters", "forget")
    },
    **{
        f"bottleneck.Bottleneck.{name}": "called by the package"
        for name in ("start", "choose", "observe", "threshold", "state")
    },
    "store.reading": "used by the package around what it reads",
    "rules.Rule": "functions of whoever adds a kind of module",
    "rules.Rule.rows": "a field",
    "rules.Rule.unrows": "a field",
    "store.StoreError": "raised by the package",
}
NETWORKS = {"target", "weights", "hidden_modules", "network"}  # test_network.py; or of no use to the method
NOT_DRAWN = {"self", "settings", "numbers", "thresholds"}  # whatever is passed on; settings are tried with `Config`


def parameters(name: str) -> list[str]:
    """The parameters to try."""
    skipped = NOT_DRAWN if name != "Config.from_dict" else {"self"}
    own = (
        "losses.faithfulness",
        "metrics.relative_faithfulness",
        *(f"controls.{n}" for n in CUTS),
    )
    skipped = skipped | (NETWORKS if name not in own else set())
    if name == "layerwise.decompose_groups":
        skipped = skipped | {"batches", "arguments"}  # of `decompose`, whose errors come back with the group's name
    if name.endswith(".__call__"):
        skipped = skipped | {"step"}  # of no use to these sources
    return [p for p in inspect.signature(PUBLIC[name]).parameters if p not in skipped]


def tried() -> list[str]:
    return [name for name in PUBLIC if name not in ELSEWHERE]


# What works.


def target() -> apd.targets.TMS:
    one = apd.targets.TMS()
    with torch.no_grad():
        one.encode.weight.copy_(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
        one.bias.fill_(0.3)
    return one


TARGET = target()
RESIDUAL = apd.targets.ResidualMLP(4, 6, (3,))
LETTERS = apd.targets.Transformer(7, 4, 2, 4, 1)
GATED = apd.targets.GatedFunctions(2, 3)
TASK = apd.targets.ModularTask(5)
MODULAR = apd.targets.ModularArithmetic([TASK], switches="frequency")
GROUP = apd.targets.Group("S3")
OPERATIONS = apd.targets.GroupOperations([GROUP], switches="irrep")
NEURONS = torch.ones(6, 4)
INDUCTION = apd.targets.Induction()
TOKENS = INDUCTION.data(4)(0, torch.Generator().manual_seed(0))
X = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) + 0.1
TRUTH = {"encode.weight": torch.eye(5)[:, :, None] * torch.tensor([1.0, 2.0])}
FIGURE_KINDS = ("svg", "webp")


def components(restarts: int | None = None, m: int = 2) -> apd.Components:
    shapes = {"encode.weight": (5, 2)}
    return apd.Components.random(shapes, 3, m, restarts, 0.5, torch.Generator().manual_seed(2))


def residual_components() -> apd.Components:
    shapes = {"read.0.weight": (6, 3), "write.0.weight": (3, 6)}
    return apd.Components.random(shapes, 3, 2, None, 0.5, torch.Generator().manual_seed(2))


def stream(step: int = 0, generator: torch.Generator | None = None) -> Tensor:
    return X.repeat(2048, 1)  # at once what the restarts are compared on


def decomposition() -> apd.Decomposition:
    history = {"step": [0], "faithfulness": [[0.5]]}
    config = apd.Config(3, 1.5)
    return apd.Decomposition(components(), config, history, [0.5], 0, True, fingerprint(TARGET.state_dict()))


FINAL = apd.selection.FinalSelection(apd.selection.TopK(1.5), threshold=0.5)


def draw(value: Any) -> Any:
    return apd.plots.masks(torch.eye(2))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


FOLDER = Path(tempfile.mkdtemp())
decomposition().save(FOLDER)
store.write_tensors(FOLDER / "x", "kind", {"a": torch.ones(2)}, {})
SCRUBBED = apd.metrics.Scrubbing(*[torch.ones(2)] * 3, nonempty=torch.ones(2, dtype=torch.bool))
ATTRIBUTION: dict[str, Any] = {"target": TARGET, "components": components(), "x": X}
OF_MASK = {"components": components(), "mask": torch.ones(4, 3)}
MATCH = {"components": components(), "truth": TRUTH}
SLIDER = {"draw": draw, "values": [1, 2], "label": "k"}
FRAMES = SLIDER | {"alt": str, "caption": "c"}
PAIR = {"outputs": torch.rand(2, 4, 5), "target_outputs": torch.rand(4, 5)}
LABELS = torch.arange(12) % 3
ROWS = torch.rand(4, 5)
DICTIONARY = apd.baselines.Dictionary([5], [2], 3, skip=True)
DICTIONARIES: dict[str, Any] = {
    "target": TARGET,
    "batches": lambda step, generator: X,
    "reads": "output of encode",
    "n_features": 3,
    "steps": 1,
}
TRAINED = {"seed": 0, "steps": 1, "batch_size": 4}
VALID: dict[str, tuple[Any, dict[str, Any]]] = {  # name: (self or None, arguments)
    "Network": (None, {"target": TARGET, "weights": ["encode.weight"]}),
    "Network.check": (apd.Network(TARGET, ["encode.weight"]), {"x": X}),
    "Components": (None, {"A": components().A, "B": components().B}),
    "Components.random": (None, {"shapes": {"w": (3, 2)}, "n_components": 2}),
    "Components.from_matrices": (None, {"matrices": {"w": torch.ones(2, 3, 4)}}),
    **{
        f"Components.{name}": (components(), {"path": "encode.weight"})
        for name in ("matrices", "sum", "squared_lengths", "singular_values")
    },
    **{f"Components.{name}": (components(), {}) for name in ("flat", "norms", "stacked", "parameters", "ranks")},
    "Components.map": (components(), {"function": torch.neg}),
    "Components.restart": (components(2), {"index": 1}),
    "Components.subset": (components(), {"index": [0, 2]}),
    "Config": (None, {"n_components": 3, "top_k": 1.0}),
    "Config.lr_at": (apd.Config(3, 1), {"t": 0.5}),
    "Config.logs": (apd.Config(3, 1), {"step": 1}),
    "Config.tidies": (apd.Config(3, 1), {"step": 1}),
    "Config.from_dict": (None, {"settings": {"n_components": 3, "top_k": 1}}),
    "Decomposition.save": (decomposition(), {"folder": FOLDER}),
    "Decomposition.load": (None, {"folder": FOLDER, "target": TARGET}),
    "artefacts.manifest": (None, {}),
    "artefacts.path": (None, {"name": next(iter(apd.artefacts.manifest()))}),
    "decompose": (
        None,
        {"target": TARGET, "batches": stream, "weights": ["encode.weight"], "n_components": 3, "top_k": 1}
        | {"steps": 1, "progress": False},
    ),
    "frames.static": (None, FRAMES),
    "frames.live": (None, SLIDER),
    "frames.slider": (None, FRAMES),
    "glue.glue": (None, {"name": "a", "value": 1.5}),
    "glue.floored": (None, {"value": 1.5}),
    "metrics.cosines": (None, {"first": components(), "second": components()}),
    "metrics.match_weights": (None, {"first": components(), "second": components()}),
    "metrics.match_use": (None, {"first": torch.rand(9, 3), "second": torch.rand(9, 3)}),
    "Decomposition.attributions": (decomposition(), {"target": TARGET, "x": X}),
    "Decomposition.active": (dataclasses.replace(decomposition(), threshold=0.1), {"target": TARGET, "x": X}),
    "glue.claim": (None, {"number": 1, "verdict": "holds", "finding": "So."}),
    "plots.matrices": (None, {"components": components()}),
    "plots.columns": (None, {"vectors": {"a": torch.ones(2, 2)}}),
    "plots.components": (None, {"decomposed": components(), "truth": TRUTH}),
    "plots.history": (None, {"result": decomposition()}),
    "plots.masks": (None, {"mask": torch.eye(3)}),
    "plots.tuned": (None, {"tried": [{"k": 1.0, "bits": 2.0}]}),
    "plots.curve": (None, {"curves": [apd.rate.Cost(0.1, 1.0, 1.0, 2)]}),
    **{f"attributions.{name}": (None, ATTRIBUTION) for name in NAMES["attributions"].split()},
    "attributions.inner_activation": (None, ATTRIBUTION | {"components": components(m=1)}),
    "data.SparseFeatures": (None, {"n_features": 3}),
    "data.SparseFeatures.__call__": (apd.data.SparseFeatures(3), {"step": 0, "generator": generator()}),
    "diagnose.diagnose": (None, ATTRIBUTION | {"top_k": 1.0}),
    "baselines.Dictionary": (None, {"reads": [5], "writes": [5], "n_features": 3}),
    "baselines.Dictionary.encode": (DICTIONARY, {"x": ROWS}),
    "baselines.Dictionary.forward": (DICTIONARY, {"x": ROWS}),
    "baselines.Dictionary.decode": (DICTIONARY, {"codes": ROWS[:, :3], "x": ROWS}),
    "baselines.Dictionary.losses": (DICTIONARY, {"x": ROWS, "y": ROWS[:, :2]}),
    "baselines.Dictionary.normalise": (apd.baselines.Dictionary([5], [2], 3), {}),
    "baselines.Dictionary.directions": (DICTIONARY, {}),
    "baselines.activations": (None, {"target": TARGET, "x": X, "places": "output of encode"}),
    "baselines.replaced": (None, {"target": TARGET, "x": X, "places": "input of encode", "values": [X]}),
    "baselines.fit": (None, DICTIONARIES),
    "baselines.choose": (None, DICTIONARIES | {"grid": [0.1]}),
    "baselines.costs": (
        None,
        {"target": TARGET, "dictionary": DICTIONARY, "x": X, "reads": "input of encode", "writes": "output of encode"},
    ),
    "baselines.transcoded": (None, {"dictionary": DICTIONARY, "paths": "encode.weight"}),
    "baselines.beside": (None, {"parts": [components(), components()]}),
    "baselines.singular": (None, {"weights": {"encode.weight": torch.ones(5, 2)}}),
    "baselines.neurons": (
        None,
        {"weights": {"encode.weight": torch.ones(5, 2)}, "layers": [{"encode.weight": "output"}]},
    ),
    "baselines.match_directions": (None, {"true": ROWS, "found": ROWS + 1, "n_draws": 2}),
    "baselines.copies": (None, {"true": ROWS, "found": ROWS + 1}),
    "baselines.owners": (None, MATCH),
    "rate.costs": (None, ATTRIBUTION),
    "rate.curve": (None, ATTRIBUTION),
    "rate.shortest": (None, ATTRIBUTION),
    "rate.Judge": (None, {}),
    "rate.Judge.__call__": (
        apd.rate.Judge(),
        {"network": apd.Network(TARGET, ["encode.weight"]), "components": components(), "x": X},
    ),
    "rate.Cost.bits": (apd.rate.Cost(0.1, 1.0, 1.0, 2), {"alpha": 1.0}),
    "rate.Cost.message": (apd.rate.Cost(0.1, 1.0, 1.0, 2), {"alpha": 1.0}),
    "controls.input_columns": (None, {"weights": {"w": torch.ones(5, 2)}}),
    "controls.rotated_columns": (None, {"weights": {"w": torch.ones(5, 2)}, "basis": torch.eye(5)}),
    "controls.random_split": (None, {"weights": {"w": torch.ones(5, 2)}}),
    "worst.worst": (None, ATTRIBUTION | {"gates": torch.ones(4, 3) / 2, "steps": 1, "n_draws": 1}),
    "merge.merge_and_prune": (None, {"components": components(2), "mask": torch.ones(2, 4, 3)}),
    "merge.merge_by_bits": (None, {"components": components(2), "mask": torch.ones(2, 4, 3), "alpha": 1.0}),
    "merge.shortened": (None, OF_MASK | {"alpha": 1.0}),
    "layerwise.decompose_groups": (
        None,
        {"target": TARGET, "batches": stream, "groups": {"a": ["encode.weight"]}}
        | {"n_components": 3, "top_k": 1.0, "steps": 1, "progress": False},
    ),
    "layerwise.activity": (None, {"target": TARGET, "parts": {"a": decomposition()}, "x": X}),
    "layerwise.similarity": (None, {"masks": {"a": torch.ones(4, 3)}}),
    "layerwise.cluster": (None, {"masks": {"a": torch.ones(4, 3)}, "min_similarity": 0.5}),
    "layerwise.stitch": (None, {"parts": {"a": components()}, "clusters": [[("a", 0), ("a", 2)], [("a", 1)]]}),
    "tune.Each": (None, {"selections": [apd.selection.TopK(1.0)]}),
    "tune.tune": (
        None,
        {"target": TARGET, "batches": stream, "weights": ["encode.weight"], "n_components": 3}
        | {"steps": 1, "progress": False, "minutes": 0},
    ),
    "bottleneck.Bottleneck": (None, {}),
    "bottleneck.settings": (
        None,
        {"network": apd.Network(TARGET, ["encode.weight"]), "x": X, "n_components": 3},
    ),
    "importance.Importance": (None, {"coefficient": 0.1, "p": 1.0}),
    "importance.leaky_clamp": (None, {"value": torch.rand(4, 3)}),
    "leakage.leakage": (None, ATTRIBUTION | {"top_k": 1.0}),
    "leakage.nearer": (None, {"own": torch.rand(4), "its": torch.rand(4)}),
    "controls.dealt": (None, {"components": components()}),
    "leakage.information": (None, {"mask": LABELS[:, None].float(), "label": LABELS}),
    "losses.faithfulness": (
        None,
        {"components": components(), "weights": {"encode.weight": torch.ones(5, 2)}},
    ),
    "losses.hidden": (None, {"activations": [PAIR["outputs"]], "target_activations": [PAIR["target_outputs"]]}),
    "losses.kl": (None, PAIR),
    "losses.minimality": (None, PAIR),
    "losses.mse": (None, PAIR),
    "losses.sample_errors": (None, PAIR | {"divergence": apd.losses.mse}),
    "losses.simplicity": (None, OF_MASK),
    "losses.simplicity_exact": (None, OF_MASK),
    "metrics.description_length": (None, OF_MASK),
    "metrics.ml2r": (None, MATCH),
    "metrics.mmcs": (None, MATCH),
    "metrics.output_error": (None, ATTRIBUTION),
    "metrics.ownership": (None, MATCH),
    "metrics.relative_faithfulness": (
        None,
        {"components": components(), "weights": {"encode.weight": torch.ones(5, 2)}},
    ),
    "metrics.scrubbing": (None, ATTRIBUTION | {"top_k": 1.0}),
    "metrics.responsible": (None, ATTRIBUTION),
    "metrics.Scrubbing.means": (SCRUBBED, {}),
    "rules.TransposedLinear": (None, {"encoder": nn.Linear(3, 2)}),
    "rules.TransposedLinear.forward": (apd.rules.TransposedLinear(nn.Linear(5, 2)), {"x": torch.ones(4, 2)}),
    "rules.rule": (None, {"module": nn.Linear(3, 2)}),
    "store.read_tensors": (None, {"path": FOLDER / "x", "kind": "kind"}),
    "store.write": (None, {"path": FOLDER / "y", "data": b"text"}),
    "store.write_tensors": (
        None,
        {"path": FOLDER / "z", "kind": "kind", "tensors": {"a": torch.ones(2)}, "facts": {"b": 1}},
    ),
    "targets.GatedFunctions": (None, {}),
    "targets.GatedFunctions.functions": (GATED, {"x": torch.ones(4)}),
    "targets.GatedFunctions.forward": (GATED, {"x": torch.ones(4, 3)}),
    "targets.GatedFunctions.data": (GATED, {}),
    "targets.GatedFunctions.mechanisms": (GATED, {}),
    "targets.GatedInputs": (None, {"n_functions": 2}),
    "targets.GatedInputs.__call__": (apd.targets.GatedInputs(2), {"step": 0, "generator": generator()}),
    "targets.Group": (None, {"name": "S3"}),
    "targets.Group.certify": (GROUP, {"u": NEURONS, "v": NEURONS, "w": torch.ones(4, 6)}),
    "targets.Group.span": (GROUP, {"irreps": [1, 0]}),
    "targets.GroupOperations": (None, {"groups": ["S3"]}),
    "targets.GroupOperations.forward": (OPERATIONS, {"x": OPERATIONS.inputs()}),
    "targets.GroupOperations.inputs": (OPERATIONS, {}),
    "targets.GroupOperations.answers": (OPERATIONS, {}),
    "targets.GroupOperations.data": (OPERATIONS, {}),
    "targets.GroupOperations.mechanisms": (OPERATIONS, {}),
    "targets.Induction": (None, {}),
    **{f"targets.Induction.{name}": (INDUCTION, {"x": TOKENS}) for name in ("forward", "patterns", "says", "answers")},
    "targets.Induction.uses": (INDUCTION, {"x": TOKENS}),
    "targets.Induction.data": (INDUCTION, {}),
    "targets.Induction.mechanisms": (INDUCTION, {}),
    "targets.Sequences": (None, {}),
    "targets.Sequences.__call__": (INDUCTION.data(4), {"step": 0, "generator": generator()}),
    "targets.ModularTask": (None, {"p": 5}),
    "targets.ModularTask.waves": (TASK, {"n": 6}),
    "targets.ModularArithmetic": (None, {"tasks": [TASK]}),
    "targets.ModularArithmetic.forward": (MODULAR, {"x": MODULAR.inputs()}),
    "targets.ModularArithmetic.inputs": (MODULAR, {}),
    "targets.ModularArithmetic.answers": (MODULAR, {"x": MODULAR.inputs()}),
    "targets.ModularArithmetic.data": (MODULAR, {}),
    "targets.ModularArithmetic.mechanisms": (MODULAR, {}),
    "targets.Pairs": (None, {"table": MODULAR.inputs(), "batch_size": 4}),
    "targets.Pairs.__call__": (MODULAR.data(4), {"step": 0, "generator": generator()}),
    "targets.Questions": (None, {}),
    "targets.Questions.__call__": (apd.targets.Questions(), {"step": 0, "generator": generator()}),
    "targets.ResidualMLP": (None, {"n_features": 4, "d_resid": 6, "neurons": (3,)}),
    "targets.ResidualMLP.forward": (RESIDUAL, {"x": torch.ones(4, 4)}),
    "targets.ResidualMLP.data": (RESIDUAL, {}),
    "targets.ResidualMLP.labels": (None, {"x": torch.ones(4, 4)}),
    "targets.ResidualMLP.fit": (RESIDUAL, TRAINED),
    "targets.ResidualMLP.composed": (RESIDUAL, {"x": torch.ones(4, 4)}),
    "targets.ResidualMLP.contributions": (RESIDUAL, {"components": residual_components()}),
    "targets.ResidualMLP.ownership": (RESIDUAL, {"components": residual_components()}),
    "targets.ResidualMLP.attributions": (
        RESIDUAL,
        {"network": None, "components": residual_components(), "x": torch.ones(4, 4)},
    ),
    "targets.TMS": (None, {}),
    "targets.TMS.forward": (TARGET, {"x": X}),
    "targets.TMS.data": (TARGET, {}),
    "targets.TMS.fit": (target(), TRAINED),
    "targets.TMS.rotate": (target(), {}),
    "targets.TMS.ownership": (TARGET, {"components": components()}),
    "targets.TMS.mechanisms": (TARGET, {}),
    "targets.TMS.attributions": (TARGET, {"network": None, "components": components(), "x": X}),
    "targets.Transformer": (None, {"n_letters": 7, "d": 4, "n_heads": 2, "neurons": 4, "n_blocks": 1}),
    "targets.Transformer.forward": (LETTERS, {"x": torch.zeros(2, 9, dtype=torch.long)}),
    "targets.Transformer.answers": (LETTERS, {"x": torch.tensor([[7] + 8 * [0]])}),
    "targets.Transformer.data": (LETTERS, {}),
    "targets.Transformer.fit": (LETTERS, TRAINED),
    "selection.TopK": (None, {"top_k": 1.0}),
    "selection.FinalSelection": (None, {"selection": apd.selection.TopK(1.0)}),
    "selection.final_selection": (None, {"top_k": 1.0, "n_components": 3}),
    **{
        f"selection.FinalSelection.{name}": (FINAL, {"scores": torch.rand(4, 3)})
        for name in ("gates", "mask", "active")
    },
    "selection.batch_top_k": (None, {"scores": torch.rand(4, 3), "k": 1.5}),
    "selection.sample_top_k": (None, {"scores": torch.rand(4, 3), "k": 1}),
}


# What does not.

OBJECTS: list[Any] = [object(), {}, {"a": 1}, [], [1], (1.0, 2.0), b"1", 1j, "", "1", "nan", "False", Ellipsis]
OBJECTS += [torch.zeros(2), np.zeros(2)]
NOTHING = st.none()


def but(*fits: type) -> Strategy:
    """Objects of many kinds, none of them of these."""
    return st.sampled_from([thing for thing in OBJECTS if not isinstance(thing, fits)])


EDGES: dict[Strategy, list[float]] = {}  # the nearest that are wrong
FITTING: dict[Strategy, list[float]] = {}  # and the last that are right


def number(
    low: float | None = None,
    high: float | None = None,
    above: bool = False,
    below: bool = False,
    whole: bool = False,
    none: bool = False,
) -> Strategy:
    """No number, or one outside of the range (which is without `low` if above, without `high` if below)."""
    strange = [float("nan"), float("inf"), -float("inf"), np.float32("nan"), torch.tensor(torch.inf), np.bool_(True)]
    drawn = [but(), st.booleans(), st.sampled_from(strange)]
    if not none:
        drawn.append(NOTHING)
    if low is not None:
        drawn += [st.floats(max_value=low, exclude_max=not above), st.integers(max_value=int(low) - 1)]
    if high is not None:
        drawn += [st.floats(min_value=high, exclude_min=not below), st.integers(min_value=int(high) + 1)]
    if whole:
        drawn.append(st.floats(-1e6, 1e6).filter(lambda v: v != int(v)))
    made = st.one_of(drawn)
    # The nearest that is wrong is always tried: there a mistake is likeliest.
    EDGES[made] = []
    if low is not None:
        EDGES[made].append(low if above else low - 1 if whole else math.nextafter(low, -math.inf))
    if high is not None:
        EDGES[made].append(high if below else high + 1 if whole else math.nextafter(high, math.inf))
    if whole:
        EDGES[made].append((low or 0) + 0.5)
    EDGES[made].append(10**400)  # too large to be a float
    FITTING[made] = [limit for limit, out in ((low, above), (high, below)) if limit is not None and not out]
    return made


def flag() -> Strategy:
    return st.one_of(but(), NOTHING, st.integers(), st.floats())


def choice(*options: str, none: bool = False) -> Strategy:
    drawn = [but(str), st.text().filter(lambda text: text not in options), st.integers(), st.booleans()]
    return st.one_of(drawn if none else [*drawn, NOTHING])


def function(none: bool = False) -> Strategy:
    drawn = [but(), st.integers(), st.booleans()]
    return st.one_of(drawn if none else [*drawn, NOTHING])


def text() -> Strategy:
    return st.one_of(but(str), NOTHING, st.integers(), st.booleans())


def path() -> Strategy:
    return st.one_of(but(str), NOTHING, st.integers(), st.booleans())


def source(none: bool = True) -> Strategy:
    drawn = [but(), st.integers(), st.booleans()]
    return st.one_of(drawn if none else [*drawn, NOTHING])


def poked(t: Tensor) -> Strategy:
    """The tensor with one entry that is NaN or infinite."""

    def poke(at: int, value: float) -> Tensor:
        new = t.clone()
        new.view(-1)[at] = value
        return new

    return st.builds(poke, st.integers(0, t.numel() - 1), st.sampled_from([torch.nan, torch.inf, -torch.inf]))


def tensor(t: Tensor, *free: int, finite: bool = True) -> Strategy:
    """No tensor, or one that is longer, shorter or of size one along an axis that is not free, or not finite."""
    shapes = []
    for axis in range(t.ndim):
        if axis not in free:
            shapes += [t.narrow(axis, 0, n) for n in {0, 1, t.shape[axis] - 1} if n < t.shape[axis]]
            shapes.append(torch.cat([t, t.narrow(axis, 0, 1)], axis))
    drawn = [st.sampled_from([t.tolist(), t.numpy(), t[..., None, None, None, None], t.new_tensor(1.0)]), st.none()]
    drawn.append(but(Tensor))
    if shapes:
        drawn.append(st.sampled_from(shapes))
    return st.one_of([*drawn, poked(t)] if finite else drawn)


def in_mapping(t: Tensor, name: str, *free: int, finite: bool = True) -> Strategy:
    """No mapping, one with another name or none, or with a malformed tensor."""
    other = [{}, {"other": t}, {name: t, "other": t}]
    inside = tensor(t, *free, finite=finite).map(lambda bad: {name: bad})
    return st.one_of(but(dict), NOTHING, st.sampled_from(other), inside)


def bad_components(alone: bool = False, finite: bool = True, fit: bool = True, restarts: bool = True) -> Strategy:
    """No components, of another weight or shape, with restarts where one decomposition is meant, or not finite."""
    wrong = [components().A, [components()], decomposition()]
    good = components()
    other = apd.Components({"other": good.A["encode.weight"]}, {"other": good.B["encode.weight"]})
    wide = apd.Components.random({"encode.weight": (6, 2)}, 3)
    drawn = [but(), NOTHING, st.sampled_from(wrong)]
    if fit:
        drawn.append(st.sampled_from([other, wide]))
    if alone:
        drawn.append(st.sampled_from([components(2), components(1)]))
    if finite:
        for name in "AB":
            drawn.append(
                poked(getattr(good, name)["encode.weight"]).map(
                    lambda t, name=name: apd.Components(
                        *({"encode.weight": t if own == name else getattr(good, own)["encode.weight"]} for own in "AB")
                    )
                )
            )
    return st.one_of(drawn)


def inputs(x: Tensor = X) -> Strategy:
    """Inputs on which the target does not run, or makes no sense of."""
    others = [{"x": x}, (x, x), [x], x.numpy(), x[:0], x[0, 0], x[:, :-1], x[:, :1], x.double(), x.long(), x > 0]
    return st.one_of(but(Tensor), NOTHING, st.sampled_from(others), poked(x))


def schedule(below: float = -0.1, top: float | None = None) -> Strategy:
    """No number and no points, points that are not in order of progress, or values out of range."""
    points: list[Any] = [(), ((0.0,),), ((0.0, 1.0, 2.0),), ((0.7, 1.0), (0.0, 2.0)), ((0.5, 1.0), (0.5, 2.0)), "01"]
    points += [((0.0, 1.0), (2.0, 1.0)), ((-1.0, 1.0),), ((0.0, below),), ((0.0, "1"),), ((torch.nan, 1.0),), [[1]]]
    points += [((0.0, torch.nan),), ((0.0, torch.inf),), ((0.0, None),), [1, 2], [[0.0, 1.0], 2], ((0.0, True),)]
    if top is not None:
        points.append(((0.0, 1.0), (1.0, top)))
    plain = number(0, top, above=below == 0.0).filter(lambda v: not isinstance(v, (list, tuple)))
    return st.one_of(plain, st.sampled_from(points))


def batches() -> Strategy:
    """No function, or one that gives what is no batch."""
    return st.one_of(function(), st.just([X, X]), inputs().map(lambda bad: lambda step, generator: bad))


SEED = number(0, 2**62, whole=True)
SIZE = number(1, whole=True)
SIZE_OR_NONE = number(1, whole=True, none=True)
SHARE = number(0, 1)
PROBABILITY = number(0, 1, above=True)
AXES = st.one_of(but(), st.integers())
PLACES = st.one_of(but(), st.sampled_from(["encode", "output of nothing", "side of encode", 1, [None]]), st.booleans())
SIZES = st.one_of(but(list, tuple), NOTHING, st.sampled_from([[], [0], [1.5], ["1"]]))
KINDS: dict[str, Strategy] = {
    "sparsity": number(0),
    "revive": number(0, whole=True),
    "skip": flag(),
    "centred": flag(),
    "least": number(-1, 1),
    "reads": st.one_of(PLACES, NOTHING),
    "writes": PLACES,
    "places": st.one_of(PLACES, NOTHING),
    "dictionary": st.one_of(but(), NOTHING, st.integers()),
    "grid": st.one_of(but(list, tuple), st.just([]), number(0).map(lambda bad: [0.1, bad])),
    "parts": st.one_of(but(), NOTHING, bad_components(alone=True, fit=False).map(lambda bad: [bad])),
    "paths": st.one_of(but(str), NOTHING, st.integers(), st.booleans()),
    "layers": st.one_of(but(), NOTHING, st.sampled_from([[{"other": "input"}], [{"encode.weight": "side"}]])),
    "true": tensor(ROWS, 0),
    "found": tensor(ROWS, 0),
    "codes": tensor(ROWS[:, :3], 0),
    "y": tensor(ROWS[:, :2]),
    "n_components": SIZE,
    "rank": SIZE_OR_NONE,
    "restarts": SIZE,
    "steps": SIZE,
    "batch_size": SIZE,
    "seed": SEED,
    "step": number(0, whole=True),
    "t": SHARE,
    "std": number(0),
    "generator": source(),
    "device": st.one_of(but(), st.just("nowhere"), st.booleans(), st.floats()),
    "path": path(),
    "function": function(),
    "threshold": number(0, 1, below=True),
    "top_k": number(0, 3, above=True),
    "k": number(0, 3, above=True),
    "p": number(0, above=True),
    "epsilon": number(0),
    "alpha": number(0),
    "epsilons": st.one_of(but(list, tuple), NOTHING, st.just([]), number(0, above=True).map(lambda bad: [0.1, bad])),
    "rank_threshold": number(0, 1, below=True),
    "minutes": number(0).filter(lambda v: not (isinstance(v, float) and v == float("inf"))),
    "tries": but(dict),
    "min_cosine": number(-1, 1),
    "min_purity": number(-1, 1),
    "length_range": st.one_of(
        number().filter(lambda v: not isinstance(v, (tuple, list))),
        st.sampled_from([(), (1,), (1, 2, 3), (2.0, 1.0), ("a", "b"), (torch.nan, 1.0), (0.0, torch.inf)]),
    ),
    "x": inputs(),
    "components": bad_components(),
    "mask": tensor(torch.ones(4, 3), 0),
    "truth": in_mapping(TRUTH["encode.weight"], "encode.weight", 0),
    "weights": in_mapping(torch.ones(5, 2), "encode.weight", finite=False).filter(
        lambda w: not (isinstance(w, dict) and set(w) == {"encode.weight", "other"})  # more weights than components
    ),
    "divergence": function(),
    "start": choice("all", "none"),
    "method": choice("gausslegendre"),
    "mode": choice("forward", "backward", "sample_gradients", none=True),
    "at": choice("target", "components"),
    "attribute_at": choice("target", "components"),
    "internal_batch_size": SIZE_OR_NONE,
    "n_probes": SIZE_OR_NONE,
    "n_steps": SIZE,
    "n_samples": number(1, whole=True),
    "n_features": SIZE,
    "n_functions": SIZE,
    "d_hidden": SIZE,
    "d_resid": SIZE,
    "probability": PROBABILITY,
    "low": number(None, 1.0),
    "high": number(0.0),
    "attribution": function(none=True),
    "judge": function(none=True),
    "callback": function(none=True),
    "n_draws": SIZE,
    "selection": st.one_of(function(none=True), st.sampled_from([1, "top_k", len])),
    "log": st.one_of(but(str, type(None)), st.integers(), st.booleans()),
    "output": function(none=True),
    "checkpoint": st.one_of(but(str), st.integers(), st.booleans()),
    "extend": st.one_of(flag(), st.just(True)),  # there is no checkpoint to extend
    "mesh": st.one_of(but(), st.integers(), st.booleans()),
    "checkpoint_every": SIZE,
    "tolerance": number(0),
    "micro_batch": SIZE_OR_NONE,
    "folder": path(),
    "kind": text(),
    "name": text(),
    "label": text(),
    "caption": text(),
    "draw": function(),
    "alt": function(),
    "shown": function(),
    "values": st.one_of(function(), st.just(())).filter(
        lambda v: isinstance(v, np.ndarray) or not isinstance(v, (list, tuple, bytes)) or not len(v)
    ),
    "digits": SIZE,
    "ax": AXES,
    "scores": st.one_of(but(Tensor), NOTHING, st.just(torch.ones(3)), poked(torch.ones(4, 3))),
    **{
        name: flag()
        for name in (
            "per_output per_position remainder return_convergence_delta return_std_error recompute progress nonempty "
            "identity show_neurons per_sample unit_norm lean"
        ).split()
    },
    # Settings of `Config`.
    **{name: schedule() for name in ("faithfulness", "minimality", "simplicity", "hidden", "scrub")},
    **{name: SHARE for name in ("tidy_every", "tidy_from", "tidy_until", "reseed_until")},
    "lr": number(0, above=True),
    "warmup": number(0, 1, below=True),
    "init_std": number(0, above=True),
}


def of_number_or_list(bad: Strategy) -> Strategy:
    """What is neither a list nor made of such numbers."""
    return st.one_of(bad.filter(lambda v: not isinstance(v, (list, tuple))), st.just(()), bad.map(lambda v: (v,)))


OUTPUTS = {
    "outputs": tensor(PAIR["outputs"], 0, finite=False).filter(lambda t: not isinstance(t, Tensor) or t.ndim < 5),
    "target_outputs": tensor(PAIR["target_outputs"], finite=False),
}
NO_NAN = {
    "components": bad_components(finite=False, fit=False),
    "mask": tensor(torch.ones(4, 3), 0, finite=False).filter(
        lambda t: not isinstance(t, Tensor) or t.shape[-1:] != (3,)
    ),
}
ALONE = {"components": bad_components(alone=True)}
ANY_WEIGHTS = {"components": bad_components(alone=True, fit=False)}
FEW_WEIGHTS = {"components": bad_components(finite=True)}
DIVERGENCE = st.one_of(  # no function, or one that does not give a number for each sample
    function(), st.sampled_from([lambda a, b: None, lambda a, b: (a - b).mean(), lambda a, b: a - b])
)
MATRICES = st.one_of(
    but(dict),
    NOTHING,
    tensor(torch.ones(5, 2), 0, 1).map(lambda bad: {"w": bad}),
    st.just({"w": torch.ones(5, 2), "v": torch.ones(4, 2)}),
)
CIRCUITS = st.one_of(but(list, tuple), NOTHING, st.sampled_from([(), ("last",), ["first", "first"], (1,), [None]]))
WIDTH = {
    name: {"x": tensor(x, 0, finite=False).filter(lambda t, n=n: not isinstance(t, Tensor) or t.shape[-1:] != (n,))}
    for name, x, n in (
        ("targets.TMS.forward", X, 5),
        ("targets.ResidualMLP.forward", torch.ones(4, 4), 4),
        ("targets.ResidualMLP.composed", torch.ones(4, 4), 4),
        ("targets.GatedFunctions.forward", torch.ones(4, 3), 3),
        ("rules.TransposedLinear.forward", torch.ones(4, 2), 2),
    )
}
OWN_KINDS: dict[str, dict[str, Strategy]] = {
    "baselines.Dictionary": {
        "reads": SIZES,
        "writes": SIZES,
        "kind": choice("relu", "topk", "batch_topk"),
        "skip": flag(),
    },
    **{f"baselines.Dictionary.{name}": {"x": tensor(ROWS, 0)} for name in ("encode", "forward")},
    **{f"baselines.Dictionary.{name}": {"x": tensor(ROWS)} for name in ("decode", "losses")},
    "baselines.Dictionary.directions": {"side": choice("write", "read")},
    **{
        f"baselines.{name}": {"kind": choice("relu", "topk", "batch_topk"), "batches": batches()}
        for name in ("fit", "choose")
    },
    "baselines.replaced": {
        "values": st.one_of(but(), NOTHING, tensor(X).map(lambda bad: [bad])),
        "x": st.one_of(but(Tensor), NOTHING, st.sampled_from([X[:0], X[:-1], X[0, 0]]), poked(X)),
    },
    "baselines.owners": ALONE | {"truth": KINDS["truth"]},
    "Network": {"hidden": st.one_of(but(list, tuple), NOTHING, st.sampled_from([[1], ["nowhere"], "encode"]))},
    "Components": {
        name: in_mapping(getattr(components(), name)["encode.weight"], "encode.weight", *free, finite=False)
        for name, free in (("A", (1,)), ("B", (2,)))
    },
    "Components.random": {
        "shapes": st.one_of(
            but(dict),
            NOTHING,
            st.sampled_from([{}, {"w": 3}, {"w": (3,)}, {"w": (3, 0)}, {"w": (3, -1)}, {"w": (2.5, 1)}, {"w": "ab"}]),
        ),
        "restarts": SIZE_OR_NONE,
    },
    "Components.from_matrices": {
        "matrices": st.one_of(
            but(dict),
            NOTHING,
            st.just({}),
            st.just({"w": torch.ones(2, 3, 4, dtype=torch.long)}),
            tensor(torch.ones(2, 3, 4), 0, 1, 2)
            .filter(lambda t: not isinstance(t, Tensor) or t.ndim < 3 or not t.isfinite().all())
            .map(lambda bad: {"w": bad}),
        )
    },
    "Components.restart": {"index": number(-2, 1, whole=True)},
    "Components.subset": {
        "index": st.one_of(
            number(-3, 2, whole=True).filter(lambda v: not isinstance(v, (list, tuple, Tensor, np.ndarray))),
            number(-3, 2, whole=True).map(lambda v: [v]),
            st.sampled_from([torch.tensor([True, False]), torch.tensor([0.5]), "12", (0, 1)]),
        )
    },
    "Config": {
        "top_k": schedule(0.0, 3.5),
        "per_weight": of_number_or_list(number(whole=True)).filter(
            lambda v: v is not None and not (isinstance(v, tuple) and not v)
        ),
        "alpha": number(0, above=True, none=True),
        "min_cosine": number(0, above=True),
    },
    "bottleneck.settings": {"divergence": st.one_of(function(), st.just("hinge"))},
    "bottleneck.Bottleneck": {
        "allowed": schedule(0.0, 1.0),
        "gain": of_number_or_list(number(0, above=True)),
        "first": number(0, above=True),
    },
    "importance.Importance": {
        "coefficient": schedule(),
        "p": schedule(0.0),
        "gamma": st.just(1.0),  # with p
        "frequency": number(0),
        "per_weight": of_number_or_list(number(1, whole=True)).filter(
            lambda v: v is not None and not (isinstance(v, tuple) and not v)
        ),
        "hidden": SIZE,
        "alive": number(0, 1, below=True),
    },
    "importance.leaky_clamp": {"value": but(Tensor), "leak": SHARE},
    "Config.from_dict": {
        "settings": st.one_of(
            but(dict), NOTHING, st.sampled_from([{}, {"top_k": 1}, {"n_components": 3, "top_k": 1, "no": 1}])
        )
    },
    "Decomposition.load": {"folder": st.one_of(path(), st.just("/nowhere"))},
    "artefacts.path": {"name": st.one_of(text(), st.just("no such thing"))},
    "decompose": {
        "batches": batches(),
        "top_k": schedule(0.0, 3.5),
        "divergence": st.one_of(function(), st.just("hinge")),
    },
    "frames.static": {"start": number(0, 1, whole=True), "kind": choice(*FIGURE_KINDS)},
    "frames.live": {"start": number(0, 1, whole=True)},
    "frames.slider": {"start": number(0, 1, whole=True), "kind": choice(*FIGURE_KINDS)},
    **{
        f"metrics.{name}": {side: bad_components(alone=True) for side in ("first", "second")} | {"empty": number(0)}
        for name in ("cosines", "match_weights")
    },
    "metrics.match_use": {"first": but(Tensor), "second": but(Tensor), "by": choice("correlation", "overlap")},
    "Decomposition.save": {"restarts": st.sampled_from(["yes", 2, [True], None])},
    "glue.floored": {
        "value": st.sampled_from([None, [1], {}, torch.zeros(2), "1", True]),
        "floor": number(0),
        "digits": SIZE,
    },
    "glue.glue": {"value": st.sampled_from([None, [1], {}, torch.zeros(2), np.zeros(3), object()])},
    "glue.claim": {
        "number": SIZE,
        "verdict": choice("holds", "does not hold", "cannot be tested here", "holds within limits", "open so far"),
        "finding": st.one_of(text(), st.just("{missing}")),
    },
    "plots.matrices": ANY_WEIGHTS
    | {
        "path": st.one_of(but(), st.integers(), st.booleans()),
        "order": st.one_of(
            number(0, 2, whole=True).filter(lambda v: v is not None and not (isinstance(v, (list, tuple)) and v)),
            st.just([3]),
            st.just(["0"]),
        ),
    },
    "plots.columns": {
        "vectors": st.one_of(but(dict), NOTHING, st.just({}), tensor(torch.ones(2, 2), 0).map(lambda bad: {"a": bad}))
    },
    "plots.components": {
        "decomposed": bad_components(alone=True).filter(lambda c: not isinstance(c, apd.Decomposition)),
        "truth": KINDS["truth"].filter(lambda v: v is not None),
        "path": st.one_of(but(), st.integers(), st.booleans()),
    },
    "plots.history": {"result": st.one_of(function(), st.just(components()))},
    "plots.masks": {"mask": tensor(torch.ones(4, 3), 0, 1)},
    "plots.curve": {"curves": st.one_of(but(list, tuple, dict), NOTHING, but().map(lambda bad: [bad]), st.just([{}]))},
    "plots.tuned": {"tried": st.one_of(but(list, tuple), NOTHING, but().map(lambda bad: [bad]), st.just([{}]))},
    "attributions.shapley": {"n_samples": number(2, whole=True, none=True)},
    "attributions.path_shapley": {"n_samples": SIZE},
    "data.SparseFeatures.__call__": {"generator": source(none=False)},
    "targets.GatedInputs.__call__": {"generator": source(none=False)},
    "targets.Questions.__call__": {"generator": source(none=False)},
    "diagnose.diagnose": ALONE | {"divergence": DIVERGENCE},
    **{f"controls.{n}": {"weights": MATRICES, "basis": tensor(torch.eye(5))} for n in CUTS},
    "worst.worst": ALONE
    | {
        "gates": tensor(torch.ones(4, 3)),
        "divergence": DIVERGENCE,
        "steps": number(0, whole=True),
        "size": number(0, above=True),
    },
    **{
        f"merge.{name}": {
            "components": st.one_of(bad_components(fit=False), st.just(components())),
            "mask": tensor(torch.ones(2, 4, 3), 1),
            "min_cosine": number(0, above=True),
            "dead_share": number(0),
            "alpha": number(0, above=True),
        }
        for name in ("merge_and_prune", "merge_by_bits")
    },
    "merge.shortened": {"components": bad_components(alone=True, fit=False), "alpha": number(0, above=True)},
    "layerwise.decompose_groups": {
        "groups": st.one_of(but(dict), NOTHING, st.sampled_from([{}, {1: ["encode.weight"]}, {"a": "b"}, {"a": []}])),
        "processes": SIZE,
        "per_group": but(dict),
    },
    "layerwise.activity": {"parts": st.one_of(but(dict), NOTHING, st.just({"a": components()}))},
    **{
        f"layerwise.{name}": {
            "masks": st.one_of(
                but(dict), NOTHING, st.just({}), tensor(torch.ones(4, 3), 0, 1).map(lambda bad: {"a": bad})
            ),
            "min_similarity": number(0, 1, above=True),
        }
        for name in ("similarity", "cluster")
    },
    "layerwise.stitch": {
        "parts": st.one_of(
            but(dict),
            NOTHING,
            bad_components(alone=True, fit=False)
            .filter(lambda c: not isinstance(c, apd.Decomposition))
            .map(lambda bad: {"a": bad}),
        ),
        "clusters": st.one_of(but(list, tuple), NOTHING, st.sampled_from([[1], [[("a", 0)]], [["a"]], [[("b", 0)]]])),
    },
    **{
        f"rate.{name}": ALONE | {"divergence": st.one_of(function(), st.just("hinge"))}
        for name in ("costs", "curve", "shortest", "Judge", "Judge.__call__")
    },
    "rate.curve": ALONE | {"divergence": st.one_of(function(), st.just("hinge")), "points": number(2, whole=True)},
    "tune.Each": {"selections": st.one_of(but(list, tuple), NOTHING, but().map(lambda bad: [bad]))},
    "tune.tune": {"batches": batches(), "tries": st.one_of(but(dict), st.sampled_from([{"lr": 3}, {"lr": []}]))},
    "leakage.leakage": ALONE
    | {
        "outputs": choice("values", "classes"),
        "blank": st.one_of(but(), st.sampled_from([1, True, {"a": None}, X[:, :-1], lambda x: x[:1], lambda x: None])),
        "tasks": st.one_of(but(), st.just(torch.zeros(4, dtype=torch.long))),  # its outputs are values
        "control": bad_components(alone=True).filter(lambda c: c is not None),
    },
    "leakage.nearer": {"own": tensor(torch.rand(4)), "its": tensor(torch.rand(4))},
    "controls.dealt": {"components": bad_components(alone=True, fit=False), "turned": flag()},
    "leakage.information": {
        "mask": tensor(torch.ones(12, 3), 1).filter(lambda t: not isinstance(t, Tensor) or t.ndim < 3),
        "label": tensor(LABELS, finite=False),
        "given": tensor(LABELS, finite=False).filter(lambda t: t is not None),
    },
    "losses.faithfulness": {"components": bad_components(finite=False)},
    "losses.hidden": {
        name: st.one_of(but(list, tuple), NOTHING, st.just([]), but(Tensor).map(lambda bad: [bad]))
        for name in ("activations", "target_activations")
    },
    "losses.kl": OUTPUTS,
    "losses.mse": OUTPUTS,
    **{f"losses.{name}": OUTPUTS | {"divergence": DIVERGENCE} for name in ("minimality", "sample_errors")},
    "losses.simplicity": NO_NAN,
    "losses.simplicity_exact": NO_NAN,
    "metrics.description_length": ANY_WEIGHTS,
    "metrics.ml2r": ALONE,
    "metrics.mmcs": ALONE,
    "metrics.ownership": ALONE,
    "metrics.relative_faithfulness": {"components": bad_components(finite=False)},
    "metrics.scrubbing": ALONE
    | {"anti": choice("half", "all"), "spared": tensor(torch.ones(4, 3)).filter(lambda t: t is not None)},
    "metrics.responsible": ALONE,
    "metrics.Scrubbing.means": {"samples": choice("all", "nonempty")},
    "rules.TransposedLinear": {"encoder": st.one_of(function(), st.just(nn.ReLU()))},
    "rules.rule": {"module": st.one_of(but(), NOTHING, st.just(nn.GRU(2, 2)))},
    "store.read_tensors": {"path": st.one_of(path(), st.just("/nowhere")), "kind": st.one_of(text(), st.just("other"))},
    "store.write": {"data": st.one_of(but(bytes), NOTHING, st.integers())},
    "store.write_tensors": {
        "tensors": st.one_of(but(dict), NOTHING, st.sampled_from([{"a": 1}, {1: X}, {"a": X.numpy()}, {"a": None}])),
        "facts": st.sampled_from([object(), {"a": X}, {"a": torch.nan}, {"a": {1, 2}}, torch.inf, b"1"]),
    },
    "targets.GatedFunctions": {"neurons": number(2, whole=True)},
    "targets.GatedFunctions.functions": {"x": st.one_of(but(Tensor), NOTHING)},
    "targets.Induction": {
        "circuits": CIRCUITS,
        "positions": number(7, 8, whole=True),
        "bits": number(3, 10, whole=True),
        "gap": number(0, above=True),
    },
    **{
        f"targets.Induction.{name}": {
            "x": st.one_of(
                but(Tensor), NOTHING, st.sampled_from([TOKENS + 0.0, TOKENS[:, :7], TOKENS + 10, TOKENS - 20])
            )
        }
        for name in ("forward", "patterns", "says", "answers", "uses")
    },
    "targets.Induction.mechanisms": {"by": choice("circuit", "role")},
    "targets.Sequences": {
        "n_letters": number(7, whole=True),
        "positions": number(7, 8, whole=True),
        "circuits": CIRCUITS,
    },
    "targets.Sequences.__call__": {"generator": source(none=False)},
    "targets.Group": {"name": st.one_of(but(str), st.sampled_from(["", "S6", "Z1", "D2", "A5", "Z121", "s3"]))},
    "targets.Group.certify": {
        "u": tensor(NEURONS, 0, 1),
        "v": tensor(NEURONS, 0, 1),
        "w": tensor(torch.ones(4, 6), 0, 1),
    },
    "targets.Group.span": {"irreps": st.sampled_from([[], [2], (0, -1), (0, 0), [0.5], ["0"], [None], 0, "S3", None])},
    "targets.GroupOperations": {
        "groups": st.one_of(but(list, tuple), NOTHING, st.sampled_from([[], [5], ["S6"], ["S3", None], ["", "S3"]])),
        "irreps": st.sampled_from([[], [()], [(2,)], [(0, 0)], [0], [None], ["0"], 5, "S3"]),
        "switches": choice("group", "irrep", none=True),
        "embedding": flag(),
    },
    "targets.GroupOperations.forward": {"x": tensor(OPERATIONS.inputs(), 0, finite=False)},
    "targets.GroupOperations.mechanisms": {"by": choice("group", "irrep")},
    "targets.ModularArithmetic": {
        "tasks": st.one_of(but(list, tuple), NOTHING, st.sampled_from([[], [5], [TASK, TASK], [TASK, None]])),
        "switches": choice("task", "frequency", none=True),
        "embedding": flag(),
    },
    "targets.ModularArithmetic.forward": {"x": tensor(MODULAR.inputs(), 0, finite=False)},
    "targets.ModularArithmetic.answers": {"x": tensor(MODULAR.inputs(), 0)},
    "targets.ModularArithmetic.mechanisms": {"by": choice("frequency", "task")},
    "targets.ModularTask": {
        "p": number(3, whole=True),
        "sign": st.sampled_from([0, 2, -2, 1.5, "1", None, torch.nan, True, [1]]),
        "frequencies": st.sampled_from([(), (0,), (3,), (1, 1), (1.5,), "1", 1, (None,), (torch.nan,)]),
        "multiply": flag(),
    },
    "targets.ModularTask.waves": {"n": number(5, whole=True)},
    "targets.Pairs": {
        "table": tensor(MODULAR.inputs(), 0, 1),
        "n_switches": number(0, 12, whole=True),
        "probability": number(0, 1),
    },
    "targets.Pairs.__call__": {"generator": source(none=False)},
    "targets.Questions": {
        "n_letters": number(7, whole=True),
        "tasks": of_number_or_list(number(0, 5, whole=True)),
    },
    "targets.ResidualMLP": {"neurons": of_number_or_list(SIZE)},
    "targets.ResidualMLP.labels": {"x": st.one_of(but(Tensor), NOTHING)},
    "targets.ResidualMLP.contributions": {"components": bad_components(alone=True).filter(lambda c: c is not None)},
    "targets.ResidualMLP.ownership": ALONE,
    "targets.ResidualMLP.attributions": {"x": tensor(torch.ones(4, 4), 0)},
    "targets.TMS.ownership": ALONE,
    "targets.TMS.attributions": {"x": tensor(X, 0)},
    "targets.TMS.fit": {"steps": SIZE_OR_NONE, "batch_size": SIZE_OR_NONE},
    "targets.Transformer": {
        "n_letters": number(7, whole=True),
        **{name: SIZE for name in ("d", "n_heads", "neurons", "n_blocks")},
    },
    "targets.Transformer.forward": {
        "x": st.one_of(but(Tensor), NOTHING, st.sampled_from([X, torch.zeros(2, 8).long()]))
    },
    "targets.Transformer.answers": {
        "x": st.one_of(but(Tensor), NOTHING, st.sampled_from([X, torch.zeros(2, 8).long()]))
    },
    "targets.Transformer.data": {"tasks": of_number_or_list(number(0, 5, whole=True))},
    "selection.TopK": {"top_k": schedule(0.0)},
    "selection.FinalSelection": {
        "selection": st.one_of(but(), NOTHING),
        "index": number(0, 0, whole=True),
        "threshold": number(none=True),
    },
    "selection.sample_top_k": {"k": number(1, 3, whole=True)},
    **WIDTH,
}
ALIASES = {  # what a message may call the parameter
    "batches": ("x",),
    "x": ("batches", "values", "y"),
    "components": ("Components", "parameter", "the truth", "truth:", "weights"),
    "decomposed": ("components", "the truth", "truth:"),
    "divergence": (),
    "module": ("has no rule",),
    "settings": ("setting",),
    "folder": ("no file at",),
    "path": ("no file at",),
    "kind": ("holds a",),
    "target_outputs": ("outputs",),
    "parts": ("Components", "components"),
    "true": ("found",),
    "found": ("true",),
    "y": ("x",),
    "matrices": ("A:",),
    "groups": ("group ",),
    "hidden": ("no module",),
    "clusters": ("cluster",),
    "first": ("components", "both"),
    "second": ("components", "both"),
    "A": ("B",),
    "B": ("A",),
}


def strategy(name: str, parameter: str) -> Strategy:
    own = OWN_KINDS.get(name, {})
    return own[parameter] if parameter in own else KINDS[parameter]


def call(name: str, changes: dict[str, Any]) -> Any:
    own, arguments = VALID[name]
    if name == "rules.rule":  # found by the class of what comes first
        return apd.rules.rule(*{**arguments, **changes}.values())
    return PUBLIC[name](*(() if own is None else (own,)), **{**arguments, **changes})


def complaint(error: BaseException, parameter: str, value: Any) -> str:
    """What is wrong with an error; nothing if it is the package's own and names the parameter and what was given."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    assert frame.lineno is not None
    line = linecache.getline(frame.filename, frame.lineno).strip()
    if not frame.filename.startswith(PACKAGE) or not line.startswith("raise"):
        return f"not raised by the package, but at {frame.filename}:{frame.lineno}: {line}"
    if not isinstance(error, (ValueError, TypeError, KeyError, FileNotFoundError)):
        return f"of kind {type(error).__name__}"
    if not any(alias in str(error) for alias in (parameter, *ALIASES.get(parameter, ()))):
        return f"does not name {parameter}"
    if not any(word in str(error) for word in words_for(value)):
        return f"does not say what was given: {words_for(value)}"
    return ""


def words_for(value: Any) -> list[str]:
    """How a message may tell what was given: by value, type, shape, or by one of the parts that it is made of."""
    words = [checks.given(value), repr(value), type(value).__name__, "NaN", "empty"]
    if isinstance(value, np.bool_):
        words.append(str(value))
    if isinstance(value, str):
        words += [value] if len(value) > 1 else []
        words += re.findall(r"{(\w+)}", value)
    if isinstance(value, (float, np.floating)):
        words += [str(value), f"{value:g}", f"got {value:.0f}"]
    if callable(value):
        words += ["got a ", "got one of shape", "a tensor [", "got NoneType", "got ["]  # what it gave
    if isinstance(value, (Tensor, np.ndarray)):
        words += [str(list(value.shape)), str(value.dtype), *map(repr, value.ravel().tolist()[:3])]
    if isinstance(value, apd.Components):
        pairs = [(value.A[path].shape[-2], value.B[path].shape[-1]) for path in value.paths]
        words += [word for t in value.parameters() for word in words_for(t)]
        words += ["restart", *map(repr, value.paths), *map(str, pairs), *(str([*pair])[1:] for pair in pairs)]
    if isinstance(value, dict):
        words += [*map(repr, value), *(word for part in value.values() for word in words_for(part))]
    if isinstance(value, (list, tuple)):
        words += [word for part in value for word in words_for(part)]
    if isinstance(value, (dict, list, tuple)) and not value:
        words += ["got none", "got None", "got 0", "and 0", "got []", "and []", "about []", "got ()", "got {}"]
    return words


CASES = [(name, parameter) for name in tried() for parameter in parameters(name)]


def test_everything_public_is_tried() -> None:
    """Whoever adds a function or a parameter says here what is malformed for it."""
    assert set(tried()) == set(VALID), "list its valid arguments in VALID"
    unknown = [case for case in CASES if case[1] not in KINDS and case[1] not in OWN_KINDS.get(case[0], {})]
    assert not unknown, "say in KINDS or OWN_KINDS what is malformed"


@pytest.mark.parametrize("name", tried())
def test_the_valid_arguments_are(name: str) -> None:
    call(name, {})


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_malformed_values_get_a_clear_error(name: str, parameter: str) -> None:
    def try_one(value: Any) -> None:
        error: BaseException | None = None
        try:
            result = call(name, {parameter: value})
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        assert error is not None, f"{name}({parameter}={value!r}) gave {type(result).__name__} in silence"
        wrong = complaint(error, parameter, value)
        assert not wrong, f"{name}({parameter}={value!r}) raised {error!r}: {wrong}"

    malformed = strategy(name, parameter)
    for value in EDGES.get(malformed, ()):
        try_one(value)

    @settings(max_examples=20 if name != "decompose" or parameter != "batches" else 40)
    @given(malformed)
    def every(value: Any) -> None:
        try_one(value)

    every()


LIMITS = [(*case, value) for case in CASES for value in FITTING.get(strategy(*case), ())]
LIMITS.remove(("decompose", "micro_batch", 1))  # slow, and in test_micro_batches.py
WITH = {  # what else must change, for a limit to fit
    ("Config", "tidy_from"): {"tidy_until": 1},
    ("targets.Sequences", "n_letters"): {"positions": 7},
    ("targets.Transformer", "d"): {"n_heads": 1},
}


@pytest.mark.parametrize(("name", "parameter", "value"), LIMITS)
def test_a_limit_that_is_in_the_range_is_taken(name: str, parameter: str, value: float) -> None:
    call(name, {parameter: value, **WITH.get((name, parameter), {})})
