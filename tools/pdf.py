"""Print the whole book as one PDF, and build the pages with a link to it: python -m tools.pdf.

The pages are joined to one, which the Chromium of the browser test prints as it would from its menu.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from theme.printed import PLACE
from tools import build

ROOT = Path(__file__).parent.parent
# Solutions and code that are folded away belong on paper, too.
UNFOLD = """() => {
  document.documentElement.dataset.theme = 'light';
  for (const box of document.querySelectorAll('details')) box.open = true;
  for (const box of document.querySelectorAll('.toggle-hidden')) box.classList.remove('toggle-hidden');
  for (const image of document.images) image.loading = 'eager';
}"""
# Asked for by a timer: a page as long as a book is slow to draw, and there is no need to draw it.
FORMULAS = """() => new Promise(done => {
  const look = () => window.MathJax?.startup?.promise
    ? MathJax.startup.promise.then(() => done()) : setTimeout(look, 200);
  look();
})"""
FOOT = (
    '<div style="width: 100%; font-size: 8px; text-align: center; color: #555"><span class="pageNumber"></span></div>'
)


def pages() -> list[str]:
    """List the pages in the order of the table of contents.

    Returns:
        list[str]: names without suffix, such as "intro" and "chapters/01_five_minutes".
    """
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [contents["root"], *(page["file"] for part in contents["parts"] for page in part["chapters"])]


def joined(site: Path, names: list[str]) -> str:
    """Join built pages to one, whose links between them stay inside.

    Args:
        site: folder of the built HTML.
        names: as `pages` gives them.

    Returns:
        str: HTML that may be stored beside the chapters.
    """
    articles, heads = [], []
    for name in names:
        html = (site / f"{name}.html").read_text()
        heads.append(html[: html.index("</head>")])
        start, end = html.index('<article class="bd-article">'), html.rindex("</article>")
        own = name.replace("/", "-")

        def link(match: re.Match[str], name: str = name, own: str = own) -> str:
            parts = urlsplit(match[2])
            if parts.scheme or parts.path.startswith("/"):
                return match[0]
            target = os.path.normpath(os.path.join(os.path.dirname(name), parts.path)) if parts.path else f"{name}.html"
            if match[1] == "src" or target.removesuffix(".html") not in names:
                return f'{match[1]}="../{target}"'
            page = target.removesuffix(".html").replace("/", "-")
            return f'href="#{page}--{parts.fragment}"' if parts.fragment else f'href="#{page}"'

        article = re.sub(r'\b(href|src)="([^"]+)"', link, html[start:end])
        article = re.sub(r'(<[a-z][^>]*\sid=")([^"]+)"', rf'\1{own}--\2"', article)
        articles.append(article.replace("<article ", f'<article id="{own}" ', 1) + "</article>")
    # Of a page beside the chapters, since its paths are the right ones, and of one with formulas.
    beside = [head for name, head in zip(names, heads, strict=True) if "/" in name] or heads
    head = next((head for head in beside if "mathjax" in head), beside[-1])
    body = f'<body><main class="bd-main bd-content"><div class="bd-article-container">{"".join(articles)}</div></main>'
    return f"{head}</head>{body}</body></html>"


def write(page: Path, target: Path, chromium: str) -> None:
    """Print a page.

    Args:
        page: an HTML file.
        target: the PDF; its folder is made if missing.
        chromium: path of the browser.
    """
    from playwright.sync_api import sync_playwright

    target.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(color_scheme="light")
        shown.set_default_timeout(0)  # a whole book takes minutes
        shown.goto(page.as_uri(), wait_until="load")
        if shown.locator(".math").count():
            shown.evaluate(FORMULAS)
        shown.evaluate(UNFOLD)
        shown.evaluate("() => Promise.all([...document.images].map(image => image.decode().catch(() => {})))")
        shown.pdf(
            path=target,
            format="A4",
            margin={"top": "18mm", "bottom": "18mm", "left": "18mm", "right": "18mm"},
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOT,
            print_background=True,
            outline=True,
            tagged=True,
        )
        browser.close()


def main() -> int:
    """Print the book, then build its pages.

    Returns:
        int: 0 if there is no problem.

    Raises:
        subprocess.CalledProcessError: if the pages cannot be built.
    """
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        print("There is no chromium on this machine: apt-get install chromium, or set CHROMIUM to one.")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        site = build.build(Path(folder)).parent
        page = site / "chapters" / "all.html"
        page.write_text(joined(site, pages()))
        write(page, ROOT / PLACE, chromium)
    print(f"Print the book:             {(ROOT / PLACE).as_uri()}")
    sys.argv[1:] = []
    return build.main()


if __name__ == "__main__":
    sys.exit(main())
