"""Puts a pass of ours into Inductor's `pre_grad_custom_pass`, takes it out again, or leaves it out for a while.

The option is documented, in torch/_inductor/config.py. installation.py and outside.py use it, and whoever compiles a
kernel of Inductor's own leaves the pass out.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from cudnn_flex_compile import torch_private

PASS, TIMING = "pre_grad_custom_pass", "pre_grad_pass_timing"  # the latter since torch 2.13
STOCK: dict[str, Any] = {PASS: None}  # options of a torch.compile that compiles a kernel of Inductor's own


class Pass(Protocol):
    """A pass of ours. `before`: the passes that were in its place: one, several or None. `timing`: when passes ran
    then, None where torch has no choice. `options`: the options that it was made with.
    """

    lowers_flex_attention: bool
    before: Any
    timing: str | None
    options: Any


def config() -> Any:
    """Inductor's options. Raises RuntimeError where this torch has none."""
    options = torch_private.inductor_options()
    if options is None:
        raise RuntimeError(f"torch {torch.__version__} has no torch._inductor.config for install() to put a pass into")
    return options


def installed() -> Pass | None:
    """The pass of ours that Inductor runs, if there is one."""
    found = getattr(torch_private.inductor_options(), PASS, None)
    return found if getattr(found, "lowers_flex_attention", False) else None


def passes(found: Any) -> tuple[Callable[..., Any], ...]:
    """The passes that Inductor's option holds: none, one, or several."""
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def identity(found: Any) -> tuple[Any, ...] | None:
    """The uuids of the passes that the option holds; None if one has none, because nothing may be cached then."""
    uuids = tuple(getattr(each, "uuid", lambda: None)() for each in passes(found))
    return None if None in uuids else uuids


def put(make: Callable[[Any, str | None], Pass]) -> None:
    """Puts a pass in. `make` gets the passes that it replaces, and the time at which these ran.

    From then on passes run before Inductor asks its caches, whose keys so hold the rewritten graph. A cache that is
    asked first would hide calls from reports, and plans from the checks that come with lowering.
    """
    options = config()
    timing = getattr(options, TIMING, None)
    setattr(options, PASS, make(getattr(options, PASS), timing))
    if timing is not None:
        setattr(options, TIMING, "early")


def take_out() -> None:
    """Restores the passes that were there before, if a pass of ours is in."""
    found = installed()
    if found is None:
        return
    setattr(config(), PASS, found.before)
    if found.timing is not None:
        setattr(config(), TIMING, found.timing)


@contextmanager
def stock() -> Generator[None]:
    """Makes Inductor compile as if no pass of ours were in, within the block."""
    found = installed()
    if found is None:
        yield
        return
    with config().patch({PASS: found.before}):
        yield
