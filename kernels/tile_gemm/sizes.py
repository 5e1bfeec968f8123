"""The grouped GEMM's sizes, all known when it is compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kernels.persistent.formats import TILE_COLUMNS, TILE_ROWS, ExpertTiles

STEP_COLUMNS = 64  # of the weights and of x, multiplied at once
STEPS = TILE_COLUMNS // STEP_COLUMNS
CONSUMERS = 2  # groups of four warps, each with a tile of its own
# Of barriers, and in which the compiler lets threads exchange what they have summed.
_OTHER_BYTES = 17 << 10


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
    tile_slots: int = 0

    @property
    def across(self) -> int:
        """Tiles side by side."""
        return -(-self.columns // TILE_COLUMNS)

    @property
    def down(self) -> int:
        """Tiles one below the other."""
        return -(-self.rows // TILE_ROWS)

    @property
    def groups(self) -> int:
        """Of tiles one below the other that a program multiplies at once."""
        return -(-self.down // CONSUMERS)

    @property
    def x_bytes(self) -> int:
        """Of a slot: one step's columns of a block."""
        return self.block_rows * STEP_COLUMNS * 2

    @property
    def words_rows(self) -> int:
        """Rows of 256 bytes that are copied for a tile's words."""
        return self.tiles.boxes[2]

    @property
    def tile_bytes(self) -> int:
        """Of a tile in a slot."""
        return self.tiles.code_bytes + self.words_rows * 256

    @property
    def shared_bytes(self) -> int:
        """What a program needs."""
        tiles = CONSUMERS * self.tile_slots * self.tile_bytes
        return self.x_slots * self.x_bytes + tiles + _OTHER_BYTES

    def with_rings(self, shared_bytes: int) -> GemmSizes:
        """Rings that fit: two tiles a consumer, three if eight steps of x still fit beside them."""
        for tile_slots in (3, 2):
            rings = CONSUMERS * tile_slots * self.tile_bytes + _OTHER_BYTES
            x_slots = min((shared_bytes - rings) // self.x_bytes, 12)
            if x_slots >= 8 or tile_slots == 2:
                break
        assert x_slots >= 2, (self, shared_bytes)
        return replace(self, x_slots=x_slots, tile_slots=tile_slots)
