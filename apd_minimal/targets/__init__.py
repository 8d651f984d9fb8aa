"""The networks that the book takes apart, with their true mechanisms (chapter 2)."""

from .tms import TMS

__all__ = ["TMS"]
