"""Interactive figures: pre-rendered frames without a kernel, live widgets with one."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import HTML, display
from matplotlib.figure import Figure

from .. import checks

STATIC = "APD_STATIC"  # set in the environment while the book is executed: its outputs must not contain live widgets

# The handlers are inline: no ids that could clash, nothing to load, and they work wherever the output's HTML is
# shown, including pages opened from a file.
SHOW = """\
const box = this.closest('.apd-frames');
box.querySelectorAll('img').forEach((img, i) => img.style.display = i == this.value ? '' : 'none');
const shown = this.dataset.values.split('|')[this.value];
box.querySelector('output').value = shown;
this.setAttribute('aria-valuetext', shown);
"""
PLAY = """\
const box = this.closest('.apd-frames'), range = box.querySelector('input');
const stop = () => { clearInterval(box.timer); box.timer = null; this.textContent = '▶ play'; };
if (box.timer) { stop(); return; }
if (range.value == range.max) range.value = -1;
this.textContent = '❚❚ stop';
box.timer = setInterval(() => {
  range.value = +range.value + 1;
  range.dispatchEvent(new Event('input'));
  if (range.value == range.max || !box.isConnected) stop();
}, 350);
"""


def _data_uri(figure: Figure, kind: str) -> str:
    """Encode the figure as a data URI, the same bytes each time, and close it."""
    file = io.BytesIO()
    if kind == "svg":
        figure.savefig(file, format="svg", metadata={"Date": None})
    else:
        figure.savefig(file, format="webp", dpi=160)
    plt.close(figure)
    mime = "image/svg+xml" if kind == "svg" else "image/webp"
    return f"data:{mime};base64," + base64.b64encode(file.getvalue()).decode()


def _check(draw: Any, values: Any, label: Any, shown: Any) -> None:
    if not callable(draw):
        raise TypeError(f"draw must be a function from a value to a figure, got {checks.given(draw)}")
    if not callable(shown):
        raise TypeError(f"shown must be a function from a value to text, got {checks.given(shown)}")
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TypeError(f"values must be a list with at least one value, got {checks.given(values)}")
    checks.kind("label", label, str, "text")


def static(
    draw: Callable[[Any], Figure],
    values: Sequence[Any],
    *,
    label: str,
    alt: Callable[[Any], str],
    caption: str,
    start: int = 0,
    kind: str = "svg",
    shown: Callable[[Any], str] = str,
) -> HTML:
    """Render one frame for each value, and a slider with a play button to move through them. Needs no kernel.

    Args:
        draw: makes the figure for one value. All frames should have one size, so that nothing jumps.
        values: what the slider moves through, at least 2.
        label: the slider's name.
        alt: what a frame shows, in words, for one value.
        caption: what the figure as a whole shows.
        start: index of the frame shown first.
        kind: "svg", or "webp" for dense scatter.
        shown: the words beside the slider, for one value: what a reader moves to, such as "step 1,800". An index
            alone says nothing.

    Returns:
        HTML: the frames and their control.

    Raises:
        ValueError: if there are fewer than 2 values, ``start`` is out of range, ``kind`` is unknown, or an alt text
            is empty.
    """
    _check(draw, values, label, shown)
    checks.kind("caption", caption, str, "text")
    if not callable(alt):
        raise TypeError(f"alt must be a function from a value to text, got {checks.given(alt)}")
    start = checks.number("start", start, whole=True)
    if len(values) < 2:
        raise ValueError(f"values: a slider needs at least 2 values, got {len(values)}")
    if not 0 <= start < len(values):
        raise ValueError(f"start must be an index of the values, got {start}; expected 0 to {len(values) - 1}")
    checks.choice("kind", kind, ("svg", "webp"))
    images = []
    for i, value in enumerate(values):
        if not (described := alt(value).strip()):
            raise ValueError(f"no alt text for the frame at {label} = {value}")
        hidden = "" if i == start else ' style="display: none"'
        images.append(
            f'<img class="dark-light" src="{_data_uri(draw(value), kind)}" alt="{escape(described)}"{hidden}>'
        )
    words = [shown(value).replace("|", "/") for value in values]
    return HTML(
        '<figure class="apd-frames">\n' + "\n".join(images) + "\n"
        '<div class="apd-frames-control" style="display: flex; gap: 0.8em; align-items: center; max-width: 32em">'
        f'<button type="button" onclick="{escape(PLAY)}">▶ play</button>'
        f'<label style="display: flex; flex: 1; gap: 0.6em; min-width: 0">{escape(label)} '
        f'<input type="range" style="flex: 1; min-width: 0" min="0" max="{len(values) - 1}" value="{start}" '
        f'autocomplete="off" aria-valuetext="{escape(words[start])}" data-values="{escape("|".join(words))}" '
        f'oninput="{escape(SHOW)}"></label>'
        f'<output style="min-width: 3.5em">{escape(words[start])}</output></div>\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def live(
    draw: Callable[[Any], Figure],
    values: Sequence[Any],
    *,
    label: str,
    start: int = 0,
    shown: Callable[[Any], str] = str,
) -> Any:
    """Show the same figure with an ipywidgets slider: every move calls ``draw`` again. Needs a running kernel.

    Args:
        draw: makes the figure for one value.
        values: what the slider moves through.
        label: the slider's name.
        start: index of the value shown first.
        shown: the words beside the slider, for one value.

    Returns:
        ipywidgets.VBox: the slider above its figure.
    """
    _check(draw, values, label, shown)
    start = checks.number("start", start, 0, len(values) - 1, whole=True)
    import ipywidgets

    def redraw(value: Any) -> None:
        figure = draw(value)
        display(figure)
        plt.close(figure)

    control = ipywidgets.SelectionSlider(
        options=[(shown(value), value) for value in values],
        index=start,
        description=label,
        continuous_update=False,
        style={"description_width": "initial"},
    )
    return ipywidgets.VBox([control, ipywidgets.interactive_output(redraw, {"value": control})])


def slider(
    draw: Callable[[Any], Figure],
    values: Sequence[Any],
    *,
    label: str,
    alt: Callable[[Any], str],
    caption: str,
    start: int = 0,
    kind: str = "svg",
    shown: Callable[[Any], str] = str,
) -> Any:
    """Show an interactive figure: :func:`live` in JupyterLab or Colab, :func:`static` in the stored outputs.

    Args:
        draw: makes the figure for one value.
        values: what the slider moves through, at least 2.
        label: the slider's name.
        alt: what a frame shows, in words, for one value.
        caption: what the figure as a whole shows.
        start: index of the frame shown first.
        kind: "svg", or "webp" for dense scatter.
        shown: the words beside the slider, for one value: what a reader moves to, such as "step 1,800". An index
            alone says nothing.

    Returns:
        HTML: the frames; in a live kernel a widget instead.
    """
    if os.environ.get(STATIC):
        return static(draw, values, label=label, alt=alt, caption=caption, start=start, kind=kind, shown=shown)
    return live(draw, values, label=label, start=start, shown=shown)
