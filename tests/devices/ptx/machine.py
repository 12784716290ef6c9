"""A launch of a kernel: all threads of all blocks side by side, registers as arrays of bits, one number per thread.

Threads that take different branches are executed one group after the other, the one that is furthest behind first: as code lies
in its order, they meet again where their ways do. What depends on that order is a race, and found as one (`memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.devices.ptx import warp
from tests.devices.ptx.faults import Fault, PtxError, UnknownInstructionError, require
from tests.devices.ptx.memory import Copies, Global, Shared
from tests.devices.ptx.parse import Address, Instruction, Kernel, Literal, Operand, Pack, Register, Symbol
from tests.devices.ptx.scalar import RULES, TYPES, Rule

#: Registers by the letters of their names.
REGISTERS = {"p": np.dtype(bool), "rs": np.dtype(np.uint16), "r": np.dtype(np.uint32), "rd": np.dtype(np.uint64)}

#: Instructions of one launch; more is a loop without end.
MOST = 1_000_000

#: Of all threads, in the place of a mask.
ALL = None
Mask = np.ndarray | None


def width_and_count(opcode: str) -> tuple[str, int]:
    """The type and number of what `ld`, `st` access: b32, 4 of ld.global.v4.b32."""
    *modifiers, kind = opcode.split(".")
    vector = [m for m in modifiers if m in ("v2", "v4")]
    return kind, int(vector[0][1:]) if vector else 1


def grain(kernel: Kernel) -> int:
    """Bytes of the narrowest access to shared memory."""
    widths = [4]
    for instruction in kernel.code:
        opcode = instruction.opcode
        if opcode.startswith(("ld.shared", "st.shared")):
            widths.append(TYPES[width_and_count(opcode)[0]].itemsize)
        elif opcode.startswith("ldmatrix") and ".trans" in opcode:
            widths.append(2)
    return min(widths)


class Machine:
    """A launch.

    Args:
        kernel: what to run
        grid: blocks in x and y
        shared: bytes of shared memory of a block
        arguments: by parameter, an integer or a float; of a tensor its address
        extents: first and last byte but one of every buffer that the launch was given
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        shared: int,
        arguments: Sequence[int | float],
        extents: list[tuple[int, int]],
    ) -> None:
        self._kernel, self._arguments = kernel, dict(zip(kernel.parameters, arguments, strict=True))
        blocks, each = grid[0] * grid[1], kernel.threads
        self.count = blocks * each
        self._each = each
        self._thread = np.arange(self.count)
        self._block = self._thread // each
        self._special = {
            "%tid.x": self._thread % each, "%ctaid.x": self._block % grid[0], "%ctaid.y": self._block // grid[0],
            "%nctaid.x": np.full(self.count, grid[0]), "%nctaid.y": np.full(self.count, grid[1]),
        }  # fmt: skip
        self._registers: dict[str, np.ndarray] = {name: x.astype(np.uint32) for name, x in self._special.items()}
        self._global = Global(extents)
        self._shared = Shared(blocks, shared, grain(kernel), each // 32)
        self._copies = Copies(self._shared, self.count)
        self._live = np.ones(self.count, bool)
        self._steps = [(instruction, self._step(instruction)) for instruction in kernel.code]

    def run(self) -> None:
        """Until all threads returned.

        Raises:
            PtxError: a thread did what it may not.
        """
        waiting = {0: np.ones(self.count, bool)}
        executed = 0
        with np.errstate(all="ignore"):
            while waiting:
                at = min(waiting)
                threads = waiting.pop(at)
                others = min(waiting, default=len(self._steps) + 1)
                together = ALL if threads.all() else threads
                while at != others:
                    instruction, step = self._steps[at]
                    executed += 1
                    if executed > MOST:
                        raise PtxError(f"{self._kernel.name}: more than {MOST} instructions")
                    if instruction.opcode in ("bra", "bra.uni", "ret"):
                        break
                    self._execute(instruction, step, together)
                    at += 1
                else:
                    waiting[at] = waiting[at] | threads
                    continue
                taken = self._guarded(instruction, threads)
                assert taken is not ALL
                if instruction.opcode == "ret":
                    self._live &= ~taken
                else:
                    (label,) = instruction.operands
                    assert isinstance(label, Symbol)
                    self._send(waiting, self._kernel.labels[label.name], taken)
                self._send(waiting, at + 1, threads & ~taken)

    @staticmethod
    def _send(waiting: dict[int, np.ndarray], at: int, threads: np.ndarray) -> None:
        if threads.any():
            waiting[at] = waiting[at] | threads if at in waiting else threads

    def _guarded(self, instruction: Instruction, threads: Mask) -> Mask:
        """Those of `threads` that execute it."""
        if instruction.guard is None:
            return threads
        name, wanted = instruction.guard
        given = self._register(name)
        given = given if wanted else ~given
        return given if threads is ALL else threads & given

    def _execute(self, instruction: Instruction, step: Callable[[Mask], None], threads: Mask) -> None:
        try:
            active = self._guarded(instruction, threads)
            if active is ALL or active.all():
                step(ALL)
            elif active.any():
                step(active)
        except Fault as fault:
            thread = int(fault.threads[0])
            raise PtxError(self._where(instruction, f"thread {thread % self._each} of block {thread // self._each} {fault}"))

    def _where(self, instruction: Instruction, message: str) -> str:
        place = f"line {instruction.line} ({instruction.source})"
        return f"{self._kernel.name}, {place}: {message}: {instruction.text}"

    # Operands.

    def _register(self, name: str) -> np.ndarray:
        try:
            return self._registers[name]
        except KeyError:
            raise Fault(f"reads {name}, which nobody has written", self._thread[:1]) from None

    def _read(self, operand: Operand, dtype: np.dtype) -> np.ndarray:
        """[threads], or [1] of what is the same for all."""
        if isinstance(operand, Register):
            value = self._register(operand.name)
            if dtype == bool:
                return value
            raw = np.dtype(f"u{dtype.itemsize}")
            return (value if value.dtype == raw else value.astype(raw)).view(dtype)
        if isinstance(operand, Literal):
            raw = np.dtype(f"u{dtype.itemsize}")
            return np.array([operand.value & ((1 << 8 * dtype.itemsize) - 1)], raw).view(dtype)
        assert operand == Symbol("global_smem"), operand
        return np.zeros(1, dtype)

    def _write(self, operand: Operand, value: np.ndarray, active: Mask) -> None:
        if operand == Symbol("_"):
            return
        assert isinstance(operand, Register), operand
        dtype = REGISTERS[operand.name[1:].rstrip("0123456789")]
        if dtype != bool:
            if value.dtype.itemsize < dtype.itemsize and value.dtype.kind == "i":
                value = value.astype(np.dtype(f"i{dtype.itemsize}"))
            value = value.view(f"u{value.dtype.itemsize}").astype(dtype, copy=False)
        if value.shape != (self.count,):
            value = np.broadcast_to(value, self.count)
        if active is not ALL:
            before = self._registers.get(operand.name)
            if before is None:  # all ones: a NaN, and no address
                before = np.full(self.count, np.iinfo(dtype).max if dtype != bool else True, dtype)
            value = np.where(active, value, before)
        self._registers[operand.name] = value

    # Instructions.

    def _step(self, instruction: Instruction) -> Callable[[Mask], None]:
        """What executes an instruction for those threads that are active.

        Raises:
            UnknownInstructionError: nothing here does.
        """
        opcode, operands = instruction.opcode, instruction.operands
        if (rule := RULES.get(opcode)) and not any(isinstance(x, Pack) for x in operands):
            return lambda active: self._scalar(rule, operands, active)
        for prefix, method in (
            ("bra", None), ("ret", None), ("mov.b32", self._repack), ("ld.param.", self._parameter), ("ld.global.", self._load),
            ("st.global.", self._store), ("ld.shared.", self._load), ("st.shared::cta.", self._store),
            ("ldmatrix.sync.aligned.m8n8.", self._load_matrices), ("cp.async.ca.shared.global", self._copy),
            ("cp.async.cg.shared.global", self._copy), ("cp.async.commit_group", self._commit),
            ("cp.async.wait_group", self._wait), ("bar.sync", self._barrier), ("bar.warp.sync", self._warp_barrier),
            ("shfl.sync.bfly.b32", self._shuffle), ("shfl.sync.idx.b32", self._shuffle),
            ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", self._multiply),
            ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", self._multiply),
            ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", self._multiply),
        ):  # fmt: skip
            if opcode.startswith(prefix) if prefix.endswith(".") else opcode in (prefix, f"{prefix}.uni"):
                return (lambda active: method(opcode, operands, active)) if method else lambda active: None
        raise UnknownInstructionError(self._where(instruction, "the emulator does not know this instruction"))

    def _chosen(self, active: Mask) -> np.ndarray:
        return self._thread if active is ALL else np.flatnonzero(active)

    def _of(self, operand: Operand, dtype: str, threads: np.ndarray) -> np.ndarray:
        """[n] numbers of these threads."""
        value = self._read(operand, np.dtype(dtype))
        if len(value) != self.count:
            return np.full(len(threads), value[0])
        return value if len(threads) == self.count else value[threads]

    def _addresses(self, operand: Operand, dtype: str, threads: np.ndarray) -> np.ndarray:
        assert isinstance(operand, Address)
        return self._of(operand.base, dtype, threads) + np.dtype(dtype).type(operand.offset % (1 << 32))

    def _whole_warps(self, active: Mask) -> None:
        """`.sync.aligned`: all threads of a warp execute the instruction together."""
        if active is not ALL:
            some = warp.lanes(active).any(1).repeat(32)
            require(active | ~some, self._thread, "is not there when the rest of its warp is")

    def _scalar(self, rule: Rule, operands: tuple[Operand, ...], active: Mask) -> None:
        values = (self._read(x, dtype) for x, dtype in zip(operands[1:], rule.operands, strict=True))
        self._write(operands[0], rule.function(*values).astype(rule.result, copy=False), active)

    def _repack(self, _: str, operands: tuple[Operand, ...], active: Mask) -> None:
        """One register of 32 bits as two of 16, the lower half first."""
        to, given = operands
        halves = np.dtype(np.uint16)
        if isinstance(given, Pack):
            low, high = (np.broadcast_to(self._read(part, halves), self.count) for part in given.parts)
            self._write(to, low.astype(np.uint32) | (high.astype(np.uint32) << 16), active)
        else:
            assert isinstance(to, Pack)
            value = np.broadcast_to(self._read(given, np.dtype(np.uint32)), self.count)
            for part, shift in zip(to.parts, (0, 16), strict=True):
                self._write(part, (value >> shift).astype(np.uint16), active)

    def _parameter(self, opcode: str, operands: tuple[Operand, ...], active: Mask) -> None:
        dtype, place = TYPES[opcode.rpartition(".")[2]], operands[1]
        assert isinstance(place, Address)
        value = self._arguments[place.base.name]
        if isinstance(value, float):
            self._write(operands[0], np.array([value], np.float32), active)
        else:
            self._write(operands[0], np.array([value], np.int64).astype(dtype), active)

    def _load(self, opcode: str, operands: tuple[Operand, ...], active: Mask) -> None:
        kind, count = width_and_count(opcode)
        dtype, threads = TYPES[kind], self._chosen(active)
        if opcode.startswith("ld.shared"):
            values = self._shared.load(threads, self._addresses(operands[1], "u4", threads), dtype.itemsize, count)
        else:
            address = self._addresses(operands[1], "u8", threads)
            values = self._global.load(threads, self._block[threads], address, dtype.itemsize, count)
        parts = operands[0].parts if isinstance(operands[0], Pack) else operands[:1]
        for part, column in zip(parts, values.T, strict=True):
            self._write(part, self._spread(column, threads), active)

    def _spread(self, values: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Numbers of some threads among those of all."""
        if len(threads) == self.count:
            return np.ascontiguousarray(values)
        every = np.zeros(self.count, values.dtype)
        every[threads] = values
        return every

    def _store(self, opcode: str, operands: tuple[Operand, ...], active: Mask) -> None:
        dtype, threads = TYPES[width_and_count(opcode)[0]], self._chosen(active)
        parts = operands[1].parts if isinstance(operands[1], Pack) else operands[1:]
        values = np.stack([self._of(part, f"u{dtype.itemsize}", threads) for part in parts], 1)
        if opcode.startswith("st.shared"):
            self._shared.store(threads, self._addresses(operands[0], "u4", threads), values)
        else:
            self._global.store(threads, self._block[threads], self._addresses(operands[0], "u8", threads), values)

    def _load_matrices(self, opcode: str, operands: tuple[Operand, ...], active: Mask) -> None:
        self._whole_warps(active)
        threads, transposed = self._chosen(active), ".trans" in opcode
        to = operands[0]
        assert isinstance(to, Pack)
        address = self._addresses(operands[1], "u4", threads)
        held = warp.lanes(address)[:, : 8 * len(to.parts)]
        require(held.ravel() % 16 == 0, warp.lanes(threads)[:, : held.shape[1]].ravel(), "has a row that is no multiple of 16 bytes")
        for i, part in enumerate(to.parts):
            places = warp.matrix_rows(address, i, transposed)
            halves = [self._shared.load(threads, place, 4 // len(places), 1)[:, 0] for place in places]
            value = halves[0] if not transposed else halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << 16)
            self._write(part, self._spread(value, threads), active)

    def _copy(self, _: str, operands: tuple[Operand, ...], active: Mask) -> None:
        """`cp.async`: size bytes, or zeros where the fourth operand says that none are read."""
        to, given, size, read = operands
        assert isinstance(size, Literal)
        threads = self._chosen(active)
        reads = self._of(read, "u4", threads)
        require((reads == size.value) | (reads == 0), threads, "copies a part")
        values = np.zeros((len(threads), size.value // 4), np.uint32)
        some = reads > 0
        address = self._addresses(given, "u8", threads[some])
        values[some] = self._global.load(threads[some], self._block[threads[some]], address, 4, size.value // 4)
        self._copies.start(threads, self._addresses(to, "u4", threads), values)

    def _commit(self, _: str, operands: tuple[Operand, ...], active: Mask) -> None:
        self._copies.commit(self._chosen(active))

    def _wait(self, _: str, operands: tuple[Operand, ...], active: Mask) -> None:
        (but,) = operands
        assert isinstance(but, Literal)
        self._copies.wait(self._chosen(active), but.value)

    def _barrier(self, _: str, operands: tuple[Operand, ...], active: Mask) -> None:
        assert operands == (Literal(0),), operands
        here = np.ones(self.count, bool) if active is ALL else active
        blocks = np.unique(self._block[here])
        waits = np.isin(self._block, blocks) & self._live
        require(here | ~waits, self._thread, "is elsewhere when the rest of its block is at a barrier")
        self._shared.barrier(blocks)

    def _warp_barrier(self, _: str, operands: tuple[Operand, ...], active: Mask) -> None:
        self._whole_warps(active)
        self._shared.warp_barrier(np.unique(self._chosen(active) // 32))

    def _shuffle(self, opcode: str, operands: tuple[Operand, ...], active: Mask) -> None:
        to, given, by, clamp, members = operands
        assert isinstance(clamp, Literal)
        assert members == Literal(-1)
        self._whole_warps(active)
        value, lane = (np.broadcast_to(self._read(x, np.dtype(np.uint32)), self.count) for x in (given, by))
        self._write(to, warp.shuffle(opcode.split(".")[2], value, lane, clamp.value), active)

    def _multiply(self, opcode: str, operands: tuple[Operand, ...], active: Mask) -> None:
        self._whole_warps(active)
        threads = self._chosen(active)
        parts = [[self._of(x, "u4", threads) for x in operand.parts] for operand in operands[1:] if isinstance(operand, Pack)]
        a, b, c = parts
        to = operands[0]
        assert isinstance(to, Pack)
        results = warp.multiply(opcode.split(".")[-2], a, b, [x.view(np.float32) for x in c])
        for part, result in zip(to.parts, results, strict=True):
            self._write(part, self._spread(result, threads), active)


def run(kernel: Kernel, grid: tuple[int, int], shared: int, arguments: Sequence[Any], extents: list[tuple[int, int]]) -> None:
    """One launch, on the memory of this process."""
    Machine(kernel, grid, shared, arguments, extents).run()
