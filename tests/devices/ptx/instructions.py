"""What carries out each instruction: the rules of `scalar` and `warp` on a machine's registers, and accesses to its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tests.devices.ptx import warp
from tests.devices.ptx.faults import UnknownInstructionError, require
from tests.devices.ptx.machine import ALL, Machine, Mask, Step
from tests.devices.ptx.parse import Address, Instruction, Kernel, Literal, Operand, Pack, parse
from tests.devices.ptx.scalar import RULES, TYPES, Rule

Operands = tuple[Operand, ...]

BITS16, BITS32 = np.dtype(np.uint16), np.dtype(np.uint32)


def _type_and_count(opcode: str) -> tuple[np.dtype, int]:
    """b32, 4 of ld.global.v4.b32."""
    *modifiers, kind = opcode.split(".")
    return TYPES[kind], max([int(m[1]) for m in modifiers if m in ("v2", "v4")], default=1)


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Pack) else (operand,)


def _scalar(rule: Rule, machine: Machine, operands: Operands, active: Mask) -> None:
    values = (machine.read(x, dtype) for x, dtype in zip(operands[1:], rule.operands, strict=True))
    machine.write(operands[0], rule.function(*values).astype(rule.result, copy=False), active)


def _halves(machine: Machine, _: str, operands: Operands, active: Mask) -> None:
    """`mov.b32`: one register of 32 bits as two of 16, the lower half first, and back."""
    to, given = operands
    if isinstance(given, Pack):
        low, high = (machine.read(part, BITS16).astype(np.uint32) for part in given.parts)
        machine.write(to, low | (high << 16), active)
    else:
        value = machine.read(given, BITS32)
        for part, shift in zip(_parts(to), (0, 16), strict=True):
            machine.write(part, (value >> shift).astype(np.uint16), active)


def _parameter(machine: Machine, opcode: str, operands: Operands, active: Mask) -> None:
    dtype, place = _type_and_count(opcode)[0], operands[1]
    assert isinstance(place, Address)
    value = machine.arguments[place.base.name]
    given = np.array([value], np.float32) if isinstance(value, float) else np.array([value], np.int64).astype(dtype)
    machine.write(operands[0], given, active)


def _load(machine: Machine, opcode: str, operands: Operands, active: Mask) -> None:
    (dtype, count), threads = _type_and_count(opcode), machine.chosen(active)
    if ".shared" in opcode:
        values = machine.shared_memory.load(threads, machine.address(operands[1], "u4", threads), dtype.itemsize, count)
    else:
        address = machine.address(operands[1], "u8", threads)
        values = machine.global_memory.load(threads, machine.block[threads], address, dtype.itemsize, count)
    for part, column in zip(_parts(operands[0]), values.T, strict=True):
        machine.write_of(part, column, threads, active)


def _store(machine: Machine, opcode: str, operands: Operands, active: Mask) -> None:
    dtype, threads = _type_and_count(opcode)[0], machine.chosen(active)
    columns = [machine.read_of(part, f"u{dtype.itemsize}", threads) for part in _parts(operands[1])]
    values = np.stack(columns, 1)
    if ".shared" in opcode:
        machine.shared_memory.store(threads, machine.address(operands[0], "u4", threads), values)
    else:
        address = machine.address(operands[0], "u8", threads)
        machine.global_memory.store(threads, machine.block[threads], address, values)


def _load_matrices(machine: Machine, opcode: str, operands: Operands, active: Mask) -> None:
    machine.whole_warps(active)
    threads, parts = machine.chosen(active), _parts(operands[0])
    address = machine.address(operands[1], "u4", threads)
    row = (threads % 32) < 8 * len(parts)
    require((address % 16 == 0) | ~row, threads, "has a row of a matrix that is at no multiple of 16 bytes")
    for i, part in enumerate(parts):
        places = warp.matrix_rows(address, i, ".trans" in opcode)
        found = [machine.shared_memory.load(threads, place, 4 // len(places), 1)[:, 0] for place in places]
        value = found[0] if len(found) == 1 else found[0].astype(np.uint32) | (found[1].astype(np.uint32) << 16)
        machine.write_of(part, value, threads, active)


def _copy(machine: Machine, _: str, operands: Operands, active: Mask) -> None:
    """`cp.async`: so many bytes, or zeros where the last operand says that none are read."""
    to, given, size, read = operands
    assert isinstance(size, Literal)
    threads = machine.chosen(active)
    reads = machine.read_of(read, "u4", threads)
    require((reads == size.value) | (reads == 0), threads, "copies a part, which the emulator does not know")
    values, some = np.zeros((len(threads), size.value // 4), np.uint32), reads > 0
    address = machine.address(given, "u8", threads[some])
    values[some] = machine.global_memory.load(threads[some], machine.block[threads[some]], address, 4, size.value // 4)
    machine.copies.start(threads, machine.address(to, "u4", threads), values)


def _commit(machine: Machine, _: str, operands: Operands, active: Mask) -> None:
    machine.copies.commit(machine.chosen(active))


def _wait(machine: Machine, _: str, operands: Operands, active: Mask) -> None:
    (but,) = operands
    assert isinstance(but, Literal)
    machine.copies.wait(machine.chosen(active), but.value)


def _barrier(machine: Machine, _: str, operands: Operands, active: Mask) -> None:
    assert operands == (Literal(0),), operands
    here = np.ones(machine.count, bool) if active is ALL else active
    blocks = np.unique(machine.block[here])
    waits = np.isin(machine.block, blocks) & machine.live
    require(here | ~waits, machine.thread, "is elsewhere when the rest of its block is at a barrier")
    machine.shared_memory.barrier(blocks)


def _warp_barrier(machine: Machine, _: str, operands: Operands, active: Mask) -> None:
    machine.whole_warps(active)
    machine.shared_memory.warp_barrier(np.unique(machine.chosen(active) // 32))


def _shuffle(machine: Machine, opcode: str, operands: Operands, active: Mask) -> None:
    to, given, by, clamp, members = operands
    assert isinstance(clamp, Literal)
    assert members == Literal(-1)
    machine.whole_warps(active)
    value, lane = (np.broadcast_to(machine.read(x, BITS32), machine.count) for x in (given, by))
    machine.write(to, warp.shuffle(opcode.split(".")[2], value, lane, clamp.value), active)


def _multiply(machine: Machine, opcode: str, operands: Operands, active: Mask) -> None:
    machine.whole_warps(active)
    threads = machine.chosen(active)
    a, b, c = ([machine.read_of(x, "u4", threads) for x in _parts(operand)] for operand in operands[1:])
    results = warp.multiply(opcode.split(".")[-2], a, b, [x.view(np.float32) for x in c])
    for part, result in zip(_parts(operands[0]), results, strict=True):
        machine.write_of(part, result, threads, active)


#: By opcode; a trailing dot stands for all that begins so.
METHODS: dict[str, Callable[[Machine, str, Operands, Mask], None]] = {
    "mov.b32": _halves, "ld.param.": _parameter, "ld.global.": _load, "ld.shared.": _load, "st.global.": _store,
    "st.shared::cta.": _store, "ldmatrix.sync.aligned.m8n8.": _load_matrices, "cp.async.ca.shared.global": _copy,
    "cp.async.cg.shared.global": _copy, "cp.async.commit_group": _commit, "cp.async.wait_group": _wait, "bar.sync": _barrier,
    "bar.warp.sync": _warp_barrier, "shfl.sync.bfly.b32": _shuffle, "shfl.sync.idx.b32": _shuffle,
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": _multiply,
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": _multiply,
    "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32": _multiply,
}  # fmt: skip


def step_of(instruction: Instruction) -> Step:
    """What carries out an instruction. Branches and returns are the machine's.

    Raises:
        UnknownInstructionError: nothing does.
    """
    opcode, operands = instruction.opcode, instruction.operands
    rule = RULES.get(opcode)
    if rule is not None and not any(isinstance(x, Pack) for x in operands):
        return lambda machine, active: _scalar(rule, machine, operands, active)
    for name, method in METHODS.items():
        if opcode == name or (name.endswith(".") and opcode.startswith(name)):
            return lambda machine, active: method(machine, opcode, operands, active)
    if opcode in ("bra", "bra.uni", "ret"):
        return lambda machine, active: None
    raise UnknownInstructionError(f"line {instruction.line}: the emulator does not know {instruction.text}")


@dataclass(frozen=True)
class Program:
    """A kernel ready to be launched."""

    kernel: Kernel
    steps: tuple[Step, ...]
    grains: tuple[int, int]

    @classmethod
    def of(cls, ptx: str) -> Program:
        """The kernel of a module.

        Raises:
            UnknownInstructionError: the emulator does not know one of its instructions.
        """
        kernel = parse(ptx)
        return cls(kernel, tuple(map(step_of, kernel.code)), (_grain(kernel, ".global"), _grain(kernel, ".shared")))

    def run(
        self,
        grid: tuple[int, int],
        shared: int,
        arguments: Sequence[int | float],
        extents: list[tuple[int, int]],
    ) -> None:
        """One launch, on the memory of this process; arguments as `Machine` has them.

        Raises:
            PtxError: a thread did what it may not.
        """
        Machine(self.kernel, self.steps, grid, shared, self.grains, arguments, extents).run()


def _grain(kernel: Kernel, space: str) -> int:
    """Bytes of the narrowest access to a state space; 4 of copies, and of matrices, whose columns are of 16 bits."""
    widths = [4]
    for instruction in kernel.code:
        opcode = instruction.opcode
        if opcode.startswith((f"ld{space}", f"st{space}")):
            widths.append(_type_and_count(opcode)[0].itemsize)
        elif opcode.startswith("ldmatrix") and ".trans" in opcode:
            widths.append(2)
    return min(widths)
