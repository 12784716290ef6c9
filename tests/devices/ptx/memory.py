"""Global and shared memory with what a device does not tell: bounds, alignment, what was never written, and races.

"PTX ISA", Memory Consistency Model: without a barrier between them, nothing orders what one thread writes and another reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np

from tests.devices.ptx.faults import require

#: Of a place that nobody, or several, accessed since the last barrier.
NOBODY, SEVERAL = -1, -2


class Races:
    """Who wrote and who read each place since the last barrier; whoever it is: warps, threads or blocks."""

    def __init__(self, places: int, who: str) -> None:
        self.writer = np.full(places, NOBODY, np.int32)
        self.reader = np.full(places, NOBODY, np.int32)
        self._who = who

    def read(self, at: np.ndarray, unit: np.ndarray, threads: np.ndarray) -> None:
        """Places `at`, read by `unit`.

        Raises:
            Fault: another one wrote there since.
        """
        writer = self.writer[at]
        require(
            (writer == NOBODY) | (writer == unit), threads, f"reads what another {self._who} wrote, and no barrier between"
        )
        before = self.reader[at]
        self.reader[at] = unit
        shared = (self.reader[at] != unit) | ((before != NOBODY) & (before != unit))
        self.reader[at[shared]] = SEVERAL

    def write(self, at: np.ndarray, unit: np.ndarray, threads: np.ndarray, changed: np.ndarray, lost: np.ndarray) -> None:
        """Places `at`, written by `unit`; changed: where that is not what was there before; lost: where another thread of the same
        instruction wrote something else.

        Raises:
            Fault: another one read there since, or wrote something else.
        """
        reader, writer = self.reader[at], self.writer[at]
        others = (reader != NOBODY) & (reader != unit)
        require(~others, threads, f"overwrites what another {self._who} read, and no barrier between")
        others = (writer != NOBODY) & (writer != unit)
        self.writer[at] = unit
        together = self.writer[at] != unit
        wrong = (others & changed) | (together & lost)
        require(~wrong, threads, f"writes where another {self._who} wrote something else, and no barrier between")
        self.writer[at[others | together]] = SEVERAL

    def forget(self, blocks: np.ndarray, each: int) -> None:
        """A barrier of these blocks, of `each` places."""
        for held in (self.writer, self.reader):
            held.reshape(-1, each)[blocks] = NOBODY


def places_of(first: np.ndarray, count: int) -> np.ndarray:
    """[n, count] from the first place of each."""
    return first[:, None] + np.arange(count)


class Buffer:
    """Bytes of this process that a kernel was given, in places of `grain` bytes as far as races go."""

    def __init__(self, start: int, end: int, grain: int) -> None:
        self.start, self.end = start, end
        self.aligned = start - start % 16
        self.bytes = np.frombuffer((ctypes.c_ubyte * (end - self.aligned)).from_address(self.aligned), np.uint8)
        self.races = Races(-(-len(self.bytes) // grain), "block")

    def numbers(self, width: int) -> np.ndarray:
        """The bytes as numbers of `width` bytes; what is left at the end holds none."""
        return self.bytes[: len(self.bytes) // width * width].view(f"u{width}")


class Global:
    """The buffers of a launch at the addresses that they have in this process. Blocks have no barriers between them."""

    def __init__(self, extents: list[tuple[int, int]], grain: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, end in sorted(extents):
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self._buffers = [Buffer(start, end, grain) for start, end in merged]
        self._grain = grain

    def load(self, threads: np.ndarray, blocks: np.ndarray, address: np.ndarray, width: int, count: int) -> np.ndarray:
        """[n, count] numbers of `width` bytes."""
        result = np.zeros((len(threads), count), f"u{width}")
        for buffer, chosen, first in self._by_buffer(threads, address, width * count):
            result[chosen] = buffer.numbers(width)[places_of(first // width, count)]
            each = width * count // self._grain
            places = places_of(first // self._grain, each).ravel()
            buffer.races.read(places, blocks[chosen].repeat(each), threads[chosen].repeat(each))
        return result

    def store(self, threads: np.ndarray, blocks: np.ndarray, address: np.ndarray, values: np.ndarray) -> None:
        """values [n, count]."""
        width, count = values.itemsize, values.shape[1]
        for buffer, chosen, first in self._by_buffer(threads, address, width * count):
            memory, at, new = buffer.numbers(width), places_of(first // width, count), values[chosen]
            old = memory[at]
            memory[at] = new
            changed, lost = ((x != new).ravel().repeat(width // self._grain) for x in (old, memory[at]))
            each = width * count // self._grain
            places = places_of(first // self._grain, each).ravel()
            buffer.races.write(places, blocks[chosen].repeat(each), threads[chosen].repeat(each), changed, lost)

    def _by_buffer(
        self, threads: np.ndarray, address: np.ndarray, size: int
    ) -> Iterator[tuple[Buffer, np.ndarray, np.ndarray]]:
        """By buffer: which accesses of `size` bytes go to it, and the offset of the first byte of each."""
        require(address % size == 0, threads, f"an address in global memory that is no multiple of {size} bytes")
        left = np.ones(len(threads), bool)
        for buffer in self._buffers:
            chosen = (address >= buffer.start) & (address + np.uint64(size) <= buffer.end)
            if chosen.any():
                left &= ~chosen
                yield buffer, chosen, (address[chosen] - np.uint64(buffer.aligned)).astype(np.int64)
        require(~left, threads, "an address in global memory outside of all buffers of the launch")


class Shared:
    """Shared memory of all blocks, in places of `grain` bytes, the narrowest access of the kernel.

    Threads are apart until `bar.sync`, those of a warp until that or `bar.warp.sync`. A place that `cp.async` will write is in
    flight until its group was waited for: "PTX ISA", Data Movement and Conversion Instructions: Asynchronous Copy.

    Args:
        warp_barriers: whether the kernel has `bar.warp.sync`, after which warps have to be told apart from threads
    """

    def __init__(self, blocks: int, size: int, grain: int, threads_per_block: int, warp_barriers: bool) -> None:
        self._size, self._grain, self._per_block = size, grain, size // grain
        self.bytes = np.zeros(blocks * size, np.uint8)
        self._written = np.zeros(blocks * self._per_block, bool)
        self._flying = np.zeros(blocks * self._per_block, bool)
        self._threads = Races(blocks * self._per_block, "thread")
        self._warps = Races(blocks * self._per_block, "warp") if warp_barriers else None
        self._threads_per_block = threads_per_block

    def load(self, threads: np.ndarray, address: np.ndarray, width: int, count: int) -> np.ndarray:
        """[n, count] numbers of `width` bytes."""
        places, who, first = self._places(threads, address, width, count)
        require(~self._flying[places], who, "reads shared memory that a copy is on its way to: no wait for its group")
        require(self._written[places], who, "reads shared memory that nobody has written")
        if self._warps:
            self._warps.read(places, who // 32, who)
        self._threads.read(places, who, who)
        return self.bytes.view(f"u{width}")[places_of(first // width, count)]

    def store(self, threads: np.ndarray, address: np.ndarray, values: np.ndarray) -> None:
        """values [n, count]."""
        width, count = values.itemsize, values.shape[1]
        places, who, first = self._places(threads, address, width, count)
        require(~self._flying[places], who, "writes shared memory that a copy is on its way to")
        self._written[places] = True
        memory, at = self.bytes.view(values.dtype), places_of(first // width, count)
        old = memory[at]
        memory[at] = values
        changed, lost = (np.repeat((x != values).ravel(), width // self._grain) for x in (old, memory[at]))
        self._race(places, who, changed, lost)

    def take_off(self, threads: np.ndarray, address: np.ndarray, size: int) -> None:
        """A copy of `size` bytes is on its way: it may land at any time until it is waited for."""
        places, who, _ = self._places(threads, address, self._grain, size // self._grain, align=size)
        require(~self._flying[places], who, "copies to shared memory that another copy is on its way to")
        unknown = np.ones(len(places), bool)
        self._race(places, who, unknown, unknown)
        self._flying[places] = True

    def land(self, threads: np.ndarray, address: np.ndarray, values: np.ndarray) -> None:
        """It was waited for, by its own thread; to others it is there after a barrier."""
        places, _, _ = self._places(threads, address, values.itemsize, values.shape[1])
        self._flying[places] = False
        self.store(threads, address, values)

    def barrier(self, blocks: np.ndarray) -> None:
        """`bar.sync` of these blocks."""
        self._threads.forget(blocks, self._per_block)
        if self._warps:
            self._warps.forget(blocks, self._per_block)

    def warp_barrier(self, warps: np.ndarray) -> None:
        """`bar.warp.sync` of these warps: orders what only one of them touched."""
        assert self._warps
        self._threads.writer[np.isin(self._warps.writer, warps)] = NOBODY
        self._threads.reader[np.isin(self._warps.reader, warps)] = NOBODY

    def _race(self, places: np.ndarray, who: np.ndarray, changed: np.ndarray, lost: np.ndarray) -> None:
        if self._warps:
            self._warps.write(places, who // 32, who, changed, lost)
        self._threads.write(places, who, who, changed, lost)

    def _places(
        self, threads: np.ndarray, address: np.ndarray, width: int, count: int, align: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flat places of an access, which thread each belongs to, and the first byte of each access in `bytes`."""
        size = width * count
        align = align or size
        require(address % align == 0, threads, f"an address in shared memory that is no multiple of {align} bytes")
        inside = address.astype(np.int64) + size <= self._size
        require(inside, threads, f"an address in shared memory outside of its {self._size} bytes")
        first = (threads // self._threads_per_block) * self._size + address.astype(np.int64)
        places = places_of(first // self._grain, size // self._grain)
        return places.ravel(), np.repeat(threads, places.shape[1]), first


class Copies:
    """`cp.async` of all threads: what is on its way, and in which group of its thread."""

    def __init__(self, shared: Shared, threads: int) -> None:
        self._shared = shared
        self._groups = np.zeros(threads, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def start(self, threads: np.ndarray, address: np.ndarray, values: np.ndarray) -> None:
        """values [n, count] on their way to shared memory."""
        self._shared.take_off(threads, address, values.shape[1] * values.itemsize)
        self._pending.append((threads, address, values, self._groups[threads]))

    def commit(self, threads: np.ndarray) -> None:
        """What these threads started since their last group is a group."""
        self._groups[threads] += 1

    def wait(self, threads: np.ndarray, but: int) -> None:
        """All groups of these threads have landed but the last `but`."""
        waits = np.zeros(len(self._groups), bool)
        waits[threads] = True
        left = []
        for owners, address, values, group in self._pending:
            done = waits[owners] & (group < self._groups[owners] - but)
            if done.any():
                self._shared.land(owners[done], address[done], values[done])
            if not done.all():
                left.append((owners[~done], address[~done], values[~done], group[~done]))
        self._pending = left
