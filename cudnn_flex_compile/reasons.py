"""Why a call was kept by the inner backend: one code each, with a remedy in one line.

Every part of the package returns a `Reason` where a call cannot be lowered; reports show it.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace


class Code(enum.Enum):
    """The value is the remedy that reports show."""

    DTYPE = "run the model under torch.autocast in bfloat16, or give it bfloat16 weights: model.to(torch.bfloat16)"
    HEAD_DIM = "use head dims that are multiples of 8, at most 256"
    LENGTH = "sequence lengths must be at least 1 and below 2**24"
    DEVICE = "move the model to an NVIDIA GPU; other devices keep stock flex_attention"
    CUDNN_MISSING = "install nvidia-cudnn-frontend and a torch build that brings cuDNN"
    CUDNN_OLD = "upgrade cuDNN (nvidia-cudnn-cu12 or nvidia-cudnn-cu13) to the version named"
    UNKNOWN_OP = "rewrite the op in terms of those that docs/support.md lists, or ask for a row in the op table"
    NO_BACKWARD = "run under torch.no_grad, or use ops that have a derivative"
    VECTORS = "add dots of vectors to the score first, `score + scale * dot(a[b, h, q], c[b, h, kv])`; then do the rest"
    ILLEGAL_OP = "cuDNN computes no form of this op right; see the detail"
    FINITE_FILL = "hide pairs with -inf, or by the mask_mod; a finite number gives rows hidden whole a meaning"
    BIAS_BUDGET = "raise options={'bias_budget_mb': ...}, or write the mask as bounds on q - kv and kv"
    LIST_BUDGET = "raise options={'bias_budget_mb': ...}: the mask has many tiles of which it hides a part"
    CAPTURED_GRADIENT = "only add it to the score, as in `score + table[h, q - kv]`, or detach it"
    LSE_GRADIENT = "detach the LSE where it takes part in no loss, or, in bfloat16, try options={'lower': 'always'}"
    MAX_SCORES = "ask for the LSE: it is the largest score, or more by at most the log of the number of visible keys"
    FORCED_BACKEND = "drop the option that is named, from kernel_options or from the options of the compile"
    DATA_DEPENDENT = "give sizes that are known before the call: pad to a length, and mask what is padding"
    TOO_LARGE = "write score_mod and mask_mod in fewer steps, or read a captured tensor of what they compute"
    BLOCK_MASK = "build the BlockMask with create_block_mask from the same mask_mod"
    UNSUPPORTED_CALL = "call flex_attention with a plain BlockMask, or none"
    TILE_LISTS = "pip install --upgrade nvidia-cudnn-frontend, whose kernels skip what such a mask hides"
    SHAPE_REFUSED = "cuDNN has no kernel for this shape on this GPU"
    SLOWER = "nothing: stock flex_attention is the faster one here (options={'lower': 'always'} overrides)"
    MEMORY = "free GPU memory and call cudnn_flex_compile.cache_clear(): checking a plan takes as much as one more call"
    CERTIFICATION = "cuDNN's numbers were wrong here; please report the program and the shape"
    CAPTURING = "run the model once before the capture: nothing can be built or checked meanwhile"
    TORCH = "use a torch that docs/support.md lists: this one has moved what the detail names"
    INTERNAL = "a bug of cudnn_flex_compile: please report it with the detail"

    @property
    def page(self) -> str:
        """The section of the documentation that is about this code."""
        return f"docs/limits.md#{self.name.lower()}"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one call was kept.

    Attributes:
        code: the class of reason, with its remedy.
        detail: the cause in this call.
        lasting: whether it would be the same another time, which is not so where memory was short.
    """

    code: Code
    detail: str = ""
    lasting: bool = True

    @property
    def remedy(self) -> str:
        """The change that a user can make, in one line."""
        return self.code.value

    @property
    def advice(self) -> str:
        """The remedy, and the section of the documentation that says more."""
        return f"{self.remedy} ({self.code.page})"

    def to_dict(self) -> dict[str, str]:
        """The reason, as JSON takes it."""
        return {"code": self.code.name, "detail": self.detail, "remedy": self.remedy, "page": self.code.page}

    def __str__(self) -> str:
        return f"{self.code.name}: {self.detail}" if self.detail else self.code.name


# The codes that say most about why nothing works, first.
TELLING = (Code.CERTIFICATION, Code.NO_BACKWARD, Code.ILLEGAL_OP, Code.SHAPE_REFUSED)


def most_telling(reasons: Sequence[Reason], forced: str = "") -> Reason:
    """One for all of them; lasting if all are.

    Args:
        forced: the only strategy that was tried, if an option forces one; there may be no reason then.
    """
    by_code = (reason for code in TELLING for reason in reasons if reason.code is code)
    found = next(by_code, None)
    if found is None and forced:
        why = "".join(f": {reason.detail}" for reason in reasons[-1:])
        found = Reason(Code.FORCED_BACKEND, f"options have strategy={forced!r}{why}")
    return replace(found or reasons[-1], lasting=all(reason.lasting for reason in reasons))
