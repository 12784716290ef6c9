"""Block sizes, by operator, kind of product and compute capability. No autotuning: it needs a device when kernels are loaded."""

from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Tile(NamedTuple):
    """Rows, columns and depth of a tile of a product; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


#: Blocks of rows of a product that take turns at a column, so that what they read of the weight stays in the cache.
GROUP = 8

#: First product of `zplus_linear` (rows × outs over ins).
SHARES = {
    "float32": {80: Tile(64, 64, 32, 8, 2)},
    "float32, many rows": {80: Tile(128, 64, 32, 8, 2), 90: Tile(128, 64, 32, 8, 3), 120: Tile(128, 64, 32, 8, 2)},
    "split": {80: Tile(64, 64, 32, 8, 2)},
    "split, tf32": {80: Tile(64, 64, 32, 8, 2)},
    "bfloat16": {80: Tile(64, 64, 32, 8, 3), 90: Tile(64, 64, 64, 8, 3), 120: Tile(64, 64, 32, 8, 3)},
    "float8": {80: Tile(64, 64, 64, 8, 2)},
}

#: Second product of `zplus_linear` (rows × ins over outs): three accumulators. `divided`: S is formed where it is read.
BACK = {
    "float32": {
        80: Tile(64, 64, 16, 8, 2),
        86: Tile(32, 64, 16, 8, 2),
        90: Tile(64, 64, 16, 8, 2),
        120: Tile(32, 64, 16, 8, 2),
    },
    "float32, many rows": {
        80: Tile(128, 64, 16, 8, 2),
        86: Tile(32, 64, 16, 8, 2),
        90: Tile(128, 64, 32, 8, 2),
        120: Tile(32, 64, 16, 8, 2),
    },
    "float32, divided": {80: Tile(32, 64, 16, 8, 2), 90: Tile(64, 64, 16, 8, 2), 100: Tile(32, 64, 16, 8, 2)},
    "split": {80: Tile(64, 64, 16, 8, 2)},
    "split, divided": {
        80: Tile(64, 64, 16, 8, 2),
        86: Tile(32, 64, 16, 4, 2),
        90: Tile(64, 64, 16, 8, 2),
        120: Tile(32, 64, 16, 4, 2),
    },
    "split, tf32": {80: Tile(32, 64, 16, 8, 2)},
    "bfloat16": {80: Tile(64, 64, 32, 8, 2), 100: Tile(32, 64, 32, 8, 2), 120: Tile(64, 64, 32, 8, 2)},
    "float8": {80: Tile(64, 64, 32, 8, 2)},
}

#: From so many rows on layers are taken one by one, and torch's own products with passes between them may take less time than fused
#: ones: in layers with so many inputs and outputs, by how they multiply. `apart`: those whose gradient is of more outputs than
#: relevance (q, k and v), which fused kernels read in two loops. GPUs for graphics have not the memory for passes. By the bounds of
#: benchmarks/roofline.py, as `FLOAT8_WIDTHS` are.
MANY_ROWS, NEVER = 1024, 2**30
WIDE = {
    "split": {80: 768, 86: NEVER, 90: 384, 120: NEVER},
    "bfloat16": {80: 1024, 86: NEVER, 90: 512, 120: NEVER},
    "apart": {80: 384, 86: NEVER, 90: 384, 120: NEVER},
}

#: Layers prepared for float8 are multiplied in it from so many rows on where their inputs or outputs are so many: rounding rows to
#: float8 is a launch more, and torch's own products in bfloat16 of wider layers take less time.
FLOAT8_ROWS, FLOAT8_WIDTHS = MANY_ROWS, {80: range(384, 768), 120: range(256, NEVER)}


def products_first(rows: int, weight: tuple[int, ...], kind: str, apart: bool, capability: int) -> bool:
    """Whether a layer in bfloat16 is multiplied by the vendor's library; kind: "split" or "bfloat16"."""
    return rows >= MANY_ROWS and min(weight) >= of(WIDE["apart" if apart else kind], capability)


def in_float8(rows: int, weight: tuple[int, ...], capability: int) -> bool:
    """Whether a layer prepared for float8 is multiplied in it, not in bfloat16."""
    return rows >= FLOAT8_ROWS and min(weight) in of(FLOAT8_WIDTHS, capability)


#: Features of float32 heads for which torch's own products take less time than tiles, by the bounds of benchmarks/roofline.py: tiles
#: pad them to 128, products leave maps in memory, which is too slow for it on GPUs for graphics.
HEADS_BY_LIBRARY = {80: range(65, 113), 86: range(0), 90: range(65, 129), 120: range(0)}


def heads_by_library(features: int, rows: int, capability: int) -> bool:
    """Whether heads of float32 are multiplied by the vendor's library. Of few rows the launches count for more."""
    return rows >= MANY_ROWS and features in of(HEADS_BY_LIBRARY, capability)


#: Sweeps of `attention_relevance`, by how it multiplies and padded head size: m queries and n keys at a time; k is not used.
#: In float32, and under the official rules, a sweep holds lanes of one kind only, the gradient or (`… relevance`) relevance; in the
#: first block none (`… row`).
ATTENTION = {
    "tf32": {
        32: {
            "rows": {80: Tile(64, 32, 0, 8, 1), 90: Tile(64, 64, 0, 8, 1), 120: Tile(64, 32, 0, 8, 1)},
            "queries": {80: Tile(32, 32, 0, 4, 1), 90: Tile(64, 64, 0, 8, 1), 120: Tile(32, 32, 0, 4, 1)},
            "queries relevance": {80: Tile(32, 32, 0, 4, 1)},
            "keys": {80: Tile(32, 32, 0, 4, 1), 86: Tile(16, 16, 0, 2, 1)},
        },
        64: {
            "rows": {
                80: Tile(64, 32, 0, 8, 1),
                90: Tile(64, 64, 0, 4, 1),
                100: Tile(64, 64, 0, 8, 1),
                120: Tile(64, 32, 0, 8, 1),
            },
            "queries": {
                80: Tile(32, 32, 0, 4, 1),
                90: Tile(128, 32, 0, 8, 1),
                100: Tile(64, 64, 0, 8, 1),
                120: Tile(32, 32, 0, 4, 1),
            },
            "queries relevance": {80: Tile(32, 32, 0, 4, 1)},
            "keys": {80: Tile(32, 32, 0, 4, 1), 90: Tile(128, 64, 0, 8, 1), 100: Tile(16, 32, 0, 4, 1)},
            "keys relevance": {80: Tile(32, 32, 0, 4, 1), 90: Tile(16, 32, 0, 4, 1)},
        },
        128: {
            "rows": {80: Tile(32, 32, 0, 4, 1)},
            "queries": {80: Tile(32, 32, 0, 8, 1)},
            "keys": {80: Tile(32, 32, 0, 8, 1), 90: Tile(16, 32, 0, 8, 1)},
            "keys row": {80: Tile(32, 32, 0, 8, 1), 86: Tile(16, 32, 0, 8, 1)},
        },
    },
    "float32": {
        32: {
            "rows": {80: Tile(32, 32, 0, 8, 1), 120: Tile(16, 32, 0, 8, 1)},
            "queries": {80: Tile(16, 32, 0, 4, 1)},
            "queries relevance": {80: Tile(16, 32, 0, 4, 1)},
            "keys": {80: Tile(16, 16, 0, 2, 1)},
            "keys relevance": {80: Tile(32, 16, 0, 4, 1)},
        },
        64: {
            "rows": {80: Tile(32, 32, 0, 8, 1)},
            "queries": {80: Tile(16, 32, 0, 8, 1)},
            "queries relevance": {80: Tile(32, 32, 0, 8, 1), 90: Tile(16, 32, 0, 8, 1)},
            "keys": {80: Tile(16, 32, 0, 8, 1), 100: Tile(16, 16, 0, 8, 1)},
            "keys official": {80: Tile(16, 32, 0, 8, 1), 90: Tile(16, 16, 0, 8, 1)},
            "keys relevance": {80: Tile(16, 32, 0, 8, 1)},
            "keys row": {80: Tile(16, 32, 0, 8, 1)},
        },
        128: {
            "rows": {80: Tile(16, 16, 0, 8, 1)},
            "queries": {80: Tile(16, 16, 0, 8, 1)},
            "queries relevance": {80: Tile(16, 16, 0, 8, 1)},
            "keys": {80: Tile(16, 16, 0, 8, 1), 90: Tile(16, 32, 0, 8, 1)},
            "keys relevance": {80: Tile(16, 16, 0, 8, 1)},
            "keys row": {80: Tile(16, 32, 0, 8, 1)},
        },
    },
}

#: The sweeps of queries, of keys and, in float32, of the keys' relevance by programs of one launch, where there are few rows: they
#: have warps in common, and none may spill.
TOGETHER = {
    "tf32": {
        32: {
            80: (Tile(32, 32, 0, 4, 1), Tile(32, 32, 0, 4, 1)),
            86: (Tile(16, 16, 0, 4, 1), Tile(16, 16, 0, 4, 1)),
            90: (Tile(64, 64, 0, 8, 1), Tile(32, 64, 0, 8, 1)),
            120: (Tile(16, 16, 0, 4, 1), Tile(16, 16, 0, 4, 1)),
        },
        64: {80: (Tile(32, 32, 0, 4, 1), Tile(16, 32, 0, 4, 1))},
    },
    "float32": {
        32: {80: (Tile(16, 32, 0, 4, 1), Tile(16, 16, 0, 4, 1), Tile(16, 16, 0, 4, 1))},
        64: {80: (Tile(32, 32, 0, 8, 1), Tile(16, 32, 0, 8, 1), Tile(32, 32, 0, 8, 1))},
    },
}


def together(precision: str, width: int, rows: int, capability: int) -> tuple[Tile, ...] | None:
    """The tiles of all sweeps of a launch over heads padded to `width` features; None where one launch each is better."""
    by_width = TOGETHER["tf32" if precision == "tf32" else "float32"]
    if rows >= MANY_ROWS or width > max(by_width):
        return None
    return of(by_width[min(known for known in by_width if known >= width)], capability)


def product(tables: dict[str, dict[int, Tile]], kind: str, rows: int, capability: int) -> Tile:
    """The tile of a product: a larger one, which reads less per operation, where enough of them remain for every processor."""
    many = f"{kind}, many rows"
    return of(tables[many if rows >= MANY_ROWS and many in tables else kind], capability)


def of(table: dict[int, T], capability: int) -> T:
    """The entry of the newest capability that is not newer than this one."""
    return table[max(known for known in table if known <= capability)]


def attention(precision: str, width: int, sweep: str, capability: int) -> Tile:
    """The tile of a sweep over heads padded to `width` features."""
    by_width = ATTENTION["tf32" if precision == "tf32" else "float32"]
    table = by_width[min(known for known in by_width if known >= width)]
    return of(table.get(sweep) or table[sweep.split()[0]], capability)
