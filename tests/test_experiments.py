"""Stored runs are known by their settings: none would be made again today, and files are written back as they are."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import multiprocessing
import pickle
import runpy
import subprocess
import sys
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import experiments
from apd_minimal.config import Config
from experiments import attributions, failures, layerwise, schedules
from experiments.experiment import DATA, Row, Rows, Study, numbers, prefix, scaled

ROOT = DATA.parent
MODULES = [path.stem for path in sorted(Path(experiments.__file__).parent.glob("*.py"))]
STUDIES: dict[str, Study] = {
    name: module.STUDY
    for name in MODULES
    if name != "__init__" and hasattr(module := importlib.import_module(f"experiments.{name}"), "STUDY")
}
LISTS = [(study, name) for study in STUDIES for name in STUDIES[study].lists]


def test_studies_are_those_that_make_data_runs() -> None:
    parts = {"basis_networks", "causal", "circuits", "layerwise_measures", "leaks_cases", "planted"}
    parts |= {"planted_kinds", "drawn_digits", "planes", "induced_network", "determined", "reading", "trained"}
    parts |= {"every_mask", "every_sequence", "leaks_later"}
    assert set(MODULES) - set(STUDIES) == {"__init__", "experiment", "sizes"} | parts
    planned = subprocess.run(["make", "-n", "data"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(STUDIES) <= set(planned.replace(";", " ").split())


@pytest.mark.parametrize("name", STUDIES)
def test_nothing_would_be_made_again_and_files_are_written_back_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = STUDIES[name]
    about = study.stored()["about"]
    assert {part: study.todo(part) for part in study.lists} == {part: [] for part in study.lists}
    assert all(study.stored()[part] for part in study.measurements)
    monkeypatch.setattr(torch, "__version__", about["torch"])
    copied = replace(study, folder=tmp_path)
    copied.write(*study.read(), about.get("processes", 1))
    assert copied.table.read_bytes() == study.table.read_bytes()
    assert copied.arrays.exists() == study.arrays.exists()
    if study.arrays.exists():
        assert copied.arrays.read_bytes() == study.arrays.read_bytes()


@pytest.mark.parametrize(("name", "part"), LISTS)
def test_a_row_with_other_settings_or_of_another_job_is_made_again(name: str, part: str) -> None:
    rows, stored = STUDIES[name].lists[part], STUDIES[name].stored()[part]
    first = rows.job_of(stored[0])
    others = [row for row in stored if rows.job_of(row) != first]
    of_nobody = copy.deepcopy(stored[0]) | {rows.fields[0]: "nobody"}
    assert rows.kept([of_nobody, *others]) == others
    if rows.settings:
        changed = copy.deepcopy(stored[0])
        changed["settings"]["lr"] *= 1.01
        assert rows.kept([changed, *others]) == others


@pytest.mark.parametrize("name", STUDIES)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"experiments.{name}")  # runpy warns of a module that is there already
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    assert stop.value.code in (None, 0)
    shown = capsys.readouterr().out
    assert f"python -m experiments.{name}" in shown
    assert all(choice in shown.replace("\n", " ") for choice in STUDIES[name].choices()[:1])


@pytest.mark.parametrize(("name", "part"), LISTS)
def test_a_process_of_its_own_can_do_a_job(name: str, part: str) -> None:
    run = STUDIES[name].lists[part].run
    assert pickle.loads(pickle.dumps(run)) is run


def test_one_job_really() -> None:
    rows = failures.STUDY.lists["runs"]
    (stored,) = [row for row in failures.STUDY.stored()["runs"] if rows.job_of(row) == ("too few steps", 10)]
    (found,), _ = rows.run(("too few steps", 10))
    assert found["scores"] == pytest.approx(stored["scores"], rel=0.01)
    # Two of them are within 1% of each other: which one is less, rounding may decide.
    assert found["scores"][found["chosen"]] == min(found["scores"])


def test_no_report_is_lost_while_a_search_is_made_again() -> None:
    rows = attributions.STUDY.stored()["runs"]
    searched = attributions.search_jobs("tms-5-2")[0]
    few = [row for row in rows if attributions.RUNS.job_of(row) != searched]
    assert attributions.RUNS.kept(few) == few
    assert set(attributions.jobs(few)) - set(map(attributions.RUNS.job_of, few)) == {searched}


def test_a_search_takes_one_setting_after_the_other_and_goes_on_where_an_end_does_best() -> None:
    part, rows = ("20", "joint", "all"), []  # nothing is stored of it
    peak = (1.0, 16.0, 0.25, 1.0)

    def served(factors: tuple[float, ...]) -> Row:
        hits = sum(f == p for f, p in zip(factors, peak, strict=True))
        away = factors[1] < 4  # more of minimality is better, but no better than 16
        job = dict(zip(layerwise.WEIGHTS.fields, (*part, *factors), strict=True))
        return job | {"served": 10 * (hits - (factors[1] != 16)) - away, "alone_error": abs(factors[0] - 1)}

    waves = []
    while missing := layerwise.search_of(part, rows)[1]:
        rows += [served(factors) for factors in missing]
        waves.append(missing)
    assert layerwise.search_of(part, rows) == (peak, [])
    assert waves == [
        [(1.0, 1.0, 1.0, 1.0), (0.5, 1.0, 1.0, 1.0), (2.0, 1.0, 1.0, 1.0)],
        [(1.0, 0.25, 1.0, 1.0), (1.0, 4.0, 1.0, 1.0)],
        [(1.0, 16.0, 1.0, 1.0)],
        [(1.0, 16.0, 0.25, 1.0), (1.0, 16.0, 4.0, 1.0)],
        [(1.0, 16.0, 1 / 16, 1.0)],
        [(1.0, 16.0, 0.25, 0.25), (1.0, 16.0, 0.25, 4.0)],
    ]


def test_of_equals_a_search_takes_the_one_with_the_smaller_error_and_none_that_is_not_faithful() -> None:
    part, rows = ("20", "joint", "all"), []
    while missing := layerwise.search_of(part, rows)[1]:
        for factors in missing:
            job = dict(zip(layerwise.WEIGHTS.fields, (*part, *factors), strict=True))
            facts = {"served": 7, "alone_error": abs(factors[2] - 4) + abs(factors[0] - 1)}
            if factors[3] < 1:
                facts = {"served": 9, "alone_error": 0.0, "relative_faithfulness": 0.06}
            rows.append(job | facts)
    assert layerwise.search_of(part, rows)[0] == (1.0, 1.0, 4.0, 1.0)


LR = {"a": 0.1, "b": 0.2}
DONE: list[tuple[str, int]] = []


def toy(job: tuple[str, int]) -> tuple[list[Row], dict[str, Tensor]]:
    """Two rows and a tensor."""
    DONE.append(job)
    return [{"value": i, "seconds": 0.5} for i in range(2)], {prefix(job) + "x": torch.tensor([float(len(DONE))])}


def measured() -> dict[str, Any]:
    """A value of its own for each call."""
    DONE.append(("measured", 0))
    return {"calls": DONE.count(("measured", 0))}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of three jobs whose settings are those of LR; its pool has threads."""
    DONE.clear()
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=ThreadPool))
    rows = Rows(
        fields=("name", "seed"),
        jobs=lambda rows: [("b", 0), ("a", 0), ("a", 1)],
        run=toy,
        settings=lambda job: numbers({"n_components": 3, "top_k": 1.0, "batches": None}, lr=LR[job[0]], seed=job[1]),
    )
    return Study("toy", {"runs": rows}, {"costs": measured}, folder=tmp_path)


def made(study: Study, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[str, int]]:
    """What a command makes."""
    DONE.clear()
    monkeypatch.setattr(sys, "argv", ["toy", "--processes", "1", *arguments])
    study.main("A toy.")
    return sorted(DONE)


def test_what_is_missing_or_changed_is_made(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(study, monkeypatch, "--only", "b") == [("b", 0)]
    assert made(study, monkeypatch) == [("a", 0), ("a", 1), ("measured", 0)]
    stored = study.stored()
    assert [(r["name"], r["seed"], r["value"], r["settings"]["lr"]) for r in stored["runs"]] == [
        ("a", 0, 0, 0.1), ("a", 0, 1, 0.1), ("a", 1, 0, 0.1), ("a", 1, 1, 0.1), ("b", 0, 0, 0.2), ("b", 0, 1, 0.2)
    ]  # fmt: skip
    assert made(study, monkeypatch) == []
    assert study.stored() == stored
    monkeypatch.setitem(LR, "b", 0.3)
    assert set(study.read()[1]) == {"a/0/x", "a/1/x"}
    assert made(study, monkeypatch) == [("b", 0)]
    assert study.read()[1]["b/0/x"].item() == 1
    assert study.read()[1]["a/1/x"].item() == 2  # the third that was made, of which two in its command
    assert made(study, monkeypatch, "--only", "a", "costs", "--again") == [("a", 0), ("a", 1), ("measured", 0)]
    assert len(study.stored()["runs"]) == 6


def test_settings_from_before_a_setting_was_added(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    made(study, monkeypatch)
    rows = copy.deepcopy(study.stored()["runs"])
    for row in rows:
        del row["settings"]["alpha"]
    assert study.lists["runs"].kept(rows) == rows


def test_the_manifest_names_what_is_there(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    made(study, monkeypatch)
    manifest = (study.folder / "manifest.json").read_text()
    assert "toy.json" in manifest
    assert "toy.safetensors" in manifest
    assert '"manifest.json"' not in manifest


def test_who_reads_while_it_is_written_sees_the_table_before_or_after(study: Study) -> None:
    table = {"about": {}, "runs": [{"name": str(i)} for i in range(30_000)]}
    study.write(table, {}, 1)
    with ThreadPool(1) as pool:
        writing = pool.apply_async(lambda: [study.write(table, {}, 1) for _ in range(10)])
        while not writing.ready():
            assert len(study.stored()["runs"]) == 30_000
        writing.get()
    assert not list(study.folder.glob("*.part"))


def test_scaled_schedules() -> None:
    assert scaled(3.0, 2) == 6.0
    assert scaled(((0.0, 1.0), (0.5, 4.0)), 0.5) == ((0.0, 0.5), (0.5, 2.0))


@pytest.mark.parametrize("package", ["benchmarks", "experiments", "theme", "tools"])
def test_modules_of_the_packages_are_not_found_by_their_bare_names(package: str) -> None:
    names = [path.stem for path in (ROOT / package).glob("*.py") if path.stem != "__init__"]
    found = {name: importlib.util.find_spec(name) for name in names}
    own = {name for name, spec in found.items() if spec and spec.origin and ROOT in Path(spec.origin).parents}
    assert names
    assert not own, f"`import {own}` finds files of {package}/: is its folder on the path?"


@pytest.mark.parametrize(("decay", "t", "rate"), [("none", 0.5, 0.2), ("linear", 0.5, 0.1), ("linear", 0.95, 0.01)])
def test_the_rate_stays_or_falls_along_a_line_to_nothing(decay: str, t: float, rate: float) -> None:
    config = Config(1, 1.0, lr=0.2, warmup=0.1, steps=1000)
    assert schedules.rate_at(decay, config, t) == pytest.approx(rate)
    halfway = schedules.rate_at("none", config, 0.049)  # step 50 of the 100 of the warm-up
    assert halfway == pytest.approx(0.1)
