"""PTX text as Triton's LLVM writes it, one statement a line: "PTX ISA", Syntax, and State Spaces, Types, and Variables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.devices.ptx.faults import UnknownInstructionError


@dataclass(frozen=True)
class Register:
    """%p1, %rs1, %r1, %rd1, or a special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A number: an integer, or the bits of a float32 (`0f3F800000`)."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, a variable in shared memory, or the sink `_`."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Pack:
    """{a, b, …}."""

    parts: tuple[Register | Literal | Symbol, ...]


Operand = Register | Literal | Symbol | Address | Pack


@dataclass(frozen=True)
class Instruction:
    """One statement. `guard`: the predicate that it is executed under, and the value that it must have."""

    line: int
    text: str
    source: str
    guard: tuple[str, bool] | None
    opcode: str
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Kernel:
    """An entry function."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    code: tuple[Instruction, ...]
    labels: dict[str, int]


_STATEMENT = re.compile(r"(?:@(?P<not>!?)(?P<guard>%p\d+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*);")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def parse(ptx: str) -> Kernel:
    """The one kernel of a module.

    Raises:
        UnknownInstructionError: a line that is neither a directive that can be passed over nor a statement.
    """
    (name,) = re.findall(r"\.entry (\w+)", ptx)
    (threads,) = re.findall(r"\.reqntid (\d+)", ptx)
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for number, line, source in _body(ptx):
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        elif statement := _STATEMENT.fullmatch(line):
            guard = (statement["guard"], not statement["not"]) if statement["guard"] else None
            operands = tuple(_operand(text) for text in _OPERAND.findall(statement["operands"]))
            code.append(Instruction(number, line, source, guard, statement["opcode"], operands))
        elif not line.startswith((".reg ", ".loc\t", ".loc ")):
            raise UnknownInstructionError(f"{name}: line {number} of the PTX is not understood: {line}")
    return Kernel(name, tuple(re.findall(r"\.param \.\w+ .*?(\w+_param_\d+)", ptx)), int(threads), tuple(code), labels)


def _body(ptx: str) -> Iterator[tuple[int, str, str]]:
    """Lines between the kernel's braces without comments, their numbers, and the line of Python that they were made of."""
    source, depth = "", 0
    for number, text in enumerate(ptx.splitlines(), 1):
        line, _, comment = text.partition("//")
        line = line.strip()
        if line in ("{", "}"):  # inline assembly has braces of its own
            depth += 1 if line == "{" else -1
            if depth == 0:
                return
        elif depth and line:
            if line.startswith(".loc"):
                source = comment.strip().rpartition(":")[0]
            yield number, line, source


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Pack(tuple(_operand(part) for part in text[1:-1].split(",")))  # type: ignore[misc]
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        name = base.strip()
        return Address(Register(name) if name.startswith("%") else Symbol(name), int(offset or 0))
    if text.startswith("%"):
        return Register(text)
    if text.startswith("0f"):
        return Literal(int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Literal(int(text.rstrip("U"), 0))
    return Symbol(text)
