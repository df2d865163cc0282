"""Reads the PTX that nvcc wrote."""

from __future__ import annotations

import re

from .module import Address, Constant, Instruction, Kernel, Reg, Special, Symbol

_ENTRY = re.compile(r"(?:\.visible |\.weak )*\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
_ARRAY = re.compile(r"\.shared\s+(?:\.align (\d+)\s+)?\.[busf](\d+)\s+([\w$]+)(?:\[(\d+)\])?")
_PARAMETER = re.compile(r"\.param\s+(?:\.align (\d+)\s+)?\.[busf](\d+)\s+([\w$]+)(?:\[(\d+)\])?")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)")
_KINDS = {"pred": "pred", "f32": "f32", "f64": "f64"}


def read(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX file by name."""
    text = re.sub(r"//[^\n]*", "", text)
    outer, bodies, start = "", [], 0
    for match in _ENTRY.finditer(text):
        body = _block(text, match.end())
        bodies.append((match, body))
        outer, start = outer + text[start : match.start()], match.end() + len(body)
    outer += text[start:]
    found = {}
    for match, body in bodies:
        kernel = Kernel(match[1])
        for line in re.findall(r"^\s*(\.shared[^;]*)", outer, re.M):
            _shared(kernel, line)
        _parameters(kernel, match[2])
        _Body(kernel).read(body)
        found[kernel.name] = kernel
    return found


def _block(text: str, start: int) -> str:
    depth = 1
    for at in re.finditer(r"[{}]", text[start:]):
        depth += 1 if at[0] == "{" else -1
        if depth == 0:
            return text[start : start + at.start()]
    raise ValueError("a kernel without its closing brace")


def _shared(kernel: Kernel, text: str) -> None:
    align, bits, name, count = _ARRAY.match(text).groups()
    kernel.shared[name] = (int(align or 1), int(bits) // 8 * int(count or 1))


def _parameters(kernel: Kernel, text: str) -> None:
    for align, bits, name, count in _PARAMETER.findall(text):
        size = int(bits) // 8 * int(count or 1)
        offset = -(-kernel.parameter_bytes // int(align or size)) * int(align or size)
        kernel.parameters[name] = (offset, size)
        kernel.parameter_bytes = offset + size


class _Body:
    """Statements of one kernel. Inline assembly opens scopes with registers and labels of their own."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.scopes: list[dict[str, int]] = [{}]
        self.numbers = [0]
        self.count = 0

    def read(self, text: str) -> None:
        pending = ""
        for piece in re.findall(r"[^;{}:]*[:;]|[{}]|[^;{}:]+", text):
            if piece in "{}" and not _inside(pending):
                if piece == "{":
                    self.count += 1
                    self.scopes.append({})
                    self.numbers.append(self.count)
                else:
                    self.scopes.pop()
                    self.numbers.pop()
                pending = ""
                continue
            pending += piece
            if piece.endswith(":") and re.fullmatch(r"\s*[\w$]+\s*:", pending):
                self.kernel.labels[self._label(pending.strip()[:-1].strip())] = len(self.kernel.instructions)
                pending = ""
            elif piece.endswith(";"):
                self._statement(" ".join(pending[:-1].split()))
                pending = ""

    def _label(self, name: str) -> str:
        return name if name.startswith("$") else f"{name}@{self.numbers[-1]}"

    def _statement(self, text: str) -> None:
        if not text:
            return
        if text.startswith(".reg"):
            kind, names = _REGISTERS.match(text).groups()
            for name in names.split(","):
                self._declare(kind, name.strip())
            return
        if text.startswith(".shared"):
            _shared(self.kernel, text)
            return
        if text.startswith("."):
            if text.startswith((".pragma", ".loc")):
                return
            raise NotImplementedError(f"PTX directive: {text}")
        guard = None
        if text.startswith("@"):
            predicate, text = text[1:].split(None, 1)
            guard = (self._slot(predicate.lstrip("!")), predicate.startswith("!"))
        opcode, _, rest = text.partition(" ")
        operands = tuple(self._operand(part, opcode) for part in _split(rest))
        self.kernel.instructions.append(Instruction(opcode, operands, guard, text))

    def _declare(self, kind: str, name: str) -> None:
        kind = _KINDS.get(kind) or f"b{kind[1:]}"
        ranged = re.fullmatch(r"(.+)<(\d+)>", name)
        names = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]
        for each in names:
            self.scopes[-1][each] = len(self.kernel.registers)
            self.kernel.registers.append(kind)

    def _slot(self, name: str) -> int | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def _operand(self, text: str, opcode: str):
        text = text.strip()
        if text == "_":
            return None
        if text.startswith("{"):
            return tuple(self._operand(part, opcode) for part in _split(text[1:-1]))
        if text.startswith("["):
            return self._address(text[1:-1], opcode)
        if "|" in text:
            return tuple(self._operand(part, opcode) for part in text.split("|"))
        if opcode.startswith("bra"):
            return self._label(text)
        if text.startswith("!"):
            raise NotImplementedError(f"a negated operand: {opcode} {text}")
        slot = self._slot(text)
        if slot is not None:
            return Reg(slot)
        if text.startswith("%"):
            return Special(text)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Constant(int(text[2:], 16), 32)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Constant(int(text[2:], 16), 64)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return Constant(int(text.rstrip("U"), 0))
        return Symbol(text)

    def _address(self, text: str, opcode: str) -> Address:
        base, *rest = _split(text)
        coordinates = (
            tuple(self._operand(part, opcode) for part in _split(rest[0].strip()[1:-1])) if rest else ()
        )
        name, _, offset = base.partition("+")
        return Address(self._operand(name, opcode), int(offset or 0), coordinates)


def _inside(text: str) -> bool:
    """Whether `text` is a statement that has begun: its braces belong to an operand."""
    return bool(text.strip())


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in [*parts, text[start:]] if part.strip()]
