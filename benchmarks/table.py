"""Tables of a stored run, in markdown or HTML: python -m benchmarks.table"""

from __future__ import annotations

import html as escaping
import json
from pathlib import Path
from typing import Any

STORED = Path(__file__).parent.parent / "data" / "benchmarks.json"
LETTERS = {"plain": "a", "paper": "b", "ours": "c", "special": "d"}
Row = list[str]


def markdown(header: Row, rows: list[Row]) -> str:
    """Format a table whose first column is left-aligned, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def html(header: Row, rows: list[Row]) -> str:
    """Format the same table in HTML."""
    head = "".join(f'<th scope="col">{escaping.escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escaping.escape(row[0])}</th>'
        + "".join(f"<td>{escaping.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def seconds(value: float) -> str:
    """Format seconds with three significant digits, in ms or s."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def ratio(value: float | None, places: int = 2) -> str:
    """Format two significant digits below ten, whole numbers above; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.{places}g}" if value < 10 else f"{value:.0f}"


def steps(stored: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Tabulate step times: medians, and smallest to largest."""
    header = ["experiment", *(f"({letter})" for letter in LETTERS.values())]
    rows = []
    for case in stored["cases"]:
        cells = [case["name"]]
        for kind in LETTERS:
            found = case["steps"].get(kind)
            spread = found and f"{seconds(found['median'])} ({seconds(found['min'])} to {seconds(found['max'])})"
            cells.append(spread or "–")
        rows.append(cells)
    return header, rows


def against_reference(stored: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Compare (b) with (a), here and where the reference implementation was timed.

    There, a training step draws its batch, and it is unknown whether the embeddings were trained: hence three ratios.
    """
    header = [
        "experiment",
        "(b)",
        "reference",
        "(a)",
        "reference",
        "b / a",
        "batch drawn",
        "and W_E trained",
        "reference",
    ]
    rows = []
    for case in stored["cases"]:
        t = {kind: found["median"] for kind, found in case["steps"].items()}
        plain, paper, drawing, there = t["plain"], t["paper"], case["drawing"], case["reference"]
        rows.append(
            [
                case["name"],
                seconds(paper),
                seconds(there["paper"]),
                seconds(plain),
                seconds(there["plain"]),
                ratio(paper / plain),
                ratio((paper + drawing) / (plain + drawing)),
                ratio((paper + drawing) / (t["loaded"] + drawing) if "loaded" in t else None),
                ratio(there["paper"] / there["plain"]),
            ]
        )
    return header, rows


def ratios(stored: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Compare ours with (b) and (a), with the goals."""
    header = ["experiment", "b / c", "b / d", "goal", "c / a", "d / a", "goal"]
    rows = []
    for case in stored["cases"]:
        t = {kind: found["median"] for kind, found in case["steps"].items()}
        special = t.get("special")
        rows.append(
            [
                case["name"],
                ratio(t["paper"] / t["ours"]),
                ratio(t["paper"] / special if special else None),
                f"≥ {case['goal_b']:.0f}" if case["goal_b"] else "–",
                ratio(t["ours"] / t["plain"]),
                ratio(special / t["plain"] if special else None),
                f"≤ {case['goal_a']:.0f}" if case["goal_a"] else "–",
            ]
        )
    return header, rows


def memory(stored: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Tabulate peak memory beyond the imports."""
    header = ["experiment", *(f"({letter})" for letter in LETTERS.values())]
    rows = []
    for case in stored["cases"]:
        found = case["memory"]
        rows.append([case["name"], *(f"{found[kind]['added']:.0f} MB" if kind in found else "–" for kind in LETTERS)])
    return header, rows


def floors(stored: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Tabulate the floor of every part of a step, and the ratio of measured time to their sum."""
    parts = list(dict.fromkeys(name for case in stored["cases"] for kind in case["floor"].values() for name in kind))
    parts.remove("all")
    header = ["experiment", *parts, "all", "measured", "measured / floor"]
    rows = []
    for case in stored["cases"]:
        for kind, floor in case["floor"].items():
            measured = case["steps"][kind]["median"]
            cells = [seconds(floor[name]) if name in floor else "–" for name in [*parts, "all"]]
            rows.append(
                [f"{case['name']} ({LETTERS[kind]})", *cells, seconds(measured), ratio(measured / floor["all"])]
            )
    return header, rows


def growth(stored: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Tabulate how step times grow."""
    header = ["size", *(f"({letter})" for letter in LETTERS.values()), "b / c", "b / d"]
    rows = []
    for name, curve in stored["growth"].items():
        for point in curve:
            times = [seconds(point[kind]) if kind in point else "–" for kind in LETTERS]
            ours, special = point["paper"] / point["ours"], point["paper"] / point.get("special", float("nan"))
            rows.append([f"{name} = {point['value']:.0f}", *times, ratio(ours), ratio(special)])
    return header, rows


def products(stored: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Tabulate rates of matrix products."""
    header = ["matrix product", "copies × [rows, d] @ [d, e]", "Gflop/s"]
    rows = []
    for found in stored["machine"]["matrix_products"]:
        copies, n, d, e = found["shape"]
        rows.append([found["name"], f"{copies} × [{n}, {d}] @ [{d}, {e}]", f"{found['flops_per_second'] / 1e9:.0f}"])
    return header, rows


def disturbed(stored: dict[str, Any]) -> str:
    """Report the smallest share of a processor that a timing had, and the load before the run."""
    shares = [found["processor_share"] for case in stored["cases"] for found in case["steps"].values()]
    load = stored["load_before"]
    return f"smallest share of a processor in any of the timings: {min(shares):.2f}; load before: {load:.2g}"


def text(stored: dict[str, Any]) -> str:
    """Format all tables of a run, in markdown."""
    m = stored["machine"]
    rates = ", ".join(f"{name} {rate / 1e9:.3g} GB/s" for name, rate in m["bytes_per_second"].items())
    before = stored["cases"][0]["memory"]["plain"]["before"]
    parts = [
        f"{m['processor']}, {m['instructions']}, {m['threads']} thread, torch {m['torch']}, {stored['date']}, "
        f"{stored['seconds']:.0f} s; {disturbed(stored)}",
        "CPU seconds of a step: (a) plain training, (b) the paper's formulation, (c) ours, (d) ours with "
        "the target's own attributions; medians (smallest to largest)",
        markdown(*steps(stored)),
        "(b) against (a), here and for the reference implementation on such a machine",
        markdown(*against_reference(stored)),
        "Ours against both",
        markdown(*ratios(stored)),
        f"Peak memory beyond the {before:.0f} MB of a process that has imported everything and trained a little",
        markdown(*memory(stored)),
        f"Floors, at {stored['flop_rate'] / 1e9:.0f} Gflop/s and {stored['bandwidth'] / 1e9:.3g} GB/s",
        markdown(*floors(stored)),
        *(["Growth", markdown(*growth(stored))] if stored["growth"] else []),
        f"Memory: {rates}",
        markdown(*products(stored)),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(text(json.loads(STORED.read_text())))
