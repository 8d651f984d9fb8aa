"""What every chapter owes its reader, checked on the stored notebooks without running them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from theme.results import stored_claims
from tools import execute, setup_cell

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
PICTURES = ("image/png", "image/svg+xml", "image/jpeg", "image/webp")
HEADINGS = [
    "What you will be able to do",
    "What you need",
    "The idea in a picture",
    "The maths, with shapes",
    "Code from scratch",
    "The experiment",
    "What goes wrong",
    "The claims it settles",
    "Exercises",
    "Summary",
    "Further reading",
]

Notebook = dict[str, Any]


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Notebook:
    return json.loads(request.param.read_text())


def code(notebook: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text(notebook: Notebook) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def outputs(notebook: Notebook) -> list[dict[str, Any]]:
    return [output for cell in code(notebook) for output in cell["outputs"]]


def test_there_are_chapters() -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = {Path(page["file"]).name for part in contents["parts"] for page in part["chapters"]}
    assert CHAPTERS
    assert {path.stem for path in CHAPTERS} <= listed


def test_executed_once_from_top_to_bottom(notebook: Notebook) -> None:
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert sum(bool(cell["outputs"]) for cell in code(notebook)) >= 3, "hardly any outputs are stored"
    assert notebook["metadata"]["measured"]["seconds"] > 0


def test_no_error_warning_or_address_is_stored(notebook: Notebook) -> None:
    for output in outputs(notebook):
        shown = json.dumps(output)
        assert output["output_type"] != "error", shown[:400]
        assert output.get("name") != "stderr", shown[:400]
        assert not re.search(r"at 0x[0-9a-f]{6,}", shown), "an object's address is stored: end the line with ;"
        assert "widget-view" not in shown, "a live widget is stored"


def test_stored_in_normal_form(notebook: Notebook) -> None:
    import nbformat

    stored = json.dumps(notebook, sort_keys=True)
    again = nbformat.from_dict(json.loads(stored))
    joined = nbformat.reads(json.dumps(again), as_version=4)
    execute.normalise(joined, notebook["metadata"]["measured"]["seconds"])
    measured = notebook["metadata"]["measured"]
    joined.metadata["measured"] = measured  # this machine may be another one
    assert json.loads(nbformat.writes(joined)) == notebook, "run python -m tools.execute on it"


def test_set_up_cell_is_the_first_and_the_configured_one(notebook: Notebook) -> None:
    first = code(notebook)[0]
    assert first["metadata"]["tags"] == setup_cell.TAGS
    assert "".join(first["source"]) == setup_cell.configured(), "run python -m tools.setup_cell"


def test_headings(notebook: Notebook) -> None:
    found = re.findall(r"^## +(.+?)\s*$", text(notebook), re.MULTILINE)
    assert len(re.findall(r"^# ", text(notebook), re.MULTILINE)) == 1
    position = -1
    for heading in HEADINGS:
        places = [i for i, line in enumerate(found) if i > position and line.startswith(heading)]
        assert places, f"no section '{heading}' after '{found[position] if position >= 0 else 'the title'}'"
        position = places[0]


def test_measured_time_is_shown(notebook: Notebook, request: pytest.FixtureRequest) -> None:
    assert "{runtime}`" + request.node.callspec.id + "`" in text(notebook)


def test_figures_have_words_and_captions(notebook: Notebook) -> None:
    names = []
    for cell in code(notebook):
        made = [out for out in cell["outputs"] if any(kind in out.get("data", {}) for kind in PICTURES)]
        if made:
            about = cell["metadata"].get("mystnb", {})
            where = "".join(cell["source"])[:80]
            assert len(made) == 1, f"one figure a cell, so that each has its own words: {where}"
            assert len(about.get("image", {}).get("alt", "").split()) >= 3, f"no alt text: {where}"
            assert len(about.get("figure", {}).get("caption", "").split()) >= 3, f"no caption: {where}"
            assert about["figure"].get("name"), f"no name: {where}"
            names.append(about["figure"]["name"])
        for out in cell["outputs"]:
            html = "".join(out.get("data", {}).get("text/html", ""))
            for image in re.findall(r"<img[^>]*>", html):
                assert re.search(r'alt="[^"]{12,}"', image), "a frame without alt text"
            if "<img" in html:
                assert re.search(r"<figcaption>.{12,}</figcaption>", html), "frames without a caption"
    assert len(set(names)) == len(names)
    assert names, "a chapter without a picture"


def test_exercises_have_executed_solutions(notebook: Notebook) -> None:
    opened: list[str] = []
    solved: dict[str, int] = {}
    inside = None
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            if inside and "".join(cell["source"]).strip():
                solved[inside] += 1
            continue
        for start, title, label, end in re.findall(
            r"^:::\{(exercise)\} (.+)\n:label: (\S+)|^:::\{(solution-end)\}|", "".join(cell["source"]), re.MULTILINE
        ):
            if start:
                assert re.search(r"\((easy|medium|hard), \d+ minutes\)$", title), f"no difficulty or minutes: {title}"
                opened.append(label)
            if end:
                inside = None
        for label in re.findall(r"^:::\{solution-start\} (\S+)", "".join(cell["source"]), re.MULTILINE):
            inside = label
            solved[label] = 0
    assert len(opened) >= 2
    assert sorted(opened) == sorted(solved)
    assert all(solved.values()), f"solutions without code: {[k for k, v in solved.items() if not v]}"
    folded = re.findall(r"^:::\{solution-start\}.*\n(?::\S+:.*\n)*?:class: dropdown", text(notebook), re.MULTILINE)
    assert len(folded) == len(solved), "each solution is folded away: ':class: dropdown'"


def test_code_fits_the_page(notebook: Notebook) -> None:
    for cell in code(notebook)[1:]:
        long = [line for line in "".join(cell["source"]).splitlines() if len(line) > 88]
        assert not long, f"wider than 88 columns: {long[0]}"


def hidden(cell: dict[str, Any]) -> bool:
    return bool({"remove-cell", "remove-input"} & set(cell["metadata"].get("tags", [])))


def test_outputs_left_uncompared_are_asserted(notebook: Notebook) -> None:
    above = ""  # a hidden cell stores what the cell above it found, and asserted
    for cell in code(notebook):
        source = "".join(cell["source"])
        above = above + source if hidden(cell) else source
        tags = set(cell["metadata"].get("tags", []))
        assert not tags & {"nbval-skip", "raises-exception"}
        if "nbval-ignore-output" in tags:
            assert re.search(r"^\s*assert ", above, re.MULTILINE), "nothing checks: " + source


def test_the_reader_sees_no_line_that_only_stores_a_number(notebook: Notebook) -> None:
    for cell in code(notebook):
        source = "".join(cell["source"])
        if not hidden(cell):
            assert not re.search(r"^\s*(glue|claim)\(", source, re.MULTILINE), "move to a hidden cell: " + source


def test_figure_names_and_labels_are_unique_in_the_book() -> None:
    found: list[str] = []
    for path in CHAPTERS:
        notebook = json.loads(path.read_text())
        found += [cell["metadata"].get("mystnb", {}).get("figure", {}).get("name", "") for cell in code(notebook)]
        found += re.findall(r"^:label: (\S+)", text(notebook), re.MULTILINE)
    found = [name for name in found if name]
    assert sorted(found) == sorted(set(found))


def test_claims_name_what_the_ledger_has() -> None:
    ledger = yaml.safe_load((ROOT / "chapters" / "claims.yml").read_text())
    assert list(ledger) == list(range(1, len(ledger) + 1))
    for path in CHAPTERS:
        for record, heading in stored_claims(json.loads(path.read_text())):
            assert record["number"] in ledger
            assert heading


def test_api_page_names_every_module() -> None:
    package = ROOT / "apd_minimal"
    paths = [path.relative_to(package).with_suffix("") for path in package.rglob("*.py") if path.stem[:2] != "__"]
    # The files of these two are told as one: the package has their names.
    whole = ("attributions", "targets")
    public = {path.parts[0] if path.parts[0] in whole else ".".join(path.parts) for path in paths}
    page = (ROOT / "chapters" / "api.md").read_text()
    assert set(re.findall(r"automodule:: apd_minimal\.(\S+)", page)) == public
