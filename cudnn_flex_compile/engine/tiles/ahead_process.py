"""Compiles kernels by tile lists, without a device, into the cache folder; ahead.py starts it.

    python -m cudnn_flex_compile.engine.tiles.ahead_process

It reads the part, the problems, and the file that says that it is done from its input, and ends when that is closed,
for then nobody waits for it.
"""

import os
import pickle
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.frontend import compile_without_a_device, quiet
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem
from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from cudnn_flex_compile.engine.tiles.kernels import compiled_backward, compiled_forward
from cudnn_flex_compile.engine.tiles.tile_list import ARCHITECTURE, Room, TileList, geometry_of
from cudnn_flex_compile.engine.tiles.tiler import Draft, Tiler
from cudnn_flex_compile.engine.tiles.units import STAGES
from cudnn_flex_compile.scoremod.masks.intervals import NARROW

DEVICE = torch.device("cuda", 0)
KERNELS = {FORWARD: compiled_forward, BACKWARD: compiled_backward}


class Stages(Tiler):
    """Compiles the stages of a tiler, and runs none."""

    def compile(self, direction: str) -> None:
        """Compiles the stages of one direction."""
        with torch_private.fake_tensors():
            draft = self._without_data()
            if direction == BACKWARD:
                self._count_columns(draft)
                self._write_columns(draft)
            else:
                self._count_rows(draft)
                self._write_rows(draft)

    def _without_data(self) -> Draft:
        g, room = self.geometry, Room(1, 1, 1, 1)
        table = torch.empty((g.mask_heads, NARROW, g.batch * g.rows), dtype=torch.int32, device=DEVICE)
        layouts = self._layouts(room)
        numbers, scratch = (torch.empty(layout.size, dtype=torch.int32, device=DEVICE) for layout in layouts)
        views = {**layouts[0].views(numbers), **layouts[1].views(scratch)}
        return Draft(table, room, TileList(numbers, layouts[0]), scratch, views)

    def _run(self, stage: str, compiler: str, config: Any, tensors: Sequence[Any], numbers: Sequence[int]) -> None:
        getattr(self._builder, compiler)(config, *tensors)

    def _add_up(self, prefix: str, draft: Draft) -> None:
        """Adds nothing up, where nothing was counted."""


def compile_all(part: str, problems: Sequence[Problem]) -> None:
    """Compiles the stages of the direction of some problems, or the kernels of each."""
    with quiet():
        for problem in problems:
            if part == STAGES:
                Stages(geometry_of(problem, problem.direction == BACKWARD)).compile(problem.direction)
            else:
                KERNELS[problem.direction](problem)


def main() -> None:
    given = sys.stdin.buffer
    part, problems, done = pickle.load(given)
    threading.Thread(target=lambda: (given.read(), os._exit(1)), daemon=True).start()
    status = 1
    try:
        if kernels_missing() is None:  # then what is compiled is kept in the folder
            compile_without_a_device(ARCHITECTURE)
            compile_all(part, problems)
            status = 0
    except Exception:
        traceback.print_exc()
    done.touch()
    os._exit(status)  # at once, for a thread waits for input


if __name__ == "__main__":
    main()
