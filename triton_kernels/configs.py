"""Block sizes, by operator, kind of product and compute capability. No autotuning: it needs a device when kernels are loaded."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows, columns and depth of a tile of a product; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


#: First product of `zplus_linear` (rows × outs over ins). "float32" keeps three operands of 4 bytes in shared memory.
SHARES = {
    "float32": {80: Tile(64, 64, 32, 4, 2), 90: Tile(64, 128, 32, 8, 2), 120: Tile(64, 64, 32, 4, 2)},
    "bfloat16": {80: Tile(64, 128, 32, 8, 3), 90: Tile(128, 128, 64, 8, 3), 120: Tile(64, 128, 32, 8, 3)},
    "float8": {80: Tile(64, 128, 64, 8, 3), 90: Tile(128, 128, 64, 8, 3), 120: Tile(64, 128, 64, 8, 2)},
}

#: Second product of `zplus_linear` (rows × ins over outs): three accumulators.
BACK = {
    "float32": {80: Tile(32, 64, 32, 4, 2), 90: Tile(64, 64, 32, 8, 2), 120: Tile(32, 64, 32, 4, 2)},
    "bfloat16": {80: Tile(64, 64, 32, 8, 3), 90: Tile(64, 128, 64, 8, 3), 120: Tile(64, 64, 32, 8, 2)},
    "float8": {80: Tile(64, 64, 32, 8, 2), 90: Tile(64, 128, 64, 8, 2), 120: Tile(64, 64, 32, 8, 2)},
}

#: `attention_relevance`, by padded head size: m queries and n keys at a time; k is not used.
ATTENTION = {
    16: {80: Tile(64, 64, 0, 4, 2)},
    32: {80: Tile(64, 64, 0, 4, 2), 120: Tile(32, 64, 0, 4, 2)},
    64: {80: Tile(32, 64, 0, 4, 2), 90: Tile(64, 64, 0, 8, 2), 120: Tile(32, 32, 0, 4, 1)},
    128: {80: Tile(32, 32, 0, 8, 1), 90: Tile(32, 32, 0, 8, 2), 120: Tile(16, 32, 0, 4, 1)},
}


def of(table: dict[int, Tile], capability: int) -> Tile:
    """The entry of the newest capability that is not newer than this one."""
    return table[max(known for known in table if known <= capability)]
