"""The names that others build on. Changing this file on purpose is how a public name changes."""

from __future__ import annotations

import dataclasses
import inspect

import apd_minimal as apd

NAMES = {
    "": "Components Config Decomposition Network NonFiniteLoss artefacts attributions baselines bottleneck "
    "controls data decompose diagnose frames glue importance leakage losses metrics plots rate rules selection store "
    "targets tune worst",
    "attributions": "ablation activation gradient inner_activation integrated_gradients path_shapley shapley",
    "baselines": "Chosen Dictionary GRIDS activations beside choose copies costs fit match_directions neurons owners "
    "replaced singular transcoded",
    "bottleneck": "Bottleneck FAITHFULNESS GAINS MEMORY SIMPLICITY settings",
    "controls": "dealt input_columns random_split rotated_columns",
    "data": "SparseFeatures",
    "diagnose": "Diagnosis diagnose",
    "importance": "Importance leaky_clamp",
    "leakage": "Information Leakage Score information leakage nearer",
    "losses": "DIVERGENCES faithfulness hidden kl minimality mse sample_errors simplicity simplicity_exact",
    "metrics": "Matching Ownership Scrubbing cosines description_length match_use match_weights ml2r mmcs output_error "
    "ownership relative_faithfulness responsible scrubbing",
    "rate": "NEVER Cost Judge costs curve shortest",
    "rules": "Rule TransposedLinear rule",
    "store": "FORMAT StoreError read_tensors reading write write_tensors",
    "targets": "Certificate GatedFunctions GatedInputs Group GroupOperations Induction ModularArithmetic ModularTask "
    "Pairs Questions ResidualMLP Sequences TMS Transformer",
    "tune": "Each Tuned tune",
    "worst": "Corners Worst worst",
    "selection": "FinalSelection Selection TopK batch_top_k final_selection sample_top_k",
}


def test_public_names() -> None:
    assert sorted(apd.__all__) == NAMES[""].split()
    for module_name, names in NAMES.items():
        module = getattr(apd, module_name) if module_name else apd
        missing = [name for name in names.split() if not hasattr(module, name)]
        assert not missing, f"{module.__name__} lost {missing}"
        if module_name:
            own = {
                name
                for name, thing in vars(module).items()
                if not name.startswith("_") and getattr(thing, "__module__", "").startswith(module.__name__)
            }
            assert own <= set(names.split()), f"{module.__name__} has new names: list them here"


def test_a_public_name_has_one_home() -> None:
    homes: dict[str, list[str]] = {}
    for module_name, names in NAMES.items():
        for name in names.split() if module_name else ():
            thing = getattr(getattr(apd, module_name), name)
            if callable(thing):
                homes.setdefault(f"{thing.__module__}.{thing.__qualname__}", []).append(module_name)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_arguments() -> None:
    assert (
        parameters(apd.decompose)[:19]
        == (
            "target batches weights n_components top_k output divergence hidden_modules attribution selection judge "
            "checkpoint checkpoint_every extend mesh micro_batch recompute callback log"
        ).split()
    )
    assert (
        parameters(apd.attributions.gradient)
        == ("target components x at per_output per_position n_probes mode internal_batch_size generator").split()
    )
    assert parameters(apd.Network) == "target weights output hidden recompute".split()
    assert parameters(apd.Network.__call__)[1:5] == "x components gates remainder".split()
    assert parameters(apd.metrics.ownership) == "components truth min_cosine length_range min_purity".split()
    assert (
        parameters(apd.diagnose.diagnose)
        == "target components x top_k divergence at seed attribution thresholds".split()
    )
    assert (
        parameters(apd.leakage.leakage)
        == "target components x top_k outputs blank tasks at seed attribution control".split()
    )
    assert parameters(apd.controls.dealt) == "components seed turned threshold".split()
    assert parameters(apd.leakage.information) == "mask label given seed".split()
    assert parameters(apd.metrics.scrubbing) == "target components x top_k at seed attribution anti spared".split()
    assert parameters(apd.Decomposition.load) == ["folder", "target"]
    assert parameters(apd.targets.TMS) == "n_features d_hidden identity probability".split()


def test_a_seed_that_is_not_given_is_zero() -> None:
    things = [getattr(getattr(apd, part) if part else apd, name) for part in NAMES for name in NAMES[part].split()]
    things += [method for kind in things if inspect.isclass(kind) for method in vars(kind).values()]
    seeds = [inspect.signature(thing).parameters.get("seed") for thing in things if inspect.isfunction(thing)]
    assert {seed.default for seed in seeds if seed is not None} - {inspect.Parameter.empty} == {0}


def test_fields() -> None:
    def fields(kind: type) -> list[str]:
        return [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]

    assert fields(apd.Components) == ["A", "B"]
    assert (
        fields(apd.Decomposition)
        == (
            "components config history scores chosen finished fingerprint restarts threshold selection attribution "
            "selection_name active_name output"
        ).split()
    )
    assert fields(apd.metrics.Scrubbing) == "top_k scrubbed anti_scrubbed nonempty".split()
    assert fields(apd.metrics.Ownership) == "owner cosine length_ratio purity owned".split()
    assert {"n_components", "top_k", "rank", "steps", "lr", "p", "restarts", "seed"} <= set(fields(apd.Config))
