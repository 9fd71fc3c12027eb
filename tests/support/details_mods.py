"""Functions whose source text tests/compile/test_details.py expects in reports."""

import torch

CAP = 20.0


def helper(score):
    return torch.tanh(score / CAP)


def soft_cap(score, b, h, q, kv):
    x = helper(score)
    return x * CAP


def alibi(slopes):
    def score_mod(score, b, h, q, kv):
        return score - slopes[h] * (q - kv)

    return score_mod


class Mods:
    def plus_one(self, score, b, h, q, kv):
        return score + 1


def long(score, b, h, q, kv):
    score = score + 1
    score = score + 2
    score = score + 3
    score = score + 4
    score = score + 5
    score = score + 6
    score = score + 7
    score = score + 8
    score = score + 9
    score = score + 10
    score = score + 11
    return score + 12


def causal(b, h, q, kv):
    return q >= kv


def window(b, h, q, kv):
    return q - kv <= 40


one, two = (lambda score, b, h, q, kv: score * 2), (lambda score, b, h, q, kv: score * 3)
(triple,) = (
    lambda score, b, h, q, kv: score
    * 3,
)  # fmt: skip
