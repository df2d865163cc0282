"""A kernel as PTX has it: parameters, registers, shared arrays, instructions and their operands."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reg:
    """A register of one thread."""

    slot: int


@dataclass(frozen=True)
class Special:
    """A register that the machine sets, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Constant:
    """An immediate: an integer, or a float by its bits."""

    value: int
    bits_of: int = 0
    """32 or 64 where `value` holds the bits of a float."""


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or parameter."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset], with coordinates where it names a box of a tensor."""

    base: Reg | Symbol
    offset: int = 0
    coordinates: tuple = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction. Operands: the classes above, None for `_`, tuples for {a, b}, strings for labels."""

    opcode: str
    operands: tuple
    guard: tuple[int, bool] | None
    """Slot of the predicate, and whether it must be false."""
    text: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Kernel:
    """One .entry."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and bytes of each parameter in the parameter block."""
    parameter_bytes: int = 0
    registers: list[str] = field(default_factory=list)
    """Type of each slot: pred, b16, b32, b64, f32, f64."""
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Alignment and bytes of each static shared array."""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
