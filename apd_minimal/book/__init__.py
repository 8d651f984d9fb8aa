"""What only the book needs: numbers in its text, figures that move, notebooks, stored artefacts."""
