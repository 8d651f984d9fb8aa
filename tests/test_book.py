"""The built book, as a reader meets it: every page in a headless browser, from a file and from a server, offline."""

from __future__ import annotations

import ast
import functools
import html as html_module
import importlib.util
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from test_docs import PUBLIC, is_called

from tools import build, pdf

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium, or set CHROMIUM): pages not opened"
)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book, built with warnings as errors."""
    try:
        return build.build(tmp_path_factory.mktemp("book")).parent
    except subprocess.CalledProcessError:
        pytest.fail("the book was not built: see the warnings", pytrace=False)


@pytest.fixture(scope="session")
def server(site: Path) -> Iterator[str]:
    """The same pages from a server on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}"
    http.shutdown()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def pages(site: Path) -> list[str]:
    return sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if "_static" not in path.parts)


def opened(chromium: Any, address: str, width: int, scheme: str) -> tuple[Any, list[str]]:
    """A page once its formulas are set, and what went wrong while it loaded."""
    wrong: list[str] = []
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)

    def ask(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:")):
            wrong.append(f"asks for {request.url}")

    page.on("request", ask)
    page.on("requestfailed", lambda request: wrong.append(f"did not get {request.url}"))
    page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
    page.on("console", lambda m: wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.goto(address, wait_until="load")
    if page.locator(".math").count():
        page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
        page.evaluate("() => MathJax.startup.promise.then(() => true)")
    page.evaluate("() => document.fonts.ready.then(() => true)")
    return page, wrong


AXE = importlib.util.find_spec("axe_playwright_python")  # axe-core is a file in it
# Formulas and code are left out, of which every page has thousands of pieces of the same few kinds.
ACCESSIBLE = """async () => {
  const options = {resultTypes: ['violations'], preload: false};
  const all = await axe.run({exclude: [['mjx-container'], ['.highlight']]}, options);
  const code = await axe.run(document, {...options, runOnly: ['scrollable-region-focusable']});
  return [...all.violations, ...code.violations].filter(found => ['serious', 'critical'].includes(found.impact))
    .flatMap(found => found.nodes.map(node => found.id + ': ' + node.html.slice(0, 120)));
}"""


def barriers(page: Any) -> list[str]:
    """What axe-core takes for a serious barrier to readers with a screen reader, a keyboard or weak eyes."""
    if AXE is None or AXE.origin is None:
        return []
    page.evaluate(Path(AXE.origin).with_name("axe.min.js").read_text())
    return page.evaluate(ACCESSIBLE)


LOOK = """() => {
  const seen = [];
  for (const image of document.querySelectorAll('.bd-article img:not(.toggler)')) {
    if (!image.complete || !image.naturalWidth) seen.push('a figure does not show: ' + image.src.slice(0, 80));
    else if (image.checkVisibility() && image.getBoundingClientRect().width < 60) seen.push('a figure is tiny');
  }
  for (const formula of document.querySelectorAll('.math'))
    if (!formula.querySelector('mjx-container')) seen.push('not rendered: ' + formula.textContent.slice(0, 60));
  for (const broken of document.querySelectorAll('mjx-merror, [data-mjx-error]'))
    seen.push('a formula with an error: ' + broken.textContent.slice(0, 60));
  const width = document.documentElement.scrollWidth;
  if (width > window.innerWidth) seen.push('wider than the window: ' + width);
  for (const box of document.querySelectorAll('div.cell_output img, div.cell_output .text_html')) {
    const background = getComputedStyle(box).backgroundColor;
    const pale = (background.match(/[\\d.]+/g) || []).map(Number);
    if (document.documentElement.dataset.theme == 'dark' && pale[3] !== 0 && pale[0] > 128)
      seen.push('a pale slab in the dark: ' + background);
  }
  return seen;
}"""


def test_everything_in_the_notebooks_is_on_the_pages(site: Path) -> None:
    assert build.problems(site, CHAPTERS) == []


def test_no_broken_link_inside_the_book(site: Path) -> None:
    anchors = {name: set(re.findall(r'\sid="([^"]+)"', (site / name).read_text())) for name in pages(site)}
    broken = []
    for name in anchors:
        for link in re.findall(r'<a [^>]*href="([^"]+)"', (site / name).read_text()):
            parts = urlsplit(link.replace("&amp;", "&"))
            if parts.scheme or link in ("#", ""):
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path))) if parts.path else name
            if not (site / target).exists():
                broken.append(f"{name} → {link}")
            elif parts.fragment and target in anchors and unquote(parts.fragment) not in anchors[target]:
                broken.append(f"{name} → {link} (no such place)")
    assert not broken


def test_no_button_that_leads_nowhere(site: Path) -> None:
    """A launch button stands on the pages if and only if there is an address for it to lead to."""
    import yaml

    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    for chapter in CHAPTERS:
        html = (site / "chapters" / f"{chapter.stem}.html").read_text()
        assert ("colab.research.google.com" in html) == bool(address)
        assert 'href=""' not in html


def test_the_ledger_says_what_the_notebooks_say(site: Path) -> None:
    """Read anew from the notebooks' printed lines, not through the extension that made the page."""
    html = (site / "chapters" / "claims.html").read_text()
    rows = [re.sub(r"<[^>]+>", " ", row) for row in re.findall(r"(?s)<tr.*?</tr>", html)]
    rows = [re.sub(r"\s+", " ", row).strip() for row in rows]
    import json

    printed = []
    for chapter in CHAPTERS:
        for cell in json.loads(chapter.read_text())["cells"]:
            for output in cell.get("outputs", []):
                line = "".join(output.get("data", {}).get("text/plain", ""))
                printed += re.findall(r"^Claim (\d+): ([a-z ]+)\. (.*)", line)

    def letters(text: str) -> str:
        return re.sub(r"[^A-Za-z0-9]", "", html_module.unescape(text))

    for number, verdict, finding in printed:
        found = [row for row in rows if row.startswith(f"{number} ") and f" {verdict} " in row]  # one for each chapter
        assert any(letters(finding) in letters(row) for row in found), f"claim {number} is cut: {found}"
    settled = {number for number, _, _ in printed}
    for row in rows[1:]:
        assert ("not settled yet" in row) == (row.split()[0] not in settled)


def test_the_api_page_has_every_public_name(site: Path) -> None:
    """With its arguments; and each of them once, by the shortest name."""
    html = (site / "chapters" / "api.html").read_text()
    described = re.findall(r'(?s)<dt class="sig[^>]*\sid="(apd_minimal[\w.]*)">(.*?)</dt>', html)
    signatures = {name: html_module.unescape(re.sub(r"<[^>]+>", "", text)) for name, text in described}
    shown = {}  # by module and name, whether the page says apd_minimal.targets.TMS or apd_minimal.targets.tms.TMS
    for name, text in signatures.items():
        for package in ("attributions", "targets"):
            if (end := name.removeprefix(f"apd_minimal.{package}.")) != name:
                shown[f"{package}: {end.split('.', 1)[-1] if end.split('.')[0].islower() and '.' in end else end}"] = (
                    text
                )
        shown[name] = text
    missing, bare = [], []
    for name, one in PUBLIC.items():
        _, first, *rest = name.split(".")
        key = f"{first}: {'.'.join(rest[1:])}" if first in ("attributions", "targets") else name
        if key not in shown:
            missing.append(name)
        elif isinstance(one, ast.FunctionDef) and not is_called(one, "property"):
            arguments = [a.arg for a in (*one.args.posonlyargs, *one.args.args, *one.args.kwonlyargs)]
            bare += [f"{name}: {a}" for a in arguments if a not in ("self", "cls") and a not in shown[key]]
    assert not missing
    assert not bare


def test_every_id_stands_once_on_its_page_and_every_heading_has_words(site: Path) -> None:
    for name in pages(site):
        html = (site / name).read_text()
        ids = re.findall(r'<[a-z][^>]*\sid="([^"]+)"', html)
        assert not {one for one in ids if ids.count(one) > 1}, name
        headings = [re.sub(r"<[^>]+>", "", text) for text in re.findall(r"(?s)<h[1-6][^>]*>(.*?)</h[1-6]>", html)]
        assert all(text.strip() for text in headings), name
        for form in re.findall(r"(?s)<form.*?</form>", html):
            assert re.search(r'<button[^>]*type="submit"[^>]*>\s*\w', form), f"{name}: a form without a button"


@needs_browser
@pytest.mark.parametrize(("way", "width", "scheme"), [("file", 1280, "light"), ("http", 390, "dark")])
def test_every_page_reads_offline(chromium: Any, site: Path, server: str, way: str, width: int, scheme: str) -> None:
    wrong = {}
    for name in pages(site):
        if name == "index.html":
            continue  # it only sends on: the next test
        page, seen = opened(chromium, (site / name).as_uri() if way == "file" else f"{server}/{name}", width, scheme)
        seen += page.evaluate(LOOK) + barriers(page)
        page.close()
        if seen:
            wrong[name] = sorted(set(seen))
    assert not wrong


@needs_browser
@pytest.mark.skipif(AXE is None, reason="axe-playwright-python is not installed: pages not checked for accessibility")
def test_axe_sees_a_barrier(chromium: Any) -> None:
    page = chromium.new_page()
    page.set_content(
        "<!doctype html><html lang=en><title>T</title><main><h1>T</h1><p style='color: #ccc'>Some words</p>"
        "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='></main>"
    )
    assert {found.split(":")[0] for found in barriers(page)} == {"image-alt", "color-contrast"}
    page.close()


def test_joined_for_print_every_link_inside_leads_somewhere(site: Path) -> None:
    names = pdf.pages()
    html = pdf.joined(site, names)
    ids = re.findall(r'<[a-z][^>]*\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 1000
    links = re.findall(r'<a [^>]*href="#([^"]+)"', html)
    assert len(links) > 300
    assert not [link for link in links if unquote(html_module.unescape(link)) not in ids]
    sources = {src for src in re.findall(r'<img [^>]*src="([^"]+)"', html) if not src.startswith("data:")}
    assert not [src for src in sources if not (site / "chapters" / unquote(src)).exists()]
    assert "mathjax" in html.partition("</head>")[0], "the last page has no formulas, and others have"
    assert all(f'<article id="{name.replace("/", "-")}"' in html for name in names)


@needs_browser
def test_a_page_is_printed(site: Path, tmp_path: Path) -> None:
    page = site / "chapters" / "one.html"
    page.write_text(pdf.joined(site, ["intro"]))
    with ThreadPoolExecutor(1) as other:  # Playwright allows one browser of this kind in a thread
        other.submit(pdf.write, page, tmp_path / "new" / "one.pdf", str(CHROMIUM)).result()
    page.unlink()
    assert (tmp_path / "new" / "one.pdf").read_bytes().startswith(b"%PDF")


@needs_browser
def test_the_ledger_is_cards_on_a_phone(chromium: Any, site: Path) -> None:
    """Nothing beside another thing, and each part of a card says what it is."""
    page, _ = opened(chromium, (site / "chapters" / "claims.html").as_uri(), 390, "light")
    cells = page.evaluate("""() => [...document.querySelectorAll('.book-claims tbody tr')].slice(0, 5).map(
      row => [...row.cells].map(cell => [cell.getBoundingClientRect().left, cell.getBoundingClientRect().width,
        getComputedStyle(cell.querySelector('p') || cell, '::before').content]))""")
    page.close()
    assert len(cells) == 5
    for row in cells:
        assert len({left for left, _, _ in row}) == 1 and all(width > 250 for _, width, _ in row)
        assert [words.strip('"').strip() for _, _, words in row] == ["Claim", "none", "Verdict:", "Found:"]


@needs_browser
def test_the_first_page_sends_on_to_the_introduction(chromium: Any, site: Path) -> None:
    page = chromium.new_page()
    page.goto((site / "index.html").as_uri())
    page.wait_for_url("**/intro.html")
    assert "step by step" in page.title()
    page.close()


@needs_browser
def test_figures_move(chromium: Any, site: Path) -> None:
    """Every slider: each position shows one picture, another one each time, with other words; play reaches the end."""
    moved = 0
    for chapter in CHAPTERS:
        page, _ = opened(chromium, (site / "chapters" / f"{chapter.stem}.html").as_uri(), 1280, "light")
        # Some stand in a solution that is folded away.
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        for box in page.locator(".apd-frames").all():
            handle, shown = box.locator("input[type=range]"), []
            last = int(handle.get_attribute("max"))
            for position in range(last + 1):
                handle.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", position)
                frames = box.evaluate(
                    "e => [...e.querySelectorAll('img')].filter(i => !i.style.display).map(i => [i.src, i.alt])"
                )
                assert len(frames) == 1
                shown.append((*frames[0], box.locator("output").text_content()))
            assert len({src for src, _, _ in shown}) == last + 1, f"{chapter.name}: the picture does not change"
            assert len({label for _, _, label in shown}) == last + 1
            handle.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", last - 1)
            box.locator("button").evaluate("e => e.click()")
            page.wait_for_function("e => e.value == e.max", arg=handle.element_handle(), timeout=30_000)
            moved += 1
        page.close()
    assert moved >= 1
