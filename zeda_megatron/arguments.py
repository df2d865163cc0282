"""Flags and YAML keys, generated from dataclasses: one field, one flag, one key; the command line wins."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
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


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice; the second would win silently."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} stands here twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


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
    parser = _Parser(prog=prog, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with the same names; flags win")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    fields: dict[str, _Field] = {}
    for title, cls in groups.items():
        section = parser.add_argument_group(title)
        hints, docs = typing.get_type_hints(cls), field_docs(cls)
        for field in dataclasses.fields(cls):
            if field.name in fields:
                raise ValueError(f"field {field.name} stands in two groups")
            kind, optional = _plain_type(hints[field.name])
            fields[field.name] = _Field(title, kind, optional)
            default = (defaults or {}).get(field.name, field.default)
            text = docs.get(field.name, "") + ("" if default is None else f" (default: {default})")
            _add_flag(section, field.name, kind, text)
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}" + _suggestion(unknown[0], fields) + " (see --help)")
    given = {k: v for k, v in vars(known).items() if v is not None}
    config = given.pop("config", None)
    given.pop("debug", None)
    values = {**(defaults or {}), **(_read_yaml(config, fields) if config else {}), **given}
    made = {}
    for title, cls in groups.items():
        mine = {name: value for name, value in values.items() if fields[name].title == title}
        made[title] = cls(**mine)
    return made


@dataclasses.dataclass(frozen=True)
class _Field:
    title: str
    """Group it belongs to."""
    kind: type
    """Type of its value."""
    optional: bool
    """May be None."""


def _suggestion(word: str, fields: dict[str, _Field]) -> str:
    near = difflib.get_close_matches(word.split("=")[0].strip("-").replace("-", "_"), fields, n=1)
    return f"; did you mean --{near[0].replace('_', '-')}?" if word.startswith("-") and near else ""


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


def _plain_type(hint) -> tuple[type, bool]:
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return (list if typing.get_origin(hint) in (list, tuple) else hint), optional


def _read_yaml(file: str, fields: dict[str, _Field]) -> dict[str, Any]:
    path = Path(file)
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys) or {}
    except FileNotFoundError:
        raise UserError(f"--config {file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: cannot be read ({error})") from None
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
        if name in values:
            raise UserError(f"{file}: key {key!r} is given twice")
        if value is None and not fields[name].optional:
            raise UserError(f"{file}: key {key!r} has no value")
        values[name] = _convert(file, key, value, fields[name].kind)
    return values


def _convert(file: str, key: str, value: Any, kind: type) -> Any:
    if kind is list and value is not None:
        return [_convert(file, key, item, str) for item in (value if isinstance(value, list) else [value])]
    if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    try:
        if kind is float and not isinstance(value, bool):
            return float(value)  # YAML reads 1e-5 as text
        if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{file}: key {key!r} wants {kind.__name__}, got {value!r}")


@functools.cache
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
