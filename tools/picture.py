"""Copy the picture of the README and the front page out of chapter 7: python -m tools.picture."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHAPTER, NAME = ROOT / "chapters" / "07_tms.ipynb", "tms-diagonal"
PICTURE = ROOT / "theme" / "static" / "decomposition.svg"


def stored() -> str:
    """Read the figure from the chapter's stored outputs.

    Returns:
        str: SVG.
    """
    for cell in json.loads(CHAPTER.read_text())["cells"]:
        if cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") == NAME:
            for output in cell["outputs"]:
                if "image/svg+xml" in output.get("data", {}):
                    return "".join(output["data"]["image/svg+xml"])
    raise LookupError(f"{CHAPTER.name} shows no figure {NAME}")


if __name__ == "__main__":
    PICTURE.write_text(stored())
    print(PICTURE)
