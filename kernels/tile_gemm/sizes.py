"""The grouped GEMM's sizes, all known when it is compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kernels.persistent.formats import ROW_BYTES, TILE_COLUMNS, TILE_ROWS, ExpertTiles

STEP_COLUMNS = 64  # of the weights and of x, multiplied at once
STEPS = TILE_COLUMNS // STEP_COLUMNS
CONSUMERS = 3  # groups of four warps
_BARRIER_BYTES = 1 << 10  # of all rings
# In which the threads of a consumer exchange what they have summed, by the bits of a code.
_EXCHANGE_BYTES = {4: 8 << 10, 8: 12 << 10}


@dataclass(frozen=True)
class GemmSizes:
    """One half of a layer's experts, and how much of it a program has in flight."""

    rows: int  # of an expert's matrix
    columns: int
    experts: int
    tiles_per_expert: int
    first_tile: int
    tiles: ExpertTiles
    block_rows: int  # (token, slot) pairs in a block: 64 or 128
    out_columns: int  # from one row of the output to the next
    gated: bool  # whether gate and up rows alternate and give one activation
    limit: float | None
    alpha: float
    offset: float
    programs: int
    x_slots: int = 0
    unit_slots: int = 0

    @property
    def across(self) -> int:
        """Tiles side by side."""
        return -(-self.columns // TILE_COLUMNS)

    @property
    def down(self) -> int:
        """Tiles one below the other."""
        return -(-self.rows // TILE_ROWS)

    @property
    def unit_rows(self) -> int:
        """Rows of weights that a consumer multiplies at once, 64 or 128: a thread has 64 sums."""
        return TILE_ROWS if self.block_rows == 64 and self.tiles.bits == 4 else TILE_ROWS // 2

    @property
    def units(self) -> int:
        """Of those rows."""
        return -(-self.rows // self.unit_rows)

    @property
    def groups(self) -> int:
        """Of units one below the other that a program multiplies at once."""
        return -(-self.units // CONSUMERS)

    @property
    def chunk_rows(self) -> int:
        """Rows of 256 bytes of a unit's codes in 64 columns with 4 bits, in 32 with 8."""
        return self.unit_rows // 8

    @property
    def x_bytes(self) -> int:
        """Of a slot: one step's columns of a block."""
        return self.block_rows * STEP_COLUMNS * 2

    @property
    def words_rows(self) -> int:
        """Rows of 256 bytes that are copied for a tile's words."""
        return self.tiles.boxes[2]

    @property
    def unit_bytes(self) -> int:
        """Of a unit of a tile in a slot: its codes and all words of the tile."""
        return (self.tiles.chunks * self.chunk_rows + self.words_rows) * ROW_BYTES

    @property
    def shared_bytes(self) -> int:
        """What a program needs."""
        consumer = self.unit_slots * self.unit_bytes + _EXCHANGE_BYTES[self.tiles.bits]
        return CONSUMERS * consumer + self.x_slots * self.x_bytes + _BARRIER_BYTES

    def with_rings(self, shared_bytes: int) -> GemmSizes:
        """Rings that fit: two units a consumer, three if six steps of x still fit beside them."""
        for unit_slots in (3, 2):
            rest = shared_bytes - replace(self, x_slots=0, unit_slots=unit_slots).shared_bytes
            x_slots = min(rest // self.x_bytes, 12)
            if x_slots >= 6 or unit_slots == 2:
                break
        assert x_slots >= 2, (self, shared_bytes)
        return replace(self, x_slots=x_slots, unit_slots=unit_slots)
