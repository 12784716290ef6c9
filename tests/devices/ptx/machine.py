"""A launch of a kernel: all threads of all blocks side by side, registers as arrays of bits, one number per thread.

Threads that take different branches are executed one group after the other, the one that is furthest behind first: as code lies
in its order, they meet again where their ways do. What depends on that order is a race, and found as one (`memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.devices.ptx.faults import Fault, PtxError, require
from tests.devices.ptx.memory import Copies, Global, Shared
from tests.devices.ptx.parse import Address, Instruction, Kernel, Literal, Operand, Register, Symbol

#: Registers by the letters of their names.
REGISTERS = {"p": np.dtype(bool), "rs": np.dtype(np.uint16), "r": np.dtype(np.uint32), "rd": np.dtype(np.uint64)}

#: Instructions of one launch; more is a loop without end.
MOST = 100_000

#: Which threads execute an instruction: a mask, or None for all.
Mask = np.ndarray | None
ALL: Mask = None

#: What carries out an instruction for some threads.
Step = Callable[["Machine", Mask], None]


class Machine:
    """A launch.

    Args:
        kernel: what to run
        steps: what carries out each of its instructions
        grid: blocks in x and y
        shared: bytes of shared memory of a block
        grains: bytes of the narrowest access to global and to shared memory
        arguments: by parameter, an integer or a float; of a tensor its address
        extents: first byte of every buffer that the launch was given, and the one behind its last
    """

    def __init__(
        self,
        kernel: Kernel,
        steps: Sequence[Step],
        grid: tuple[int, int],
        shared: int,
        grains: tuple[int, int],
        arguments: Sequence[int | float],
        extents: list[tuple[int, int]],
    ) -> None:
        self._kernel, self._steps = kernel, steps
        self.arguments = dict(zip(kernel.parameters, arguments, strict=True))
        blocks, self._each = grid[0] * grid[1], kernel.threads
        self.count = blocks * kernel.threads
        self.thread = np.arange(self.count)
        self.block = self.thread // kernel.threads
        special = {
            "%tid.x": self.thread % kernel.threads, "%ctaid.x": self.block % grid[0], "%ctaid.y": self.block // grid[0],
            "%nctaid.x": np.full(self.count, grid[0]), "%nctaid.y": np.full(self.count, grid[1]),
        }  # fmt: skip
        self._registers = {name: x.astype(np.uint32) for name, x in special.items()}
        self.global_memory = Global(extents, grains[0])
        warp_barriers = any(instruction.opcode == "bar.warp.sync" for instruction in kernel.code)
        self.shared_memory = Shared(blocks, shared, grains[1], kernel.threads, warp_barriers)
        self.copies = Copies(self.shared_memory, self.count)
        self.live = np.ones(self.count, bool)

    def run(self) -> None:
        """Until all threads returned.

        Raises:
            PtxError: a thread did what it may not.
        """
        waiting = {0: np.ones(self.count, bool)}
        left = MOST
        with np.errstate(all="ignore"):
            while waiting:
                at = min(waiting)
                threads = waiting.pop(at)
                at, left = self._straight_on(at, threads, min(waiting, default=len(self._steps)), left)
                if at in waiting:
                    waiting[at] = waiting[at] | threads
                else:
                    self._branch(at, threads, waiting)

    def _straight_on(self, at: int, threads: np.ndarray, end: int, left: int) -> tuple[int, int]:
        """Executes up to the next branch or to `end`; where that is, and how many more instructions there may be."""
        together = ALL if threads.all() else threads
        code = self._kernel.code
        while at != end and code[at].opcode not in ("bra", "bra.uni", "ret"):
            self._execute(code[at], self._steps[at], together)
            at, left = at + 1, left - 1
            if not left:
                raise PtxError(f"{self._kernel.name}: more than {MOST} instructions")
        return at, left

    def _branch(self, at: int, threads: np.ndarray, waiting: dict[int, np.ndarray]) -> None:
        instruction = self._kernel.code[at]
        taken = self._guarded(instruction, threads)
        assert taken is not ALL
        if instruction.opcode == "ret":
            self.live &= ~taken
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

    def _execute(self, instruction: Instruction, step: Step, threads: Mask) -> None:
        try:
            active = self._guarded(instruction, threads)
            if active is ALL or active.all():
                step(self, ALL)
            elif active.any():
                step(self, active)
        except Fault as fault:
            thread = int(fault.threads[0])
            raise PtxError(
                f"{self._kernel.name}, line {instruction.line} ({instruction.source}): thread {thread % self._each} "
                f"of block {thread // self._each} {fault}: {instruction.text}"
            ) from None

    # Operands.

    def _register(self, name: str) -> np.ndarray:
        try:
            return self._registers[name]
        except KeyError:
            raise Fault(f"reads {name}, which nobody has written", self.thread[:1]) from None

    def read(self, operand: Operand, dtype: np.dtype) -> np.ndarray:
        """[threads], or [1] of what is the same for all."""
        if isinstance(operand, Register):
            value = self._register(operand.name)
            if dtype.kind == "b":
                return value
            raw = np.dtype(f"u{dtype.itemsize}")
            return (value if value.dtype == raw else value.astype(raw)).view(dtype)
        if isinstance(operand, Literal):
            raw = np.dtype(f"u{dtype.itemsize}")
            return np.array([operand.value & ((1 << 8 * dtype.itemsize) - 1)], raw).view(dtype)
        assert operand == Symbol("global_smem"), operand
        return np.zeros(1, dtype)

    def read_of(self, operand: Operand, dtype: str, threads: np.ndarray) -> np.ndarray:
        """[n] numbers of these threads."""
        value = self.read(operand, np.dtype(dtype))
        if len(value) != self.count:
            return np.full(len(threads), value[0])
        return value if len(threads) == self.count else value[threads]

    def address(self, operand: Operand, dtype: str, threads: np.ndarray) -> np.ndarray:
        """[n] addresses of these threads."""
        assert isinstance(operand, Address)
        base = self.read_of(operand.base, dtype, threads)
        return base + np.array([operand.offset], f"i{base.itemsize}").view(dtype)

    def write(self, operand: Operand, value: np.ndarray, active: Mask) -> None:
        """Of value [threads] or [1] what is of active threads; a narrower number is extended, a signed one by its sign."""
        if operand == Symbol("_"):
            return
        assert isinstance(operand, Register), operand
        dtype = REGISTERS[operand.name[1:].rstrip("0123456789")]
        if dtype.kind != "b":
            if value.dtype.itemsize < dtype.itemsize and value.dtype.kind == "i":
                value = value.astype(np.dtype(f"i{dtype.itemsize}"))
            value = value.view(f"u{value.dtype.itemsize}").astype(dtype, copy=False)
        if value.shape != (self.count,):
            value = np.broadcast_to(value, self.count)
        if active is not ALL:
            before = self._registers.get(operand.name)
            if before is None:  # all ones: a NaN, and no address
                before = np.full(self.count, True if dtype.kind == "b" else np.iinfo(dtype).max, dtype)
            value = np.where(active, value, before)
        self._registers[operand.name] = value

    def write_of(self, operand: Operand, values: np.ndarray, threads: np.ndarray, active: Mask) -> None:
        """[n] numbers of `threads`, which are those that are active."""
        if active is not ALL:
            every = np.zeros(self.count, values.dtype)
            every[threads] = values
            values = every
        self.write(operand, np.ascontiguousarray(values), active)

    def chosen(self, active: Mask) -> np.ndarray:
        """Numbers of the active threads."""
        return self.thread if active is ALL else np.flatnonzero(active)

    def whole_warps(self, active: Mask) -> None:
        """`.sync.aligned`: all threads of a warp execute the instruction together."""
        if active is not ALL:
            some = active.reshape(-1, 32).any(1).repeat(32)
            require(active | ~some, self.thread, "is not there when the rest of its warp is")
