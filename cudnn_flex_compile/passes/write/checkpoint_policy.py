"""Makes policies of selective checkpointing treat our ops as the flex_attention op that they replace.

A policy says for each op of a checkpointed region whether its result is saved. If it saves flex_attention, by its name
in a list, attention must not be computed again because the op now has another name.
"""

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.ops import attention_forward
from cudnn_flex_compile.passes.read.call import FLEX_ATTENTION

SAVES = (True, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


def save_as_stock(region: GraphModule) -> None:
    """Changes the policy of a graph with lowered calls, if it is a region that is checkpointed by a policy."""
    context_fn = torch_private.context_fn_of(region)
    if context_fn is not None and not isinstance(context_fn, _Contexts):
        torch_private.set_context_fn(region, _Contexts(context_fn))


class _Contexts:
    """A context_fn for torch.utils.checkpoint, with the policies of another."""

    def __init__(self, context_fn: Callable[[], Any]) -> None:
        self._context_fn = context_fn
        known = getattr(context_fn, "cache_hash", None)  # torch's caches identify a policy by it
        if known is not None:
            self.cache_hash = f"cudnn_flex {known}"

    def __call__(self) -> Any:
        contexts = self._context_fn()
        for context in contexts:
            policy = getattr(context, "policy_fn", None)
            if policy is not None:
                context.policy_fn = _with_our_ops(policy)
        return contexts


def _with_our_ops(policy: Callable[..., Any]) -> Callable[..., Any]:
    def decide(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        if op is attention_forward:
            found = policy(context, FLEX_ATTENTION, *args, **kwargs)
            if found in SAVES:
                return found
        return policy(context, op, *args, **kwargs)

    return decide
