"""Compares cuDNN's row maximum with flex_attention's max_scores, in each strategy: python3 -m tests.measure.row_maximum

The package keeps calls that use max_scores. This says whether they could be lowered: the columns are the largest error
of cuDNN's and of stock's maximum against float64 in rows that see a key, and what cuDNN has in rows that see none,
where stock has -inf.
"""

import dataclasses

import cudnn
import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from cudnn_flex_compile.engine.plans import graph_plan
from cudnn_flex_compile.engine.problem import FORWARD, stats_spec
from cudnn_flex_compile.reasons import Reason
from tests.deviceless.accepted import lowerings, problem, program_of
from tests.support.row_maximum import PROGRAMS, ROLE, with_maximum

LENGTHS = (1000, 1000)


def main():
    graph_plan.FORWARD_ROLES = (*graph_plan.FORWARD_ROLES, ROLE)
    print(f"cuDNN {cudnn.backend_version()}, {torch.cuda.get_device_name()}")
    print("program | strategy | cuDNN's error | stock's error | rows that see nothing")
    for name, mods in PROGRAMS.items():
        program = program_of(*mods)
        asked = dataclasses.replace(problem(program, FORWARD, lengths=LENGTHS), replay=False)
        torch.manual_seed(0)
        query, key, value = (s.empty(torch.device("cuda")).normal_() for s in (asked.query, asked.key, asked.value))
        exact = _exact(query, key, asked.scale, *mods)
        seen = exact != -torch.inf
        stock = _stock(query, key, value, asked.scale, *mods)
        for lowering in lowerings(program):
            with with_maximum():
                plan = graph_plan.build(asked, lowering)
            if isinstance(plan, Reason):
                print(f"{name} | {lowering.strategy} | {plan}")
                continue
            out, stats, largest = (
                s.empty(query.device).fill_(torch.nan) for s in (asked.out, stats_spec(asked), stats_spec(asked))
            )
            plan.run((query, key, value, out, stats, largest), (), (), ())
            found = largest[..., 0].double()
            mine, theirs = ((x[seen] - exact[seen]).abs().max().item() for x in (found, stock.double()))
            hidden = sorted(set(found[~seen].tolist()))[:3]
            print(f"{name} | {lowering.strategy} | {mine:.3e} | {theirs:.3e} | {hidden}")


def _exact(query, key, scale, score_mod, mask_mod):
    """In float64, [B, H, Sq]."""
    group = query.shape[1] // key.shape[1]
    scores = query.double() @ key.double().repeat_interleave(group, 1).mT * scale
    where = [torch.arange(n, device="cuda").view([-1 if i == d else 1 for i in range(4)]) for d, n in
             enumerate(scores.shape)]  # fmt: skip
    scores = score_mod(scores, *where) if score_mod else scores
    visible = mask_mod(*where) if mask_mod else torch.ones((), dtype=torch.bool, device="cuda")
    return torch.where(visible, scores, -torch.inf).amax(-1)


def _stock(query, key, value, scale, score_mod, mask_mod):
    mask = create_block_mask(mask_mod, None, None, *LENGTHS, device="cuda") if mask_mod else None
    how = {"score_mod": score_mod, "block_mask": mask, "scale": scale, "enable_gqa": True}
    with torch.no_grad():
        _, aux = torch.compile(flex_attention)(query, key, value, **how, return_aux=AuxRequest(max_scores=True))
    return aux.max_scores


if __name__ == "__main__":
    main()
