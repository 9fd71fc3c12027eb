"""Which storages tensors have that are made of others."""

import torch

from cudnn_flex_compile.passes.read.storages import storages


class Sharded(torch.Tensor):
    """A tensor made of two others and of something that is no tensor, as a DTensor is of its part and its mesh."""

    @staticmethod
    def __new__(cls, part, more, mesh):
        return torch.Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.dtype)

    def __init__(self, part, more, mesh):
        self.part, self.more, self.mesh = part, more, mesh

    def __tensor_flatten__(self):
        return ["part", "mesh", "more"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["part"], inner["more"], inner["mesh"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} runs")


def test_a_tensor_made_of_others_has_their_storages():
    part, more = torch.empty(4), torch.empty(4)
    expected = storages([part, more])
    assert len(expected) == 2
    assert storages(Sharded(part, more, object())) == expected
    assert storages(Sharded(part.view(2, 2), Sharded(more, more, object()), object())) == expected
