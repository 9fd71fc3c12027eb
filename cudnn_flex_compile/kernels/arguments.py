"""The program of a call and what it reads besides queries, keys and values, as one value.

Kernels that run for milliseconds take it. The way to a plan does not: making it takes the host 0.4 us a call, and
handing the five on 0.03 us. The two names below are attributes of tensors, by which the host hands on what it knows.
It may import torch alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

HANDLE = "_cudnn_flex_tiles"  # of the handle of a list of tiles (tile_lists.py)
ANSWER = "_cudnn_flex_answer"  # of the guard of a BlockMask (block_mask_contract.py)


class Arguments(NamedTuple):
    """The arguments that all ops on a program share.

    Attributes:
        operands: broadcastable to [B, Hq, Sq, Skv], in the order of the program.
        ints, floats: its scalars; the floats are 0-d host tensors.
        program: canonical text.
        scale: multiplies q . k before the program.
    """

    operands: Sequence[Tensor]
    ints: Sequence[int]
    floats: Sequence[Tensor]
    program: str
    scale: float
