"""Dense attention for a score_mod and a mask_mod, in float64 and as stock flex_attention's eager math rounds.

Independent of the package: the user's functions on broadcast index tensors, and autograd.
"""

import math

import torch


def attention(query, key, value, score_mod, mask_mod, scale, exact):
    """out and natural log-sum-exp; `exact` computes in float64, else in float32 with stock's roundings."""
    work = torch.float64 if exact else torch.float32
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = query.to(work) @ key.to(work).transpose(-2, -1) * scale
    b, h, q, kv = (
        torch.arange(n, device=query.device, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
        for d, n in enumerate(scores.shape)
    )
    modified = scores if score_mod is None else score_mod(scores, b, h, q, kv)
    if mask_mod is not None:
        modified = torch.where(mask_mod(b, h, q, kv), modified, -math.inf)
    lse = modified.logsumexp(-1)
    weights = torch.where((lse == -math.inf).unsqueeze(-1), 0.0, torch.exp(modified - lse.unsqueeze(-1)))
    if exact:
        return weights @ value.to(work), lse
    return weights.to(query.dtype) @ value.to(query.dtype), lse


def leaf(tensor, exact):
    """A copy that collects its gradient in float64, or in its own dtype."""
    return tensor.detach().to(torch.float64 if exact else tensor.dtype, copy=True).requires_grad_()


def with_gradients(query, key, value, score_mod, mask_mod, scale, grad, exact):
    """out, lse, dQ, dK, dV, detached."""
    leaves = [leaf(t, exact) for t in (query, key, value)]
    out, lse = attention(*leaves, score_mod, mask_mod, scale, exact)
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return (out.detach(), lse.detach(), *gradients)


def captured_gradients(
    query, key, value, score_mod, mask_mod, scale, grad, captured, dtype=torch.float32, grad_lse=0.0
):
    """Gradients of captured tensors as flash attention gives them: the scores' gradients, from an output that is
    rounded, are rounded to `dtype` themselves, before autograd takes them on. Stock's kernel keeps them in float32.
    `grad_lse` is that of the natural log-sum-exp, [B, H, Sq, 1].
    """
    with torch.no_grad():
        out = attention(query, key, value, score_mod, mask_mod, scale, exact=False)[0].float()
    group = query.shape[1] // key.shape[1]
    keys, values = (t.detach().float().repeat_interleave(group, dim=1) for t in (key, value))
    scores = query.detach().float() @ keys.mT * scale
    b, h, q, kv = (
        torch.arange(n, device=query.device, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
        for d, n in enumerate(scores.shape)
    )
    modified = score_mod(scores, b, h, q, kv)
    shown = torch.ones_like(scores, dtype=torch.bool)
    shown = shown if mask_mod is None else shown & mask_mod(b, h, q, kv)
    masked = torch.where(shown, modified.detach(), -math.inf)
    weights = torch.where(shown.any(-1, keepdim=True), masked.softmax(-1), 0.0)
    delta = (grad.float() * out).sum(-1, keepdim=True)
    gradient = weights * (grad.float() @ values.mT - delta + grad_lse)
    return torch.autograd.grad(modified, captured, gradient.to(dtype).float())
