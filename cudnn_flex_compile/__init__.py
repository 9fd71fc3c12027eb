"""cudnn_flex_compile: torch.compile(model, backend="cudnn_flex") runs flex_attention on cuDNN.

Importing it costs little: torch._dynamo finds the backend through its entry point and imports the rest then.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Options", "Reason", "Report", "Settings", "cache_clear", "cache_info", "collect", "configure", "cudnn_flex",
    "explain", "install", "uninstall",
]  # fmt: skip

if TYPE_CHECKING:
    from cudnn_flex_compile.backend import cudnn_flex
    from cudnn_flex_compile.config import Options
    from cudnn_flex_compile.engine.find_plan import cache_clear, cache_info
    from cudnn_flex_compile.explanation import explain
    from cudnn_flex_compile.installation import install, uninstall
    from cudnn_flex_compile.reasons import Reason
    from cudnn_flex_compile.report.report import Report, collect
    from cudnn_flex_compile.settings import Settings, configure

_HOMES = {
    "Options": "config",
    "Reason": "reasons",
    "Report": "report.report",
    "Settings": "settings",
    "cache_clear": "engine.find_plan",
    "cache_info": "engine.find_plan",
    "collect": "report.report",
    "configure": "settings",
    "cudnn_flex": "backend",
    "explain": "explanation",
    "install": "installation",
    "uninstall": "installation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
