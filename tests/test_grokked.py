"""Networks that learned to add: waves and tokens against closed forms, what is stored of a training, the control."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from apd_minimal.study.rate import Judge
from apd_minimal.targets import ModularArithmetic, ModularTask
from experiments import each_method, grokked
from experiments.grokked import HIDDEN, P, by_wave, cuts, neuron_share, shapes, wave_share


def drawn(*shape: int) -> torch.Tensor:
    """Draw a matrix."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def of(matrices: torch.Tensor) -> apd.Components:
    """Make components of the first matrix."""
    return apd.Components.from_matrices({HIDDEN: matrices}, min(matrices.shape[1:]))


@pytest.mark.parametrize("p", [5, 13, 17])
def test_waves_are_a_split_into_planes(p: int) -> None:
    W = drawn(2 * p, 40)
    parts = by_wave(W)
    assert parts.shape == (1 + (p - 1) // 2, 2 * p, 40)
    torch.testing.assert_close(parts.sum(0), W, atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(parts, rtol=1e-4).tolist() == [2] + [4] * ((p - 1) // 2)
    torch.testing.assert_close(parts[0, :p], W[:p].mean(0).expand(p, -1), atol=1e-5, rtol=0)
    angles = 2 * torch.pi * 2 / p * torch.arange(p)
    one = torch.cat([(angles + 0.3).cos(), 3 * (angles - 1).cos()])[:, None]  # frequency 2 of both numbers
    torch.testing.assert_close(by_wave(one)[2], one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("p", [5, 13, 17])
def test_shares_of_waves_and_of_tokens(p: int) -> None:
    wave = (2 * torch.pi / p * torch.arange(p) + 0.4).cos()
    fourth = torch.cat([wave, torch.zeros(p)]) + 7  # the constant does not count
    token = torch.eye(2 * p)[p + 1]
    two = torch.cat([wave, (4 * torch.pi / p * torch.arange(p)).cos() / 2])  # another frequency, half as high
    wanted = torch.tensor([1, 2 / (p - 1), 0.8, 0.0])
    found = wave_share(torch.stack([fourth, token, two, torch.zeros(2 * p)])[..., None])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    written = ModularArithmetic([ModularTask(p)])
    assert neuron_share(written.hidden.weight.detach().T) == pytest.approx(1, abs=1e-5)
    mixed = torch.stack([token, 2 * two], 1)  # by squared length: 1 and 4 * 1.25 * p / 2
    size = 2.5 * p
    assert neuron_share(mixed) == pytest.approx((2 / (p - 1) + 0.8 * size) / (1 + size), abs=1e-5)


def test_tokens_are_like_tokens_and_waves_like_waves() -> None:
    W = drawn(2 * P, 64)
    W[:, ::2] *= 3
    made, none = cuts(W), torch.zeros(5, *W.shape)
    tokens = shapes(of(torch.cat([made["tokens"].matrices(HIDDEN), none])), W)
    assert tokens["near"] == 2 * P
    assert [tokens[name] for name in ("token_cosine", "token_share", "wave_share")] == pytest.approx([1, 1, 0.125])
    waves = shapes(of(by_wave(W)[1:]), W)
    assert (waves["near"], waves["wave_cosine"], waves["wave_share"]) == (0, pytest.approx(1), pytest.approx(1))
    assert waves["token_share"] < 0.1
    # A part in two rows, nine times as long in one of them, among others that are in one: by squared length.
    merged = torch.cat([made["tokens"].matrices(HIDDEN)[2:], made["tokens"].matrices(HIDDEN)[:2].sum(0, keepdim=True)])
    rows = W.square().sum(1)
    assert shapes(of(merged), W)["token_share"] == pytest.approx(float(1 - rows[:2].min() / rows.sum()), abs=1e-5)


def test_the_table_is_exact_on_any_weights_and_costs_two_ranks_and_two_names() -> None:
    model = grokked.Squares()
    network, x = apd.Network(model, [HIDDEN]), grokked.table()[0]
    made = cuts(network.weights[HIDDEN].detach())
    others = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x, made["tokens"], x.maximum(others)), model(x), atol=1e-5, rtol=0)
    exact = 2 * 8 + 2 * torch.log2(torch.tensor(2.0 * P))
    assert Judge(epsilons=(1e-6,))(network, made["tokens"], x) == pytest.approx(float(exact), rel=0.01)


def test_a_token_that_is_taken_away_is_missed_by_its_pairs_and_a_wave_by_all() -> None:
    model = grokked.Squares()
    network, x = apd.Network(model, [HIDDEN]), grokked.table()[0]
    W, y = network.weights[HIDDEN].detach(), model(x)
    made, none = cuts(W), torch.zeros(2, *W.shape)
    tokens = grokked.removed(network, of(torch.cat([none, made["tokens"].matrices(HIDDEN)])), x)
    assert tokens["others"] < 1e-9
    wanted = []  # without its token a pair is left with the square of the other's row
    for i in range(2 * P):
        own = x[x[:, i] > 0]
        error = (model(own - torch.eye(2 * P)[i]) - model(own)).square().sum(1).mean()
        wanted.append((error / (y - y.mean(0)).square().sum(1).mean()).item())
    assert tokens["own"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    waves = grokked.removed(network, made["frequencies"], x)
    assert waves["others"] > 0.1 * waves["own"]


def test_a_training_stores_weights_that_score_what_its_row_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grokked.TRAINING, "steps", 200)
    (row,), kept = grokked.run_network((90,))
    assert row["curves"]["step"] == [0, 200]
    assert list(row["states"]) == ["untrained", "fitted", "end"]  # it has not generalised so early
    x, answers = grokked.table()
    seen = round(0.6 * len(x))
    monkeypatch.setattr(grokked, "stored", lambda name: kept)
    for state, facts in row["states"].items():
        model = grokked.network_of(state, 90)
        right = int((model(x).argmax(1) == answers).sum())
        assert right == round(facts["train"] * seen + facts["test"] * (len(x) - seen))
        assert facts["share"] == pytest.approx(neuron_share(model.hidden.weight.detach().T))
        assert sum(facts["energy"]) == pytest.approx(1, abs=1e-3)
    assert 0 < row["states"]["fitted"]["step"] < 200 and row["states"]["fitted"]["train"] == 1
    assert row["states"]["fitted"]["test"] < 0.2
    end, random = (grokked.network_of(state, 90) for state in ("end", "random"))
    for a, b in zip(end.parameters(), random.parameters(), strict=True):
        torch.testing.assert_close(*(torch.linalg.svdvals(w.detach()) for w in (a, b)), atol=1e-4, rtol=0)
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) < 0.2


@pytest.mark.parametrize("cut", ["tokens", "frequencies"])
def test_what_spd_is_said_to_have_found(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular directions of the parts of a cut are put together to it, and to no other; dealt ones to neither."""
    model = grokked.Squares()
    W = model.hidden.weight.detach().T
    U, S, Vh = torch.linalg.svd(cuts(W)[cut].matrices(HIDDEN), full_matrices=False)
    ones = torch.einsum("cir,cr,cro->crio", U[..., :4], S[..., :4], Vh[:, :4]).flatten(0, 1)
    ones = ones[ones.norm(dim=(1, 2)) > 1e-4]
    asked = []

    def by_spd(
        network: apd.Network, source: object, x: torch.Tensor, judge: Judge, settings: dict[str, object]
    ) -> apd.Components:
        asked.append((list(network.weights), settings["penalties"], settings["seed"], len(x)))
        return apd.Components.from_matrices({HIDDEN: ones}, 1)

    monkeypatch.setattr(grokked, "network_of", lambda state, seed: model)
    monkeypatch.setattr(each_method, "by_spd", by_spd)
    (row,), _ = grokked.run_spd(("end", 8800))
    assert asked == [([HIDDEN], each_method.PENALTIES, 9800, P * P)]
    found, dealt = row["found"], row["dealt"]
    right, wrong = ("as_tokens", "as_frequencies") if cut == "tokens" else ("as_frequencies", "as_tokens")
    assert found[right] == pytest.approx(1, abs=1e-4) and found[wrong] < 0.6 and max(dealt[right], dealt[wrong]) < 0.8
    assert found["near"] == (2 * P if cut == "tokens" else 0) and dealt["near"] == 0
    assert found["in_use"] == len(ones)
    assert cut == "frequencies" or found["bits"] == pytest.approx(row["bits_of_cuts"]["tokens"])
