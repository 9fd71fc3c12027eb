"""Lists the attempts to build a plan of a problem, of all kinds of plans, in the order of trial.

choose.py tries them, certifies the plans, and keeps one.
"""

from cudnn_flex_compile.engine.plans.kinds import kinds
from cudnn_flex_compile.engine.plans.plan import Attempt
from cudnn_flex_compile.engine.problem import Problem


def attempts(problem: Problem) -> list[Attempt]:
    """The attempts to build a plan of a problem, in the order of trial."""
    return [attempt for kind in kinds() for attempt in kind.attempts(problem, attempts)]
