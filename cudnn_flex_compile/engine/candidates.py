"""What builds a plan of a problem: the attempts of all kinds of plans, in the order of trial.

Knows nothing of whether a plan is right, nor of which one is kept.
"""

from cudnn_flex_compile.engine.plans.kinds import kinds
from cudnn_flex_compile.engine.plans.plan import Attempt
from cudnn_flex_compile.engine.problem import Problem


def attempts(problem: Problem) -> list[Attempt]:
    """What builds a plan of a problem, in the order of trial."""
    return [attempt for kind in kinds() for attempt in kind.attempts(problem, attempts)]
