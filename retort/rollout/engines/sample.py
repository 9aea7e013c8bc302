"""Samples tokens from given uniform random numbers. Axis letters: see `retort.core`; B is the rows sampled at once.

The distribution of a row is cut into intervals of [0, 1), one per id and in the order of the ids; the number of the row
lies in one of them. So a row's token depends on its own logits and its own number only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

#: Ids per block of the search.
_BLOCK = 512
#: Elements of logits processed at once: few enough that a CPU's second pass over them finds them in its cache.
_ELEMENTS, _ELEMENTS_CPU = 2**25, 2**20


def sample(
    logits_BV: Tensor, uniforms_B: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Samples a token for every row, by the inverse of its cumulative distribution.

    Args:
        logits_BV: Logits of the ids that are tokens, in any floating dtype.
        uniforms_B: Random numbers in [0, 1), float64.
        temperature: The divisor of the logits, in fp32.
        top_p: See `nucleus`; 1 keeps every id.

    Returns:
        Ids, and the log-prob of each under the distribution that it was sampled from, nats, fp32; [B] both.
    """
    rows = max(1, (_ELEMENTS_CPU if logits_BV.device.type == "cpu" else _ELEMENTS) // logits_BV.shape[1])
    parts = [
        _draw(_scaled(part_BV, temperature, top_p), part_B)
        for part_BV, part_B in zip(logits_BV.split(rows), uniforms_B.split(rows), strict=True)
    ]
    return torch.cat([token_B for token_B, _ in parts]), torch.cat([logp_B for _, logp_B in parts])


def nucleus(logp_BV: Tensor, top_p: float) -> Tensor:
    """Log-probs renormalised on the smallest set of most likely tokens that holds `top_p`; -inf outside."""
    sorted_BV, order_BV = logp_BV.sort(dim=-1, descending=True)
    # The sum before a token, without the token: subtracting it again would leave rounding at the edge.
    before_BV = functional.pad(sorted_BV.exp().cumsum(-1)[:, :-1], (1, 0))
    outside_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= top_p)
    return torch.log_softmax(logp_BV.masked_fill(outside_BV, float("-inf")), dim=-1)


def _scaled(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    scaled_BV = logits_BV.float() if temperature == 1.0 else logits_BV.float() / temperature
    return nucleus(torch.log_softmax(scaled_BV, dim=-1), top_p) if top_p < 1.0 else scaled_BV


def _draw(logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Searches in two levels: first among sums of blocks of ids, then inside the block that was hit.

    One level would need every cumulative sum in float64, or the tail of 150,000 small numbers is rounded away. A sum of
    512 numbers in fp32 is right to a few ulp, because torch adds in pairs; only sums over blocks need float64.
    """
    rows, vocab = logits_BV.shape
    peak_B1 = logits_BV.max(-1, keepdim=True).values
    blocks = -(-vocab // _BLOCK)
    if blocks > 1:
        mass_BV = logits_BV.new_empty(rows, blocks * _BLOCK)
        mass_BV[:, vocab:] = 0.0
        torch.sub(logits_BV, peak_B1, out=mass_BV[:, :vocab]).exp_()
        blocks_BKV = mass_BV.view(rows, blocks, _BLOCK)
        ends_BK = blocks_BKV.sum(-1).double().cumsum(-1)
        whole_B1 = ends_BK[:, -1:]
        block_B1, rest_B1 = _hit(ends_BK, uniforms_B[:, None] * whole_B1)
        inside_BV = blocks_BKV.gather(1, block_B1[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    else:
        inside_BV, block_B1 = (logits_BV - peak_B1).exp_(), torch.zeros_like(peak_B1, dtype=torch.long)
        whole_B1 = inside_BV.sum(-1, keepdim=True, dtype=torch.float64)
        rest_B1 = uniforms_B[:, None] * whole_B1
    target_B1, _ = _hit(inside_BV.double().cumsum(-1), rest_B1)
    token_B1 = block_B1 * _BLOCK + target_B1
    logp_B1 = (logits_BV.gather(1, token_B1) - peak_B1).double() - whole_B1.log()
    return token_B1.squeeze(1), logp_B1.squeeze(1).float()


def _hit(ends_BK: Tensor, target_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The interval that a number lies in, and its distance from the interval's start; `ends_BK` are intervals' ends.

    The first end above the number is that of the interval, so one of width zero is never hit: its end is the end of the
    interval before. A number that rounding pushed to the end of the last interval is moved back into it.
    """
    last_B1 = ends_BK[:, -1:]
    target_B1 = torch.minimum(target_B1, torch.nextafter(last_B1, torch.zeros_like(last_B1)))
    index_B1 = torch.searchsorted(ends_BK, target_B1, right=True)
    starts_B1 = torch.where(index_B1 > 0, ends_BK.gather(1, (index_B1 - 1).clamp_min(0)), 0.0)
    return index_B1, target_B1 - starts_B1
