"""Sphinx extension: pages that load nothing from outside.

MathJax comes from PyPI's sphinx-mathjax-offline, reduced to the tenth of it that the pages use. Notebooks carry no
widget state (figures that move are pre-rendered frames), so require.js and the ipywidgets scripts are not needed.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

FONTS = "output/chtml/fonts/woff-v2"
# The theme's icon script would otherwise replace parts of notebook outputs while they are in use.
ICONS = "var FontAwesomeConfig = {observeMutations: false};"


def _configure(app: Sphinx, config: Config) -> None:
    # Jupyter Book always loads sphinx-thebe (code that runs in the page, from a CDN): the book does not use it.
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)
    app.registry.css_files[:] = [file for file in app.registry.css_files if file[0] != "sphinx-thebe.css"]
    config.mathjax_path = "mathjax/tex-chtml.js"
    config.nb_ipywidgets_js = {}
    address = config.html_theme_options.get("repository_url", "")
    launch = {"colab_url": "https://colab.research.google.com"} if address else {}
    config.html_theme_options["launch_buttons"] = {"notebook_interface": "jupyterlab", **launch}


def _copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    # The distribution's folder has hyphens, so that it cannot be imported: locate its files.
    files = importlib.metadata.distribution("sphinx-mathjax-offline")
    source = Path(str(files.locate_file("sphinx-mathjax-offline/static/mathjax")))
    target = Path(app.outdir) / "_static" / "mathjax"
    (target / FONTS).mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "tex-chtml.js", target)
    for font in (source / FONTS).glob("*.woff"):
        shutil.copy(font, target / FONTS)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension.

    Args:
        app: the Sphinx application.

    Returns:
        dict[str, bool]: what Sphinx asks of an extension.
    """
    app.connect("config-inited", _configure, priority=900)
    app.connect("build-finished", _copy_mathjax)
    app.add_js_file(None, body=ICONS, priority=1)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
