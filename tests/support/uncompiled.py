"""`uncompiled` runs eager flex_attention as it is written, for results in float64."""

import contextlib

from torch.nn.attention import flex_attention as stock


@contextlib.contextmanager
def uncompiled():
    """Eager flex_attention without a compiler of its own, which would refuse float64."""
    before = stock._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    stock._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        stock._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before
