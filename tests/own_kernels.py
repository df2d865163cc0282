"""The distribution in kernels/ as if it were installed: importable, and found by its entry point."""

from __future__ import annotations

import configparser
import sys
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path

HERE = Path(__file__).resolve().parents[1] / "kernels"


class _Checkout(Distribution):
    """The metadata that pip would write, of setup.cfg."""

    def read_text(self, filename: str) -> str | None:
        setup = configparser.ConfigParser()
        setup.read(HERE / "setup.cfg")
        about, points = setup["metadata"], setup["options.entry_points"]
        return {
            "METADATA": f"Name: {about['name']}\nVersion: {about['version']}\n",
            "entry_points.txt": "\n".join(f"[{group}]{points[group]}" for group in points),
        }.get(filename)

    def locate_file(self, path) -> Path:
        return HERE / path


class _Finder(DistributionFinder):
    def find_distributions(self, context=DistributionFinder.Context()):  # noqa: B008
        return [_Checkout()] if context.name in (None, "zeda_kernels") else []


def install() -> None:
    """In this process."""
    sys.path.append(str(HERE))
    sys.meta_path.append(_Finder())
