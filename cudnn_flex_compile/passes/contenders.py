"""`Contenders` are the ways of ours to run a call: by graphs, and by a list of its mask's tiles in some directions.

lower_call.py makes them, and lowers the call in the first way of the order that is chosen (decide/chooser.py) in which
it has certified plans. Each way is tried once.
"""

from cudnn_flex_compile.config import LISTS
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes.decide.candidate import Candidate, Lowered, plan_or_reason
from cudnn_flex_compile.passes.decide.chooser import Choice, Way, choose
from cudnn_flex_compile.passes.decide.cost_inputs import CostInputs
from cudnn_flex_compile.passes.decide.measured_times import Measuring, measurable
from cudnn_flex_compile.passes.graph_context import (
    Context,
    at_hand,
    cost_inputs_of,
    disagreement,
    given_to,
    values_of,
)  # fmt: skip
from cudnn_flex_compile.passes.read.call import example, hint
from cudnn_flex_compile.passes.read.programs import Traced
from cudnn_flex_compile.passes.write import tile_lists
from cudnn_flex_compile.passes.write.block_mask_guards import MaskProgram
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.masks.form import split

GRAPHS: Way = ()


class Contenders:
    """The ways to run one call. Inductor's kernel is none where a score_mod has dots of vectors, which it cannot read.

    Args:
        candidate: the call by graphs.
        checked: its mask_mod, with which its BlockMask is compared.
        large: the reason against graphs that need too large a bias.
    """

    def __init__(
        self, candidate: Candidate, traced: Traced, checked: MaskProgram | None, large: Reason | None, context: Context
    ) -> None:
        self._checked, self._large, self._context = checked, large, context
        self._only_faster = context.only_faster and not candidate.dots
        self._tried: dict[Way, Lowered | Reason] = {}
        self.ways = {GRAPHS: candidate, **_by_lists(candidate, traced, context)}

    def choice(self) -> Choice | None:
        """The order in which ways are tried, and why others are not; None where an option forces one."""
        context, graphs = self._context, self.ways[GRAPHS]
        if context.options.strategy is not None:
            return None
        query, facts = example(graphs.call.query), cost_inputs_of(graphs, context)
        dims = (hint(example(node).shape[3]) for node in (graphs.call.query, graphs.call.value))
        known = facts.program, facts.hoisted, graphs.fingerprint, facts.training, facts.lse_gradient, facts.sharing

        def find() -> Choice:
            inputs = {way: cost_inputs_of(candidate, context) for way, candidate in self.ways.items()}
            return choose(inputs, self._only_faster, self._measure(facts), context.options.autotune)

        given = *given_to(graphs.call), query.dtype, *dims, *known, self._only_faster
        return context.once(("choice", *given, *self.ways), find)

    def _measure(self, facts: CostInputs) -> Measuring | None:
        context, graphs = self._context, self.ways[GRAPHS]
        if not self._only_faster or context.options.tune_seconds == 0:
            return None
        if not measurable(graphs, not facts.reads_mask or at_hand(graphs.captures, context)):
            return None
        return Measuring(
            self.ways, lambda way: not isinstance(self.tried(way), Reason),
            lambda way: values_of(self.ways[way], context), facts.blocks, context.budget,
        )  # fmt: skip

    def order(self, choice: Choice | None) -> tuple[Way, ...]:
        """The ways in the order of trial."""
        by_list = [way for way, candidate in self.ways.items() if way == candidate.directions]
        if choice is None:
            return self._forced(self._context.options.strategy or "")
        # With lower="always" a list comes first where graphs would read a bias, or compute a predicate, at each pair.
        if not self._context.only_faster and split(self.ways[GRAPHS].program.mask).reads_pairs:
            return (*by_list, GRAPHS)
        return choice.order

    def _forced(self, strategy: str) -> tuple[Way, ...]:
        if strategy not in LISTS:
            return (GRAPHS,)
        listed = tuple(d for d in self.ways[GRAPHS].directions if d in LISTS[strategy])
        return (listed,) if listed and listed in self.ways else ()

    def tried(self, way: Way) -> Lowered | Reason:
        """The plans of a way, or the reason why there are none."""
        if way not in self._tried:
            self._tried[way] = self.refused(way) or plan_or_reason(self.ways[way])
        return self._tried[way]

    def refused(self, way: Way) -> Reason | None:
        """A reason against a way that needs no plan."""
        candidate, context = self.ways[way], self._context
        if way != candidate.directions and self._checked is not None:
            wrong = disagreement(candidate.call, candidate.captures, self._checked, context)
            if wrong is not None:
                return wrong
        if way == GRAPHS:
            if self._large is not None:
                return self._large
            checked = self._checked
            return None if checked is None else context.guards.unsuitable(candidate.call, checked, candidate.training)
        if context.tiles is None:
            return Reason(Code.UNSUPPORTED_CALL, "tile lists are not asked for, or CUDA graphs are captured")

        def unsuitable() -> Reason | None:
            return tile_lists.unsuitable(candidate, context.real.get, context.options.bias_budget_mb)

        known = way, candidate.program, candidate.hoisted, *candidate.captures.nodes.values()
        return context.once(("unsuitable", *given_to(candidate.call), *known), unsuitable)


def _by_lists(candidate: Candidate, traced: Traced, context: Context) -> dict[Way, Candidate]:
    """The call by a list of tiles, in all directions or in some, where there are kernels for that."""
    both = tile_lists.tiled(candidate, traced, candidate.directions)
    forced = context.options.strategy in LISTS
    if both is None or (context.tiles is None and not forced):
        return {}
    tile_lists.compile_ahead(both)
    missing = tile_lists.unusable(example(candidate.call.query).device)
    if missing is not None and missing.code is not Code.TILE_LISTS and not forced:
        return {}
    apart = [(FORWARD,), (BACKWARD,)] if missing is None and candidate.training else []
    found = {way: tile_lists.tiled(candidate, traced, way) for way in apart}
    return {candidate.directions: both, **{way: listed for way, listed in found.items() if listed is not None}}
