"""The number formats of experts that the persistent step multiplies, and their tiles.

A new format that is made of these needs a row in EXPERT_TILES; else also its packing (pack.py) and
its products (multiply.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from quant.formats import FP8_BLOCK128, FP8_BLOCK128_E8M0, FP8_ROW, MXFP4, MXFP8, NVFP4

TILE_ROWS = 128
TILE_COLUMNS = 320
CHUNK_BYTES = 4096  # of a tile's codes: 128 rows of 32 bytes
ROW_BYTES = 256  # in which tiles are counted


@dataclass(frozen=True)
class ExpertTiles:
    """What stands in a tile of 128 rows and 320 columns: codes, then words of each row."""

    bits: int  # of a code: 4 for E2M1, 8 for E4M3
    scales: str  # "e8m0": of 32 columns; "e4m3": of 16, and fp32 of a row; "fp32": of 64 and a row
    words: int  # of a row: its scales and its bias
    unscale: float  # the value of a code times that of a scale, as the kernel reads both

    @property
    def chunks(self) -> int:
        """Of codes: 64 columns with 4 bits, 32 with 8."""
        return TILE_COLUMNS * self.bits // 256

    @property
    def scale_columns(self) -> int:
        """That share a scale."""
        return {"e8m0": 32, "e4m3": 16, "fp32": 64}[self.scales]

    @property
    def bias_words(self) -> slice:
        """Of a row's words, those whose upper half is the bias."""
        return slice(4, 6) if self.scales == "e4m3" else slice(2, 3)

    @property
    def code_bytes(self) -> int:
        return self.chunks * CHUNK_BYTES

    @property
    def bytes(self) -> int:
        """Of a tile."""
        return self.code_bytes + self.words * TILE_ROWS * 4

    @property
    def rows(self) -> int:
        """Of ROW_BYTES, of a tile."""
        return self.bytes // ROW_BYTES

    @property
    def boxes(self) -> tuple[int, int, int]:
        """Rows of ROW_BYTES that are copied together: two of codes, and those of the words, where
        a power of two may bring rows of the next tile along."""
        words = 8 if self.words <= 4 else 16
        return (64, 16, words) if self.bits == 4 else (128, 32, words)


# E2M1 codes are multiplied as E4M3 with 2^-6 in front, scales in E4M3 as fp32 with 2^-8.
_E8M0, _FP32 = ExpertTiles(8, "e8m0", 3, 1.0), ExpertTiles(8, "fp32", 3, 1.0)
EXPERT_TILES = {
    MXFP4.name: ExpertTiles(4, "e8m0", 3, 2.0**6),
    NVFP4.name: ExpertTiles(4, "e4m3", 7, 2.0**14),
    MXFP8.name: _E8M0,
    FP8_ROW.name: _FP32,
    FP8_BLOCK128.name: _FP32,
    FP8_BLOCK128_E8M0.name: _FP32,
}
