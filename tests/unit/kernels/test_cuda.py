"""What a plan is run with: tensors at addresses that cuDNN can read.

Knows nothing of plans or of CUDA: the tensors are on the host.
"""

import pytest
import torch

from cudnn_flex_compile.kernels import cuda


def view(offset, shape):
    """Of memory that is aligned, from an element on."""
    count = torch.Size(shape).numel()
    return torch.arange(offset + count, dtype=torch.float32)[offset:].view(shape)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
def test_everything_is_aligned(offset):
    tensors = (view(offset, (1, 2, 3, 8)), view(0, (1, 2, 3, 8)), view(offset, (1, 2, 1, 1)))
    for given, found in zip(tensors, cuda._aligned(tensors), strict=True):
        assert found.data_ptr() % 16 == 0
        assert torch.equal(found, given)
        assert found.stride() == given.stride()
        assert (found is given) == (given.data_ptr() % 16 == 0)
