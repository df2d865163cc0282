"""Values between processes that do not trust each other: exact built-in types as text, and nothing that runs.

Stands alone (standard library only): it is also copied into the sandbox, beside the drivers. A frame is eight bytes of
length and JSON of tagged lists; a value is None, a boolean, a string, or `[tag, ...]`.
"""

import collections
import datetime
import decimal
import fractions
import json
import os
import re
import struct

_HEADER = struct.Struct(">Q")
_LISTS = {"l": list, "t": tuple, "s": set, "z": frozenset, "q": collections.deque, "I": iter}
_DICTS = {
    "o": collections.OrderedDict,
    "n": collections.Counter,
    "e": collections.defaultdict,
    "d": dict,
}
_DATES = {"date": datetime.date, "datetime": datetime.datetime, "time": datetime.time}
_VIEWS = {
    "k": (type({}.keys()), lambda items: dict.fromkeys(items).keys()),
    "v": (type({}.values()), lambda items: dict(enumerate(items)).values()),
    "j": (type({}.items()), lambda items: dict(items).items()),
}
_LONGEST = 100_000
"""Digits of a fraction or decimal, and items of an endless iterator."""


class Opaque:
    """Stands for an object of no plain kind: it is not None, and equals nothing but itself."""


class NotPlain(TypeError):
    """A value that no other process can have."""


def encode(value, opaque=False):
    """The value as JSON data. Subclasses count as the built-in type that holds their data.

    With `opaque`, what is no data becomes an `Opaque` on the other side; otherwise it raises `NotPlain`.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    for tag, of in _DICTS.items():
        if isinstance(value, of):
            return [tag, [[encode(k, opaque), encode(v, opaque)] for k, v in dict.items(value)]]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["i", format(int.__index__(value), "x")]
    if isinstance(value, float):
        return ["f", float.hex(float(value))]
    if isinstance(value, complex):
        return ["c", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, (bytes, bytearray)):
        return ["y" if isinstance(value, bytes) else "Y", bytes(value).hex()]
    for tag, of in _LISTS.items():
        if isinstance(of, type) and isinstance(value, of):
            return [tag, [encode(item, opaque) for item in of.__iter__(value)]]
    for tag, (of, _) in _VIEWS.items():
        if kind is of:
            return [tag, [encode(item, opaque) for item in value]]
    if kind is range:
        return ["r", *(format(part, "x") for part in (value.start, value.stop, value.step))]
    if isinstance(value, fractions.Fraction):
        return ["F", format(value.numerator, "x"), format(value.denominator, "x")]
    if isinstance(value, decimal.Decimal):
        return ["D", str(value)]
    if kind in _DATES.values():
        return ["T", kind.__name__, value.isoformat()]
    if kind is datetime.timedelta:
        return ["W", value.days, value.seconds, value.microseconds]
    module = kind.__module__
    if module == "numpy" and hasattr(value, "tolist"):
        held = encode(value.tolist(), opaque)
        return ["A", value.dtype.str, held] if kind.__name__ == "ndarray" else held
    if hasattr(kind, "__next__") and module in ("builtins", "itertools"):
        items = []
        for item in value:
            items.append(encode(item, opaque))
            if len(items) > _LONGEST:
                raise NotPlain("an iterator without end")
        return ["I", items]
    if opaque:
        return ["?"]
    raise NotPlain(f"{kind.__name__} is not plain data")


def decode(data, hashing=True):
    """The value of JSON data. Raises `ValueError` or `TypeError` for data that `encode` does not make.

    Without `hashing` nothing is built that a hostile sender could make slow (sets, dicts with other keys than
    strings, long fractions): an `Opaque` stands for it.
    """
    if data is None or isinstance(data, (bool, str)):
        return data
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        raise ValueError("no value")
    tag, *rest = data
    if tag == "i":
        return int(rest[0], 16)
    if tag == "f":
        return float.fromhex(rest[0])
    if tag in _LISTS:
        items = [decode(item, hashing) for item in rest[0]]
        return _LISTS[tag](items) if hashing or tag in "lt" else Opaque()
    if tag in _DICTS:
        pairs = [(decode(key, hashing), decode(value, hashing)) for key, value in rest[0]]
        if not hashing and not all(type(key) is str for key, _ in pairs):
            return Opaque()
        made = collections.defaultdict() if tag == "e" else _DICTS[tag]()
        made.update(dict(pairs))
        return made
    if tag in ("y", "Y"):
        return (bytes if tag == "y" else bytearray).fromhex(rest[0])
    if tag == "c":
        return complex(*map(float.fromhex, rest))
    if tag == "r":
        return range(*(int(part, 16) for part in rest))
    if tag == "F":
        return fractions.Fraction(*(int(_short(part), 16) for part in rest))
    if tag == "D":
        return decimal.Decimal(_short(rest[0]))
    if tag == "T":
        return _DATES[rest[0]].fromisoformat(rest[1])
    if tag == "W":
        return datetime.timedelta(*rest)
    if tag == "A":
        return _array(rest[0], decode(rest[1], hashing))
    if tag in _VIEWS and hashing:
        return _VIEWS[tag][1]([decode(item) for item in rest[0]])
    if tag in _VIEWS or tag == "?":
        return Opaque()
    raise ValueError("no value")


def _short(text):
    if len(text) > _LONGEST:
        raise ValueError("a number of too many digits")
    return text


def _array(kind, items):
    if re.fullmatch("[<>|=]?[biufc][0-9]{1,2}", kind) is None:
        return Opaque()
    import numpy

    return numpy.array(items, dtype=kind)


def dumps(value) -> bytes:
    """JSON data as bytes."""
    return json.dumps(value).encode()


def loads(data: bytes):
    """JSON data of bytes that anybody may have sent. Raises `ValueError`."""
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_frame(descriptor: int) -> bytes:
    """The next frame. Raises `EOFError` at the end."""
    (length,) = _HEADER.unpack(_read(descriptor, _HEADER.size))
    return _read(descriptor, length)


def frame(data: bytes) -> bytes:
    """Data with its length before it."""
    return _HEADER.pack(len(data)) + data


def frame_length(start: bytes) -> int | None:
    """Length of a frame of which this is the start; None while its header is not complete."""
    return _HEADER.unpack_from(start)[0] if len(start) >= _HEADER.size else None


def write_frame(descriptor: int, data: bytes, write=os.write) -> None:
    """Send a frame."""
    rest = memoryview(frame(data))
    while rest:
        rest = rest[write(descriptor, rest) :]


def _read(descriptor: int, length: int, read=os.read) -> bytes:
    parts = []
    while length:
        part = read(descriptor, min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
