"""Faster ways to the same numbers (chapter 13)."""
