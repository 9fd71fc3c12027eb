"""The pass that `install` gives Inductor: lowers the flex_attention calls of each graph that Inductor compiles.

installation.py puts it in; it calls the backend's `lower`.
"""

from dataclasses import replace
from typing import Any

from torch.fx import Graph, GraphModule

from cudnn_flex_compile import __version__, inductor_seam, torch_private
from cudnn_flex_compile.backend import lower
from cudnn_flex_compile.config import Options
from cudnn_flex_compile.engine.store.identity import code_digest
from cudnn_flex_compile.inner.inductor import prepare
from cudnn_flex_compile.passes.read.call import find_calls


class LowerFlexAttention(torch_private.custom_graph_pass()):
    """Runs on the graph of a model, and on each graph nested in it before that.

    Args:
        options: the backend's options.
        before: the passes that were in its place, which run first: one, several, or None.
        timing: when Inductor ran passes before, which uninstalling sets again; None where torch has no choice.
    """

    lowers_flex_attention = True

    def __init__(self, options: Options, before: Any, timing: str | None) -> None:
        self.options, self.before, self.timing = options, before, timing

    def __call__(self, graph: Graph) -> None:
        for other in inductor_seam.passes(self.before):
            other(graph)
        module = graph.owning_module
        if module is None or _nested(module) or next(find_calls(module), None) is None:
            return
        prepare()
        mode = "reduce-overhead" if inductor_seam.config().triton.cudagraphs else None
        lower(module, (), replace(self.options, mode=mode))

    def uuid(self) -> Any | None:
        """An identity for Inductor's caches, which differs wherever the compiled graph may.

        It has our code, the options, and the uuids of the passes before; it is None if one of these has none.
        """
        others = inductor_seam.identity(self.before)
        return None if others is None else ("cudnn_flex", __version__, code_digest(), repr(self.options), *others)


def _nested(module: GraphModule) -> bool:
    """Whether a module is the graph of a region, such as a checkpointed one, whose calls are lowered later.

    The graph around it comes later, and shows when its calls run and what they share. Dynamo marks the outermost graph.
    """
    return torch_private.compiling() and "dynamo_compile_id" not in module.meta
