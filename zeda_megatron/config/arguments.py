"""Flags and YAML keys, generated from dataclasses: one field, one flag, one key; the command line wins."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml

from ..errors import UserError, shown

MAX_YAML_BYTES = 1 << 18
"""Longest file of settings that is read."""
MAX_INT = 1 << 62
"""Whole numbers are smaller: seeds and counts are counted on from, in 64 bits."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them stand for more values than fit into any memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}: write the value itself", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


def parse(
    argv: Sequence[str],
    groups: dict[str, type],
    defaults: dict[str, Any] | None = None,
    prog: str | None = None,
    habits: dict[str, Habit] | None = None,
) -> dict[str, Any]:
    """Read `--config FILE.yaml` and flags into one frozen dataclass per group.

    Args:
        argv: the command line without the program's name.
        groups: title -> dataclass. Field names must be unique over all groups; `num_layers` becomes the flag
            `--num-layers` and the YAML key `num_layers` (dashes are taken too). Booleans get `--x` and `--no-x`. A
            type `Annotated[list[str], "LOW HIGH"]` says how the help shows the values.
        defaults: values that replace a field's default.
        habits: flags and keys of other programs, by name.

    Returns:
        title -> instance. Raises `UserError` for unknown flags, unknown YAML keys and values of the wrong type.
        Whether a value is one of a `Literal` field's is for `check_choices`, when all are known.
    """
    parser = _Parser(prog=prog, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with the same names; flags win")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    fields: dict[str, _Field] = {}
    for title, cls in groups.items():
        section = parser.add_argument_group(title)
        hints, docs = _hints(cls), field_docs(cls)
        for field in dataclasses.fields(cls):
            if field.name in fields:
                raise ValueError(f"field {field.name} stands in two groups")
            fields[field.name] = known = _field(title, hints[field.name])
            default = (defaults or {}).get(field.name, _default(field))
            text = docs.get(field.name, "") + ("" if default in (None, []) else f" (default: {default})")
            _add_flag(section, field.name, known, text)
    _add_habits(parser, habits or {})
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise UserError(
            f"unknown argument {shown(unknown[0])[1:-1]}" + _suggestion(unknown[0], fields) + " (see --help)"
        )
    given = {k: v for k, v in vars(known).items() if v is not None}
    config = given.pop("config", None)
    given.pop("debug", None)
    values = {**(defaults or {}), **(_read_yaml(config, fields, habits or {}) if config else {}), **given}
    made = {}
    for title, cls in groups.items():
        mine = {name: value for name, value in values.items() if fields[name].title == title}
        made[title] = cls(**mine)
    return made


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers a setting may be, for `Annotated` fields."""

    least: float | None = None
    """Not below this."""
    above: float | None = None
    """More than this."""
    below: float | None = None
    """Less than this."""

    def __contains__(self, value: float) -> bool:
        return not (  # NaN is in no range
            (self.least is not None and not value >= self.least)
            or (self.above is not None and not value > self.above)
            or (self.below is not None and not value < self.below)
        )

    def __str__(self) -> str:
        words = {"at least": self.least, "above": self.above, "below": self.below}
        return " and ".join(f"{word} {limit:g}" for word, limit in words.items() if limit is not None)


Count = Annotated[int, Range(least=1)]
Whole = Annotated[int, Range(least=0)]
Amount = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, below=1)]


@dataclasses.dataclass(frozen=True)
class Habit:
    """A flag (and key) that people type because another program has it."""

    field: str | None = None
    """Field that it is another name of; None: it sets nothing."""
    must: Any = None
    """The one value that it may have, since that is so anyway; None: it may not be given."""
    why: str = ""
    """What to tell who wants another."""

    @property
    def words(self) -> int | str:
        """How many words follow the flag, as argparse counts."""
        return "*" if self.must is None else 0 if self.must is True else 1

    def require(self, place: str, value: str) -> None:
        """Raise `UserError` that begins with `place` if this value cannot be had."""
        if self.must is None or value != str(self.must).lower():
            told = "" if value == "true" else f" {shown(value)[1:-1]}"
            raise UserError(f"{place}{told}: {self.why}")


@dataclasses.dataclass(frozen=True)
class _Field:
    title: str
    """Group it belongs to."""
    kind: type
    """Type of its value."""
    optional: bool
    """May be None."""
    form: str | None = None
    """How the help shows its value; None: by its type."""


def _field(title: str, hint: Any) -> _Field:
    form = None
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        bare, optional = next(arg for arg in typing.get_args(hint) if arg is not type(None)), True
    else:
        bare, optional = hint, False
    if typing.get_origin(bare) is Annotated:
        bare, told = typing.get_args(bare)
        form = told if isinstance(told, str) else None
    if typing.get_origin(bare) is typing.Literal:
        bare, form = str, "{" + ",".join(typing.get_args(bare)) + "}"
    return _Field(title, list if typing.get_origin(bare) in (list, tuple) else bare, optional, form)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def require(options: Any, *names: str) -> None:
    """Raise `UserError` for the first of these fields that was not given."""
    for name in names:
        if not getattr(options, name):
            raise UserError(f"{_flag(name)} is missing")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def check_choices(options: Any) -> None:
    """Raise `UserError` for a value that is none of its field's `Literal[...]`, or out of its `Range`."""
    for name, hint in _hints(type(options)).items():
        value = getattr(options, name, None)
        for bare in (hint, *typing.get_args(hint)) if value is not None else ():
            allowed = typing.get_args(bare)
            if typing.get_origin(bare) is typing.Literal and value not in allowed:
                raise UserError(
                    f"{_flag(name)} {shown(value)} is unknown; choose one of {', '.join(allowed)}"
                )
            if (
                typing.get_origin(bare) is Annotated
                and isinstance(allowed[1], Range)
                and value not in allowed[1]
            ):
                raise UserError(f"{_flag(name)} {value} must be {allowed[1]}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _suggestion(word: str, fields: dict[str, _Field]) -> str:
    near = difflib.get_close_matches(word.split("=")[0].strip("-").replace("-", "_")[:80], fields, n=1)
    return f"; did you mean {_flag(near[0])}?" if word.startswith("-") and near else ""


def _add_flag(section, name: str, field: _Field, text: str) -> None:
    text = text.replace("%", "%%")
    if field.kind is bool:
        section.add_argument(
            _flag(name), dest=name, action=argparse.BooleanOptionalAction, default=None, help=text
        )
        return
    kind = str if field.kind is list else field.kind
    words = {"metavar": field.form or kind.__name__.upper()}
    if field.kind is list:
        words = {"nargs": "+", "metavar": tuple(field.form.split()) if field.form else name.upper()}
    section.add_argument(_flag(name), dest=name, type=_reader(kind), default=None, help=text, **words)


def _reader(kind: type) -> Callable[[str], Any]:
    """A function that reads a word of the command line."""

    def read(text: str) -> Any:
        try:
            return checked(kind(text))
        except ValueError as error:
            if kind is str:
                raise argparse.ArgumentTypeError(str(error)) from None
            what = error if isinstance(error, OutOfReach) else f"invalid {kind.__name__} value"
            raise argparse.ArgumentTypeError(f"{what}: {shown(text)}") from None

    return read


class OutOfReach(ValueError):
    """A number that no setting can have."""


def checked(value: Any) -> Any:
    """The value of a setting: a finite number, a whole one that fits into 64 bits, or text that a path could be.

    Raises `ValueError` that says what is wrong.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise OutOfReach("is not a finite number")
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise OutOfReach("is too large")
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("is empty; leave it out, or give a value")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"is no UTF-8 text: {shown(value)}") from None
        if any(ord(c) < 32 and c not in "\n\t" for c in value):
            raise ValueError(f"has a control character: {shown(value)}")
    return value


class _HabitAction(argparse.Action):
    """A flag of another program that sets nothing here."""

    def __init__(self, option_strings, dest, habit: Habit):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=habit.words, help=argparse.SUPPRESS)
        self.habit = habit

    def __call__(self, parser, namespace, values, option_string=None):
        self.habit.require(option_string, " ".join(values) if values else "true")


def _add_habits(parser: argparse.ArgumentParser, habits: dict[str, Habit]) -> None:
    for name, habit in habits.items():
        if habit.field is None:
            parser.add_argument(_flag(name), action=_HabitAction, habit=habit)
        else:  # one more name of the same flag, which the help does not show
            parser._option_string_actions[_flag(name)] = parser._option_string_actions[_flag(habit.field)]


def _read_yaml(file: str, fields: dict[str, _Field], habits: dict[str, Habit]) -> dict[str, Any]:
    loader = _Loader(_yaml_text(file))
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{file}: expected `name: value` lines")
        values, seen = {}, set()
        for key, node in root.value:
            place = f"{file} line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{place}: a name must be one word, not a {key.id}")
            name = key.value.replace("-", "_")
            if name in seen:
                raise UserError(f"{place}: key {shown(key.value)} is there twice")
            seen.add(name)
            habit = habits.get(name)
            if habit is not None and habit.field is None:
                habit.require(f"{file}: {name}", str(node.value).lower())
                continue
            name = habit.field if habit is not None else name
            if name not in fields:
                near = difflib.get_close_matches(name[:80], fields, n=1)
                near = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"{file}: unknown key {shown(key.value)}{near}")
            if name in values:
                raise UserError(f"{place}: {shown(key.value)} is given twice, once by another name")
            values[name] = _yaml_value(loader, f"{file}: key {shown(key.value)}", node, fields[name])
    except RecursionError:
        raise UserError(f"{file}: is nested too deeply; a value is a word or a list of words") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    finally:
        loader.dispose()
    return values


def _yaml_text(file: str) -> str:
    path = Path(file)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(
                f"--config {file}: is not a plain file"
            )  # a pipe may have no writer, a device no end
        with open(path, "rb") as stream:
            data = stream.read(MAX_YAML_BYTES + 1)
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"--config {file}: no such file") from None
    except (OSError, ValueError) as error:  # no path, or no UTF-8
        raise UserError(f"--config {file}: cannot be read ({error})") from None
    if len(data) > MAX_YAML_BYTES:
        raise UserError(f"--config {file}: is longer than {MAX_YAML_BYTES} bytes, which no settings are")
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        raise UserError(f"{file} line {line}: character U+{ord(bad[0]):04X} is not allowed in YAML")
    return text


def _yaml_value(loader: _Loader, place: str, node: yaml.Node, field: _Field) -> Any:
    """The value of a setting. Text stays as it is written, whatever else YAML could take it for."""
    if field.kind is list and isinstance(node, yaml.SequenceNode):
        item = dataclasses.replace(field, kind=str, optional=False)
        return [_yaml_value(loader, place, part, item) for part in node.value]
    kind, tag = str if field.kind is list else field.kind, node.tag.rpartition(":")[2]
    if tag == "null":
        if field.optional and node.value in ("", "~", "null", "Null", "NULL"):
            return None
        raise UserError(f"{place} has no value")
    value = _plain(loader, node)
    try:
        if kind is float and tag in ("int", "str"):  # YAML reads 1e-5 as text
            value = float(value)
        elif kind is str and tag in ("int", "float", "timestamp"):
            value = node.value
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            value = checked(value)
            return [value] if field.kind is list else value
    except OverflowError:
        raise UserError(f"{place} is too large: {shown(node.value)}") from None
    except ValueError as error:
        if isinstance(error, OutOfReach):
            raise UserError(f"{place} {error}: {shown(node.value)}") from None
        if kind is str:
            raise UserError(f"{place} {error}") from None
    raise UserError(f"{place} wants {kind.__name__}, got {shown(value)}")


def _plain(loader: _Loader, node: yaml.Node) -> Any:
    """What a node stands for, as Python writes it; the text itself where its tag promises what it is not."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, part) for part in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(_plain(loader, key)): _plain(loader, value) for key, value in node.value}
    read = {
        "int": loader.construct_yaml_int,
        "float": loader.construct_yaml_float,
        "bool": loader.construct_yaml_bool,
    }
    try:
        return read.get(node.tag.rpartition(":")[2], lambda node: node.value)(node)
    except (ValueError, KeyError, IndexError):
        return node.value


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, its own and those that it inherits, for help texts."""
    docs = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for here, after in zip(body, body[1:]):
            if (
                isinstance(here, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[here.target.id] = " ".join(str(after.value.value).split())
    return docs
