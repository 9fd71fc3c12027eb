"""Launches a built graph with as little host work as the frontend allows.

Plans launch by it. The frontend's private names that it needs are in engine/frontend.py.
"""

from collections.abc import Sequence
from typing import Any

from cudnn_flex_compile.engine.frontend import Launch, prepared_launch, public_launch, raw_launch


def launcher(graph: Any, uids: Sequence[int]) -> Launch:
    """A function that runs the graph's selected plan on addresses given in the order of `uids`."""
    return prepared_launch(graph, uids) or raw_launch(graph, uids) or public_launch(graph, uids)
