"""The kinds of plans, in the order in which they are tried, and how a record becomes a plan of its kind.

A new kind is one entry here. The kinds are imported when a plan is wanted, because some import cudnn.
"""

import functools

from cudnn_flex_compile.engine.plans.plan import Plan, Record
from cudnn_flex_compile.engine.problem import Problem, problem_text


@functools.cache
def kinds() -> tuple[type[Plan], ...]:
    """All kinds, imported now."""
    from cudnn_flex_compile.engine.plans.box_plan import BoxPlan
    from cudnn_flex_compile.engine.plans.folded_output import FoldedPlan
    from cudnn_flex_compile.engine.plans.graph_plan import GraphPlan
    from cudnn_flex_compile.engine.tiles.plan import TilePlan

    return TilePlan, FoldedPlan, BoxPlan, GraphPlan


def restore(problem: Problem, record: Record) -> Plan:
    """The recorded plan of a problem, on the current device.

    Raises ValueError for a record of another problem (our code cannot have changed, but be sure), or one that cannot be
    used.
    """
    if record.problem != problem_text(problem):
        raise ValueError("it is for another problem")
    kind = next((kind for kind in kinds() if record.kind == kind.KIND), None)
    if kind is None:
        raise ValueError(f"it is of a kind that there is not: {record.kind!r}")
    try:
        return kind.from_record(problem, record, restore)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its record is none of {record.kind}: {type(error).__name__}: {error}") from error
