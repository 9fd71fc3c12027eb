"""The rules for calls that stock flex_attention runs faster, as measured: one table of conditions.

lower_call.py asks for the first rule that applies; cost_model.py estimates times. Each row names the command that
reproduces it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes.decide.cost_model import (
    DOCUMENTS,
    CostInputs,
    graph_times,
    host_counts,
    list_time,
    our_times,
    pair_operands,
    pairs_of,
    spared,
    stock_times,
)  # fmt: skip
from cudnn_flex_compile.passes.decide.device_times import INDUCTOR, PLAIN
from cudnn_flex_compile.passes.read.call import example
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.masks.form import split

LSE = "python3 -m tests.measure.lse_time"
HOST = "python3 -m tests.measure.host_share"
# The cost of a gradient of the log-sum-exp on cuDNN for each query, in keys of the query on Inductor's kernel. (LSE)
LSE_COST = 128
# A score's own bias over pairs: Inductor gathers it faster, but for items of this many bytes in the forward.
FORWARD_ITEMSIZE = 4
SURELY = 1.2  # a list must save so many times its own time
# The milliseconds that a call must save the GPU, without and with its backward, where the GPU may wait for the host. So
# much longer the host takes for ours than for Inductor's, mostly for launches of cold code by cuDNN. With launches that
# are replayed (engine/launch/replay.py) it is 0.09 and 0.15 by HOST, some 0.17 and 0.2 in BERT with all lowered.
# (CUDNN_FLEX_LOWER=always python3 -m tests.measure.models --cases bert:full)
MIN_SAVING_MS = {False: 0.17, True: 0.2}
# The same wherever the log-sum-exp has a gradient. (LSE)
MIN_SAVING_WITH_LSE_MS = 0.55
# The milliseconds that all calls with one mask of captured tensors must save in a model. Each step has a new BlockMask,
# which is compared, and keys are permuted. A tile list must save as much beyond its own time: steps of 4 layers were
# 0.93 and 0.97 times as fast as Inductor's. (python3 -m tests.measure.models --cases bert:right gpt_neox:right)
MIN_MASK_SHARE = 0.95
DECODING_QUERIES = 16  # with up to so many queries, a call decodes


@dataclass(frozen=True, slots=True)
class Row:
    """A rule.

    Attributes:
        applies: gives the detail of the reason to keep a call, or None.
        command: the command that reproduces the measurement.
        code: the reason's code.
        tiled: whether it is about calls by lists of tiles, or about others; None for both.
    """

    applies: Callable[[CostInputs], str | None]
    command: str
    code: Code = Code.SLOWER
    tiled: bool | None = False


def _lse_in_the_loss(inputs: CostInputs) -> str | None:
    """A gradient of the log-sum-exp takes a pass over the outputs (engine/plans/folded_output.py), which is as long as
    the kernels of a narrow window.
    """
    if not inputs.lse_gradient:
        return None
    queries, keys = inputs.lengths
    stock, ours = (sum(times.values()) for times in (stock_times(inputs), graph_times(inputs)))
    rates = (inputs.rate(INDUCTOR, way, PLAIN) or 0.0 for way in inputs.directions)
    if ours + sum(rates) * inputs.tflop * LSE_COST / keys <= stock:
        return None
    seen = pairs_of(inputs.program, inputs.lengths, BACKWARD) / queries
    return f"the LSE takes part in the loss, and a query has {seen:.0f} keys to compute on average"


def _decodes_by_one_more(inputs: CostInputs) -> str | None:
    queries, keys = (example(node).shape[2] for node in (inputs.call.query, inputs.call.key))
    static = isinstance(queries, int), isinstance(keys, int)
    if inputs.training or static != (True, False) or queries > DECODING_QUERIES:
        return None
    return "a few queries beside keys whose number changes: building a plan for each number takes longer than the call"


def _in_a_step(inputs: CostInputs) -> bool:
    """Whether the time of a step besides the kernels counts.

    It does not on the CPU, where programs are checked and explained, and sizes tell nothing of later ones; nor with
    learned biases, for which Inductor's kernels take a multiple of ours (_learned_by_place).
    """
    on_gpu = example(inputs.call.query).device.type == "cuda"
    return on_gpu and inputs.around is not None and not any(part.learned for part in inputs.hoisted)


def _in_a_model(inputs: CostInputs) -> bool:
    return inputs.around is not None and inputs.around.products > 0


def _spares_little(inputs: CostInputs) -> str | None:
    saved = spared(inputs)
    least = MIN_SAVING_WITH_LSE_MS if inputs.lse_gradient else MIN_SAVING_MS[inputs.training]
    if not _in_a_step(inputs) or saved >= least:
        return None
    spare = f"it would spare the GPU about {max(saved, 0):.2f} ms"
    return f"{spare}, and may keep the host longer than that, but under CUDA graphs"


def _host_takes_longer(inputs: CostInputs) -> str | None:
    return _spares_little(inputs) if host_counts(inputs) else None


def _host_takes_longer_with_lse(inputs: CostInputs) -> str | None:
    return _spares_little(inputs) if inputs.lse_gradient else None


def _setting_up_takes_longer(inputs: CostInputs) -> str | None:
    captured = any(node.kind == "operand" for node in ir.walk(inputs.program.mask))
    saved = inputs.sharing * spared(inputs)
    if not (captured and _in_a_model(inputs) and inputs.call.blocks and _in_a_step(inputs)) or saved >= MIN_MASK_SHARE:
        return None
    calls = f"{inputs.sharing} call{'s' if inputs.sharing > 1 else ''}"
    return f"a mask of captured tensors takes some time at each step, and {calls} would spare the GPU {saved:.2f} ms"


def _pairs_are_read(inputs: CostInputs) -> str | None:
    stored = pair_operands(inputs)
    if stored and (inputs.training or min(d.itemsize for d in stored) < FORWARD_ITEMSIZE):
        return "a score over (q, kv) pairs is read from memory, which cuDNN does slower"
    return None


def _learned_by_place(inputs: CostInputs) -> str | None:
    """A learned tensor with an entry for each query or key is slower on cuDNN.

    For t[h, q, kv] and t[kv] cuDNN takes 1.05 and 1.09 times as long as Inductor's kernel, which adds up few gradients
    for each entry; for slopes[h] * (kv - q) it takes a 64th. Where a table is read at a captured index, as for T5,
    Inductor's kernel of torch 2.11 needs more shared memory than an H200 has.
    """
    roots = [part.expression for part in inputs.hoisted if part.learned]
    reads = [n for n in ir.walk(*roots) if n.kind == "gather" and n.dtype == F32]
    for read in reads:
        places = {i.value for i in read.args[1:] if i.kind == "index"}
        if places & {"q", "k"} and all(i.kind in ("index", "const") for i in read.args[1:]):
            return "a captured tensor that requires grad has an entry for each query or key"
    return None


def _unknown_blocks(inputs: CostInputs) -> str | None:
    if not inputs.call.blocks or inputs.blocks is not None or not split(inputs.program.mask).reads_pairs:
        return None
    return "a mask without tile skipping, under a BlockMask made in the graph"


def _more_pairs(inputs: CostInputs) -> str | None:
    if not inputs.call.blocks or spared(inputs) >= 0:
        return None
    if inputs.blocks is None:
        return "cuDNN would compute every pair that bounds show, the BlockMask is not at hand and may list few blocks"
    queries, keys = inputs.lengths
    ours = pairs_of(inputs.program, inputs.lengths, BACKWARD if inputs.training else FORWARD) / (queries * keys)
    return f"cuDNN would compute {ours:.0%} of the pairs, the BlockMask lists {inputs.blocks.share:.0%}"


def _listing_takes_longer(inputs: CostInputs) -> str | None:
    times = our_times(inputs)
    if times is None:
        return "its kernels were not measured on this device: run `cudnn-flex calibrate`"
    listing = list_time(inputs) if inputs.reads_mask else 0.0
    stock, ours = (inputs.sharing * sum(by_way.values()) for by_way in (stock_times(inputs), times))
    least = MIN_MASK_SHARE if _in_a_model(inputs) else 0.0
    least += inputs.sharing * MIN_SAVING_MS[inputs.training] if host_counts(inputs) else 0.0
    if stock - ours > SURELY * listing + least:
        return None
    calls = f"{inputs.sharing} call{'s' if inputs.sharing > 1 else ''}"
    return f"listing the mask's tiles takes about {listing:.2f} ms a step, and {calls} would save {stock - ours:.2f} ms"


RULES = (
    Row(_lse_in_the_loss, LSE, Code.LSE_GRADIENT),
    Row(_host_takes_longer_with_lse, LSE, Code.LSE_GRADIENT),
    Row(_decodes_by_one_more, "python3 -m pytest -s tests/gpu/test_dynamic.py", tiled=None),
    Row(_pairs_are_read, 'cudnn-flex bench --mods "relative table" "bias tensor" --lower always'),
    Row(_learned_by_place, "python3 -m tests.measure.bias_time"),
    Row(_unknown_blocks, 'cudnn-flex bench --mods "dilated window" documents --lower always'),
    Row(_more_pairs, "cudnn-flex bench --mods causal prefix-LM documents --mode reduce-overhead --lower always"),
    Row(_setting_up_takes_longer, "python3 -m tests.measure.models"),
    Row(_host_takes_longer, HOST),
    Row(_listing_takes_longer, DOCUMENTS, tiled=True),
)


def slower(inputs: CostInputs) -> Reason | None:
    """The reason of the first row that applies, or None."""
    for row in RULES:
        if row.tiled not in (None, bool(inputs.tiled)):
            continue
        detail = row.applies(inputs)
        if detail is not None:
            return Reason(row.code, f"{detail} ({row.command})")
    return None
