"""The protocol of plans: how they are tried, run and certified, and how a stored one is built again.

Each kind of plan is one class in a file of its own, and one entry of engine/plans/kinds.py. This file imports none of
them, and no cudnn.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from cudnn_flex_compile.engine.problem import Error, Problem, output_specs, problem_text
from cudnn_flex_compile.engine.tiles.tile_list import TileList
from cudnn_flex_compile.reasons import Reason


@dataclass(frozen=True, slots=True)
class Record:
    """A plan as the store keeps it: a tree, because a plan may run others.

    Attributes:
        kind: the plan's kind (Plan.KIND).
        problem: the text of its problem (problem_text).
        details: values that JSON keeps.
        data: bytes.
        parts: the plans that it runs, in order.
    """

    kind: str
    problem: str
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: bytes = b""
    parts: tuple["Record", ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """Builds one plan when it is called, or says why cuDNN does not.

    Attributes:
        last_resort: whether it writes the graph of an earlier attempt in another way that does more work.
        variant: the form of its graph, the same at every shape; None where it depends on the lengths.
    """

    make: "Callable[[], Plan | Reason]"
    last_resort: bool = False
    variant: tuple[Hashable, ...] | None = None

    def __call__(self) -> "Plan | Reason":
        return self.make()


class Plan(ABC):
    """Runs one problem. Immutable once built and certified; any thread may run it.

    Attributes:
        KIND: names the class in records.
        problem: its problem.
        strategy: the name of its strategy in reports.
        device: the device on which it runs.
        outputs: the layouts of out and stats, or of dq, dk, dv, and dbias if an operand is learned.
        errors: the errors that certification measured, once it has run.
    """

    KIND: ClassVar[str]
    __slots__ = ("device", "errors", "outputs", "problem", "strategy")

    def __init__(self, problem: Problem, strategy: str) -> None:
        self.problem, self.strategy, self.outputs = problem, strategy, output_specs(problem)
        self.device = torch.device("cuda", problem.device)
        self.errors: tuple[Error, ...] = ()

    @classmethod
    @abstractmethod
    def attempts(cls, problem: Problem, every: "Callable[[Problem], list[Attempt]]") -> list[Attempt]:
        """The attempts of this kind for a problem, in the order of trial; none where the kind is not for it.

        Args:
            every: the attempts of all kinds for a problem, for a plan that runs another one.
        """

    @abstractmethod
    def run(
        self, tensors: Sequence[Tensor], operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor],
        tiles: TileList | None = None,
    ) -> None:  # fmt: skip
        """Enqueues its kernels on the current stream.

        Args:
            tensors: query, key, value, out, and stats if the problem asks for them; in a backward query, key, value,
                out, stats, the gradient of out, that of the log-sum-exp if it takes one, then `outputs`. Stats and the
                gradient of the log-sum-exp are float32, contiguous, [B, H, Sq] or [B, H, Sq, 1].
            operands: as in the problem.
            ints, floats: all scalars of the program; the floats are 0-d host tensors.
            tiles: the list of the mask's tiles where the problem is tiled; if it is not given, the plan makes one.
        """

    def prepared(
        self, operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], room: int | None = None
    ) -> "Plan | None":  # fmt: skip
        """The plan with all that a step has made before it runs, such as the list of its mask's tiles for these values;
        None where that takes more than `room` numbers.
        """
        return self

    def launcher(self, operands: int) -> Callable[[list[int]], None] | None:
        """A function that runs it on addresses of the tensors, then of so many operands, while no CUDA graph is being
        captured; None for a plan that takes tensors, reads other values, or not all operands.
        """
        return None

    def on_harder_mask(self) -> "Plan | None":
        """The same kernels on another problem, whose program is the reference, on which they are certified, too."""
        return None

    @property
    def parts(self) -> "tuple[Plan, ...]":
        """The plans that it runs, in order."""
        return ()

    def to_record(self) -> Record:
        """The record of which `from_record` makes the plan again. Raises ValueError if it cannot be kept."""
        return Record(self.KIND, problem_text(self.problem), parts=tuple(part.to_record() for part in self.parts))

    @classmethod
    @abstractmethod
    def from_record(cls, problem: Problem, record: Record, restore: "Callable[[Problem, Record], Plan]") -> "Plan":
        """The plan again, on the current device. Raises ValueError for a record that cannot be used.

        Args:
            restore: makes the plan of a part's record, of any kind.
        """


class AddressPlan(Plan):
    """A plan that takes addresses as well, which saves making views of parts of tensors."""

    __slots__ = ()

    @abstractmethod
    def run_at(
        self, addresses: list[int], operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor]
    ) -> None:  # fmt: skip
        """Runs like `run`, with the addresses of the tensors."""
