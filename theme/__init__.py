"""Style sheet, offline assets and Sphinx extensions of the book."""
