"""What every chapter owes its reader, checked on the stored notebooks without running them."""

from __future__ import annotations

import ast
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from theme.results import stored_claims
from tools import execute, setup_cell
from tools.printed import COMPARED, GLUED, NUMBER

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


GLUE = re.compile(r"\{glue:text\}`(?:([\w.]+)::)?(\w+)(?::([^`]*))?`")


def stored_numbers(notebook: Notebook) -> dict[str, Any]:
    """What was glued, by name."""
    found = {}
    for output in outputs(notebook):
        if "scrapbook" in output.get("metadata", {}):
            value = "".join(output["data"][GLUED])
            is_float = re.fullmatch(r"-?(nan|inf|\d+\.\d+|\d+(\.\d+)?e[-+]\d+)", value)
            found[output["metadata"]["scrapbook"]["name"]] = float(value) if is_float else ast.literal_eval(value)
    return found


def shows(cell: dict[str, Any]) -> Iterator[str]:
    """What a cell prints for readers, as text."""
    if "remove-cell" in cell["metadata"].get("tags", []):
        return
    for output in cell["outputs"]:
        if "scrapbook" not in output.get("metadata", {}):
            yield "".join(output.get("text", ""))
            data = output.get("data", {})
            yield re.sub(r"<[^>]*>", " ", "".join(data["text/html"])) if "text/html" in data else ""
            yield "".join(data.get("text/plain", ""))


def rounded_elsewhere(value: float, text: str) -> list[str]:
    """Printed numbers that this value would give only if it had been rounded before: 1.60 for 1.5949, by way of 1.595.

    Such a number is off by a little more than half a unit of its last digit. With fewer than three digits, other
    quantities would be taken for the same one too often; where the right number stands, too, the other is another one.
    """
    found: list[str] = []
    if not math.isfinite(value):
        return found
    numbers = {written: Decimal(written.replace("−", "-")) for written in NUMBER.findall(text)}
    for written, number in numbers.items():
        digits = number.as_tuple()
        if isinstance(digits.exponent, int) and digits.exponent < 0 and len(digits.digits) >= 3:
            off = abs(Decimal(value) - number) / Decimal(1).scaleb(digits.exponent)
            right = round(Decimal(value).scaleb(-digits.exponent)) * Decimal(1).scaleb(digits.exponent)
            if Decimal("0.5000001") < off <= Decimal("0.5501") and right not in numbers.values():
                found.append(written)
    return found


@pytest.mark.parametrize(
    ("value", "text", "found"),
    [
        (1.5949, "1.59 and 1.595", []),
        (1.5949, "it is 1.60.", ["1.60"]),
        (0.99949, "−1.000 or 1.000", ["1.000"]),
        (0.99949, "from 0.999 to 1.000", []),
        (-2.3447e-7, "2.34e-07 or −2.35e-07", ["−2.35e-07"]),
        (1.5949, "1.6, 1.50, 1.58, 1.64, 2, 160", []),
    ],
)
def test_a_number_that_was_rounded_twice_is_seen(value: float, text: str, found: list[str]) -> None:
    assert rounded_elsewhere(value, text) == found


def test_text_claims_and_cells_show_the_same_number(notebook: Notebook) -> None:
    """Of one value, rounded once each: what is glued has all digits, and so has what the claims are made of."""
    used = {name for page, name, _ in GLUE.findall(text(notebook)) if not page}
    values = {name: v for name, v in stored_numbers(notebook).items() if name in used and isinstance(v, float)}
    claims = [record for record, _ in stored_claims(notebook)]
    twice = []
    visible = ""  # what the nearest cell above, that readers see, has printed
    for cell in code(notebook):
        here = {
            output["metadata"]["scrapbook"]["name"]
            for output in cell["outputs"]
            if "scrapbook" in output.get("metadata", {})
        }
        own = "\n".join(shows(cell))
        visible = own if not hidden(cell) else visible
        for name in sorted(here & values.keys()):
            twice += [f"{name} = {values[name]!r}, a cell prints {n}" for n in rounded_elsewhere(values[name], visible)]
    for record in claims:
        for name, value in (values | record["numbers"]).items():
            if isinstance(value, float):
                wrong = rounded_elsewhere(value, record["finding"])
                twice += [f"{name} = {value!r}, claim {record['number']} says {n}" for n in wrong]
    assert not twice


def test_no_number_is_rounded_before_it_is_stored(notebook: Notebook) -> None:
    for cell in code(notebook):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("glue", "claim"):
                rounds = [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == "round"]
                assert not [n for n in rounds if len(n.args) > 1], ast.unparse(node)


def test_a_glued_number_in_the_text_has_a_format(notebook: Notebook) -> None:
    """All its digits are stored: the format says how many are shown."""
    stored = stored_numbers(notebook)
    for page, name, form in GLUE.findall(text(notebook)):
        if not page and not form and isinstance(stored[name], float):
            assert len(repr(stored[name])) <= 6, f"{name} = {stored[name]!r}"


def contrast(colour: str, ground: str) -> float:
    """The ratio of the web's accessibility guidelines, from 1 to 21, of two colours like #7a7a7a."""
    lights = []
    for one in (colour, ground):
        parts = [int(one[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def faint(svg: str) -> set[str]:
    """Colours of axes, and of the words on them and in legends, that do not read on white and on near-black."""
    found = set()

    def look(node: ElementTree.Element, inside: str, fill: str) -> None:
        name, style = node.get("id", ""), node.get("style", "")
        inside = next((part for part in ("matplotlib.axis", "legend") if name.startswith(part)), inside)
        fill = (re.findall(r"fill: (#\w{6})", style) or [fill])[0]
        ticks = re.findall(r"stroke: (#\w{6})", style) if inside == "matplotlib.axis" else []
        words = inside and node.tag.endswith("}use") and "DejaVu" in "".join(node.attrib.values())
        for colour in [*ticks, *([fill] if words else [])]:
            if min(contrast(colour, "#ffffff"), contrast(colour, "#121212")) < 3:
                found.add(colour)
        for child in node:
            look(child, inside, fill)

    look(ElementTree.fromstring(svg.encode()), "", "#000000")
    return found


def test_axes_read_in_the_light_and_in_the_dark(notebook: Notebook) -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for cell in code(notebook):
        for output in cell["outputs"]:
            if svg := "".join(output.get("data", {}).get("image/svg+xml", "")):
                assert not faint(svg), "".join(cell["source"])[:300]


def test_numbers_are_stored_with_all_their_digits(notebook: Notebook) -> None:
    """Beside those that are the same on every machine; an earlier version stored these alone, rounded."""
    for output in outputs(notebook):
        if "scrapbook" in output.get("metadata", {}):
            value = stored_numbers({"cells": [{"cell_type": "code", "outputs": [output]}]}).popitem()[1]
            assert not isinstance(value, float) or COMPARED in output["data"], "run python -m tools.execute on it"


def plain(text: str) -> str:
    """Straight quotes and single spaces."""
    return re.sub(r"\s+", " ", text.translate(str.maketrans("“”’‘", "\"\"''"))).strip()


def unquoted_claims(notebook: Notebook) -> list[int]:
    """The claims that a chapter settles and does not quote before, in their section, with number and source."""
    ledger = yaml.safe_load((ROOT / "chapters" / "claims.yml").read_text())
    section = text(notebook).partition("\n## The claims it settles")[2].partition("\n## ")[0]
    quotes = plain(" ".join(re.findall(r"^>(.*)$", section, re.MULTILINE)))
    settled = {record["number"] for record, _ in stored_claims(notebook)}
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    start = next((i for i, source in enumerate(sources) if "## The claims it settles" in source), len(sources))
    early = {record["number"] for record, _ in stored_claims({"cells": notebook["cells"][:start]})}
    return [
        n for n in sorted(settled) if n in early or plain(f"Claim {n} (podcast summary): {ledger[n]}") not in quotes
    ]


def test_claims_are_quoted_before_they_are_settled(notebook: Notebook) -> None:
    """In the words of claims.yml, under the name of their source; what the paper says stands apart."""
    assert not unquoted_claims(notebook), "a quote is missing: > Claim 7 (podcast summary): its words"


def test_a_claim_in_other_words_is_seen() -> None:
    ledger = yaml.safe_load((ROOT / "chapters" / "claims.yml").read_text())
    settled = {"cell_type": "code", "source": [], "outputs": [{"metadata": {"apd_claim": {"number": 7}}}]}

    def chapter(quote: str) -> Notebook:
        words = f"# T\n\n## The claims it settles\n\n{quote}\n\nIt holds.\n\n## Exercises\n"
        return {"cells": [{"cell_type": "markdown", "source": [words]}, settled]}

    first, second = ledger[7].replace("“", '"').split(": ", 1)
    assert unquoted_claims(chapter(f"> Claim 7 (podcast summary): {first}:\n>  {second}")) == []
    assert unquoted_claims(chapter(f"> Claim 7: {ledger[7]}")) == [7]
    assert unquoted_claims(chapter(f"Claim 7 (podcast summary): {ledger[7]}")) == [7]
    assert unquoted_claims(chapter("> Claim 7 (podcast summary): TMS 5 → 2: each row is recovered.")) == [7]
    assert unquoted_claims(chapter(f"\n## Another\n> Claim 7 (podcast summary): {ledger[7]}")) == [7]
    late = chapter(f"> Claim 7 (podcast summary): {ledger[7]}")
    late["cells"].reverse()
    assert unquoted_claims(late) == [7], "the verdict stands before the quote"


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
    # Of these two, users take the names from the package.
    public = {".".join(path.parts) for path in paths} | {"attributions", "targets"}
    page = (ROOT / "chapters" / "api.md").read_text()
    assert set(re.findall(r"automodule:: apd_minimal\.(\S+)", page)) == public
