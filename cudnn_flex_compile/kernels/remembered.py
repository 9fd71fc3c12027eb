"""Remembers values that were computed from tensors, for as long as the tensors live and stay the same.

Lists of tiles and comparisons of BlockMasks are remembered so. A tensor is identified by the object (another one may
get its address), by its version, which each write in place counts up, and by its memory, which `tensor.data = ...`
replaces.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from cudnn_flex_compile.torch_private import version_of

Made = TypeVar("Made")
State = tuple[Callable[[], Tensor | None], Any, int]  # a weak reference, a version, an address
Noted = tuple[Hashable, list[State]]


class Remembered(Generic[Made]):
    """Values, by a question and the tensors that it is about. Each step looks here, in microseconds.

    Args:
        kept: the number of values; the oldest is dropped first. A value of tensors that were changed is replaced, and a
            value is dropped with the first of its tensors.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._entries: dict[Hashable, tuple[Made, list[State]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self._entries.clear()

    def get(self, question: Hashable, tensors: Sequence[Tensor]) -> Made | None:
        """The value for the tensors as they are now, or None."""
        found = self._entries.get((question, *map(id, tensors)))
        if found is None:
            return None
        made, states = found
        for (reference, version, address), tensor in zip(states, tensors, strict=True):
            if reference() is not tensor or version_of(tensor) != version or tensor.data_ptr() != address:
                return None
        return made

    def put(self, question: Hashable, tensors: Sequence[Tensor], made: Made) -> None:
        """Remembers a value, but none of inference tensors, whose writes are not counted."""
        self.keep(self.noted(question, tensors), made)

    def noted(self, question: Hashable, tensors: Sequence[Tensor]) -> "Noted | None":
        """The tensors as they are now, for `keep`."""
        if any(t.is_inference() for t in tensors):
            return None
        key = (question, *map(id, tensors))
        entries = self._entries

        def forget(reference: Any) -> None:
            entry = entries.get(key)
            if entry is not None and any(state[0] is reference for state in entry[1]):
                del entries[key]

        return key, [(weakref.ref(t, forget), version_of(t), t.data_ptr()) for t in tensors]

    def keep(self, noted: "Noted | None", made: Made | None) -> None:
        """Remembers a value of the tensors as they were noted, unless one of them is gone, or the value is None."""
        if noted is None or made is None or any(reference() is None for reference, _, _ in noted[1]):
            return
        key, states = noted
        if key not in self._entries:
            # A copy: another thread may add an entry meanwhile, and a tensor that is freed takes one away.
            for oldest in list(self._entries)[: max(0, len(self._entries) + 1 - self._kept)]:
                self._entries.pop(oldest, None)
        self._entries[key] = made, states
