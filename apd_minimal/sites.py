"""Moved into `rules`."""

from .rules import Site, Use, busy, find_sites, lookup

__all__ = ["Site", "Use", "busy", "find_sites", "lookup"]
