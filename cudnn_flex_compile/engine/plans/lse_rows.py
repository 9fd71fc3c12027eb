"""What a plan's backward reads besides, where the log-sum-exp takes part in the loss: two float32 tensors of rows.

Knows nothing of plans. With P = exp(S - LSE), the gradient of a modified score is P * (dP - delta + dLSE): a plan adds
exp(S - LSE) * dLSE to what cuDNN gives it, P * (dP - delta) (engine/graph/strategies/scores.py).
"""

import math

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]


def rows_of(stats: Tensor, grad_lse: Tensor | None) -> Rows:
    """(-LSE, dLSE), contiguous, in the order of ir.ROWS; nothing without a gradient of the log-sum-exp.

    Args:
        stats: the natural log-sum-exp, [B, H, Sq] or [B, H, Sq, 1], contiguous. Rows that see no key have -inf, and get
            0: all scores there are -inf, and so no infinities cancel.
        grad_lse: of the same shape, in any layout.
    """
    if grad_lse is None:
        return ()
    minus_lse = torch.nan_to_num(stats, nan=math.nan, posinf=math.inf, neginf=0.0).neg_()
    return minus_lse, grad_lse.to(torch.float32).contiguous()
