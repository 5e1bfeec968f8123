"""The persistent decode step's sizes: what is computed at load and what the kernel is built for.

A weight matrix is cut into tiles of TILE_ROWS rows and TILE_COLUMNS columns. In a phase, a
program has tiles of one column of tiles, so it needs one slice of the vector; as many programs as
the grid has for each column divide the column's tiles among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kernels.persistent.formats import (
    EXPERT_TILES,
    ROW_BYTES,
    TILE_COLUMNS,
    TILE_ROWS,
    ExpertTiles,
)
from quant.formats import MXFP4

DENSE_ROWS = 160  # of ROW_BYTES, of a slot of the dense ring: a tile in FP8, half of one in bf16
OTHER_BYTES = 6656  # of shared memory: queries, barriers, scratch of sums over warps
PHASES = (  # of a layer, by their names in the roofline
    *("qkv", "attention", "output projection", "router", "experts gate_up", "experts down"),
)
ROUTER_COLUMNS = 128  # of the vector that one program of the router takes
DRAW_WORDS = 8  # of what a program hands in to the draw


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def padded_experts(experts: int) -> int:
    """Experts as a block of numbers."""
    return max(32, 1 << (experts - 1).bit_length())


def router_blocks(experts: int, *, fp8: bool) -> int:
    """Blocks of rows behind those of the output projection that give the experts' logits: as many
    rows for each expert as there are terms that add up to one."""
    return cdiv(_router_terms(fp8) * padded_experts(experts), TILE_ROWS)


def _router_terms(fp8: bool) -> int:
    return 3 if fp8 else 2


@dataclass(frozen=True)
class StepSizes:
    """Compile-time constants of one model on one GPU."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    experts: int
    top_k: int
    hidden: int
    vocabulary: int
    window: int
    eps: float
    limit: float
    alpha: float
    fp8: bool  # dense weights in E4M3 with a scale a row; else bf16
    programs: int
    tiles: ExpertTiles = EXPERT_TILES[MXFP4.name]  # of the experts
    dense_slots: int = 2
    lent_slots: int = 2  # more for dense weights, in the experts' ring while that is not needed
    expert_slots: int = 5
    splits: int = 16  # of the cache of a full layer
    single: int = 1024  # cached positions up to which one program reads a kv head's cache

    def __post_init__(self) -> None:
        experts = max(self.gate_up_columns, self.top_k * self.down_columns)
        phases = (self.width_columns, self.out_columns, experts, self.router_programs)
        needed = max(*phases, self.splits * self.kv_heads)
        if needed > self.programs:
            raise ValueError(f"{self.programs} processors are too few: it needs {needed}")
        if self.programs > 256:
            raise ValueError(f"{self.programs} processors are too many: the draw reads 256 at once")
        if self.norm_groups > 256 or self.logit_parts > 255:
            raise ValueError(f"a width of {self.width} is too much for it")

    # --- dense tiles
    @property
    def group(self) -> int:
        """Columns that one dense instruction multiplies."""
        return 32 if self.fp8 else 16

    @property
    def pieces(self) -> int:
        """Slots of the ring that a dense tile takes."""
        return 1 if self.fp8 else 2

    @property
    def slice_groups(self) -> int:
        """Groups that are set apart for a slice of the vector; 320 columns are 10 or 20."""
        return 16 if self.fp8 else 32

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_width

    @property
    def qkv_blocks(self) -> int:
        return cdiv(self.qkv_rows, TILE_ROWS)

    @property
    def width_columns(self) -> int:
        """Columns of dense tiles of a matrix that takes the residual."""
        return cdiv(self.width, TILE_COLUMNS)

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_width

    @property
    def out_blocks(self) -> int:
        return cdiv(self.width, TILE_ROWS)

    @property
    def out_columns(self) -> int:
        return cdiv(self.attention_width, TILE_COLUMNS)

    @property
    def padded_experts(self) -> int:
        """See the function."""
        return padded_experts(self.experts)

    @property
    def router_terms(self) -> int:
        """Rows of dense tiles that add up to what attention gives to an expert's logit."""
        return _router_terms(self.fp8)

    @property
    def logit_parts(self) -> int:
        """Contributions to an expert's logit: of parts of the residual, and of tiles, whose rows
        behind the last term are zeros."""
        rows = (self.mixed_blocks - self.out_blocks) * TILE_ROWS // self.padded_experts
        return self.router_programs + self.out_columns * rows

    @property
    def mixed_blocks(self) -> int:
        """Blocks of rows of the output projection, and those of the router behind them."""
        return self.out_blocks + router_blocks(self.experts, fp8=self.fp8)

    @property
    def qkv_tiles(self) -> int:
        return self.qkv_blocks * self.width_columns

    @property
    def out_tiles(self) -> int:
        return self.mixed_blocks * self.out_columns

    @property
    def layer_tiles(self) -> int:
        """Dense tiles of a layer."""
        return self.qkv_tiles + self.out_tiles

    @property
    def head_blocks(self) -> int:
        return cdiv(self.vocabulary, TILE_ROWS)

    # --- experts' tiles
    @property
    def gate_up_blocks(self) -> int:
        return cdiv(2 * self.hidden, TILE_ROWS)

    @property
    def gate_up_columns(self) -> int:
        return cdiv(self.width, TILE_COLUMNS)

    @property
    def gate_up_given(self) -> int:
        """Blocks of the chosen experts' gate_up that every program has: two thirds of an even
        share. The others go to who is ready for more, because memory does not serve all alike."""
        return 2 * self.top_k * self.gate_up_blocks // (3 * (self.programs // self.gate_up_columns))

    @property
    def told_slots(self) -> int:
        """Of the ring in which a program's claims stand: those on the way, and the end."""
        return 1 << (self.expert_slots + 1).bit_length()

    @property
    def down_blocks(self) -> int:
        return cdiv(self.width, TILE_ROWS)

    @property
    def down_columns(self) -> int:
        return cdiv(self.hidden, TILE_COLUMNS)

    @property
    def gate_up_tiles(self) -> int:
        """Of one expert."""
        return self.gate_up_blocks * self.gate_up_columns

    @property
    def down_tiles(self) -> int:
        return self.down_blocks * self.down_columns

    @property
    def expert_tiles(self) -> int:
        return self.gate_up_tiles + self.down_tiles

    # --- other phases
    @property
    def router_programs(self) -> int:
        return cdiv(self.width, ROUTER_COLUMNS)

    @property
    def norm_groups(self) -> int:
        """Parts of the residual whose squares are published in the first phase of a layer."""
        return self.width_columns * (TILE_COLUMNS // self.group)

    @property
    def most_blocks(self) -> int:
        """Blocks of rows of the output projection that a program can have, rounded up to a power
        of two."""
        most = cdiv(self.mixed_blocks, self.programs // self.out_columns)
        return 1 << (most - 1).bit_length()

    @property
    def hidden_scale(self) -> float:
        """A power of two that brings an expert's activations, limit * (limit + 1) at most, to what
        E4M3 holds, which is 448."""
        return 2.0 ** math.floor(math.log2(448 / (self.limit * (self.limit + 1.0))))

    @property
    def heads_per_kv(self) -> int:
        return self.heads // self.kv_heads

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        rings = self.dense_slots * DENSE_ROWS + self.expert_slots * sum(self.tiles.boxes)
        slices = self.slice_groups * 256
        return rings * ROW_BYTES + slices + 2 * self.most_blocks * TILE_ROWS * 4 + OTHER_BYTES

    @property
    def slots_for_dense(self) -> int:
        """Slots of the experts' ring that hold as much as one of the dense ring."""
        return 128 // self.tiles.boxes[0]

    @property
    def dense_pool(self) -> int:
        """The dense ring in slots of the experts' ring, which stands behind it."""
        return self.dense_slots * self.slots_for_dense

    @property
    def all_slots(self) -> int:
        """Of both rings, in slots of the experts'."""
        return self.dense_pool + self.expert_slots

    @property
    def head_slices_bytes(self) -> int:
        """Of the whole vector as the head takes it, which stands where experts' tiles did."""
        return self.width_columns * self.slice_groups * 256

    def with_rings(self, shared_bytes: int) -> StepSizes:
        """The same with as many slots as fit into this much shared memory of a program.

        Three slots of the dense ring and one lent are faster than two and two where they fit.
        """
        for dense, lent in ((3, 1), (2, 2)):
            least = max(
                4 if self.tiles.bits == 4 else 3,
                lent * self.slots_for_dense + 1,  # the last one is attention's
                cdiv(self.head_slices_bytes, self.tiles.boxes[0] * ROW_BYTES),
            )
            for experts in range(2 * least, least - 1, -1):
                sizes = replace(self, dense_slots=dense, lent_slots=lent, expert_slots=experts)
                if sizes.shared_bytes <= shared_bytes:
                    return sizes
        raise ValueError(f"a program needs more than {shared_bytes} bytes of shared memory")
