"""Tools of the book, each with one job; run them as `python -m tools.NAME`."""
