"""Trained networks of chapter 33: what is read, how it is cut, and measures that tell parts from lumps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.targets.transformer import answer_shares, last_position
from experiments import architectures, digits, reading, trained
from experiments.drawn_digits import DiagonalReader, ExpertsReader, Reader, RecurrentReader, SelectiveReader
from experiments.reading import LETTERS, WINDOW, Writer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_windows_are_of_one_part_of_the_text_and_followed_by_their_next_character() -> None:
    text = (reading.DATA / reading.FILE).read_text()
    assert len(text) == reading.SIZE and set(text) == set(LETTERS)
    own, other = (set(reading.places(held_out).tolist()) for held_out in (False, True))
    assert not own & other
    for first, held_out in ((own, False), (other, True)):
        for i in (min(first), max(first), sorted(first)[len(first) // 2]):
            assert {j // 1000 % 10 == 0 for j in range(i, i + WINDOW + 1)} == {held_out}
    x = reading.windows(200, generator(), held_out=True)
    assert x.shape == (200, WINDOW + 1)
    assert all(spelt in text for spelt in reading.words(x))


def test_a_table_is_made_of_the_trained_part_alone_and_beats_the_shorter_one() -> None:
    text, n = (reading.DATA / reading.FILE).read_text(), len(LETTERS)
    pairs = [text[i : i + 2] for i in range(reading.SIZE - 1) if i // 1000 % 10]
    counts = torch.tensor([[pairs.count(a + b) for b in LETTERS] for a in "qe"]).float() + 0.1
    rows = reading.table(1)[[LETTERS.index("q"), LETTERS.index("e")]]
    torch.testing.assert_close(rows, counts / counts.sum(1, keepdim=True))
    x = reading.windows(4000, generator(), held_out=True)
    losses = [reading.table_loss(x, characters) for characters in range(3)]
    assert losses[0] > losses[1] + 0.3 > losses[2] + 0.6
    one = -reading.table(1)[x[:, -2], x[:, -1]].log().mean()
    assert losses[1] == pytest.approx(float(one)) and reading.table(2).shape == (n, n, n)


def test_a_writer_sees_no_later_character_and_learns() -> None:
    writer = Writer(3)
    x = reading.windows(8, generator())[:, :-1]
    y = x.clone()
    y[:, 9:] = 0
    torch.testing.assert_close(writer(x)[:, :9], writer(y)[:, :9])
    assert (writer(x)[:, 12] - writer(y)[:, 12]).abs().max() > 1e-3
    writer.fit(3, steps=200)
    both = reading.windows(1000, generator(1), held_out=True)
    loss = float(nn.functional.cross_entropy(writer(both[:, :-1])[:, -1], both[:, -1]))
    assert loss < reading.table_loss(both, 0) - 0.3


@pytest.mark.parametrize("way", trained.WAYS)
def test_the_call_is_that_of_the_chapter_but_for_what_is_said(way: str) -> None:
    reader = Reader(3)
    network = apd.Network(reader, list(reader.weights))
    x, _ = digits.digits(256, generator())
    found = trained.arguments(way, network, x, trained.TOLD, 7)
    assert found["n_components"] == trained.TOLD["components"] and found["seed"] == 7
    assert found["divergence"] == "kl" and found["attribution"] is answer_shares
    assert ("top_k" in found, "selection" in found) == ((True, False) if way == "told" else (False, True))
    zero = network(x, apd.Components.random(network.shapes, 1, 1).map(torch.zeros_like))
    nothing = float(apd.losses.kl(zero, network(x)).detach().mean())
    assert found["faithfulness"] == pytest.approx(60 * nothing, rel=1e-3)
    assert {name: found[name] for name in trained.CHANGES[way]} == trained.CHANGES[way]
    if way == "told":
        same = set(architectures.SETTINGS) - set(trained.CHANGES[way])
        assert {name: found[name] for name in same} == {name: architectures.SETTINGS[name] for name in same}
        assert found["top_k"][-1][1] == pytest.approx(0.8 * trained.TOLD["active"])
    else:
        rule = apd.bottleneck.settings(network, x, trained.TOLD["components"], "kl")
        same = set(rule) - set(trained.CHANGES[way]) - {"selection"}
        assert {name: found[name] for name in same} == {name: rule[name] for name in same}
        assert found["selection"].allowed == trained.ALLOWED


def test_a_network_without_training_has_the_singular_values_and_another_function() -> None:
    for target, x, pick in (
        (Reader(3), digits.digits(64, generator())[0], None),
        (Writer(3), reading.windows(64, generator())[:, :-1], last_position),
    ):
        network = apd.Network(target.requires_grad_(False), list(target.weights), pick)
        before, outputs = dict(network.weights), network(x)
        before = {path: w.clone() for path, w in before.items()}
        trained.without_training(network, 5)
        after = apd.Network(target, list(target.weights), pick)
        assert (after(x) - outputs).square().mean() > 0.1 * (outputs - outputs.mean(0)).square().mean()
        for path, w in after.weights.items():
            torch.testing.assert_close(
                torch.linalg.svdvals(w), torch.linalg.svdvals(before[path]), atol=1e-4, rtol=1e-4
            )
            assert (w - before[path]).norm() > 0.5 * w.norm()


def test_what_is_never_on_is_not_dealt_and_the_sum_stays() -> None:
    parts = apd.Components.random({"a": (6, 5), "b": (5, 4)}, 5, 2, generator=generator())
    new = trained.dealt(parts, [1, 3, 4], 0)
    for path in parts.paths:
        torch.testing.assert_close(new.sum(path), parts.sum(path), atol=1e-5, rtol=0)
        moved = (new.matrices(path) - parts.matrices(path)).flatten(1).norm(dim=1) > 1e-3
        assert moved.tolist() == [False, True, False, True, True]


class Two(nn.Module):
    """Two parts: each sample has numbers in one half of its inputs, and each half has two classes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.layer.weight.data = 4.0 * torch.tensor(
            [[1.0, 0.2, 0, 0], [-0.2, 1.0, 0, 0], [0, 0, 1.0, 0.2], [0, 0, -0.2, 1.0]]
        )

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layer(x)
        return scores


def two(n: int, draws: torch.Generator) -> Tensor:
    x, half = torch.rand(n, 2, 2, generator=draws), torch.randint(2, (n,), generator=draws)
    return (x * nn.functional.one_hot(half, 2)[:, :, None]).flatten(1)


def decomposed(parts: Tensor, k: float, other: Tensor | None = None) -> apd.Decomposition:
    """Make a result with two starts: these parts [C, 4, 4], and others."""
    both = [apd.Components.from_matrices({"layer.weight": p}, 4) for p in (parts, parts if other is None else other)]
    A, B = ({"layer.weight": torch.stack([getattr(c, f)["layer.weight"] for c in both])} for f in "AB")
    config = apd.Config(n_components=len(parts), top_k=k, restarts=2)
    return apd.Decomposition(both[0], config, {}, [1.0, 2.0], 0, True, "", restarts=apd.Components(A, B))


def test_measures_tell_two_parts_from_one_lump_and_from_dealt_parts() -> None:
    target = Two().requires_grad_(False)
    network = apd.Network(target, ["layer.weight"])
    W, x = network.weights["layer.weight"], two(1000, generator())
    halves = torch.stack([torch.cat([W[:2], 0 * W[2:]]), torch.cat([0 * W[:2], W[2:]])])
    row, scores, gates = trained.measured(network, decomposed(halves, 1.0), x, 0)
    assert row["in_use"] == scores.shape[1] == gates.shape[1] == 2 and row["active"] == pytest.approx(1, abs=0.01)
    assert row["agreement"] == row["whole"] == 1 > row["dealt"]["agreement"]
    assert row["error"] < 1e-5 < row["dealt"]["error"] < row["nothing"] and row["sum_in_use"] < 1e-9
    assert row["weights"]["mean"] == pytest.approx(1) and row["weights"]["chance"] < 0.8
    assert row["masks"]["mean"] == pytest.approx(1) and row["masks"]["chance"] < 0.6
    its, own = (row["leakage"][f"another's mask: {what} answer"] for what in ("its", "own"))
    assert its[0] < 0.5 and own[2] == 1  # the mask of another half leaves nothing to answer with
    on = x.reshape(-1, 2, 2).sum(2) > 0
    on = on[:, on.float().mean(0).argsort(descending=True)]
    assert torch.equal(gates.bool(), on)
    assert trained.by_group(gates, on[:, 1].long(), 3) == [[1, 0, 0], [0, 1, 0]]
    lump, *_ = trained.measured(network, decomposed(torch.stack([W, 0 * W]), 1.0), x, 0)
    assert lump["in_use"] == 1 and lump["leakage"] == {} and lump["masks"] == {}
    # What is never on counts in the sum, and in nothing else; it is not dealt.
    spare = torch.cat([halves[:1] + 0.5 * halves[1:], 0.5 * halves[1:]])
    row, *_ = trained.measured(network, decomposed(torch.cat([halves, spare * 1e-1]), 1.0), x, 0)
    assert row["left"] == 4 and row["in_use"] == 2 and row["sum"] > 0.001 > row["sum_in_use"]
    result = decomposed(torch.cat([halves, spare * 1e-1]), 1.0)
    control = trained.dealt(
        result.components, (x.reshape(-1, 2, 2).sum(2) > 0).sum(0).argsort(descending=True).tolist(), 0
    )
    gates = result.final_selection.gates(answer_shares(network, control, x)).float()
    error = apd.losses.kl(network(x, control, gates), network(x)).mean()
    assert row["dealt"]["error"] == pytest.approx(float(error), rel=1e-4)
    other = torch.linalg.qr(torch.randn(4, 4, generator=generator(2))).Q
    turned = torch.stack([halves[0] @ other, halves[1] @ other])
    apart, *_ = trained.measured(network, decomposed(halves, 1.0, turned), x, 0)
    assert apart["weights"]["mean"] < 0.9


@pytest.mark.parametrize("kind", [Reader, *digits.KINDS.values()])
def test_readers_of_every_kind_learn_have_scores_of_one_size_and_can_be_gated(kind: type[Reader]) -> None:
    reader = kind(3).fit(3, steps=150)
    x, y = digits.digits(2048, generator(1))
    scores = reader(x)
    assert float((scores.argmax(1) == y).float().mean()) > 0.3
    assert float((scores - scores.mean(0)).square().mean()) == pytest.approx(1, abs=0.1)
    apd.Network(reader, list(reader.weights)).check(x[:6])
    named = {name.rpartition(".")[0] for name, _ in reader.named_parameters()}
    assert {path.rpartition(".")[0] for path in reader.weights} == named  # no layer is left out


def test_readers_of_strips_and_of_experts_compute_what_they_say() -> None:
    x = torch.randn(3, 1, 12, 12, generator=generator())
    recurrent, diagonal, selective, experts = (
        RecurrentReader(5),
        DiagonalReader(5),
        SelectiveReader(5),
        ExpertsReader(5),
    )
    assert diagonal.decay.a.std() > 0.05  # states with one speed would be one state
    with torch.no_grad():
        for picture, *scores in zip(x[:, 0], *(f(x) for f in (recurrent, diagonal, selective, experts)), strict=True):
            r, d, s = torch.zeros(24), torch.zeros(24), torch.zeros(24)
            for strip in (picture[i : i + 3].flatten() for i in (0, 3, 6, 9)):
                r = torch.tanh(recurrent.into(strip) + recurrent.again.weight @ r)
                d = diagonal.decay.a * d + diagonal.into(strip)
                step = torch.sigmoid(selective.step(strip))
                s = s + step * (selective.into(strip) - s)
            share = experts.router(picture.flatten()).exp()
            said = [experts.last[e](experts.first[e](picture.flatten()).relu()) for e in range(3)]
            wanted = (
                recurrent.last(r), diagonal.last(diagonal.out(d).relu()), selective.last(selective.out(s).relu()),
                sum(w * y for w, y in zip(share, said, strict=True)) / share.sum(),
            )  # fmt: skip
            for found, own in zip(scores, wanted, strict=True):
                torch.testing.assert_close(found, own)


@pytest.mark.parametrize("kind", [Reader, ExpertsReader, DiagonalReader])
def test_random_twins_have_scores_of_the_same_size_and_decays_stay(kind: type[Reader]) -> None:
    reader = kind(3).requires_grad_(False)
    before = {path: reader.get_parameter(path).clone() for path in reader.weights}
    digits.untrained(reader, 3)
    scores = reader(digits.digits(2048, generator(1))[0])
    assert float((scores - scores.mean(0)).square().mean()) == pytest.approx(1, abs=0.1)
    other = [path for path, w in before.items() if not torch.equal(w, reader.get_parameter(path))]
    assert other == [path for path in reader.weights if path != "decay.a"]
