"""glue, claims, figures that move, the set-up of a notebook; the tools that execute and check chapters."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from nbclient.exceptions import CellTimeoutError

from apd_minimal.book import frames, notebook
from apd_minimal.book.glue import CLAIM, GLUE_PREFIX, VERDICTS, claim, floored, glue
from theme import results
from tools import build, execute, setup_cell
from tools import picture as front_picture


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a cell would have displayed."""
    record: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "apd_minimal.book.glue.display", lambda data, raw, metadata: record.append({**data, **metadata})
    )
    return record


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (0.123456, 0.123456),
        (1.5949, 1.5949),
        (np.float32(2.5), 2.5),
        (torch.tensor(1e-7, dtype=torch.float64), 1e-7),
        (7, 7),
        (True, True),
        ("two", "two"),
    ],
)
def test_glue_is_what_myst_nb_reads(shown: list, value: Any, read: Any) -> None:
    """The oracle is myst-nb's own reader."""
    from myst_nb.core.variables import format_plain_text
    from myst_nb.ext.glue import extract_glue_data_cell

    glue("x", value)
    meta = shown[0].pop("scrapbook")
    output = nbformat.v4.new_output("display_data", dict(shown[0]), metadata={"scrapbook": meta})
    [(name, stored)] = extract_glue_data_cell(nbformat.v4.new_code_cell("", outputs=[output]))
    assert name == "x"
    assert stored["data"]["text/plain"] == repr(read)
    if isinstance(read, float):
        assert format_plain_text(stored["data"]["text/plain"], ".2e") == f"{read:.2e}"


@given(
    st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.5g}")),  # many end in 5, where rounding twice goes wrong
    st.sampled_from([".1f", ".2f", ".3f", ".2e", ".2g", ".1%"]),
    st.integers(1, 4),
)
def test_prose_claims_and_tables_round_once(x: float, form: str, digits: int) -> None:
    """1.5949 is 1.59 in a table; were it stored as 1.595, the prose would say 1.60."""
    from myst_nb.core.variables import format_plain_text

    record: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apd_minimal.book.glue.display", lambda data, raw, metadata: record.append(data))
        glue("x", x, digits=digits)
        claim(1, VERDICTS[0], f"It is {{x:{form}}}.", x=x)
    stored = record[0][GLUE_PREFIX + "text/plain"]
    assert format_plain_text(stored, form) == f"{x:{form}}"
    assert record[1]["text/plain"].endswith(f"It is {x:{form}}.")


def test_without_a_format_a_claim_shows_four_digits(shown: list) -> None:
    claim(1, VERDICTS[0], "It is {a}, {b} and {c}.", a=2 / 3, b=1e-5 / 3, c=12)
    assert shown[0]["text/plain"].endswith("It is 0.6667, 3.333e-06 and 12.")


def test_glue_refuses_what_is_no_single_value(shown: list) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        glue("x", torch.zeros(3))
    with pytest.raises(TypeError, match="got a list"):
        glue("x", [1, 2])
    assert not shown


@pytest.mark.parametrize(
    ("value", "arguments", "words"),
    [
        (0.0, {}, "below 1e-12"),
        (torch.tensor(-3e-13, dtype=torch.float64), {}, "below 1e-12"),
        (np.float64(2.4e-12), {}, "2e-12"),
        (-2.46e-7, {"digits": 2}, "-2.5e-07"),
        (2.46e-3, {"floor": 0.1}, "below 0.1"),
        (float("nan"), {}, "nan"),
    ],
)
def test_rounding_is_not_shown(value: Any, arguments: dict[str, Any], words: str) -> None:
    assert floored(value, **arguments) == words


def test_claim_shows_and_stores_the_same(shown: list) -> None:
    claim(7, "holds within limits", "Over {seeds} seeds MMCS is {mmcs:.3f}.", seeds=10, mmcs=torch.tensor(0.99812))
    [output] = shown
    assert output["text/plain"] == "Claim 7: holds within limits. Over 10 seeds MMCS is 0.998."
    assert output[CLAIM]["numbers"] == {"seeds": 10, "mmcs": pytest.approx(0.99812)}
    assert output["text/plain"].endswith(output[CLAIM]["finding"])


@pytest.mark.parametrize(
    ("verdict", "finding", "numbers"),
    [
        ("mostly holds", "It is {a}.", {"a": 1}),
        (VERDICTS[0], "It is small.", {"a": 1}),
        (VERDICTS[0], "It is {b}.", {}),
    ],
)
def test_claim_refuses_loose_talk(shown: list, verdict: str, finding: str, numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="claim 3"):
        claim(3, verdict, finding, **numbers)
    assert not shown


def draw(k: int) -> Figure:
    figure, axes = plt.subplots()
    axes.plot([0, k], [0, 1])
    axes.set_xlim(0, 5)
    return figure


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.mark.parametrize("kind", ["svg", "webp"])
def test_frames(kind: str) -> None:
    open_before = plt.get_fignums()  # other tests of this process may have left some
    html = frames.static(
        draw, [1, 2, 4], label="k < 5", alt=lambda k: f'a line to "{k}"', caption="A line & more", start=1, kind=kind
    ).data
    elements = Elements(html)
    images = elements.all("img")
    assert [image["alt"] for image in images] == ['a line to "1"', 'a line to "2"', 'a line to "4"']
    assert ["display: none" in (image.get("style") or "") for image in images] == [True, False, True]
    assert [range_["value"] for range_ in elements.all("input")] == ["1"]
    assert [range_["data-values"] for range_ in elements.all("input")] == ["1|2|4"]
    pictures = [base64.b64decode(str(image["src"]).split(",")[1]) for image in images]
    assert len(set(pictures)) == 3
    for picture in pictures:
        if kind == "svg":
            assert ElementTree.fromstring(picture).tag.endswith("svg")
        else:
            assert picture[:4] == b"RIFF" and picture[8:12] == b"WEBP"
    assert not re.search(r"https?://(?!www\.w3\.org)", html), "asks for something outside"
    assert " id=" not in html, "an id can clash with another figure's"
    assert plt.get_fignums() == open_before, "figures were left open"


def test_frames_say_what_they_move_to() -> None:
    """By eye (output) and by ear (aria-valuetext): a seed and a step, not an index."""
    html = frames.static(
        draw, [0, 1, 2], label="when", alt=str, caption="c", start=1, shown=lambda i: f"target 10, step {900 * i:,}"
    ).data
    (handle,) = Elements(html).all("input")
    assert handle["data-values"] == "target 10, step 0|target 10, step 900|target 10, step 1,800"
    assert handle["aria-valuetext"] == "target 10, step 900"
    assert ">target 10, step 900</output>" in html
    assert "setAttribute('aria-valuetext', shown)" in str(handle["oninput"])
    with pytest.raises(TypeError, match="shown"):
        frames.static(draw, [1, 2], label="k", alt=str, caption="c", shown="step")  # type: ignore[arg-type]


def test_frames_are_the_same_bytes_each_time() -> None:
    notebook.setup()
    made = [frames.static(draw, [1, 2], label="k", alt=str, caption="a caption").data for _ in range(2)]
    assert made[0] == made[1]


def test_frames_refuse_bad_input() -> None:
    good: dict[str, Any] = {"label": "k", "alt": str, "caption": "c"}
    with pytest.raises(ValueError, match="at least 2"):
        frames.static(draw, [1], **good)
    with pytest.raises(ValueError, match="0 to 1"):
        frames.static(draw, [1, 2], start=2, **good)
    with pytest.raises(ValueError, match="'gif'"):
        frames.static(draw, [1, 2], kind="gif", **good)
    with pytest.raises(ValueError, match="k = 1"):
        frames.static(draw, [1, 2], **{**good, "alt": lambda k: " "})


def test_slider_is_live_with_a_kernel_and_static_while_outputs_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(k: int) -> Figure:
        drawn.append(k)
        return draw(k)

    monkeypatch.setattr(frames, "display", lambda figure: None)
    arguments: dict[str, Any] = {"label": "k", "alt": str, "caption": "c", "shown": "{} of 3".format}
    monkeypatch.setenv(frames.STATIC, "1")
    assert "<img" in frames.slider(counted, [1, 2, 3], **arguments).data
    assert drawn == [1, 2, 3]
    monkeypatch.delenv(frames.STATIC)
    drawn.clear()
    box = frames.slider(counted, [1, 2, 3], **arguments)
    assert drawn == [1]
    assert box.children[0].label == "1 of 3"
    box.children[0].value = 3
    assert drawn == [1, 3]


def test_figures_are_transparent_and_read_on_both_themes() -> None:
    def brightness(colour: Any) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in plt.matplotlib.colors.to_rgb(colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    notebook.setup()
    figure, axes = plt.subplots()
    for patch in (figure.patch, axes.patch):
        assert patch.get_facecolor()[3] == 0
    used = [plt.rcParams["text.color"], plt.rcParams["axes.labelcolor"], plt.rcParams["xtick.color"]]
    used += plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for colour in used:  # contrast of at least 3 : 1, what WCAG asks of graphics, on white and on the dark page
        light = brightness(colour)
        assert 1.05 / (light + 0.05) > 3, f"{colour} is faint on white"
        assert (light + 0.05) / (brightness("#121212") + 0.05) > 3, f"{colour} is faint on the dark page"
    plt.close(figure)


def chapter(**changes: Any) -> nbformat.NotebookNode:
    cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        nbformat.v4.new_code_cell("print('a')\nprint('b')\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);"),
        nbformat.v4.new_code_cell("import os; os.environ['APD_STATIC'], os.environ['OMP_NUM_THREADS']"),
    ]
    return nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {"state": 1}, **changes})


def test_execution_gives_the_same_notebook_twice(tmp_path: Path) -> None:
    path = tmp_path / "x.ipynb"
    nbformat.write(chapter(), path)
    execute.execute(path)
    first = path.read_text()
    execute.execute(path)
    made, again = json.loads(first), json.loads(path.read_text())
    again["metadata"]["measured"] = made["metadata"]["measured"]  # a busy machine may need twice as long
    assert json.dumps(again) == json.dumps(made)
    assert [cell["execution_count"] for cell in made["cells"] if cell["cell_type"] == "code"] == [1, 2, 3]
    assert made["cells"][1]["metadata"]["tags"] == setup_cell.TAGS
    assert "image/svg+xml" in first, "notebook.setup() makes figures SVG"
    assert f"('1', '{execute.THREADS}')" in json.dumps(made["cells"][-1]["outputs"])
    assert "widgets" not in made["metadata"]


def test_a_chapter_whose_outputs_do_not_come_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.ipynb"
    silent = chapter()
    silent.cells[1].source = "get_ipython().kernel._publish_status = lambda *args, **more: None"  # never idle again
    nbformat.write(silent, path)
    before = path.read_bytes()
    monkeypatch.setattr(execute, "OUTPUT_SECONDS", 1)
    with pytest.raises(CellTimeoutError, match="output"):
        execute.execute(path)
    assert path.read_bytes() == before


def test_a_chapter_that_fails_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.ipynb"
    broken = chapter()
    broken.cells[1].source = "raise ValueError('no')"
    nbformat.write(broken, path)
    before = path.read_bytes()
    with pytest.raises(execute.CellExecutionError, match="no"):
        execute.execute(path)
    assert path.read_bytes() == before


def test_stored_time_changes_only_when_it_really_differs() -> None:
    one = execute._measured(40.2, {})
    assert one["seconds"] == 40
    assert execute._measured(49, one) == one
    assert execute._measured(51, one)["seconds"] == 51
    assert execute._measured(41, {**one, "torch": "1.0"})["seconds"] == 41


def test_set_up_cell_names_the_address_once_it_is_known() -> None:
    assert "http" not in setup_cell.source("", "main")
    text = setup_cell.source("https://github.com/someone/book", "main")
    assert '%pip install -q "apd_minimal[book] @ git+https://github.com/someone/book@main"' in text
    assert '"https://raw.githubusercontent.com/someone/book/main/data/"' in text
    configured = yaml.safe_load((setup_cell.ROOT / "_config.yml").read_text())["repository"]
    assert setup_cell.configured() == setup_cell.source(configured["url"], configured["branch"])


def test_stored_claims_finds_the_section() -> None:
    found = {"number": 2, "verdict": "holds", "finding": "Yes.", "numbers": {}}
    cells = [
        nbformat.v4.new_markdown_cell("# T\n\n## The claims it settles\n```python\n# no heading\n```"),
        nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("display_data", {}, metadata={CLAIM: found})]),
    ]
    assert list(results.stored_claims(nbformat.v4.new_notebook(cells=cells))) == [(found, "The claims it settles")]


@pytest.mark.parametrize(
    ("seconds", "words"), [(3, "under 10 s"), (44, "about 40 s"), (100, "about 1.5 minutes"), (245, "about 4 minutes")]
)
def test_times_are_spoken(seconds: float, words: str) -> None:
    assert results.spoken(seconds) == words


GOOD = '<article><div class="cell_output"><img alt="A line that rises." src="{src}"></div></article>'


@pytest.mark.parametrize(
    ("html", "complaint"),
    [
        (GOOD, None),
        (GOOD.replace("A line that rises.", ""), "without alt text"),
        (GOOD.replace("{src}", "gone.svg"), "is missing"),
        (GOOD + "<p>see {numref}</p>", "was not rendered"),
        (GOOD + "<p>$$x$$</p>", "was not rendered"),
        (GOOD + "<pre>Traceback (most recent call last)</pre>", "traceback"),
        ('<img alt="A logo."><div class="cell_output"></div>', "1 figures in the notebook, 0 on its page"),
        (GOOD.replace("cell_output", "x"), "1 cells with output, 0 on its page"),
        (None, "has no page"),
    ],
)
def test_build_check_sees_planted_faults(tmp_path: Path, html: str | None, complaint: str | None) -> None:
    site = tmp_path / "site"
    (site / "chapters").mkdir(parents=True)
    (site / "chapters" / "f.svg").write_text("<svg/>")
    if html:
        (site / "chapters" / "x.html").write_text(html.replace("{src}", "f.svg"))
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", {"image/svg+xml": "<svg/>"})])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
    found = build.problems(site, [tmp_path / "x.ipynb"])
    assert (not found) if complaint is None else any(complaint in line for line in found), found


def test_the_front_picture_is_the_one_of_the_chapter() -> None:
    assert front_picture.PICTURE.read_text() == front_picture.stored(), "run python -m tools.picture"
