"""The grid of a calibration: ways to run a call, kinds of calls, head dims and lengths, and the work of each."""

from dataclasses import dataclass

from cudnn_flex_compile.passes.decide.device_times import (
    CAPPED,
    CHAINED,
    INDUCTOR,
    MASKED,
    NATIVE,
    PLAIN,
    TILE_LISTS,
)  # fmt: skip

DIMS = (64, 128, 256)
LENGTHS = (512, 2048, 8192)
ROWS = 2**18  # query rows of all heads and batch entries together: enough to fill the device
# The ways that are measured for each kind.
WAYS = {PLAIN: (INDUCTOR, NATIVE, CHAINED, TILE_LISTS), CAPPED: (INDUCTOR, CHAINED), MASKED: (INDUCTOR,)}
HEADS, BLOCK = 16, 128
CAP = 30.0


@dataclass(frozen=True, slots=True)
class Cell:
    """A call."""

    kind: str
    dim: int
    length: int

    @property
    def batch(self) -> int:
        return max(1, ROWS // (HEADS * self.length))

    @property
    def tflop(self) -> float:
        """The TFLOP of the two products of a forward, on the blocks of 128 x 128 that have a visible pair."""
        rows = self.length // BLOCK
        blocks = rows * rows if self.kind == MASKED else rows * (rows + 1) / 2
        return 4 * self.dim * self.batch * HEADS * BLOCK * BLOCK * blocks / 1e12
