"""Does the mask give the answer away: networks where it says everything, and where it says which mechanism works."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.study.controls import dealt
from apd_minimal.study.leakage import Leakage, _only_ordered, information, leakage

K = 6


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Two networks by hand.


def spelled(**more: object) -> Leakage:
    """Six classes that depend on five inputs; component c writes class c whatever these are, and the mask is the class.

    The sixth input is always 1, and the components read nothing else.
    """
    x = torch.cat([draw(1200, 5), torch.ones(1200, 1)], dim=1)
    target = linear(draw(K, 6, seed=1) * torch.tensor([2.0, 2, 2, 2, 2, 0]))
    P = torch.zeros(K, 6, K)
    P[torch.arange(K), 5, torch.arange(K)] = 10.0
    components = apd.Components.from_matrices({"weight": P})

    def attribution(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        return nn.functional.one_hot(network(x).argmax(-1), K).float()

    tasks = target(x).argmax(1) // 2
    return leakage(target, components, x, 1, outputs="classes", tasks=tasks, attribution=attribution, **more)  # type: ignore[arg-type]


def test_a_mask_that_is_the_answer_leaks_fully() -> None:
    blank = torch.tensor([0.0, 0, 0, 0, 0, 1])
    found = spelled(blank=blank)
    for name in ("own mask", "another's mask: its answer", "another's mask: nearer to its", "own mask, blank inputs"):
        assert found[name].components == 1, name
    for name in ("mask of its own class", "mask of another class: that class"):
        assert found[name].components == 1, name
    for name in ("another's mask: own answer", "mask of another class: own answer", "inactive alone"):
        assert found[name].components == 0, name
    assert found["another's mask: own answer"].target == found["own mask"].target == 1
    assert found["another's mask: its answer"].target == found["another's mask: nearer to its"].target == 0
    # Every class is about as frequent as it is by chance to be the answer to a blank input.
    assert found["own mask, blank inputs"].target == found["no component"].components < 0.4
    bits = found.bits["I(mask; answer)"]
    assert bits.bits == pytest.approx(bits.ceiling, abs=0.02)
    assert abs(bits.shuffled) < 0.05
    bits = found.bits["I(mask; task | answer)"]  # here the answer says which task it was
    assert bits.ceiling == pytest.approx(0, abs=1e-6)
    assert abs(bits.bits) < 0.05


def test_a_module_in_place_of_the_target_may_be_what_is_blank() -> None:
    blind = linear(torch.zeros(K, 6))
    found = spelled(blank={"blind": blind, "zero": torch.zeros(6)})
    # The components still read the input that says nothing; without it there is nothing that they could read.
    assert found["own mask, blind"].components == 1
    assert found["own mask, zero"].components == found["no component"].components


def features(signs: bool) -> tuple[nn.Linear, apd.Components, Tensor]:
    """One of six inputs is on, and each has an output of its own; component c is the weight of input c."""
    x = torch.eye(K).repeat(100, 1)
    if signs:
        x = torch.cat([x, -x])
    components = apd.Components.from_matrices({"weight": torch.diag_embed(torch.eye(K))})
    return linear(torch.eye(K)), components, x


def test_mechanisms_of_their_own_inputs_do_not_leak() -> None:
    target, components, x = features(signs=True)
    found = leakage(target, components, x, 1)
    assert found["own mask"].components == pytest.approx(1, abs=1e-6)
    for name, score in found.scores.items():
        if "nearer" not in name and name not in (
            "own mask",
            "another's mask: own answer",
            "another's mask: its answer",
        ):
            assert score.components == pytest.approx(0, abs=0.01), name
    # Of pairs with the same input on, the mask is the same, and only the sign differs: it is the input's.
    same = 1 / 11  # of pairs with other answers
    assert found["another's mask: own answer"].components == pytest.approx(same, abs=0.05)
    assert found["another's mask: nearer to its"].components == pytest.approx((1 - same) / 2, abs=0.03)
    assert found["another's mask: nearer to its"].target == 0
    assert found.active == 1 and found.bits == {}


def test_a_mask_that_names_the_answer_need_not_leak() -> None:
    target, components, x = features(signs=False)
    found = leakage(target, components, x, 1, outputs="classes")
    assert found["own mask"].components == 1
    bits = found.bits["I(mask; answer)"]
    assert bits.ceiling == pytest.approx(math.log2(K), abs=1e-6)
    assert bits.bits == pytest.approx(bits.ceiling, abs=0.02)  # it names the answer, and yet ...
    first = float((x.argmax(-1) == 0).float().mean())  # with all logits 0 the first class is taken
    assert found["own mask, inputs zero"].components == pytest.approx(first)
    for name in ("another's mask: its answer", "mask of another class: that class"):
        assert found[name].components == pytest.approx(first, abs=0.05), name
    assert found["another's mask: nearer to its"].components == 0.5


# Against brute force.


def by_hand(network: nn.Linear, components: apd.Components, x: Tensor, gates: Tensor) -> Tensor:
    """Sample by sample, with the weight that its gates make."""
    P = components.matrices("weight")
    return torch.stack([v @ (g[:, None, None] * P).sum(0) for v, g in zip(x, gates, strict=True)])


@pytest.mark.parametrize("outputs", ["values", "classes"])
def test_every_number_is_the_one_of_its_definition(outputs: str) -> None:
    x, target = draw(90, 4), linear(draw(3, 4, seed=1))
    components = apd.Components.random({"weight": (4, 3)}, 5, 2, std=0.8, generator=torch.Generator().manual_seed(2))
    blank = x.flip(1)
    found = leakage(target, components, x, 2, outputs=outputs, blank={"flipped": lambda x: x.flip(1)}, seed=3)
    scores = apd.attributions.gradient(target, components, x)
    gates = apd.selection.batch_top_k(scores, 2)
    generator = torch.Generator().manual_seed(3)
    f, j = target(x).detach(), torch.randperm(90, generator=generator)
    fit = torch.randperm(90, generator=generator) < 45
    i = torch.arange(90)
    if outputs == "classes":
        i, j = (t[f.argmax(1) != f.argmax(1)[j]] for t in (i, j))
    else:
        i, j = (t[(f != f[j]).any(1)] for t in (i, j))
    assert found.pairs == len(i)
    title = str(found).splitlines()[0]
    assert ("share of answers" in title, "share of variance" in title) == (outputs == "classes", outputs == "values")

    def score(out: Tensor, wanted: Tensor) -> float:
        if outputs == "classes":
            return sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(out, wanted, strict=True)) / len(out)
        error = sum(float((a - b).square().sum().detach()) for a, b in zip(out, wanted, strict=True))
        return 1 - error / sum(float((b - wanted.mean(0)).square().sum()) for b in wanted)

    def distance(out: Tensor, wanted: Tensor) -> Tensor:
        if outputs == "classes":
            return nn.functional.kl_div(out.log_softmax(1), wanted.softmax(1), reduction="none").sum(1)
        return (out - wanted).square().sum(1)

    exchanged = by_hand(target, components, x[i], gates[j])
    expected = {
        "own mask": (by_hand(target, components, x, gates), f, target(x)),
        "another's mask: its answer": (exchanged, f[j], target(x[i])),
        "another's mask: own answer": (exchanged, f[i], target(x[i])),
        "own mask, flipped": (by_hand(target, components, blank, gates), f, target(blank)),
        "inactive alone": (by_hand(target, components, x, 1 - gates), f, target(x)),
        "no component": (torch.zeros_like(f), f, target(x)),
    }
    if outputs == "classes":  # one mask a class, made on one half: as many as are active there, the most frequent ones
        own = f.argmax(1)
        masks = torch.zeros(3, 5)
        for a in range(3):
            often = (gates * (fit & (own == a))[:, None]).sum(0)
            n = round(float(often.sum()) / int((fit & (own == a)).sum()))
            masks[a, often.argsort(descending=True)[:n]] = 1
        rest = ~fit
        ours = by_hand(target, components, x[rest], masks[own[rest]])
        expected["mask of its own class"] = (ours, f[rest], target(x[rest]))
        left, right = (t[~fit[i]] for t in (i, j))
        ours = by_hand(target, components, x[left], masks[own[right]])
        expected["mask of another class: that class"] = (ours, f[right], target(x[left]))
        expected["mask of another class: own answer"] = (ours, f[left], target(x[left]))
    for name, (out, wanted, own) in expected.items():
        assert found[name].components == pytest.approx(score(out, wanted), abs=1e-4), name
        assert found[name].target == pytest.approx(score(own, wanted), abs=1e-4), name
        chance = max((wanted.argmax(1) == a).float().mean().item() for a in range(3)) if outputs == "classes" else 0
        assert found[name].chance == pytest.approx(chance), name
    nearer = (distance(exchanged, f[j]) < distance(exchanged, f[i])).float().mean().item()
    assert found["another's mask: nearer to its"].components == pytest.approx(nearer, abs=1e-4)
    # The control is measured like the components: with it in their place, all is the same but for the column.
    control = dealt(components, 3, turned=False)
    again = leakage(target, control, x, 2, outputs=outputs, blank={"flipped": lambda x: x.flip(1)}, seed=3)
    for name, s in found.scores.items():
        assert s.dealt == pytest.approx(again[name].components, abs=1e-4), name


def test_positions_and_tokens() -> None:
    """Gates may be [B, positions, C]; whole numbers have no zero, so that the blank test is left out."""
    torch.manual_seed(0)
    target = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    components = apd.Components.random({"0.weight": (7, 4)}, 3, 2, std=0.5)
    x = torch.randint(7, (60, 3))

    def attribution(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        return apd.attributions.gradient(network, components, x, per_position=True)

    class PerPosition(apd.selection.Selection):
        def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
            return scores > scores.flatten(1).median(1).values[:, None, None, None]

    found = leakage(target, components, x, PerPosition(), outputs="classes", attribution=attribution)
    assert not [name for name in found.scores if name.startswith("own mask,")]
    assert 3 < found.active < 6
    assert "mask of its own class" in found.scores
    blanked = leakage(target, components, x, 1, blank=torch.zeros(3, dtype=torch.long))
    assert -10 < blanked["own mask, blank inputs"].components < 1


# The control.


def test_dealt_parts_have_the_same_sum_and_ranks() -> None:
    shapes = {"one": (8, 9), "two": (9, 7)}
    whole = apd.Components.random(shapes, 6, 3, std=1, generator=torch.Generator().manual_seed(0))
    whole.A["one"][0] = 0  # empty, and not in both weights
    whole.A["two"][:3, :, 1:] = 0  # of rank one
    whole.B["two"][4] *= 1e-3  # small
    for turned in (False, True):
        other = dealt(whole, 1, turned)
        for path in whole.paths:
            torch.testing.assert_close(other.sum(path), whole.sum(path), atol=1e-5, rtol=1e-5)
            assert not torch.allclose(other.matrices(path), whole.matrices(path), atol=0.1)
            singular = other.singular_values(path)
            assert torch.equal((singular > 1e-6).sum(-1), (whole.singular_values(path) > 1e-6).sum(-1))
            assert torch.equal((singular > 1e-2).sum(-1), (whole.singular_values(path) > 1e-2).sum(-1))
        assert not torch.allclose(dealt(whole, 2, turned).matrices("one"), other.matrices("one"), atol=0.1)


def test_dealing_components_of_rank_one_gives_them_another_order_and_turning_others() -> None:
    whole = apd.Components.random({"one": (8, 9)}, 6, 1, std=1, generator=torch.Generator().manual_seed(0))
    alike = (apd.metrics.cosines(dealt(whole, 1), whole) > 1 - 1e-5).sum(1)
    assert torch.equal(alike, torch.ones(6, dtype=torch.long))
    assert apd.metrics.cosines(dealt(whole, 1, turned=True), whole).abs().max() < 0.99


@pytest.mark.parametrize("turned", [False, True])
def test_the_deal_does_not_depend_on_signs_that_a_processor_chose(
    monkeypatch: pytest.MonkeyPatch, turned: bool
) -> None:
    whole = apd.Components.random({"one": (8, 9)}, 4, 2, std=1, generator=torch.Generator().manual_seed(0))
    usual, split = dealt(whole, 1, turned), apd.Components.from_matrices

    def flipped(*arguments: object) -> apd.Components:
        return split(*arguments).map(torch.neg)  # type: ignore[arg-type]

    monkeypatch.setattr(apd.Components, "from_matrices", flipped)
    torch.testing.assert_close(dealt(whole, 1, turned).A, usual.A)


def test_parts_are_turned_where_dealing_changes_nothing() -> None:
    def parts(*ranks: tuple[int, int]) -> apd.Components:
        """Components of these ranks in two weights."""
        generator = torch.Generator().manual_seed(0)
        whole = apd.Components.random({"one": (6, 7), "two": (7, 5)}, len(ranks), 3, std=1, generator=generator)
        for c, pair in enumerate(ranks):
            for path, rank in zip(whole.paths, pair, strict=True):
                whole.A[path][c, :, rank:] = 0
        return whole

    for ranks in (((1, 0), (1, 0), (0, 1), (0, 1)), ((1, 0), (1, 0), (0, 3)), ((1, 0), (0, 0), (0, 1))):
        assert _only_ordered(parts(*ranks)), ranks
    for ranks in (((1, 1), (1, 1)), ((2, 0), (1, 0)), ((1, 0), (0, 2), (0, 1))):
        assert not _only_ordered(parts(*ranks)), ranks
        alike = [apd.metrics.cosines(dealt(parts(*ranks), seed), parts(*ranks)) > 0.99 for seed in range(5)]
        assert not all(bool(found.any(1).all()) for found in alike), ranks  # some deal makes another component


# Bits.


def coin(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def test_bits_of_a_noisy_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(2, (20_000,), generator=generator)
    flipped = torch.rand(20_000, generator=generator) < 0.1
    found = information((label ^ flipped)[:, None].bool(), label)
    assert found.bits == pytest.approx(1 - coin(0.1), abs=0.03)
    assert found.ceiling == pytest.approx(1, abs=1e-3)
    assert abs(found.shuffled) < 0.01


def test_masks_that_are_all_different_tell_nothing_by_that() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2000, 60, generator=generator) < 0.3
    assert len(mask.unique(dim=0)) == 2000  # so that counted frequencies would give the whole entropy
    label = torch.randint(8, (2000,), generator=generator)
    found = information(mask, label)
    assert -0.1 < found.bits < 0.02
    assert found.ceiling == pytest.approx(3, abs=0.01)


def test_bits_about_the_task_beyond_the_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    task, answer = (torch.randint(n, (6000,), generator=generator) for n in (2, 3))
    mask = nn.functional.one_hot(answer, 3)
    tells_both = torch.cat([mask, task[:, None]], dim=1)
    assert information(tells_both, task, answer).bits == pytest.approx(1, abs=0.02)
    assert information(mask, task, answer).bits == pytest.approx(0, abs=0.02)
    # What the mask says about the answer is no news; here the answer fixes the task.
    assert information(mask, (answer > 0).long(), answer).bits == pytest.approx(0, abs=0.005)
    assert information(task[:, None], (answer > 0).long(), answer).bits == pytest.approx(0, abs=0.005)
    assert information(mask, (answer > 0).long()).bits == pytest.approx(coin(1 / 3), abs=0.02)


def test_shuffled_masks_keep_what_is_given() -> None:
    """Shuffled among all samples, a mask that names the answer would confuse a predictor that knows it, or look so."""
    from apd_minimal.study.information import _shuffle

    given = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    rows = _shuffle(given, torch.Generator().manual_seed(1))
    assert torch.equal(given[rows], given)
    assert torch.equal(rows.sort().values, torch.arange(8)) and not torch.equal(rows, torch.arange(8))


# What is refused, and what stays as it was.


def test_what_cannot_be_compared_is_refused() -> None:
    target, components, x = features(signs=False)
    with pytest.raises(ValueError, match="nothing to give away"):
        leakage(target, components, x[:1].repeat(9, 1), 1)
    with pytest.raises(ValueError, match="nothing to give away"):
        leakage(target, components, x[:1].repeat(9, 1), 1, outputs="classes")
    with pytest.raises(ValueError, match=r"outputs must be of shape \[B, classes\]"):
        leakage(target, components, x[:, None], 1, outputs="classes")
    with pytest.raises(ValueError, match='tasks are for outputs="classes"'):
        leakage(target, components, x, 1, tasks=torch.zeros(len(x)).long())
    with pytest.raises(TypeError, match="tasks must be whole numbers"):
        leakage(target, components, x, 1, outputs="classes", tasks=torch.zeros(len(x)))
    with pytest.raises(ValueError, match="blank: a must be of shape"):
        leakage(target, components, x, 1, blank={"a": lambda x: x[:1, :2]})
    with pytest.raises(ValueError, match="blank: a must have weights of shapes"):
        leakage(target, components, x, 1, blank={"a": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="at least 8 samples"):
        information(torch.ones(4, 2), torch.arange(4))


def test_the_target_and_the_components_stay_as_they_were() -> None:
    target = apd.targets.TMS(5, 2)
    components = apd.Components.random({"encode.weight": (5, 2)}, 4, 2, generator=torch.Generator().manual_seed(0))
    before = [p.clone() for p in [*target.parameters(), *components.parameters()]]
    state, random = target.training, torch.random.get_rng_state()
    x = target.data(64)(0, torch.Generator().manual_seed(0))
    first, second = (leakage(target, components, x, 1.0, seed=5) for _ in range(2))
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(before, [*target.parameters(), *components.parameters()], strict=True))
    assert target.training == state and torch.equal(random, torch.random.get_rng_state())
    table = str(first)
    assert "another's mask: its answer" in table and f"{first.pairs} pairs" in table


def test_samples_to_fit_to_choose_and_to_test_on_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, ...]] = []

    def noted(features: Tensor, label: Tensor, parts: tuple[Tensor, ...]) -> float:
        seen.append(parts)
        return 0.0

    monkeypatch.setattr("apd_minimal.study.information._held_out", noted)
    information(draw(103, 2), torch.arange(103) % 2)
    for parts in seen:
        assert torch.cat(parts).sort().values.tolist() == list(range(103))
        assert [len(part) / 103 for part in parts] == pytest.approx([0.5, 0.25, 0.25], abs=0.01)


def test_three_hundred_deals_are_all_different() -> None:
    lengths = torch.arange(1.0, 13)
    whole = apd.Components({"w": torch.diag(lengths)[:, :, None]}, {"w": torch.eye(12)[:, None]})
    deals = {tuple(dealt(whole, seed).matrices("w").abs().amax((1, 2)).tolist()) for seed in range(300)}
    assert len(deals) == 300
    assert all(sorted(deal) == pytest.approx(lengths.tolist()) for deal in deals)


def test_eight_samples_are_enough_and_seven_are_not() -> None:
    label = torch.arange(8) % 2
    assert information(label[:, None].float(), label).ceiling == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 8 samples"):
        information(label[:7, None].float(), label[:7])
