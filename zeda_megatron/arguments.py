"""Flags and YAML keys, generated from dataclasses: one field, one flag, one key; the command line wins."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def parse(
    argv: Sequence[str],
    groups: dict[str, type],
    defaults: dict[str, Any] | None = None,
    prog: str | None = None,
) -> dict[str, Any]:
    """Read `--config FILE.yaml` and flags into one frozen dataclass per group.

    Args:
        argv: the command line without the program's name.
        groups: title -> dataclass. Field names must be unique over all groups; `num_layers` becomes the flag
            `--num-layers` and the YAML key `num_layers` (dashes are taken too). Booleans get `--x` and `--no-x`.
        defaults: values that replace a field's default.

    Returns:
        title -> instance. Raises `UserError` for unknown flags, unknown YAML keys and values of the wrong type.
    """
    parser = _Parser(prog=prog, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with the same names; flags win")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    fields: dict[str, tuple[str, type, Any]] = {}
    for title, cls in groups.items():
        section = parser.add_argument_group(title)
        hints, docs = typing.get_type_hints(cls), field_docs(cls)
        for field in dataclasses.fields(cls):
            if field.name in fields:
                raise ValueError(f"field {field.name} stands in two groups")
            kind = _plain_type(hints[field.name])
            fields[field.name] = (title, kind, None)
            _add_flag(section, field.name, kind, docs.get(field.name, ""))
    given = {k: v for k, v in vars(parser.parse_args(list(argv))).items() if v is not None}
    config = given.pop("config", None)
    given.pop("debug", None)
    values = {**(defaults or {}), **(_read_yaml(config, fields) if config else {}), **given}
    made = {}
    for title, cls in groups.items():
        mine = {name: value for name, value in values.items() if fields[name][0] == title}
        made[title] = cls(**mine)
    return made


def _add_flag(section, name: str, kind: type, text: str) -> None:
    flag = "--" + name.replace("_", "-")
    text = text.replace("%", "%%")
    if kind is bool:
        section.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif kind is list:
        section.add_argument(flag, dest=name, nargs="+", default=None, help=text)
    else:
        section.add_argument(
            flag, dest=name, type=kind, default=None, help=text, metavar=kind.__name__.upper()
        )


def _plain_type(hint) -> type:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return list if typing.get_origin(hint) in (list, tuple) else hint


def _read_yaml(file: str, fields: dict) -> dict[str, Any]:
    path = Path(file)
    try:
        loaded = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise UserError(f"--config {file}: no such file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: expected `name: value` lines")
    values = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise UserError(f"{file}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        values[name] = _convert(file, key, value, fields[name][1])
    return values


def _convert(file: str, key: str, value: Any, kind: type) -> Any:
    if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    try:
        if kind is float and not isinstance(value, bool):
            return float(value)  # YAML reads 1e-5 as text
        if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if kind is list:
            return [value]
    except (TypeError, ValueError):
        pass
    raise UserError(f"{file}: key {key!r} wants {kind.__name__}, got {value!r}")


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, for help texts."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    docs = {}
    for here, after in zip(body, body[1:]):
        if (
            isinstance(here, ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            docs[here.target.id] = " ".join(str(after.value.value).split())
    return docs
