"""The two float32 tensors of rows that a plan's backward also reads where the log-sum-exp takes part in the loss.

With P = exp(S - LSE), the gradient of a modified score is P * (dP - delta + dLSE). cuDNN gives P * (dP - delta), and a
graph adds exp(S - LSE) * dLSE to it (engine/graph/strategies/scores.py).
"""

import math

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]


def rows_of(stats: Tensor, grad_lse: Tensor | None) -> Rows:
    """(-LSE, dLSE), contiguous, in the order of ir.ROWS; nothing without a gradient of the log-sum-exp.

    Args:
        stats: the natural log-sum-exp, [B, H, Sq] or [B, H, Sq, 1], contiguous. Rows that see no key have -inf, and get
            0: all scores there are -inf, so that no infinities cancel.
        grad_lse: a tensor of the same shape, in any layout.
    """
    if grad_lse is None:
        return ()
    minus_lse = torch.nan_to_num(stats, nan=math.nan, posinf=math.inf, neginf=0.0).neg_()
    return minus_lse, grad_lse.to(torch.float32).contiguous()
