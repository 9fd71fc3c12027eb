"""`install` lowers flex_attention wherever Inductor compiles it, whoever asked Inductor to.

Trainers compile flex_attention by itself, or block by block, always with Inductor, so that a backend of ours never sees
the call. `install()` gives Inductor a pass of ours (inductor_pass.py).
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from types import TracebackType
from typing import Any

from cudnn_flex_compile.config import Options, options_from

log = logging.getLogger("cudnn_flex_compile")
VARIABLE = "CUDNN_FLEX_INSTALL"
OTHERS = ("inner_backend", "inner_options", "mode")  # options that belong to the user's own torch.compile


class Installed:
    """A context manager: leaving it uninstalls."""

    def __enter__(self) -> "Installed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        uninstall()


def install(**options: Any) -> Installed:
    """Lowers the flex_attention calls in all graphs that Inductor compiles in this process from now on.

    `torch.compile(...)` keeps its own mode and options. A pass that the user has set in
    `torch._inductor.config.pre_grad_custom_pass` before runs first; one that is set later, or in the options of one
    torch.compile, takes the place of ours. Graphs that are compiled already stay as they are.

    Args:
        options: the backend's options (see Options), without those that the user's own torch.compile has:
            inner_backend, inner_options and mode.

    Returns:
        A context manager that uninstalls; it need not be used.

    Raises:
        ValueError, TypeError: an unknown option, or a value that it does not take.
        RuntimeError: it is installed already, with other options.
    """
    from cudnn_flex_compile import inductor_seam

    chosen = _options(options)
    there = inductor_seam.installed()
    if there is not None and there.options != chosen:
        raise RuntimeError(
            f"cudnn_flex_compile.install: it is installed with {there.options}, and now {chosen} is asked for; "
            "call cudnn_flex_compile.uninstall() before"
        )
    if there is None:
        from cudnn_flex_compile.inductor_pass import LowerFlexAttention

        inductor_seam.put(lambda before, timing: LowerFlexAttention(chosen, before, timing))
    return Installed()


def uninstall() -> None:
    """Undoes `install`, if it was called. Graphs that are compiled already stay as they are."""
    from cudnn_flex_compile import inductor_seam

    inductor_seam.take_out()


def install_if_asked() -> None:
    """Installs where the environment says CUDNN_FLEX_INSTALL=1.

    `import torch` calls it, by the entry point that torch has for device backends, so that it reaches processes whose
    code can't be edited.
    """
    asked = os.environ.get(VARIABLE, "0")
    if asked == "0":
        return
    try:
        if asked != "1":
            raise ValueError(f"environment variable {VARIABLE}={asked!r}; valid: 1 (install), 0 (do not)")
        install()
    except Exception as error:  # raised from here, it would end `import torch`
        log.warning("cudnn_flex: not installed: %s: %s", type(error).__name__, error)


def _options(given: Mapping[str, Any]) -> Options:
    wrong = sorted(set(given) & set(OTHERS))
    if wrong:
        valid = ", ".join(f.name for f in fields(Options) if f.name not in OTHERS)
        raise ValueError(
            f"cudnn_flex_compile.install: {', '.join(wrong)} is an option of the torch.compile that compiles the model;"
            f" valid options: {valid}"
        )
    return options_from(given)
