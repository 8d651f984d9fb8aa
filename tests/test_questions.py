"""The exam questions that readers of the built pages are asked: complete, and on chapters that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "tests" / "questions").glob("*.yml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_questions_have_answers(path: Path) -> None:
    chapters = {chapter.stem for chapter in (ROOT / "chapters").iterdir()}
    questions = yaml.safe_load(path.read_text())
    assert len(questions) >= 10
    for entry in questions:
        assert set(entry) == {"question", "answer", "chapter"}
        assert all(isinstance(text, str) and text.strip() for text in entry.values())
        assert entry["chapter"] in chapters
    assert len({entry["question"] for entry in questions}) == len(questions)
