"""The pass that `install` gives Inductor: lowers the flex_attention calls of each graph that Inductor compiles.

Knows nothing of how calls are lowered, nor of when it is installed.
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
        options: of the backend.
        before: what was in its place, which runs first: a pass, several, or None.
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
        """Differs wherever the compiled graph may: it has our code, the options, and the uuids of the passes before;
        None if one of these has none.
        """
        others = inductor_seam.identity(self.before)
        return None if others is None else ("cudnn_flex", __version__, code_digest(), repr(self.options), *others)


def _nested(module: GraphModule) -> bool:
    """Whether it is the graph of a region, such as a checkpointed one: the graph around it, which says when its calls
    run and what they share, comes later, and its calls are lowered then. Dynamo marks the outermost graph.
    """
    return torch_private.compiling() and "dynamo_compile_id" not in module.meta
