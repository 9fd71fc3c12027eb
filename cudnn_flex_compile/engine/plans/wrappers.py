"""The ways to a gradient of the log-sum-exp around a plan without one, by name.

Knows nothing of how they work.
"""

from cudnn_flex_compile.engine.plans.folded_output import FoldedPlan
from cudnn_flex_compile.engine.plans.widened_values import WidenedPlan
from cudnn_flex_compile.engine.plans.wrapped import WrappedPlan

WRAPPERS: dict[str, type[WrappedPlan]] = {way.NAME: way for way in (FoldedPlan, WidenedPlan)}
