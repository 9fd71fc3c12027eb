"""What is measured: ways to run a call, head dims, kinds of score and lengths, and how much work each is.

Imports nothing that takes long.
"""

from dataclasses import dataclass

DIMS = (64, 128, 256)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ROWS = 2**18  # of all heads and batch entries together: enough to fill the device
PLAIN, CAPPED = SCORES = ("plain", "capped")
INDUCTOR, GRAPH, TILE_LIST = "inductor", "graph", "tile_list"
# The options that have the backend run a causal call in this way; None for Inductor's own kernel.
WAYS: dict[str, dict[str, dict[str, str] | None]] = {
    PLAIN: {INDUCTOR: None, GRAPH: {"strategy": "native"}, TILE_LIST: {"strategy": "tile_lists"}},
    CAPPED: {INDUCTOR: None, GRAPH: {"strategy": "chained"}},
}
HEADS = 16
CAP = 30.0


@dataclass(frozen=True, slots=True)
class Cell:
    """A causal call."""

    dim: int
    length: int

    @property
    def batch(self) -> int:
        return max(1, ROWS // (HEADS * self.length))

    @property
    def tflop(self) -> float:
        """Of the two products of a forward, on the blocks of 128 x 128 that have a visible pair."""
        blocks = self.length // 128
        return 4 * self.dim * self.batch * HEADS * 128 * 128 * (blocks * (blocks + 1) / 2) / 1e12
