"""For measuring scripts that nobody watches: a case that fails does not lose the others.

Knows nothing of what is measured.
"""

import traceback


def tried(run, *arguments):
    """What `run` gives, or None where it fails: the log says why."""
    try:
        return run(*arguments)
    except Exception:
        traceback.print_exc()
        return None


def line_of(name, run, *arguments):
    """What `run` gives for a case, or that it failed, printed at once; and whether it went well."""
    try:
        line, well = run(name, *arguments), True
    except Exception as error:
        line, well = _failed(name, error), False
    print(line, flush=True)
    return line, well


def lines(names, run, *arguments):
    """The lines of all cases, once more, and as the last that is printed; whether all went well."""
    found = [line_of(name, run, *arguments) for name in names]
    print("\n" + "\n".join(line for line, _ in found), flush=True)
    return all(well for _, well in found)


def by_case(cases, compiled, measured):
    """Compiles all cases, yields once, and then a line of each: a generator for turns.in_turn.

    Args:
        compiled: takes a case; gives the further arguments of `measured`, which gives the line.
    """
    ready = [(case, _said_or(case, compiled)) for case in cases]
    yield
    for case, found in ready:
        yield found if isinstance(found, str) else _said_or(case, measured, *found)


def _said_or(case, run, *arguments):
    """What `run` gives for a case, or a line that says how it failed."""
    try:
        return run(case, *arguments)
    except Exception as error:
        return _failed(case, error)


def _failed(case, error):
    traceback.print_exc()
    said = (str(error).strip().splitlines() or [""])[0][:120]
    return f"{case}: FAILED, {type(error).__name__}: {said}"
