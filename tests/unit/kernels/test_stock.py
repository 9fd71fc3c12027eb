"""Stock flex_attention with a BlockMask of the user's own, compiled by Inductor on the CPU, against the interpreter."""

import pytest
import torch
from torch.nn.attention.flex_attention import AuxOutput, flex_attention

from cudnn_flex_compile.kernels import cpu, cuda, inductor
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.kernels.stock import Stock
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I64
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text
from tests.support.blocks import from_pattern, tensors_of

B, Q, KV = (ir.index(axis) for axis in "bqk")
LENGTHS = (160, 200)
ENDS = make("gather", ir.capture(0, I64), B)
# Over the keys in their own order; and for plans, whose keys may come in another.
PROGRAM = ir.program(
    make("tanh", ir.SCORE / 2.0) * 2.0 + ir.operand(0, F32, "h"), make("gt", ENDS, ir.cast(KV, I64))
)  # fmt: skip


def stock(full, slots, program=PROGRAM):
    drawn = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)).numpy()
    mask = from_pattern(drawn < 0.6, drawn > 0.7 if full else None, 64, (2, 4, *LENGTHS))
    return Stock(torch.empty(0), tensors_of(mask), [torch.tensor([170, 40])], slots, (64, 64), text(program))


def without_lse(*tensors, return_aux, **how):
    """Inductor's kernel of the CPU gives none."""
    return flex_attention(*tensors, **how), AuxOutput(lse=tensors[0].sum(-1))


@pytest.mark.parametrize("full", [False, True], ids=["partial", "full, too"])
@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
@torch.no_grad()
def test_inductor_and_the_interpreter_agree(full, permuted, monkeypatch):
    monkeypatch.setattr(inductor, "flex_attention", without_lse)
    torch.manual_seed(0)
    slots = torch.stack([torch.randperm(LENGTHS[1]) for _ in range(2)]) if permuted else None
    given = stock(full, slots)
    query, key, value = (torch.randn(2, h, n, 16) for h, n in ((4, LENGTHS[0]), (2, LENGTHS[1]), (2, LENGTHS[1])))
    call = (query, key, value, Arguments([torch.randn(1, 4, 1, 1)], [], [], "", 0.25))
    expected = torch.empty_like(query)
    cpu.forward(*call, expected, torch.empty(query.shape[:3]), given)
    torch.testing.assert_close(inductor.forward(*call, given)[0], expected, rtol=1e-4, atol=1e-5)


def test_keys_that_were_permuted_come_back():
    keys, order = torch.randn(2, 3, 10, 4), torch.stack([torch.randperm(10) for _ in range(2)])
    given = torch.gather(keys, 2, order[:, None, :, None].expand(keys.shape))
    call = stock(False, order.argsort(-1))
    assert torch.equal(call.own_order(given), keys)
    assert torch.equal(call.given_order(keys), given)


def test_where_a_plan_is_right_no_block_is_left():
    call = stock(True, None)
    for right in (True, False):
        blocks = call._replace(guard=torch.tensor(right)).where_plans_are_wrong().blocks
        for i, (found, given) in enumerate(zip(blocks, call.blocks, strict=True)):
            assert torch.equal(found, torch.zeros_like(given) if right and i % 2 == 0 else given)
            assert found.dtype == given.dtype


def test_the_kernel_is_compiled_once_for_tensors_with_and_without_gradients(monkeypatch):
    """A CUDA graph records a training step on tensors that require none; nothing can be compiled meanwhile."""
    seen = []

    def ran(query, key, value, given, stock):
        tensors = (query, key, value, *given.operands, *stock.captured)
        seen.append([t.requires_grad for t in tensors])
        return torch.zeros_like(query), torch.zeros(query.shape[:3])

    monkeypatch.setattr(inductor, "forward", ran)
    for requires_grad in (True, False):
        tensors = [torch.randn(2, 4, 160, 16, requires_grad=requires_grad) for _ in range(3)]
        operand = torch.randn(1, 4, 1, 1, requires_grad=requires_grad)
        captured = torch.randn(3, requires_grad=requires_grad)
        call = stock(False, None)._replace(captured=[captured])
        cuda._fallback_forward(*tensors, Arguments([operand], [], [], "", 0.25), True, call)
    assert seen[0] == seen[1]
