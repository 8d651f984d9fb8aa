"""Groups against what they must obey: homomorphisms, orthogonality, the delta at the product, and certificates."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apd_minimal as apd
from apd_minimal.targets import Group, GroupOperations
from experiments import groups as study

NAMES = ["Z2", "Z5", "Z6", "D3", "D4", "D5", "S3", "A4", "S4", "S5"]
small = st.sampled_from(["Z2", "Z5", "Z6", "D4", "D5", "S3", "A4"])
seeds = st.integers(0, 2**31)


def scores(group: Group, some: list[int]) -> Tensor:
    """By the formula, from traces: weight / n times tr(rho(a) rho(b) rho(c)^T), summed over some irreps: [a, b, c]."""
    total = torch.zeros(3 * [group.order], dtype=torch.double)
    for i in some:
        rho = group.irreps[i]
        total += group.weights[i] / group.order * torch.einsum("aij,bjk,cik->abc", rho, rho, rho)
    return total


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_that_of_a_group(name: str) -> None:
    table, every = Group(name).table, torch.arange(Group(name).order)
    assert torch.equal(table[0], every) and torch.equal(table[:, 0], every)
    for rows in (table, table.T):
        assert torch.equal(rows.sort(1).values, every.expand_as(table))
    assert torch.equal(table[every, Group(name).inverse], torch.zeros_like(every))
    some = every[:: max(1, len(every) // 12)]
    for g in some:
        assert torch.equal(table[table[g, some]][:, some], table[g, table[some][:, some]])  # (g h) k = g (h k)


def test_tables_that_are_known() -> None:
    every = list(itertools.permutations(range(4)))
    table = Group("S4").table
    for (i, g), (j, h) in itertools.product(enumerate(every), enumerate(every)):
        assert every[int(table[i, j])] == tuple(g[h[x]] for x in range(4))
    assert [Group(n).order for n in ("Z7", "D7", "S3", "A4", "S4", "S5")] == [7, 14, 6, 12, 24, 120]
    commuting = {n: bool((Group(n).table == Group(n).table.T).all()) for n in ("Z6", "D3", "S3", "A4")}
    assert commuting == {"Z6": True, "D3": False, "S3": False, "A4": False}


@pytest.mark.parametrize("name", NAMES)
def test_representations_are_homomorphisms_irreducible_and_orthogonal(name: str) -> None:
    group = Group(name)
    n, one = group.order, torch.ones(group.order, 1, 1, dtype=torch.double)
    dimensions = 1.0
    for i, rho in enumerate(group.irreps):
        product = torch.einsum("gij,hjk->ghik", rho, rho)
        torch.testing.assert_close(product, rho[group.table], atol=1e-10, rtol=0)
        torch.testing.assert_close(rho @ rho.mT, torch.eye(rho.shape[1]).double().expand_as(rho), atol=1e-10, rtol=0)
        # Schur: entries of different representations are orthogonal, and so are all of them to the constant.
        for other in [one, *group.irreps[:i]]:
            inner = torch.einsum("gij,gkl->ijkl", rho, other)
            assert inner.abs().max() < 1e-9
        # A real representation is irreducible if what commutes with it has dimension 1, 2 or 4; 2 is complex.
        commutes = torch.einsum("gij,gkl->ikjl", rho, rho).flatten(2).flatten(0, 1) / n
        kept = int(torch.linalg.matrix_rank(commutes, atol=1e-8))
        d = rho.shape[1]
        assert kept == 1 or (kept, d) == (2, 2)
        assert group.weights[i] == d / kept
        dimensions += d * d / kept
    assert round(dimensions) == n  # none is missing


@pytest.mark.parametrize("name", [*NAMES[:-1], "D7"])
def test_scores_are_delta_at_the_product(name: str) -> None:
    group = Group(name)
    n = group.order
    wanted = torch.eye(n).double()[group.table] - 1 / n
    torch.testing.assert_close(scores(group, list(range(len(group.irreps)))), wanted, atol=1e-10, rtol=0)


@given(name=small, embedding=st.booleans(), seed=seeds)
def test_a_network_computes_the_product(name: str, embedding: bool, seed: int) -> None:
    target = GroupOperations([name], embedding=embedding, seed=seed)
    (group,), (tokens,) = target.groups, target.tokens
    n = group.order
    x = target.inputs()
    a, b = x[:, :n].argmax(1), x[:, n:].argmax(1)
    element = torch.empty(n).long()
    element[tokens] = torch.arange(n)
    assert torch.equal(target.answers(), tokens[group.table[element[a], element[b]]])
    torch.testing.assert_close(target(x), torch.eye(n)[target.answers()] - 1 / n, atol=1e-5, rtol=0)


@given(name=small, seed=seeds)
def test_each_irrep_alone_gives_its_trace_and_a_closed_one_nothing(name: str, seed: int) -> None:
    target = GroupOperations([name], switches="irrep", seed=seed)
    (group,), (tokens,) = target.groups, target.tokens
    x = target.inputs()
    parts = apd.Components.from_matrices(target.mechanisms("irrep"), 18)
    network = apd.Network(target, target.weights)
    for i in range(len(group.irreps)):
        gates = torch.eye(len(group.irreps))[i].expand(len(x), -1)
        wanted = scores(group, [i]).flatten(0, 1).float()
        torch.testing.assert_close(network(x, parts, gates)[:, tokens], wanted, atol=1e-5, rtol=0)
        only = x.clone()
        only[:, 2 * group.order :] = gates
        torch.testing.assert_close(target(only)[:, tokens], wanted, atol=1e-5, rtol=0)


@given(names=st.lists(st.sampled_from(["Z2", "Z5", "S3", "D4"]), min_size=2, max_size=3), seed=seeds)
def test_groups_with_tokens_of_their_own_leave_each_other_alone(names: list[str], seed: int) -> None:
    target = GroupOperations(names, seed=seed)
    own = torch.zeros(len(names), target.n_tokens)
    for t, tokens in enumerate(target.tokens):
        own[t, tokens] = 1
    assert torch.equal(own.sum(0), torch.ones(target.n_tokens))
    group_of = torch.cat([torch.full((g.order**2,), t) for t, g in enumerate(target.groups)])
    orders = torch.tensor([float(g.order) for g in target.groups])[group_of, None]
    wanted = torch.eye(target.n_tokens)[target.answers()] - own[group_of] / orders
    x = target.inputs()
    torch.testing.assert_close(target(x), wanted, atol=1e-5, rtol=0)
    parts = apd.Components.from_matrices(target.mechanisms(), 40)
    attributed = apd.attributions.gradient(apd.Network(target, target.weights), parts, x)
    others = attributed[torch.eye(len(names))[group_of] == 0]
    assert others.abs().max() < 1e-6 and (attributed[torch.eye(len(names))[group_of] > 0] > 1e-4).all()


@given(seed=seeds)
def test_groups_that_share_tokens_take_turns(seed: int) -> None:
    target = GroupOperations(["Z6", "S3", "D3"], switches="group", seed=seed)
    x = target.inputs()
    assert x.shape == (108, 15) and target.n_tokens == 6
    assert torch.equal(x[:, 12:], torch.eye(3).repeat_interleave(36, 0))
    torch.testing.assert_close(target(x), torch.eye(6)[target.answers()] - 1 / 6, atol=1e-5, rtol=0)
    for t, (group, tokens) in enumerate(zip(target.groups, target.tokens, strict=True)):
        answers = target.answers()[36 * t : 36 * (t + 1)].view(6, 6)
        assert torch.equal(answers, tokens[group.table])


@given(seed=seeds)
def test_mechanisms_sum_to_the_weights_and_seeds_change_them(seed: int) -> None:
    one, other = (GroupOperations(["Z6", "S3"], switches="group", seed=s) for s in (seed, seed + 1))
    for by, count in (("group", 2), ("irrep", 5)):
        for path, whole in apd.Network(one, one.weights).weights.items():
            assert one.mechanisms(by)[path].shape[0] == count
            assert torch.equal(one.mechanisms(by)[path].sum(0), whole)
            assert not torch.allclose(whole, apd.Network(other, other.weights).weights[path], atol=0.05)
    writes = [t.out.weight.detach()[t.tokens[0]] for t in (one, other)]  # in the group's order
    assert not torch.allclose(*writes, atol=0.05)
    assert one.embed.shape == (12, 10)
    torch.testing.assert_close(one.embed.T @ one.embed, torch.eye(10), atol=1e-5, rtol=0)


@given(some=st.sets(st.integers(0, 3), min_size=1), seed=seeds)
def test_a_network_may_have_some_irreps_only(some: set[int], seed: int) -> None:
    target = GroupOperations(["S4", "Z24"], [tuple(some), (0, 4)], "group", seed=seed)
    (S4, Z24), tokens = target.groups, target.tokens
    y = target(target.inputs())
    for t, (group, own) in enumerate(((S4, list(some)), (Z24, [0, 4]))):
        wanted = scores(group, own).flatten(0, 1).float()
        torch.testing.assert_close(y[576 * t : 576 * (t + 1)][:, tokens[t]], wanted, atol=1e-5, rtol=0)
    right = (y.argmax(1) == target.answers())[:576].float().mean()
    assert (right == 1) == bool(some & {2, 3}) and (y.argmax(1) == target.answers())[576:].all()


@given(names=st.lists(small, min_size=1, max_size=2), seed=seeds)
def test_the_embedding_spans_what_the_irreps_read(names: list[str], seed: int) -> None:
    some = [(len(Group(name).irreps) - 1,) for name in names]
    target = GroupOperations(names, some, seed=seed)
    D = target.embed.shape[1]
    torch.testing.assert_close(target.embed.T @ target.embed, torch.eye(D), atol=1e-5, rtol=0)
    assert D == 2 * sum(round(g.weights[i] * g.irreps[i].shape[1]) for g, (i,) in zip(target.groups, some, strict=True))
    plain = GroupOperations(names, some, embedding=False, seed=seed)
    torch.testing.assert_close(target(target.inputs()).abs().amax(), plain(plain.inputs()).abs().amax())
    y = target(target.inputs())
    for (i,), group, tokens, n in zip(
        some, target.groups, target.tokens, [g.order for g in target.groups], strict=True
    ):
        rows = slice(0, n * n) if tokens.min() == 0 else slice(len(y) - n * n, None)
        torch.testing.assert_close(y[rows][:, tokens], scores(group, [i]).flatten(0, 1).float(), atol=1e-5, rtol=0)


@given(name=st.sampled_from([*NAMES, "D7"]), data=st.data())
def test_a_span_holds_all_entries_of_its_irreps_and_no_more(name: str, data: st.DataObject) -> None:
    group = Group(name)
    some = data.draw(st.lists(st.integers(0, len(group.irreps) - 1), min_size=1, unique=True))
    Q = group.span(some)
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1]).double(), atol=1e-9, rtol=0)
    entries = torch.cat([group.irreps[i].flatten(1) for i in some], 1)
    torch.testing.assert_close(Q @ (Q.T @ entries), entries, atol=1e-9, rtol=0)
    assert int(torch.linalg.matrix_rank(entries, atol=1e-8)) == Q.shape[1]
    assert torch.equal(Q, torch.cat([group.span((i,)) for i in some], 1))  # in the order given


@pytest.mark.parametrize(
    ("irreps", "error", "message"),
    [
        (0, TypeError, "irreps must be a list of places in Group.irreps, got 0"),
        ([0.5], ValueError, "irreps must be a whole number at least 0 and at most 1, got 0.5"),
        ([-1], ValueError, "irreps must be at least 0 and at most 1, got -1"),
        ((0, 2), ValueError, "irreps must be at least 0 and at most 1, got 2"),
        (["0"], TypeError, "irreps must be a whole number"),
        ([], ValueError, r"irreps must be some places in Group.irreps, each once, got \[\]"),
        ([1, 1], ValueError, r"each once, got \[1, 1\]"),
    ],
)
def test_irreps_that_a_group_does_not_have_span_nothing(irreps: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Group("S3").span(irreps)  # type: ignore[arg-type]


def test_batches_come_from_the_table() -> None:
    target = GroupOperations(["S3"], switches="irrep", probability=0.3)
    x = target.data(4000)(0, torch.Generator().manual_seed(0))
    assert (x[:, 12:].mean(0) - 0.3).abs().max() < 0.05
    assert torch.equal(x[:, :12].sum(1), torch.full((4000,), 2.0))
    assert torch.equal(GroupOperations(["S3", "Z5"]).data(9).table, GroupOperations(["S3", "Z5"]).inputs())


@given(name=small, noise=st.floats(0.0, 1.0), neurons=st.integers(1, 8), seed=seeds)
def test_a_certificate_is_what_all_pairs_say(name: str, noise: float, neurons: int, seed: int) -> None:
    """Margin and residual against all scores, symmetrised by brute force; never fewer wrong than there are."""
    group, n = Group(name), Group(name).order
    generator = torch.Generator().manual_seed(seed)
    exact = GroupOperations([group], embedding=False, seed=seed)
    (tokens,) = exact.tokens
    own = exact.hidden.weight.detach().T.double()
    u, v, w = own[tokens], own[n:][tokens], exact.out.weight.detach().T[:, tokens].double()

    def more(t: Tensor, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.double)
        return torch.cat([t + noise * t.std() * torch.randn(t.shape, generator=generator).double(), drawn], -1)

    u, v = more(u, n, neurons), more(v, n, neurons)
    w = more(w.T, n, neurons).T * 1.0
    w[-neurons:] *= noise
    found = group.certify(u, v, w)
    y = ((u[:, None] + v) ** 2) @ w  # [a, b, c]
    y = y - y.mean(2, keepdim=True)
    at = y.gather(2, group.table[group.table])  # [a, b, g]: the score of a b g
    symmetric = at.mean((0, 1))
    residual = float((at - symmetric).square().sum())
    margin = float(symmetric[0] - symmetric[1:].max())
    assert found.pairs == n * n and found.margin == pytest.approx(margin, rel=1e-6, abs=1e-8)
    assert found.residual == pytest.approx(residual, rel=1e-6, abs=1e-7 * float(y.square().sum()))
    wrong = int((at[..., :1] <= at[..., 1:]).any(2).sum())
    assert wrong <= found.wrong <= n * n
    assert found.share == 1 - found.wrong / n**2
    if noise == 0.0:
        assert found.wrong == 0


def test_a_random_network_is_certified_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v, w = (torch.randn(s, generator=generator) for s in ((24, 60), (24, 60), (60, 24)))
    assert Group("S4").certify(u, v, w).share == 0


@pytest.mark.parametrize(
    ("name", "order"), [("Z2", 2), ("Z120", 120), ("D3", 6), ("D60", 120), ("S3", 6), ("S5", 120), ("A4", 12)]
)
def test_the_smallest_and_the_largest_of_each_kind_are_known(name: str, order: int) -> None:
    assert Group(name).order == order


@pytest.mark.parametrize("name", ["", "S6", "A5", "Z1", "D2", "D61", "Z121", "s3", "Z06", "S3 "])
def test_names_that_are_not_known_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must be one of the known groups"):
        Group(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": []}, "groups must be at least one"),
        ({"groups": ["Z5", "S3"], "switches": "irrep"}, "groups must be at least one"),
        ({"groups": ["Z5", "S3"], "switches": "group"}, "of one order"),
        ({"groups": ["Z5"], "switches": "both"}, "switches must be"),
        *(
            ({"groups": ["Z5"], "irreps": some}, "irreps must be")
            for some in ([], [()], [(2,)], [(0, 0)], [0], [(0,), (1,)])
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupOperations(**arguments)  # type: ignore[arg-type]


def test_neurons_that_do_not_fit_are_refused() -> None:
    u = torch.ones(6, 4)
    with pytest.raises(ValueError, match="the same neurons"):
        Group("S3").certify(u, u[:, :3], torch.ones(4, 6))


def test_a_component_is_run_on_its_own_tokens_and_switch() -> None:
    """Certificates of true parts hold, of another's part they do not; all pairs are run as the network runs them."""
    for kind in ("apart", "shared"):
        target = study.target_of(kind, 5)
        parts = apd.Components.from_matrices(target.mechanisms(), 40)
        network, x = apd.Network(target, target.weights), target.inputs()
        for row in study.bounds(target, parts, torch.arange(3)):
            assert row["share"] == row["right"] == 1 and row["wrong"] == 0
        assert all(row["share"] == 0 for row in study.bounds(target, parts, torch.tensor([1, 2, 0])))
        lump = apd.Components.from_matrices({path: w[None] for path, w in network.weights.items()}, 46)
        assert all(row["share"] == 1 for row in study.bounds(target, lump, torch.zeros(3).long()))  # others are closed
        for t, tokens in enumerate(target.tokens):
            rows = slice(576 * t, 576 * (t + 1))
            alone = network(x[rows], parts, torch.eye(3)[t].expand(576, -1))
            right = (tokens[alone[:, tokens].argmax(1)] == target.answers()[rows]).double().mean()
            assert right == 1


@pytest.mark.parametrize(
    ("kind", "control"),
    [("shared", "shared, no irreps"), ("irrep", "irrep, no irreps"), ("apart", "apart, own tokens")],
)
def test_without_irreps_keeps_sizes_and_nothing_else(kind: str, control: str) -> None:
    before, after = study.target_of(kind, 3), study.target_of(control, 3)
    n = study.MECHANISMS[kind]
    assert study.settings_of((control, n, 3)) == study.settings_of((kind, n, 3))
    assert torch.equal(before.opens, after.opens) and torch.equal(before.embed, after.embed)
    for irrep in before.owner.unique():
        own = before.owner == irrep
        for name in ("hidden", "out"):
            old, new = (getattr(t, name).weight.detach() for t in (before, after))
            old, new = (old[own], new[own]) if name == "hidden" else (old[:, own], new[:, own])
            sizes = [torch.linalg.svdvals(w) for w in (old, new)]
            torch.testing.assert_close(*sizes, atol=1e-4, rtol=1e-4)
            assert abs(float(torch.cosine_similarity(old.flatten(), new.flatten(), dim=0))) < 0.4
    y = after(after.inputs())
    assert float((y.argmax(1) == after.answers()).double().mean()) < 0.3


def test_random_weights_of_own_tokens_leave_other_groups_closed() -> None:
    """What reads all dimensions is on for every pair; with own tokens, for the pairs of its group alone."""
    for kind, closed in (("apart, own tokens", True), ("apart, no irreps", False)):
        target = study.target_of(kind, 3)
        parts = apd.Components.from_matrices(target.mechanisms(), 40)
        x, of_pair = target.inputs(), torch.arange(3).repeat_interleave(576)
        on = apd.attributions.gradient(apd.Network(target, target.weights), parts, x) > 1e-6
        assert on[torch.arange(len(x)), of_pair].all()
        assert torch.equal(on, of_pair[:, None] == torch.arange(3)) == closed
        assert closed or on.all()


def test_causal_scores_of_cuts_that_are_known() -> None:
    """Cuts are exact where the network computes each operation apart; parts in another order are matched."""
    task = study.task_of("trained", 4)
    net = study.OneLayer(2 * task.n_tokens, task.n_tokens, True, 0, len(task.owner))
    net.load_state_dict({name: dict(task.named_parameters())[name].detach() for name in dict(net.named_parameters())})
    made = study.cuts(task, net)
    for name in ("tokens", "neurons"):  # these networks have neurons of their own
        parts = made[name]
        for order in ([0, 1, 2], [2, 0, 1]):
            turned = {path: parts.matrices(path)[order] for path in parts.paths}
            for row in study.causal(task, net, apd.Components.from_matrices(turned, 44)):
                assert row["right"] == row["as_the_network"] == row["certified_share"] == 1
                assert row["alone"] < 1e-6 and row["without_on_others"] < 1e-6
                assert row["without"] == pytest.approx(1, abs=0.05) and row["alone_on_others"] > 0.9
    lumped = {path: m[[0, 0, 0]] / 3 for path in made["tokens"].paths for m in [made["tokens"].matrices(path)]}
    worst = study.causal(task, net, apd.Components.from_matrices(lumped, 44))
    assert max(row["alone"] for row in worst) > 0.9


def test_training_learns_all_three_operations_and_untrained_has_none() -> None:
    task = study.task_of("trained", 0)
    x, block = task.inputs(), study.blocks_of(task)
    assert block.bincount().tolist() == [36, 36, 100]
    for kind, low, high in (("trained", 1.0, 1.0), ("untrained", 0.0, 0.3)):
        y = study.network_of(kind, 0, **({"steps": 1500} if kind == "trained" else {}))(x)
        right = float((y.argmax(1) == task.answers()).double().mean())
        assert low <= right <= high


def test_scores_by_divergence_of_cuts_that_are_known() -> None:
    """By answers: exact cuts say nothing of other operations and take nothing from them; a lump says everything."""
    task = study.task_of("answers", 4)
    net = study.OneLayer(2 * task.n_tokens, task.n_tokens, True, 0, len(task.owner))
    net.load_state_dict({name: dict(task.named_parameters())[name].detach() for name in dict(net.named_parameters())})
    parts = study.cuts(task, net)["tokens"]
    for row in study.causal(task, net, parts, True):
        assert row["right"] == row["right_without_on_others"] == 1
        assert row["alone"] < 1e-6 < 0.01 < min(row["without"], row["alone_on_others"])
        assert row["without_on_others"] < 1e-6 and row["right_on_others"] <= 0.2 and row["right_without"] < 0.5
    lump = {path: parts.matrices(path).sum(0, keepdim=True) for path in parts.paths}
    nothing = {path: m.repeat(4, 1, 1) * torch.tensor([1.0, 0, 0, 0])[:, None, None] for path, m in lump.items()}
    rows = study.causal(task, net, apd.Components.from_matrices(nothing, 54), True)
    assert sum(row["right"] == 1 for row in rows) == 1
    (whole,) = [row for row in rows if row["right"] == 1]
    assert whole["right_on_others"] == 1 and whole["right_without_on_others"] < 0.5
    assert whole["without_on_others"] > 0.01


def test_networks_learn_answers_and_untrained_ones_do_not() -> None:
    for kind, low, high in (("answers", 1.0, 1.0), ("answers, untrained", 0.0, 0.3)):
        task, net = study.task_of(kind, 0), study.network_of(kind, 0, steps=600)
        assert not net.squares and net.hidden.weight.shape == (64, 2 * task.n_tokens)
        assert low <= float((net(task.inputs()).argmax(1) == task.answers()).double().mean()) <= high


def test_new_targets_of_one_group() -> None:
    dimensions = {"irrep, S3": [1, 2], "irrep, D5": [1, 2, 2], "irrep, A4": [2, 3], "irrep, S5": [1, 4, 4]}
    dimensions["irrep, S5 whole"] = [1, 4, 4, 5, 5, 6]
    for kind, n in study.ONE_GROUP.items():
        target = study.target_of(kind, 3)
        assert target.owner.bincount().tolist() == [2 * d**3 for d in dimensions[kind]]
        truth = target.mechanisms(study.by_of(kind))
        assert len(truth["hidden.weight"]) == n == study.MECHANISMS[kind] == len(dimensions[kind])
        assert study.settings_of((kind, n, 3)) == study.settings_of(("irrep", n, 3)) | {"top_k": pytest.approx(0.2 * n)}
        seeds = {seed for own, _, seed in study.jobs() if own == kind}
        assert seeds == set(range(8710, 8710 + (study.FEW if "whole" in kind else 5)))
    assert study.settings_of(("irrep", 4, 3))["top_k"] == 0.8


def test_two_and_four_groups_share_tokens_and_three_of_them_are_those_of_the_others() -> None:
    for kind, names in (("shared, two", ["S4", "D12"]), ("shared, four", ["S4", "D12", "Z24", "D12"])):
        target, three = study.target_of(kind, 3), study.target_of("shared", 3)
        assert [g.name for g in target.groups] == names and target.n_tokens == three.n_tokens
        truth, x = target.mechanisms("group"), target.inputs()
        assert len(truth[study.HIDDEN]) == len(names)
        right = (target(x).argmax(1) == target.answers()).double()
        assert all(float(right[study.blocks_of(target) == t].mean()) == 1 for t in range(len(names)))


def test_answers_on_shared_tokens_are_learned_with_the_settings_for_answers() -> None:
    kind = "answers, shared tokens"
    task, shared = study.task_of(kind, 5), study.task_of("trained, shared tokens", 5)
    assert [g.name for g in task.groups] == [g.name for g in shared.groups] and task.switches == "group"
    assert torch.equal(task.inputs(), shared.inputs())
    assert study.settings_of((kind, 3, 5)) == study.settings_of(("answers", 3, 5))
    net = study.network_of(kind, 5, steps=600)
    assert not net.squares and float((net(task.inputs()).argmax(1) == task.answers()).double().mean()) == 1


def test_settings_of_networks_that_were_trained_on_answers() -> None:
    for kind, divided in (("answers", False), ("answers, untrained", False), ("trained, one each", True)):
        own = study.settings_of((kind, 3, 5))
        assert own["per_sample"] and own["top_k"] == 1 and own["tidy_every"] == 0 and own["seed"] == 1005
        assert (own["minimality"] == 60) == divided
    assert "per_sample" not in study.settings_of(("trained", 3, 5))  # stored rows are as they were
