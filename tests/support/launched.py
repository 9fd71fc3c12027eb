"""Switches replays off for a while, to compare with, or to time, the launches themselves.

Knows nothing of plans. A user's way is `options={"replay": False}`: its plans are others.
"""

from contextlib import contextmanager
from unittest import mock

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.launch.replay import Replays


def _launch(replays, addresses, workspace, given=None, capturing=None):
    replays._enqueue(addresses if given is None else given, workspace, torch_private.current_stream(replays._device))


@contextmanager
def launched():
    """Within, nothing is replayed, recorded or counted."""
    with mock.patch.object(Replays, "run", _launch):
        yield
