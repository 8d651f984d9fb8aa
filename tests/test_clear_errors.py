"""Calls that once passed in silence, or ended in an error from elsewhere: each now names what was given.

`test_bad_input` draws malformed values for whatever is public. Here are the mistakes that it does not draw: of objects
that a run makes and calls, of functions that give what does not fit, and of arguments that do not fit each other.
"""

from __future__ import annotations

import linecache
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.scale import layerwise
from apd_minimal.selection import FinalSelection, Selection, TopK
from apd_minimal.study.tune import Each, Tuned, tune
from apd_minimal.tidy.merge import merge_and_prune

PACKAGE = str(Path(apd.__file__).parent)
C = 6
WEIGHTS = ["0.weight", "2.weight"]
X = torch.rand(64, 5, generator=torch.Generator().manual_seed(0))


def foreign(error: BaseException) -> str:
    """Where an error comes from, if not from a line of the package that raises it; else nothing."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    own = frame.filename.startswith(PACKAGE) and line.startswith("raise")
    return "" if own else f"{frame.filename}:{frame.lineno}: {line}"


def target() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


class Positions(nn.Module):
    """It adds an embedding of the position, as many a transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places(torch.arange(x.shape[1]))


TARGET = target()
NETWORK = apd.Network(TARGET, WEIGHTS)
COMPONENTS = apd.Components.random(NETWORK.shapes, C, std=0.4, generator=torch.Generator().manual_seed(1))


def batches(step: int, generator: torch.Generator) -> Tensor:
    return torch.rand(64, 5, generator=generator)


def zeros(step: int, generator: torch.Generator) -> Tensor:
    return torch.zeros(64, 5)


def decompose(**changes: Any) -> apd.Decomposition:
    given: dict[str, Any] = {"top_k": None if "selection" in changes else 2.0, "steps": 6, "progress": False}
    given |= {"batches": batches, "weights": WEIGHTS}
    return apd.decompose(n_components=C, **({"target": TARGET} | given | changes))


def tuned(**changes: Any) -> Tuned:
    def used(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:
        raise AssertionError("a run began")

    given: dict[str, Any] = {"steps": 30, "progress": False, "callback": used}
    return tune(TARGET, batches, WEIGHTS, C, **(given | changes))


def nan(outputs: Tensor, target_outputs: Tensor) -> Tensor:
    return (outputs - target_outputs).mean(-1) * torch.nan


class Own(Selection):
    """A selection that works, but for the methods that are given."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        self.methods = methods
        for name, method in methods.items():
            setattr(self, name, method)

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        return scores > scores.mean()

    def __deepcopy__(self, memo: Any) -> Own:
        return Own(**self.methods)


def chosen(**methods: Callable[..., Any]) -> apd.Decomposition:
    return decompose(selection=Own(**methods), scrub=1.0)


def wrong(outputs: Tensor, target_outputs: Tensor) -> Tensor:
    return (outputs.argmax(-1) != target_outputs.argmax(-1)).float()


class Signs(nn.Module):
    """A loss by signs, with a slope by its own weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, outputs: Tensor, target_outputs: Tensor) -> Tensor:
        return ((outputs.detach().sign() - target_outputs.sign()).square() * self.weight).mean(-1)


ONES = torch.ones(64, C)


def spoilt(gates: Tensor, value: float) -> Tensor:
    """The same gates, but for one."""
    gates = gates.clone()
    gates.view(-1)[7] = value
    return gates


def calls_with(value: float) -> dict[str, Callable[[], Any]]:
    """The ways to run a mixture of components, with one gate of this value."""
    bad = spoilt(ONES, value)
    return {
        "alone": lambda: NETWORK(X, COMPONENTS, bad),
        "with the remainder": lambda: NETWORK(X, COMPONENTS, bad, remainder=True),
        "for each weight": lambda: NETWORK(X, COMPONENTS, dict.fromkeys(WEIGHTS, bad)),
        "in half precision": lambda: NETWORK(X, COMPONENTS, bad.half()),
        "of restarts": lambda: NETWORK(X, COMPONENTS.stacked(), bad[None]),
        "that are learned": lambda: NETWORK(X, COMPONENTS, bad.clone().requires_grad_()),
    }


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    # Divergences and outputs.
    "a divergence without a derivative": (
        lambda: decompose(divergence=wrong, reseed_until=0.0),
        "divergence must have",
    ),
    "a detached divergence": (lambda: decompose(divergence=lambda a, b: apd.losses.mse(a, b).detach()), "derivative"),
    "a divergence that rounds": (
        lambda: decompose(divergence=lambda a, b: apd.losses.mse((20 * a).round(), (20 * b).round())),
        "divergence must have a slope by the outputs, got .*<lambda>, which goes from 19.1 .* to 0 near",
    ),
    "a divergence that has a slope by its own weight": (lambda: decompose(divergence=Signs()), "slope .*got .*Signs"),
    "a divergence of signs in pieces": (
        lambda: decompose(divergence=lambda a, b: (a.sign() - b.sign()).square().mean(-1), micro_batch=16),
        "divergence must have a slope by the outputs",
    ),
    "outputs that are rounded": (
        lambda: decompose(output=lambda o: (20 * o).round()),
        "float32, have no slope by it: pick",
    ),
    "outputs that are rounded, and attributions by ablation": (
        lambda: decompose(output=lambda o: (20 * o).round(), attribution=apd.attributions.ablation),
        "float32, have no slope by it: pick",
    ),
    "a divergence that counts": (lambda: decompose(divergence=lambda a, b: (a > b).sum(-1)), "divergence .*int64"),
    "a complex divergence": (
        lambda: decompose(divergence=lambda a, b: apd.losses.mse(a, b).to(torch.cfloat)),
        "divergence .*complex64",
    ),
    "a divergence that writes to the outputs": (
        lambda: decompose(divergence=lambda a, b: a.sub_(b).square().mean(-1)),
        "divergence must leave the outputs .*got .*<lambda>",
    ),
    "a divergence that writes to the target's": (
        lambda: decompose(divergence=lambda a, b: (a - b.mul_(2)).square().mean(-1)),
        "divergence must leave the outputs .*got .*<lambda>",
    ),
    "an attribution that writes to the inputs": (
        lambda: decompose(attribution=lambda n, c, x: apd.attributions.gradient(n, c, x.mul_(2))),
        "attribution must leave its components and x as they are",
    ),
    "an attribution that writes to the components": (
        lambda: decompose(attribution=lambda n, c, x: apd.attributions.gradient(n, c.map(lambda t: t.mul_(2)), x)),
        "attribution must leave its components and x as they are",
    ),
    "mse of whole numbers": (lambda: apd.losses.mse(X.long(), X.long()), "outputs must hold real numbers .*int64"),
    "one class": (lambda: decompose(output=lambda o: o[:, :1], divergence="kl"), r"2 classes or more\], got .*, 1\]"),
    "the answer's number": (
        lambda: decompose(output=lambda o: o.argmax(-1).float()),
        "float32, have no slope by it: pick",
    ),
    "outputs that are compared": (
        lambda: decompose(output=lambda o: (o > 0).float()),
        "float32, have no slope by it: pick",
    ),
    "complex attributions in a run": (
        lambda: decompose(attribution=lambda n, c, x: torch.ones(1, len(x), C, dtype=torch.cfloat)),
        "attributions must hold real numbers .*complex64",
    ),
    # Selections.
    "no gates": (lambda: chosen(choose=lambda scores, t, share: None), "Own.choose must be a tensor, got None"),
    "gates of NaN": (
        lambda: chosen(choose=lambda scores, t, share: scores * torch.nan),
        "Own.choose .*from nan to nan",
    ),
    "drawn gates above 1": (lambda: chosen(draw=lambda gates, noise: 3 * noise), r"Own.draw must be .*in \[0, 1\]"),
    "drawn gates of another shape": (lambda: chosen(draw=lambda gates, noise: noise[..., :1]), "Own.draw must be of"),
    "a threshold for other restarts": (
        lambda: chosen(threshold=lambda scores: torch.ones(7)),
        r"Own.threshold must be of shape \[1\], got .*\[7\]",
    ),
    "a threshold that is no tensor": (
        lambda: chosen(threshold=lambda scores: 0.5),
        "threshold must be a tensor, got 0.5",
    ),
    "a threshold of NaN": (
        lambda: chosen(threshold=lambda scores: scores[:, 0, 0] * torch.nan),
        "threshold must be fin",
    ),
    "parameters that need no gradient": (
        lambda: chosen(parameters=lambda: [ONES]),
        "Own.parameters .*gradients, got a",
    ),
    "parameters that are no leaves": (
        lambda: chosen(parameters=lambda: [2 * nn.Parameter(ONES)]),
        "Own.parameters must be leaf tensors",
    ),
    "a parameter in place of a list": (
        lambda: chosen(parameters=lambda: nn.Parameter(ONES)),
        "Own.parameters must be a list of leaf tensors, got a",
    ),
    "importances of gradient attributions": (
        lambda: decompose(selection=apd.importance.Importance(0.1, 1.0)),
        "Importance needs attribution=.*inner_activation.*, got None",
    ),
    "importances that no run has started": (
        lambda: apd.metrics.scrubbing(NETWORK, COMPONENTS, X, apd.importance.Importance(0.1, 1.0)),
        "Importance.* has not been started",
    ),
    "a bottleneck that no run has started": (
        lambda: apd.metrics.scrubbing(NETWORK, COMPONENTS, X, apd.bottleneck.Bottleneck()),
        "Bottleneck.* has not been started",
    ),
    "no selection at the end": (lambda: FinalSelection(3), "selection must be .*, got 3"),  # type: ignore[arg-type]
    "another restart": (lambda: FinalSelection(TopK(1.0), 2, 2), "index must be at least 0 and at most 1, got 2"),
    "no restarts": (lambda: FinalSelection(TopK(1.0), 0), "restarts must be at least 1, got 0"),
    "a threshold that is text": (lambda: FinalSelection(TopK(1.0), threshold="a"), "threshold must be .*, got 'a'"),  # type: ignore[arg-type]
    "a threshold that is NaN": (
        lambda: FinalSelection(TopK(1.0), threshold=torch.nan),
        "threshold must be .*, got nan",
    ),
    "the largest of none": (lambda: apd.selection.batch_top_k(ONES[:0], 1.0), r"at least one number, got .*\[0, 6\]"),
    "the largest of yes and no": (lambda: apd.selection.batch_top_k(ONES > 0, 1.0), "real numbers .*bool"),
    "the largest of complex numbers": (lambda: apd.selection.batch_top_k(ONES + 0j, 1.0), "real numbers .*complex64"),
    # Gates and masks.
    **{
        f"{what} gates {how}": (call, "gates for 0.weight must be finite, got NaN or infinite numbers")
        for what, bad in (("NaN", torch.nan), ("infinite", torch.inf))
        for how, call in calls_with(bad).items()
    },
    "a NaN gate for one weight": (
        lambda: NETWORK(X, COMPONENTS, dict(zip(WEIGHTS, (ONES, spoilt(ONES, torch.nan)), strict=True))),
        "gates for 2.weight must be finite",
    ),
    "a mask of no sample": (
        lambda: apd.losses.simplicity(COMPONENTS, ONES[:0]),
        r"mask must hold at least one number, got .*\[0, 6\]",
    ),
    "bits of no sample": (
        lambda: apd.metrics.description_length(COMPONENTS, ONES[:0]),
        r"mask must hold at least one number, got .*\[0, 6\]",
    ),
    "errors of no sample": (
        lambda: apd.losses.minimality(X[:0], X[:0]),
        r"target_outputs must hold at least one number, got .*\[0, 5\]",
    ),
    "spared components of sevens": (
        lambda: apd.metrics.scrubbing(NETWORK, COMPONENTS, X, 1.0, spared=7 * ONES),
        "spared must be .*, numbers from 7 to 7",
    ),
    "similar masks of sevens": (
        lambda: layerwise.similarity({"a": 7 * ONES}),
        "masks: a must be .*, numbers from 7 to 7",
    ),
    "similar masks of no sample": (
        lambda: layerwise.similarity({"a": ONES[:0]}),
        "masks: a must hold at least one number",
    ),
    # Metrics, data and files.
    "a mask of negative numbers": (lambda: apd.metrics.description_length(COMPONENTS, -ONES), "mask .* from -1 to -1"),
    "a mask of sevens": (lambda: apd.losses.simplicity(COMPONENTS, 7 * ONES), "mask must be .*, numbers from 7 to 7"),
    "a truth of whole numbers": (
        lambda: apd.metrics.ownership(
            COMPONENTS, {path: torch.ones(2, *s).long() for path, s in NETWORK.shapes.items()}
        ),
        "truth: 0.weight must hold real numbers .*int64",
    ),
    "features that are never on": (
        lambda: apd.data.SparseFeatures(3, 1e-17, nonempty=True),
        "probability must be above 1e-16 .*, got 1e-17",
    ),
    "nonempty samples of zeros": (
        lambda: apd.data.SparseFeatures(3, low=0.0, high=0.0, nonempty=True),
        "high must be above low=0 for samples that are nonempty, got 0",
    ),
    "a device that is not there": (
        lambda: apd.Components.random(NETWORK.shapes, C, device="cuda:99"),
        "device must be a torch device or None, got 'cuda:99'",
    ),
    "sparse tensors in a file": (
        lambda: apd.store.write_tensors("nowhere", "kind", {"a": X.to_sparse()}, {}),
        "a must be dense .*sparse_coo",
    ),
    "tensors without numbers in a file": (
        lambda: apd.store.write_tensors("nowhere", "kind", {"a": X.to("meta")}, {}),
        "a must be dense and hold numbers, got .* on meta",
    ),
    "batches of two widths": (
        lambda: apd.baselines.fit(TARGET, lambda step, generator: torch.rand(8, 5 + step % 2), "output of 0", 3),
        r"batches must give inputs of one shape, got samples \[\[5\], \[6\]\]",
    ),
    "tokens that are none": (
        lambda: apd.targets.Transformer(7, 4, 2, 4, 1)(torch.full((2, 9), 99)),
        "tokens from 0 to 12, got 99 to 99",
    ),
    # Networks.
    "outputs picked by text": (lambda: apd.Network(TARGET, WEIGHTS, "logits"), "output must be a function .*'logits'"),  # type: ignore[arg-type]
    "recompute that is text": (lambda: apd.Network(TARGET, WEIGHTS, recompute="no"), "recompute must be .*'no'"),  # type: ignore[arg-type]
    "samples that are split": (
        lambda: apd.decompose(nn.DataParallel(TARGET), batches, ["module.0.weight"], C, 2.0),
        "DataParallel.*give its .module",
    ),
    "a remainder that is text": (lambda: NETWORK(X, COMPONENTS, ONES, "no"), "remainder must be .*, got 'no'"),  # type: ignore[arg-type]
    "a remainder of two": (lambda: NETWORK(X, COMPONENTS, ONES, 2), "remainder must be True or False, got 2"),  # type: ignore[arg-type]
    "a call without samples": (
        lambda: NETWORK(X[:0], COMPONENTS, ONES[:0]),
        r"x must hold .* one number, got .*\[0, 5\]",
    ),
    "a call with inputs of another width": (
        lambda: NETWORK(X[:, :4]),
        r"does not run on x, a tensor \[64, 4\] of torch.float32, with weights of torch.float32: .*shapes",
    ),
    "a call with sparse inputs": (
        lambda: NETWORK(X.to_sparse(), COMPONENTS, ONES),
        r"x must be a dense tensor, got .*sparse_coo: give its .to_dense\(\)",
    ),
    "a call with complex gates": (
        lambda: NETWORK(X, COMPONENTS, ONES.to(torch.complex64)),
        "gates for .* must hold real numbers .*complex64",
    ),
    "a complex mask": (
        lambda: apd.losses.simplicity(COMPONENTS, ONES.to(torch.complex64)),
        "mask must hold real numbers .*complex64",
    ),
    "sparse batches": (
        lambda: apd.decompose(TARGET, lambda step, generator: X.to_sparse_csr(), WEIGHTS, C, 2.0),
        r"what batches\(step=0\) gives must be a dense tensor, got .*sparse_csr: give its .to_dense\(\)",
    ),
    "nested batches": (
        lambda: apd.decompose(
            TARGET, lambda step, generator: torch.nested.nested_tensor([X[0], X[1, :3]]), WEIGHTS, C, 2.0
        ),
        r"what batches\(step=0\) gives must be a dense tensor, got a nested one",
    ),
    "a rate of four hundred digits": (
        lambda: apd.Config(1, 1.0, lr=10**400),
        "lr must be a number that fits 64 bits, got an int of 1329 bits",
    ),
    "more digits than Python writes": (
        lambda: apd.Components.random(NETWORK.shapes, 10**9999),
        "n_components must be a number that fits 64 bits, got an int of 33216 bits",
    ),
    "singular values of NaN": (
        lambda: COMPONENTS.map(lambda t: t * torch.nan).norms(),
        "components.A: .* must be finite, got NaN",
    ),
    "a judge that says yes": (
        lambda: decompose(judge=lambda network, components, x: True, restarts=2),
        "judge must be a function that gives a number, got True",
    ),
    "a call with one number": (lambda: NETWORK(X[0, 0]), r"x must be of shape \[B, ...\], got a tensor \[\]"),
    "a call with a list": (lambda: NETWORK([1.0]), r"x must be a tensor, got \[1.0\]"),  # type: ignore[arg-type]
    "outputs of no number": (
        lambda: decompose(output=lambda o: o[:, :0]),
        r"the target's outputs must hold at least one number, got .*\[64, 0\]",
    ),
    "gates in lists": (
        lambda: NETWORK(X, COMPONENTS, ONES.tolist()),  # type: ignore[arg-type]
        "gates for 0.weight must be a tensor, got \\[\\[",
    ),
    "components of another type": (
        lambda: NETWORK(X, COMPONENTS.map(Tensor.double), ONES),
        "0.weight: components of torch.float64, but the weight is torch.float32",
    ),
    "a list of components": (lambda: NETWORK(X, [COMPONENTS]), "components must be Components .*, got \\["),  # type: ignore[arg-type]
    "a tolerance of NaN": (lambda: NETWORK.check(X, torch.nan), "tolerance must be .*, got nan"),
    "a tolerance that is text": (lambda: NETWORK.check(X, "a"), "tolerance must be .*, got 'a'"),  # type: ignore[arg-type]
    "whole numbers into a linear layer": (lambda: NETWORK.check(X.long()), "does not run on x, .*int64"),
    "position ids without samples": (
        lambda: apd.Network(Positions(), ["places.weight"]).check(torch.rand(5, 4, 3)),
        r"position ids \[T\] as \[1, T\]",
    ),
    # Bits and k.
    "a judge whose divergence is NaN": (lambda: apd.rate.Judge(divergence=nan)(NETWORK, COMPONENTS, X), "got NaN"),
    "errors of NaN": (lambda: apd.rate.costs(NETWORK, COMPONENTS, X, divergence=nan), "got NaN"),
    "a message with an error of NaN": (lambda: apd.rate.shortest(NETWORK, COMPONENTS, X, divergence=nan), "got NaN"),
    "a run whose judge finds NaN": (lambda: decompose(judge=apd.rate.Judge(divergence=nan), restarts=2), "got NaN"),
    "outputs that differ by rounding": (
        lambda: apd.rate.costs(NETWORK, COMPONENTS, X[:1].repeat(64, 1)),
        "the same on all inputs",
    ),
    "a dictionary's costs where outputs differ by rounding": (
        lambda: apd.baselines.costs(
            TARGET, apd.baselines.Dictionary([5], [4], 3), X[:1].repeat(64, 1), "input of 0", "output of 0"
        ),
        "the same on all inputs",
    ),
    "mse as a function is no number of bits": (
        lambda: apd.rate.shortest(NETWORK, COMPONENTS, X, divergence=apd.losses.mse),
        "divergence must be one of .*got <function mse",
    ),
    "complex attributions": (
        lambda: apd.rate.costs(
            NETWORK, COMPONENTS, X, attribution=lambda n, c, x: torch.ones(len(x), C, dtype=torch.cfloat)
        ),
        "attributions must hold real numbers .*complex64",
    ),
    "tries of a setting that is none": (lambda: tuned(tries={"simplicty": [1.0]}), "tries: .*simplicty.*'simplicity'"),
    "tries of a value out of range": (lambda: tuned(tries={"lr": [0.01, -1.0]}), "tries: .*-1.0.*lr must be above 0"),
    "tries of a divergence": (lambda: tuned(tries={"divergence": ["hinge"]}), "tries: .*divergence must be .*'hinge'"),
    "tries of targets": (lambda: tuned(tries={"target": [TARGET]}), "tries must be settings, and target is the same"),
    "a log of several runs": (lambda: tuned(log="l.jsonl"), "log belongs to one run"),
    "no selections": (lambda: Each([]), "selections must hold at least one"),
    "a selection each, that has to be started": (
        lambda: Each([apd.bottleneck.Bottleneck()]),
        "selections must be .*Bottleneck",
    ),
    "more selections than restarts": (
        lambda: decompose(selection=Each([TopK(1.0), TopK(2.0)])),
        "selections must be one for each of 1 restarts, got 2",
    ),
    "singular vectors of whole numbers": (
        lambda: apd.baselines.singular({"w": torch.ones(5, 2, dtype=torch.long)}),
        "weights: w must hold real numbers .*int64",
    ),
}


def test_a_mask_of_components() -> None:
    mask = torch.tensor([True, False, False, True, True, False])
    assert torch.equal(COMPONENTS.subset(mask).flat(), COMPONENTS.flat()[mask])
    assert torch.equal(COMPONENTS.stacked().subset(mask).flat(), COMPONENTS.flat()[None, mask])
    with pytest.raises(ValueError, match=r"index must be of shape \[6\], got .*\[5\]"):
        COMPONENTS.subset(mask[:5])


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_masks_of_any_type_merge_alike(dtype: torch.dtype) -> None:
    mask = torch.rand(1, 64, C, generator=torch.Generator().manual_seed(2)) < torch.linspace(0, 1, C)
    whole, own = (COMPONENTS.map(Tensor.clone).stacked() for _ in range(2))
    assert torch.equal(merge_and_prune(own, mask.to(dtype)), merge_and_prune(whole, mask.float()))
    assert torch.equal(own.flat(), whole.flat())
    assert not own.norms().all(), "a test that tells"


def test_tensors_that_share_memory_are_stored(tmp_path: Path) -> None:
    apd.store.write_tensors(tmp_path / "file", "kind", {"all": X, "some": X[:2], "turned": X.T}, {})
    tensors, _ = apd.store.read_tensors(tmp_path / "file", "kind")
    assert torch.equal(tensors["all"], X)
    assert torch.equal(tensors["some"], X[:2])
    assert torch.equal(tensors["turned"], X.T)


@pytest.mark.parametrize(
    "given", [{"output": torch.sign}, {"output": lambda o: 0 * o}, {"batches": zeros, "weights": WEIGHTS[:1]}]
)
def test_a_run_in_which_no_component_does_anything_says_so(given: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="in 6 steps, no component had an attribution other than 0"):
        decompose(**given)


def test_a_first_batch_in_which_nothing_happens_is_none_of_that() -> None:
    def later(step: int, generator: torch.Generator) -> Tensor:
        return batches(step, generator) * (step > 3)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no component had an attribution")
        decompose(batches=later, weights=WEIGHTS[:1])


def saturating(outputs: Tensor, target_outputs: Tensor) -> Tensor:
    """At most 1, and no slope from there on, as at the start of a run."""
    return apd.losses.mse(1e3 * outputs, 1e3 * target_outputs).clamp_max(1)


def tolerant(outputs: Tensor, target_outputs: Tensor) -> Tensor:
    """Nothing, whatever the first outputs are."""
    return (apd.losses.mse(outputs, target_outputs) - 100).relu()


def where_on(outputs: Tensor, target_outputs: Tensor) -> Tensor:
    """Only of outputs that the target has on: none, in batches of zeros."""
    return ((outputs - target_outputs).square() * (target_outputs != 0)).mean(-1)


@pytest.mark.parametrize("divergence", [saturating, tolerant, where_on, apd.losses.mse, apd.losses.kl])
@pytest.mark.parametrize("first", [1.0, 0.0, 1e-6])
def test_a_divergence_with_a_slope_is_taken_whatever_the_first_batch(
    divergence: Callable[[Tensor, Tensor], Tensor], first: float
) -> None:
    """A batch in which nothing is on, or hardly anything, tells nothing against a loss."""

    def later(step: int, generator: torch.Generator) -> Tensor:
        return batches(step, generator) * (first if step == 0 else 1.0)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        silent = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    assert decompose(target=silent, batches=later, divergence=divergence).finished


def test_a_first_batch_on_which_the_components_are_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run begins at the truth, every loss is 0, and its slope too."""
    truth = apd.Components.from_matrices({path: w[None] for path, w in NETWORK.weights.items()})
    truth = truth.map(lambda t: torch.cat([t, torch.zeros_like(t).expand(C - 1, -1, -1)])[None])
    monkeypatch.setattr(apd.Components, "random", classmethod(lambda cls, *a, **k: truth.map(Tensor.clone)))
    assert decompose(divergence=lambda a, b: apd.losses.mse(a, b), top_k=float(C), tidy_every=0.0).finished


class Bump(nn.Module):
    """On where the product is within 0.002 of 1, as at the target itself, and off for nearly all other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.weigh.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (1 - 5e5 * (self.weigh(x) - 1.0005).square()).relu()


def test_a_unit_that_is_on_at_the_target_alone_is_no_step() -> None:
    """All the weights that the check tries put it out, where it has no slope; but at the target it has one."""
    apd.Network(Bump(), ["weigh.weight"]).check(torch.ones(8, 1))


class Full(RuntimeError):
    """As torch's own error where memory is short."""


class Greedy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise Full("out of memory")


def test_what_is_no_fault_of_the_inputs_is_not_called_one() -> None:
    with pytest.raises(Full, match=r"^out of memory$"):
        apd.decompose(Greedy(5, 3), batches, ["weight"], C, 2.0)


def test_a_log_and_a_checkpoint_are_two_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"log and checkpoint must be two files, got .*link") as raised:
            decompose(log=tmp_path / "link", checkpoint=tmp_path / "run")
        assert not foreign(raised.value)
        decompose(checkpoint=tmp_path / "run")
        decompose(checkpoint=tmp_path / "run", log=tmp_path / "log")


def test_files_that_cannot_be_written_are_refused_before_the_first_step(tmp_path: Path) -> None:
    def stop(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:
        raise AssertionError("a step was taken")

    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"checkpoint must be a file in a folder .*file/x") as raised:
        decompose(checkpoint=tmp_path / "file" / "x", callback=stop)
    assert not foreign(raised.value)
    with pytest.raises(ValueError, match=r"log must be a file, got ") as raised:
        decompose(log=tmp_path, callback=stop)
    assert not foreign(raised.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_clear_error(name: str) -> None:
    call, says = REFUSED[name]
    with pytest.raises((ValueError, TypeError, ArithmeticError), match=says) as raised:
        call()
    assert not foreign(raised.value)
