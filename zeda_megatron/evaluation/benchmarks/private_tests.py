"""LiveCodeBench's private tests, read without unpickling.

The data set packs them as base64 of zlib of a pickle of one string, which is JSON. A pickle may run code when it is
loaded; this one is taken apart instead: one string constant and nothing else is accepted.
"""

from __future__ import annotations

import base64
import binascii
import pickletools
import zlib

from ...data.jsonl import parse_line
from ...errors import UserError, shown

MOST = 1 << 30
"""Bytes that packed tests may have when unpacked."""
_TEXT = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_HARMLESS = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")


def decode_tests(packed: str | list | None, where: str) -> list[dict]:
    """Tests as `{"input", "output", "testtype"}`: a list as it is, JSON text, or the packed form.

    Raises `UserError`, opened by `where`, for anything else: more than `MOST` bytes, a pickle that holds more than a
    string, text that is no list of tests.
    """
    if isinstance(packed, list):
        tests = packed
    elif not packed:
        tests = []
    elif isinstance(packed, str):
        text = packed if packed.lstrip().startswith("[") else pickled_text(_unpacked(packed, where), where)
        tests = parse_line(text.encode("utf-8", "surrogatepass"), f"{where}: private tests")
    else:
        raise UserError(f"{where}: tests must be a list or text, found {shown(packed)}")
    for test in tests if isinstance(tests, list) else [None]:
        if not isinstance(test, dict) or not all(isinstance(test.get(k), str) for k in ("input", "output")):
            raise UserError(f"{where}: private tests are no list of objects with the texts input and output")
    return tests


def _unpacked(packed: str, where: str) -> bytes:
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(packed, validate=True), MOST)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise UserError(f"{where}: private tests cannot be unpacked ({error})") from None
    if stream.unconsumed_tail:
        raise UserError(f"{where}: private tests are larger than {MOST >> 20} MiB")
    if not stream.eof:
        raise UserError(f"{where}: private tests are cut short")
    return data


def pickled_text(data: bytes, where: str) -> str:
    """The one string that a pickle holds. Nothing is executed."""
    found: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name in _TEXT:
                found.append(argument)
            elif operation.name not in _HARMLESS:
                raise UserError(f"{where}: private tests hold the pickle operation {operation.name}; refused")
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: private tests are no pickle of a string ({error})") from None
    if len(found) != 1:
        raise UserError(f"{where}: private tests hold {len(found)} strings; one is expected")
    return found[0]
