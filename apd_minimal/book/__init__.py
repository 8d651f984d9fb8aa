"""What only the book needs: numbers in its text, interactive figures, notebooks, stored artefacts."""
