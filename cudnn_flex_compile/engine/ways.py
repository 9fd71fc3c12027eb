"""The ways to a gradient of the log-sum-exp around a plan without one, by name.

Knows nothing of how they work.
"""

from cudnn_flex_compile.engine.around import Around
from cudnn_flex_compile.engine.folded import FoldedPlan
from cudnn_flex_compile.engine.wide import WidePlan

WAYS: dict[str, type[Around]] = {way.NAME: way for way in (FoldedPlan, WidePlan)}
