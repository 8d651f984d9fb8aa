"""Files: whole or not at all, bit by bit, and nobody else's."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import apd_minimal as apd
from apd_minimal import store
from apd_minimal.decomposition import fingerprint

FACTS = {"numbers": [1, 2.5, 0.1 + 0.2], "none": None, "text": "ü"}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.A": torch.randn(2, 3, 4, generator=generator),
        "a.B": torch.randn(2, 4, 5, generator=generator).transpose(1, 2),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "counts": torch.arange(4, dtype=torch.uint8),
    }


def decomposition(target: nn.Module, weights: list[str]) -> apd.Decomposition:
    network = apd.Network(target, weights)
    components = apd.Components.random(network.shapes, 3, rank=2, generator=torch.Generator().manual_seed(0))
    return apd.Decomposition(
        components=components,
        config=apd.Config(n_components=3, top_k=1.5, simplicity=((0.0, 3.0), (1.0, 0.1)), seed=7),
        history={
            "step": [0, 1],
            "faithfulness": [[0.1 + 0.2, 1e-30], [1 / 3, 2.0]],
            "scrub": [[None, None], [1.0, 2.0]],
        },
        scores=[0.5, 1 / 3],
        chosen=1,
        finished=False,
        fingerprint=fingerprint(network.target.state_dict()),
    )


def test_tensors_and_facts_come_back_bit_by_bit(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "x.safetensors"
    store.write_tensors(file, "kind", tensors(), FACTS)
    back, facts = store.read_tensors(file, "kind")
    assert facts == FACTS
    assert back.keys() == tensors().keys()
    for name, t in tensors().items():
        assert back[name].dtype == t.dtype
        assert torch.equal(back[name], t)
    assert [path.name for path in file.parent.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    file = tmp_path / "x.safetensors"
    store.write_tensors(file, "kind", tensors(), FACTS)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(store.StoreError, match=r"x.safetensors is truncated or not a safetensors file"):
        store.read_tensors(file, "kind")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"something else altogether, and rather long" * 100)
    with pytest.raises(store.StoreError, match="not a safetensors file"):
        store.read_tensors(file, "kind")
    file.write_bytes(pickle.dumps({"a": [1, 2, 3]}))
    with pytest.raises(store.StoreError, match="not a safetensors file"):
        store.read_tensors(file, "kind")
    for metadata in (None, {"format": "pt"}, {"format": "apd_minimal/0", "kind": "kind", "facts": "{}"}):
        safetensors.torch.save_file(tensors() | {"a.B": torch.ones(1)}, file, metadata)
        with pytest.raises(store.StoreError, match=r"is of format .*, expected 'apd_minimal/1'"):
            store.read_tensors(file, "kind")
    store.write_tensors(file, "other", tensors(), FACTS)
    with pytest.raises(store.StoreError, match="holds a 'other', expected a 'kind'"):
        store.read_tensors(file, "kind")
    with pytest.raises(FileNotFoundError, match=r"no file at .*nowhere"):
        store.read_tensors(tmp_path / "nowhere", "kind")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    store.write(file, b"old")

    def broken(*args: Any) -> None:
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"apd_minimal.store.os.{step}", broken)
            with pytest.raises(OSError, match="disk full"):
                store.write(file, b"new")
        assert file.read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["x"], "no part of a file is left"
    store.write(file, b"new")
    assert file.read_bytes() == b"new"


def test_nothing_is_written_through_what_was_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever guesses the name of the part finds no way either: it must be new, be there a file or a link."""
    monkeypatch.setattr("apd_minimal.store.secrets.token_hex", lambda n: "guessed")
    monkeypatch.setattr("apd_minimal.store.glob.escape", lambda name: "no such name")  # it came after the tidying
    (tmp_path / "treasure").write_bytes(b"mine")
    for plant in ("hardlink_to", "symlink_to"):
        part = tmp_path / "x.guessed.part"
        getattr(part, plant)(tmp_path / "treasure")
        with pytest.raises(FileExistsError):
            store.write(tmp_path / "x", b"new")
        assert (tmp_path / "treasure").read_bytes() == b"mine"
        part.unlink(missing_ok=True)
    store.write(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_only_parts_of_this_file_are_tidied(tmp_path: Path) -> None:
    """Those of a process that was killed go; a user's own, and what a run beside this one is writing, stay."""
    left = "m.0123456789abcdef.part"
    others = ["m.notes.part", "m.seed1.0123456789abcdef.part", "m.0123456789ABCDEF0.part"]
    for name in (left, *others):
        (tmp_path / name).write_bytes(b"mine")
    store.write(tmp_path / "m", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["m", *others])


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    target = apd.targets.TMS()
    saved = decomposition(target, target.weights)
    saved.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    few = dataclasses.replace(saved, components=saved.components.subset([0, 1]))
    with pytest.raises(ValueError, match="the components must be the 3 of the configuration, got 2"):
        few.save(tmp_path)
    broken = dataclasses.replace(saved, components=saved.components.map(lambda t: t * torch.nan))
    with pytest.raises(ValueError, match="must be finite"):
        broken.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cfg.json").write_text('{"model": "mine"}')
    with pytest.raises(ValueError, match=r"cfg.json is not a decomposition's .*another folder"):
        saved.save(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["cfg.json"]


@pytest.mark.parametrize("identity", [False, True])
def test_a_decomposition_comes_back(tmp_path: Path, identity: bool) -> None:
    target = apd.targets.TMS(identity=identity)
    saved = decomposition(target, target.weights)
    saved.save(tmp_path)
    back = apd.Decomposition.load(tmp_path, target)
    assert back.components.paths == saved.components.paths
    for a, b in zip(saved.components.parameters(), back.components.parameters(), strict=True):
        assert torch.equal(a, b)
    for name in ("config", "history", "scores", "chosen", "finished", "fingerprint"):
        assert getattr(back, name) == getattr(saved, name), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "components.safetensors"]
    # What other tools read: plain safetensors and plain JSON.
    plain = safetensors.torch.load_file(tmp_path / "components.safetensors")
    assert list(plain["encode.weight.A"].shape) == [3, 5, 2]
    facts = json.loads((tmp_path / "cfg.json").read_text())
    assert facts["format"] == store.FORMAT
    assert facts["fingerprint"] == saved.fingerprint
    assert facts["config"]["n_components"] == 3


def test_no_pickle_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("pickle")

    for name in ("pickle.dumps", "pickle.loads", "pickle.dump", "pickle.load", "torch.save", "torch.load"):
        monkeypatch.setattr(name, refuse)
    target = apd.targets.TMS()
    decomposition(target, target.weights).save(tmp_path)
    apd.Decomposition.load(tmp_path, target)
    for source in Path(apd.__file__).parent.rglob("*.py"):
        text = source.read_text()
        # layerwise.py sends its jobs to other processes that way, as bytes; nothing is stored or read from a file.
        assert "import pickle" not in text or source.name == "layerwise.py"
        assert not re.search(r"pickle\.(dump|load)\(", text)
        assert "torch.save" not in text
        assert "torch.load" not in text


def test_a_target_must_be_a_module(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"target must be a torch\.nn\.Module, got 'a'"):
        apd.Decomposition.load(tmp_path, "a")  # type: ignore[arg-type]


def test_another_target_is_refused(tmp_path: Path) -> None:
    target = apd.targets.TMS()
    decomposition(target, target.weights).save(tmp_path)
    with pytest.raises(store.StoreError, match="decomposes another target: its parameters hash to"):
        apd.Decomposition.load(tmp_path, apd.targets.TMS())
    with pytest.raises(store.StoreError, match="decomposes another target"):
        apd.Decomposition.load(tmp_path, apd.targets.TMS(6, 2))
    with pytest.raises(store.StoreError, match=r"decomposes \['encode.weight'\], which this target does not have"):
        apd.Decomposition.load(tmp_path, nn.Linear(5, 2))
    for name in ("encode.weight", "bias"):  # the bias is not decomposed, but part of the target
        other = copy.deepcopy(target)
        with torch.no_grad():
            other.get_parameter(name).flatten()[0] += 1e-6
        with pytest.raises(store.StoreError, match="decomposes another target"):
            apd.Decomposition.load(tmp_path, other)
    with pytest.raises(FileNotFoundError, match="no file at"):
        apd.Decomposition.load(tmp_path / "nowhere", target)


def test_saving_again_replaces(tmp_path: Path) -> None:
    target = apd.targets.TMS()
    first = decomposition(target, target.weights)
    first.save(tmp_path)
    doubled = apd.Decomposition(**{**vars(first), "components": first.components.map(lambda t: 2 * t)})
    doubled.save(tmp_path)
    back = apd.Decomposition.load(tmp_path, target)
    assert torch.equal(back.components.A["encode.weight"], 2 * first.components.A["encode.weight"])


def test_the_fingerprint_depends_on_values_shapes_types_and_paths() -> None:
    w = torch.arange(6.0).reshape(2, 3)
    seen = [
        fingerprint(weights)
        for weights in (
            {"a": w},
            {"b": w},
            {"a": w.reshape(3, 2)},
            {"a": w.double()},
            {"a": w + 1},
            {"a": w, "b": w},
        )
    ]
    assert len(set(seen)) == len(seen)
    assert fingerprint({"a": w, "b": w + 1}) == fingerprint({"b": w + 1, "a": w})
    assert fingerprint({"a": w.T.contiguous().T}) == seen[0], "how it lies in memory does not matter"
