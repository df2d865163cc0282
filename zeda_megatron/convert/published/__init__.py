"""Folders as they are published: quantised, with merged experts, under other names."""

from .reader import PublishedReader

__all__ = ["PublishedReader"]
