"""Does the mask give the answer away? What the outputs owe to the inputs, and what to who is active (chapter 27).

Active components are chosen by attributions, and those by the target's outputs: the choice may say what the sparse
network should work out. k of C components can spell log2 C(C, k) bits. So take the two apart: run inputs with the
mask of others, masks with blank inputs, and see whose answer comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import checks
from ..attributions import Attribution, gradient
from ..components import Components, usable
from ..losses import kl, mse
from ..network import Network, as_network
from ..selection import FinalSelection, Selection, final_selection
from .controls import dealt
from .information import Information as Information
from .information import information as information
from .information import whole_numbers

Blank = Tensor | nn.Module | Callable[[Tensor], Tensor]
Outputs = dict[str, tuple[Tensor, Tensor]]  # by test: what came out [n, ...], and what is looked for [n, ...]
SAMPLES = 512  # that are run at a time
SAME = 1e-6  # outputs count as the same answer up to this share of their mean squared distance from the mean
ITS, OWN, NEARER = (f"another's mask: {what}" for what in ("its answer", "own answer", "nearer to its"))


@dataclass(frozen=True)
class Score:
    """One test: the share of samples with the answer that is looked for, or the share of its variance explained.

    Attributes:
        components: of the sparse network.
        dealt: of the control (`controls.dealt`), the same parts dealt at random, which choose masks of their own.
        target: of the target on the same inputs; masks mean nothing to it.
        chance: of the best constant output.
    """

    components: float
    dealt: float
    target: float
    chance: float


@dataclass(frozen=True)
class Leakage:
    """What masks give away; see `leakage`.

    Attributes:
        outputs: how answers are compared, "classes" or "values".
        scores: by the name of the test, in the order of the table.
        pairs: samples that have a partner with another answer.
        active: mean number of active components of a sample.
        bits: I(mask; answer), and I(mask; task | answer) where tasks are given, for classes.
    """

    outputs: str
    scores: dict[str, Score]
    pairs: int
    active: float
    bits: dict[str, Information] = field(default_factory=dict)

    def __getitem__(self, test: str) -> Score:
        return self.scores[test]

    def __str__(self) -> str:
        what = "share of answers" if self.outputs == "classes" else "share of variance explained"
        width = max(map(len, self.scores))
        lines = [f"{what:{width}s}  components   dealt  target  chance"]
        for name, s in self.scores.items():
            lines.append(f"{name:{width}s}  {s.components:10.2f}  {s.dealt:6.2f}  {s.target:6.2f}  {s.chance:6.2f}")
        lines.append(f"{self.pairs} pairs with different answers; {self.active:.2f} components active a sample")
        for name, bits in self.bits.items():
            lines.append(
                f"{name}: at least {bits.bits:.2f} of {bits.ceiling:.2f} bits (shuffled masks: {bits.shuffled:.2f})"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Case:
    """What all tests share: samples, their outputs and partners, and how answers are compared."""

    network: Network
    x: Tensor
    wanted: Tensor
    own: Tensor  # [n] samples that have a partner, ...
    partner: Tensor  # ... and the partner of each
    blanks: dict[str, tuple[Network, Tensor]]
    fit: Tensor  # [B] samples on which the masks of classes are made
    classes: bool

    def answer(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def score(self, outputs: Tensor, wanted: Tensor) -> float:
        if self.classes:
            return float((self.answer(outputs) == self.answer(wanted)).float().mean())
        error = (outputs - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-30)
        return 1 - float(error)

    def chance(self, wanted: Tensor) -> float:
        return float(self.answer(wanted).bincount().max() / len(wanted)) if self.classes else 0.0

    def nearer(self, outputs: Tensor) -> float:
        divergence = kl if self.classes else mse
        return nearer(*(divergence(outputs, self.wanted[rows]) for rows in (self.own, self.partner)))


def nearer(own: Tensor, its: Tensor) -> float:
    """Give the share of pairs whose outputs are nearer to the other's than to the own; where both are alike, one half.

    Args:
        own: distance from the own output [n].
        its: distance from the other's output [n].

    Raises:
        TypeError, ValueError: no distances, or other numbers of them.
    """
    checks.tensor("own", own, "n", real=True)
    its = checks.tensor("its", its, "n", real=True).to(own)
    if len(own) != len(its) or not len(own):
        raise ValueError(f"own and its must be as many, at least one: {checks.given(own)} and {checks.given(its)}")
    alike = torch.isclose(its, own, rtol=1e-4, atol=1e-9)  # such as of outputs that are zero
    return float(torch.where(alike, 0.5, (its < own).to(its)).mean())


Run = Callable[[Network, Tensor, Tensor], Tensor]  # (network, x, gates) -> outputs


def _outputs(case: _Case, run: Run, gates: Tensor) -> Outputs:
    """Make every test with one way to run a network with gates."""
    x, f, i, j = case.x, case.wanted, case.own, case.partner
    exchanged = run(case.network, x[i], gates[j])
    found = {"own mask": (run(case.network, x, gates), f), ITS: (exchanged, f[j]), OWN: (exchanged, f[i])}
    for name, (network, blank) in case.blanks.items():
        found[f"own mask, {name}"] = (run(network, blank, gates), f)
    if case.classes:
        answer = case.answer(f)
        masks = _class_masks(gates[case.fit], answer[case.fit], f.shape[-1])
        known = answer[case.fit].bincount(minlength=f.shape[-1]) > 0
        rows = (~case.fit & known[answer]).nonzero().flatten()
        if len(rows):
            found["mask of its own class"] = (run(case.network, x[rows], masks[answer[rows]]), f[rows])
        pairs = ~case.fit[i] & known[answer[j]]
        i, j = i[pairs], j[pairs]
        if len(i):
            exchanged = run(case.network, x[i], masks[answer[j]])
            found["mask of another class: that class"] = (exchanged, f[j])
            found["mask of another class: own answer"] = (exchanged, f[i])
    found["inactive alone"] = (run(case.network, x, 1 - gates), f)
    found["no component"] = (run(case.network, x, torch.zeros_like(gates)), f)
    return found


def _class_masks(gates: Tensor, answer: Tensor, n_classes: int) -> Tensor:
    """Give one mask to each class: as many components as are active on its samples on average, the most frequent."""
    masks = gates.new_zeros(n_classes, *gates.shape[1:])
    for a in answer.unique().tolist():
        mean = gates[answer == a].mean(0).flatten()
        n = round(float((gates[answer == a] != 0).flatten(1).sum(1).float().mean()))
        masks[a].view(-1)[mean.topk(n).indices] = 1
    return masks


@torch.no_grad()
def leakage(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    top_k: float | Selection | FinalSelection,
    *,
    outputs: str = "values",
    blank: Blank | Mapping[str, Blank] | None = None,
    tasks: Tensor | None = None,
    at: str = "target",
    seed: int = 0,
    attribution: Attribution | None = None,
    control: Components | None = None,
) -> Leakage:
    """Test whether masks give answers away.

    Every input is paired with another one at random; pairs with the same answer are left out. The tests:

    - another's mask: the input of one, the mask of the other. Whose answer comes out? "nearer to its" is the share of
      pairs whose outputs are nearer to the other's than to the own: 0 where the input decides, 1 where the mask does,
      one half where both are needed and neither answer comes out.
    - own mask, blank inputs: what of the answer is left if the input says nothing of it?
    - one fixed mask for each class, made on half of the samples and tested on the others: as above.
    - inactive components alone, and none at all: do gates matter?
    - bits: how much of the answer's name a predictor can read off masks (`information`). This alone is no leak: a right
      decomposition's masks say which mechanisms are at work, and that may say much about the answer.

    Args:
        target: the network, plain or wrapped (wrap it if only some outputs count, such as the last position's).
        components: C components, without restarts.
        x: inputs [B, ...]; a few thousand of the kind that the decomposition was made for.
        top_k: mean number of active components per sample, 0 < k <= C; or a selection, such as that of a run
            (`Decomposition.final_selection`).
        outputs: "classes" for logits [B, classes], compared by their argmax, distances by KL; "values" for anything
            else [B, ...], compared by the share of the variance explained, distances by squared error.
        blank: what an input is without what it says: a tensor of the shape of x or of one sample; a function from x to
            such inputs; or a module in place of the target that cannot see (some of) the input, with weights of the
            same names. Several by name in a mapping. None takes zeros, and leaves the test out where inputs are whole
            numbers.
        tasks: whole numbers [B], what is asked of each sample; for classes.
        at: where the gradient attributions are taken, "target" or "components".
        seed: of the pairs, the halves, the control and the predictor's samples.
        attribution: (network, components, x) -> [B, C] or [B, positions, C], as in `decompose`; None for gradients.
        control: components to compare with; None for `controls.dealt`, turned where dealing alone would change nothing.

    Returns:
        Leakage: one score for each test, and bits.

    Raises:
        TypeError, ValueError: an argument that does not fit; answers that are all the same; outputs that are no
            logits [B, classes] where these are expected.
    """
    usable(components, alone=True)
    selection = final_selection(top_k, components.n_components)
    checks.choice("outputs", outputs, ("values", "classes"))
    checks.choice("at", at, ("target", "components"))
    checks.function("attribution", attribution)
    seed = checks.number("seed", seed, 0, 2**62, whole=True)
    components, network, x = components.map(Tensor.detach), as_network(target, components), checks.inputs(x)
    if control is None:
        control = dealt(components, seed, turned=_only_ordered(components))
    try:
        as_network(network, usable(control, alone=True))
    except (TypeError, ValueError) as error:
        raise type(error)(f"control: {error}") from None
    if tasks is not None and outputs == "values":
        raise ValueError(f'tasks are for outputs="classes", there are none with "values": got {checks.given(tasks)}')
    tasks = None if tasks is None else whole_numbers("tasks", tasks, len(x))

    def plain(net: Network, part: Tensor, gates: Tensor) -> Tensor:
        return torch.cat([net(some) for some in part.split(SAMPLES)])

    def gated(parts: Components) -> Run:
        def run(net: Network, part: Tensor, gates: Tensor) -> Tensor:
            pieces = zip(part.split(SAMPLES), gates.split(SAMPLES), strict=True)
            return torch.cat([net(some, parts, g) for some, g in pieces])

        return run

    def gates_of(parts: Components) -> Tensor:
        pieces = x.split(SAMPLES)
        if attribution is None:
            scores = torch.cat([gradient(network, parts, part, at=at) for part in pieces])
        else:
            scores = torch.cat([attribution(network, parts, part) for part in pieces])
        checks.tensor("attributions", scores, len(x), ..., parts.n_components)
        return selection.gates(scores).to(parts.parameters()[0])

    with checks.running(x, f"components of {components.parameters()[0].dtype}"):
        wanted = plain(network, x, x)
    checks.tensor("the target's outputs", wanted, *(("B", "classes") if outputs == "classes" else ("B", ...)))
    case = _case(network, x, wanted, _blanks(network, blank, x), outputs == "classes", seed)
    gates = gates_of(components)
    tables = [
        _outputs(case, gated(components), gates),
        _outputs(case, gated(control), gates_of(control)),
        _outputs(case, plain, gates),
    ]
    scores = {}
    for name, (_, looked_for) in tables[0].items():
        of_components, of_dealt, of_target = (case.score(*table[name]) for table in tables)
        scores[name] = Score(of_components, of_dealt, of_target, case.chance(looked_for))
        if name == OWN:
            of_components, of_dealt, of_target = (case.nearer(table[name][0]) for table in tables)
            scores[NEARER] = Score(of_components, of_dealt, of_target, 0.5)
    bits = {}
    if case.classes:
        answer = case.answer(wanted)
        bits["I(mask; answer)"] = information(gates, answer, seed=seed)
        if tasks is not None:
            bits["I(mask; task | answer)"] = information(gates, tasks, answer, seed)
    active = float((gates != 0).flatten(1).sum(1).float().mean())
    return Leakage(outputs, scores, len(case.own), active, bits)


def _case(
    network: Network, x: Tensor, wanted: Tensor, blanks: dict[str, tuple[Network, Tensor]], classes: bool, seed: int
) -> _Case:
    generator = torch.Generator().manual_seed(seed)
    partner = torch.randperm(len(x), generator=generator).to(x.device)
    fit = (torch.randperm(len(x), generator=generator) < len(x) // 2).to(x.device)
    if classes:
        differ = wanted.argmax(-1) != wanted.argmax(-1)[partner]
    else:
        spread = mse(wanted, wanted.mean(0).expand_as(wanted)).mean()
        differ = mse(wanted, wanted[partner]) > SAME * spread
    own = differ.nonzero().flatten()
    if len(own) == 0:
        raise ValueError("the target's answers to all paired inputs are the same: there is nothing to give away")
    return _Case(network, x, wanted, own, partner[own], blanks, fit, classes)


def _blanks(
    network: Network, blank: Blank | Mapping[str, Blank] | None, x: Tensor
) -> dict[str, tuple[Network, Tensor]]:
    """Make the blank inputs, and the networks that they are for, by name."""
    if blank is None:
        return {"inputs zero": (network, torch.zeros_like(x))} if x.is_floating_point() else {}
    if isinstance(blank, Mapping) and not blank:
        raise ValueError("blank must have at least one entry, got an empty mapping")
    found = {}
    for name, one in (blank if isinstance(blank, Mapping) else {"blank inputs": blank}).items():
        if isinstance(one, nn.Module):
            blind = Network(one, list(network.weights), network.output)
            if blind.shapes != network.shapes:
                raise ValueError(f"blank: {name} must have weights of shapes {network.shapes}, got {blind.shapes}")
            found[name] = (blind, x)
            continue
        made = one(x) if callable(one) else one
        if isinstance(made, Tensor) and made.shape == x.shape[1:]:
            made = made.expand_as(x)
        checks.tensor(f"blank: {name}", made, *x.shape)
        found[name] = (network, made.to(x))
    return found


def _only_ordered(components: Components) -> bool:
    """Tell whether dealing rank-one parts would only put components in another order.

    So it is if each lies in one weight, and is of rank one or the only one there.
    """
    ranks = torch.stack(list(components.ranks().values()))  # [weights, C]
    alone = (ranks > 0).sum(1, keepdim=True) == 1
    return bool(((ranks > 0).sum(0) <= 1).all() and ((ranks <= 1) | alone).all())
