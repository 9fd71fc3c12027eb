"""Measures cases in this process: compiles all contenders beside other processes, and times them alone.

command.py starts it. The default is compiled once more when this process is alone, because its choice may rest on times
that it measures itself; what its first compile left in the caches makes that short.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from cudnn_flex_compile.backend import lower
from cudnn_flex_compile.bench.case import OURS, STOCK, Case, Function, Layer
from cudnn_flex_compile.bench.measure import BOTH, FORWARD, Time, forward, on_device, on_host, step, times_of
from cudnn_flex_compile.bench.regret.result import DEFAULT, Contender, Result
from cudnn_flex_compile.bench.turns import Alone
from cudnn_flex_compile.config import FORCED, LISTS, options_from
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.inner import compile_inner
from cudnn_flex_compile.kernels import bound_calls
from cudnn_flex_compile.passes.decide.chooser import name_of
from cudnn_flex_compile.passes.read.call import find_calls
from cudnn_flex_compile.report.report import Report, collect

ROUGHLY, FAR = 3, 3.0  # samples of a first look; so many times the least time is too long for another one
PREDICTED = "predicted"
PATIENCE = 300  # seconds for measurements that only fill caches
Found = TypeVar("Found")


class KeptCall(RuntimeError):
    """A call does not run as it should; the report says why."""


@dataclass(slots=True)
class Prepared:
    """A case whose contenders are compiled: the functions of those that can run."""

    case: Case
    functions: dict[str, Function] = field(default_factory=dict[str, Function])
    contenders: dict[str, Contender] = field(default_factory=dict[str, Contender])


def measure(
    cases: dict[str, Case], repeats: int, alone: Alone, folder: Path, tell: Callable[[str, Result | str], None]
) -> None:
    """Measures cases by name, and tells of each by its name: the result, or why it failed.

    Args:
        alone: a context in which no other process computes.
        folder: the cache folder of this process, which is emptied.
    """
    prepared = {name: _or_error(_prepare, case) for name, case in cases.items()}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for others, which compile
    with alone():
        engine.times.clear()  # they were measured while others computed
        shutil.rmtree(folder, ignore_errors=True)
        for name, found in prepared.items():
            tell(name, found if isinstance(found, str) else _or_error(_timed, name, found, repeats))


def _or_error(run: Callable[..., Found], *given: Any) -> Found | str:
    try:
        return run(*given)
    except Exception as error:
        return _in_words(error)


def _in_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[:2]])


def _strategies(case: Case) -> list[str]:
    """The ways that can be forced. Without gradients a list of all directions is one of the forward."""
    apart = [name for name, directions in LISTS.items() if len(directions) == 1]
    return [name for name in FORCED if name != STOCK and (case.training or name not in apart)]


def _prepare(case: Case) -> Prepared:
    found, layers = Prepared(case), [case.layer()]
    stock = case.compiled(STOCK) if case.device != "cpu" else case.compiled_by("eager", STOCK)
    functions = {STOCK: stock, **{name: _forced(case, name, strategy=name) for name in _strategies(case)}}
    for name, function in functions.items():
        tried, _ = _tried(name, function, case, layers)
        found.contenders[name] = tried
        if tried.ran:
            found.functions[name] = function
    _, report = _tried(PREDICTED, _forced(case, PREDICTED, tune_seconds=0), case, layers)
    for call in report.calls:
        for contender in call.contenders:
            found.contenders[_strategy_of(contender.name, case)].predicted = contender.milliseconds
    patient = replace(case, options={**case.options, "tune_seconds": PATIENCE})
    _tried(DEFAULT, patient.compiled(OURS), case, layers)
    return found


def _forced(case: Case, name: str, **options: Any) -> Function:
    """The call as these options have it. Where it is kept, nothing is compiled, and KeptCall is raised."""

    def backend(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        given = options_from({**case.options, **options})
        lower(graph_module, example_inputs, given)
        if next(find_calls(graph_module), None) is not None:
            raise KeptCall
        return compile_inner(graph_module, example_inputs, given)

    return case.compiled_by(backend, name)


def _tried(name: str, function: Function, case: Case, layers: list[Layer]) -> tuple[Contender, Report]:
    """Compiles a contender by running it once, and says how it runs."""
    with collect() as report:
        try:
            (step if case.training else forward)(function, layers)
        except Exception as error:
            kept = [str(call.reason) for call in report.kept]
            return Contender(why=kept[0] if kept else _in_words(error)), report
    if name != STOCK and len(report.calls) != 1:
        return Contender(why=f"{len(report.calls)} flex_attention calls were compiled, expected one"), report
    ran = [" + ".join(call.strategies) for call in report.lowered]
    return Contender(ran[0] if ran else STOCK, "".join(str(call.reason) for call in report.kept)), report


def _strategy_of(name: str, case: Case) -> str:
    """The value of the option `strategy` that forces a contender of a report."""
    lists = [name for name in _strategies(case) if name in LISTS]
    return next((each for each in lists if name == name_of(LISTS[each][: 1 + case.training])), name)


def _timed(name: str, prepared: Prepared, repeats: int) -> Result:
    case = prepared.case
    for bound in (bound_calls.forwards, bound_calls.backwards):
        bound.clear()  # cases of one program would be more than are bound
    default = case.compiled(OURS)
    tried, report = _tried(DEFAULT, default, case, [case.layer()])
    if not tried.ran:
        raise RuntimeError(tried.why)
    contenders = {DEFAULT: tried, **prepared.contenders}
    for won in [c.name for call in report.calls for c in call.contenders if c.won]:
        tried.predicted = contenders[_strategy_of(won, case)].predicted
    for contender, taken in _times(case, {DEFAULT: default, **prepared.functions}, repeats).items():
        contenders[contender].milliseconds, contenders[contender].spread = taken.median, taken.spread
    return Result(name, contenders)


def _times(case: Case, functions: dict[str, Function], repeats: int) -> dict[str, Time]:
    """The times of all; one that takes far longer than the fastest has few samples, so that it keeps nobody waiting."""
    part, clock = BOTH if case.training else FORWARD, on_device if case.device == "cuda" else on_host
    times = times_of(case, functions, ROUGHLY, (part,), clock, single=True)
    limit = FAR * min(taken.median for taken in times.values())
    near = {name: f for name, f in functions.items() if name == DEFAULT or times[name, part].median <= limit}
    times |= times_of(case, near, repeats, (part,), clock)
    return {name: taken for (name, _), taken in times.items()}
