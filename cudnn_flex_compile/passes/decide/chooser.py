"""Chooses among the ways to run a call: its contenders are ours, and Inductor's kernel. The fastest one wins.

lower_call.py says what the contenders are, and tries them in the order that is chosen here. Times are predicted
(cost_model.py). Where two are so close that a prediction can't tell them apart, or no table tells their times (those of
another kind of device, and of deterministic backwards), measured_times.py measures them. This file must not know how a
call is lowered.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cudnn_flex_compile.passes.decide.cost_inputs import CostInputs
from cudnn_flex_compile.passes.decide.cost_model import Estimate, in_table, inductors, ours
from cudnn_flex_compile.passes.decide.device_times import INDUCTOR
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.call import Contender

log = logging.getLogger("cudnn_flex_compile")
# Predictions of one device's table tell two ways apart that are so many times as fast as the other. Of 30 predicted
# ratios to Inductor's kernel, at lengths of 2048 and more, 29 were as near to those that were measured, the host's time
# included (docs/forty_h200.csv; tests/unit/passes/decide/test_cost_model.py).
# A factor that is in no table, such as that of a bias, may err as much again.
PREDICTION_ERROR = 1.3
WORTH_MEASURING = 0.1  # milliseconds of a step: calls that take less in all are not worth the seconds of a measurement

Way = tuple[str, ...]  # the directions that run by a list of tiles; none where all are graphs
STOCK: Way = (INDUCTOR,)
Measured = dict[Way, tuple[float, ...]]  # the milliseconds of the kernels, by direction
Measure = Callable[[Sequence[Way]], Measured]


@dataclass(frozen=True, slots=True)
class Choice:
    """The ways to run a call.

    Attributes:
        order: those of ours that are tried, the fastest first.
        estimates: the times of all contenders, the fastest first.
        slower: the reason why ways that are not in the order are not tried.
    """

    order: tuple[Way, ...]
    estimates: dict[Way, Estimate]
    slower: Reason

    def contenders(self, winner: Way) -> tuple[Contender, ...]:
        """The contenders, for a report."""
        return tuple(
            Contender(name_of(way), found.total, found.measured, way == winner)
            for way, found in self.estimates.items()
        )


def choose(contenders: dict[Way, CostInputs], only_faster: bool, measure: Measure | None, every: bool) -> Choice:
    """The order in which ways are tried.

    Args:
        contenders: the facts of a call by each way of ours; that by graphs, and others.
        only_faster: whether ways that are slower than Inductor's kernel are left out of the order.
        measure: measures some ways, and gives the times of those for which that was possible; None where nothing may be
            measured.
        every: whether all are measured, however plain the prediction is.
    """
    graphs = contenders[()]
    predicted = _estimated(contenders, dict.fromkeys([*contenders, STOCK], ()))
    measured = _measured(predicted, contenders, measure, every) if measure is not None else {}
    if not measured and graphs.table.foreign:
        _warn_of(graphs.table.device)
    return _by_time(measured or predicted, graphs, only_faster)


@functools.cache
def _warn_of(device: str) -> None:
    log.warning(
        "cudnn_flex: calls that could not be measured are lowered or kept by the times of %s, for there are none of "
        "this device: run `cudnn-flex calibrate` once", device,
    )  # fmt: skip


def _estimated(contenders: dict[Way, CostInputs], kernels: Measured) -> dict[Way, Estimate]:
    """The times of some ways, by those of their kernels where these were measured; of none for which they are unknown.
    """
    found: dict[Way, Estimate] = {}
    for way, times in kernels.items():
        estimate = inductors(contenders[()], times) if way == STOCK else ours(contenders[way], times)
        if estimate is not None:
            found[way] = estimate
    return found


def _measured(
    predicted: dict[Way, Estimate], contenders: dict[Way, CostInputs], measure: Measure, every: bool
) -> dict[Way, Estimate]:
    """The times of contenders that predictions can't tell apart; of none if either side could not be measured.

    On a device of its own table those of ours differ by little where their predictions are close. So the fastest one
    alone is compared with Inductor's kernel, and the next one where it loses, or can't run.
    """
    graphs, ways = contenders[()], [way for way in _fastest_first(predicted) if way != STOCK]
    if not every and graphs.sharing * max(estimate.total for estimate in predicted.values()) < WORTH_MEASURING:
        return {}
    together = every or any(inputs.untold for inputs in contenders.values())
    found: dict[Way, Estimate] = {}
    for count in [len(ways)] if together else range(1, len(ways) + 1):
        way, stock = ways[count - 1], (found or predicted)[STOCK].total
        error = PREDICTION_ERROR if way or in_table(graphs) else PREDICTION_ERROR**2
        least = 0.0 if found else stock / error  # of the first: it may be plainly faster
        if not (together or least < predicted[way].total < error * stock):
            break
        found = _estimated(contenders, measure([*ways[:count], STOCK]))
        if STOCK not in found or _fastest_first(found)[0] != STOCK:
            break
    return found if STOCK in found and len(found) > 1 else {}


def _fastest_first(estimates: dict[Way, Estimate]) -> list[Way]:
    return sorted(estimates, key=lambda way: (estimates[way].total, way == STOCK))


def _by_time(estimates: dict[Way, Estimate], graphs: CostInputs, only_faster: bool) -> Choice:
    ways = _fastest_first(estimates)
    ordered = {way: estimates[way] for way in ways}
    order = ways[: ways.index(STOCK)] if only_faster and STOCK in ways else [way for way in ways if way != STOCK]
    code = Code.LSE_GRADIENT if graphs.lse_gradient else Code.SLOWER
    return Choice(tuple(order), ordered, Reason(code, _in_words(ordered, graphs)))


def _in_words(estimates: dict[Way, Estimate], graphs: CostInputs) -> str:
    """The contenders and their times, the fastest first."""
    known = "measured here" if all(found.measured for found in estimates.values()) else "predicted"
    table = graphs.table
    if known == "predicted" and table.foreign:
        known += f" by the table of {table.device}, for there is none of this device: run `cudnn-flex calibrate`"
    elif known == "predicted" and graphs.untold:
        known += ", as if no backward had to be deterministic"
    shared = f" in each of {graphs.sharing} calls" if graphs.sharing > 1 else ""
    listed = ", ".join(f"{name_of(way)} {_of_parts(found)}" for way, found in estimates.items())
    return f"milliseconds of a step{shared}: {listed}; {known}"


def _of_parts(found: Estimate) -> str:
    named = "".join(f" + {ms:.3f} {name}" for name, ms in found.rest)
    return f"{found.total:.3f}" + (f" ({sum(found.kernels):.3f} kernels{named})" if named else "")


def name_of(way: Way) -> str:
    """The name of a contender, in reports."""
    if way == STOCK:
        return INDUCTOR
    return f"tile lists ({', '.join(way)})" if way else "graphs"
