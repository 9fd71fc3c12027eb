"""Inductor's `pre_grad_custom_pass`, where a pass of ours is put, taken out again, or left out for a while.

Knows nothing of what the pass does. The option is documented, in torch/_inductor/config.py.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from cudnn_flex_compile import torch_private

PASS, TIMING = "pre_grad_custom_pass", "pre_grad_pass_timing"  # the latter since torch 2.13
STOCK: dict[str, Any] = {PASS: None}  # options of a torch.compile that compiles a kernel of Inductor's own


class Pass(Protocol):
    """A pass of ours. `before`: what was in its place, a pass, several or None. `timing`: when passes ran then, None
    where torch has no choice. `options`: whatever it was made with.
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
    """The uuids of the passes that the option holds; None if one has none, for then nothing may be cached."""
    uuids = tuple(getattr(each, "uuid", lambda: None)() for each in passes(found))
    return None if None in uuids else uuids


def put(make: Callable[[Any, str | None], Pass]) -> None:
    """Puts a pass in, given what it takes the place of. Passes run before Inductor's caches are asked from then on,
    whose keys so hold the graph that was rewritten: a cache that is asked before would hide calls from reports, and
    plans from the checks that come with lowering.
    """
    options = config()
    timing = getattr(options, TIMING, None)
    setattr(options, PASS, make(getattr(options, PASS), timing))
    if timing is not None:
        setattr(options, TIMING, "early")


def take_out() -> None:
    """Sets again what was there before, if a pass of ours is in."""
    found = installed()
    if found is None:
        return
    setattr(config(), PASS, found.before)
    if found.timing is not None:
        setattr(config(), TIMING, found.timing)


@contextmanager
def stock() -> Generator[None]:
    """Has Inductor compile what is compiled within as if no pass of ours were in."""
    found = installed()
    if found is None:
        yield
        return
    with config().patch({PASS: found.before}):
        yield
