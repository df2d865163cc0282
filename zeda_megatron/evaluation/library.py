"""Libraries that the package itself does not require: the extra `evaluation` brings them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ..errors import UserError


def library(module: str) -> ModuleType:
    """The module. Raises `UserError` that says what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module.partition('.')[0]} cannot be imported ({error}): pip install -e '.[evaluation]'"
        ) from error
