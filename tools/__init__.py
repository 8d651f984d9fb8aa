"""Tools of the book, one task each; run them as `python -m tools.NAME`."""
