"""What a plan is run with: tensors and operands at addresses that cuDNN can read.

Knows nothing of plans or of CUDA: the plan is a stand-in, and its tensors are on the host.
"""

from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.kernels import cuda


class Recorder:
    def run(self, tensors, operands, ints, floats):
        self.tensors, self.operands = tensors, operands


def view(offset, shape):
    """Of memory that is aligned, from an element on."""
    count = torch.Size(shape).numel()
    return torch.arange(offset + count, dtype=torch.float32)[offset:].view(shape)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
def test_everything_is_aligned(monkeypatch, offset):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    plan = Recorder()
    tensors, operands = (view(offset, (1, 2, 3, 8)), view(0, (1, 2, 3, 8))), [view(offset, (1, 2, 1, 1))]
    cuda._run(SimpleNamespace(plan=plan), tensors, operands, [], [], torch.empty(0))
    for given, found in zip((*tensors, *operands), (*plan.tensors, *plan.operands), strict=True):
        assert found.data_ptr() % 16 == 0
        assert torch.equal(found, given)
        assert found.stride() == given.stride()
        assert (found is given) == (given.data_ptr() % 16 == 0)
