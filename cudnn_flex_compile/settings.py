"""Settings that all compiles of a process share: from environment variables, or from `configure`.

The engine reads them: the cache folder, and the sizes of caches. A value that was set stays: a second one would change
models that are compiled already. Options of one compile are in config.py.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from cudnn_flex_compile.config import PREFIX, check, from_environment
from cudnn_flex_compile.locks import new_lock

PACKAGE = "cudnn_flex_compile"
_lock = new_lock()


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of the process.

    Attributes:
        cache: whether plans and verdicts are kept beyond the process, in the cache folder.
        cache_dir: that folder; empty for the user's own (platformdirs). Its files are code: only those who may run code
            as this user should be able to write to it.
        cache_mb: MiB that the folder may take (least recently used first out).
        plan_cache_size: the number of plans that are kept in memory (least recently used first out).
    """

    cache: bool = True
    cache_dir: str = ""
    cache_mb: int = 256
    plan_cache_size: int = 256

    def __post_init__(self) -> None:
        check(self, "setting")

    @property
    def folder(self) -> Path | None:
        """The folder in which plans and verdicts are kept, or None."""
        if not self.cache:
            return None
        return Path(self.cache_dir).expanduser() if self.cache_dir else platformdirs.user_cache_path(PACKAGE, False)


def settings() -> Settings:
    """The settings of the process. Raises ValueError, TypeError for a wrong environment variable."""
    with _lock:
        return Settings(**{name: value for name, (value, _) in _values().items()})


def configure(
    *, cache: bool | None = None, cache_dir: str | os.PathLike[str] | None = None, cache_mb: int | None = None,
    plan_cache_size: int | None = None,
) -> Settings:  # fmt: skip
    """Sets settings of the process, at any time, and returns all of them. Settings that are not given stay.

    Args:
        cache, cache_dir, cache_mb, plan_cache_size: see Settings.

    Raises:
        ValueError, TypeError: a wrong value or type.
        RuntimeError: a setting has another value already, by an earlier call or an environment variable.
    """
    folder = None if cache_dir is None else os.fspath(cache_dir)
    named = {"cache": cache, "cache_dir": folder, "cache_mb": cache_mb, "plan_cache_size": plan_cache_size}
    given = {name: value for name, value in named.items() if value is not None}
    Settings(**given)  # raises  # pyright: ignore[reportArgumentType]
    with _lock:
        values = _values()
        for name, value in given.items():
            before, by = values.get(name, (value, ""))
            if before != value:
                raise RuntimeError(
                    f"{name} is {before!r} in this process, by {by}, and cannot become {value!r}: models that are "
                    f"compiled already share it. Set it once, by configure({name}=...) or {_variable(name)}"
                )
        for name, value in given.items():
            values.setdefault(name, (value, f"configure({name}={value!r})"))
    return settings()


def forget() -> None:
    """Forgets the values that were set, and reads the environment again. For tests."""
    with _lock:
        _values.cache_clear()


@functools.cache
def _values() -> dict[str, tuple[Any, str]]:
    """The values that were set, each with the function or variable that set it. The environment is read once."""
    found = from_environment(Settings)
    return {name: (value, f"the environment variable {_variable(name)}") for name, value in found.items()}


def _variable(name: str) -> str:
    return PREFIX + name.upper()
