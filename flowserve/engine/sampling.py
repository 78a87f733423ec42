"""How a token is drawn: vectorised over the rows of a step, reproducible whatever else is in the batch.

Order (as in vLLM and Hugging Face): minimum tokens, logit processor, repetition, presence and
frequency penalties, bias; then temperature, top-k, top-p, min-p; then the draw. Log-probabilities are
those of the raw distribution, before any of it.

A draw is `u(seed, index)` through the inverse cumulative distribution in order of token id, in
float64. `u` is a counter-based hash, so there is no generator state to keep, to share or to move with
a hand-over: the same seed gives the same token at the same index in any batch, on any executor, up to
the rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flowserve.engine.processors import LogitProcessor
from flowserve.engine.types import SamplingParams, TokenLogprobs
from flowserve.executor.interface import SampleSpec

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class SamplingError(Exception):
    """Logits that no token can be drawn from: NaN, or nothing left after masking."""


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) of `seed` and `index` alone: splitmix64 (Steele et al. 2014), 53 bits."""
    mixed = _mix(_mix(seed & _MASK) ^ (((index + 1) * _GOLDEN) & _MASK))
    return (mixed >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@torch.inference_mode()
def sample(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[tuple[int, TokenLogprobs | None]]:
    """Draws one token a row. `logits` float32 [len(specs), vocab]; it may be changed.

    Raises SamplingError for rows with NaN or without a possible token.
    """
    if not specs:
        return []
    peaks, best = logits.max(dim=-1)
    if not bool(torch.isfinite(peaks).all()):
        raise SamplingError("the model gave logits that are not finite")
    wanted = [i for i, spec in enumerate(specs) if spec.params.logprobs is not None]
    raw = logits[wanted].log_softmax(dim=-1) if wanted else None
    changed = [i for i, spec in enumerate(specs) if _reshape(logits, i, spec)]
    if changed:
        peaks, best = logits.max(dim=-1)
        if not bool(torch.isfinite(peaks).all()):
            raise SamplingError("penalties, bias or a processor left no token to choose from")
    tokens = best.tolist()
    random = [i for i, spec in enumerate(specs) if spec.params.temperature > 0]
    if random:
        for i, token in zip(random, _draw(logits[random], [specs[i] for i in random]), strict=True):
            tokens[i] = token
    scores: dict[int, TokenLogprobs] = {}
    if raw is not None:
        counts = [specs[i].params.logprobs or 0 for i in wanted]
        scores = dict(zip(wanted, token_logprobs(raw, [tokens[i] for i in wanted], counts), strict=True))
    return [(token, scores.get(i)) for i, token in enumerate(tokens)]


def token_logprobs(raw: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probability, rank and the most likely alternatives of one token per row of `raw` [rows, vocab]."""
    chosen = raw.gather(1, torch.tensor(tokens, device=raw.device).unsqueeze(1))
    ranks = (raw > chosen).sum(dim=-1) + 1
    width = min(max(counts), raw.shape[-1])
    values, ids = (
        raw.topk(width, dim=-1) if width else (raw[:, :0], torch.zeros_like(raw[:, :0], dtype=torch.int64))
    )
    rows = zip(
        tokens, chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), counts, strict=True
    )
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(top[:count], likely[:count], strict=True)))
        for token, logprob, rank, top, likely, count in rows
    ]


def _reshape(logits: torch.Tensor, row: int, spec: SampleSpec) -> bool:
    """Everything that changes single logits of a row; returns whether anything did."""
    params = spec.params
    line = logits[row]
    changed = False
    if spec.index < params.min_tokens and spec.eos_token_ids:
        line[list(spec.eos_token_ids)] = -torch.inf
        changed = True
    if spec.processor is not None:
        processor: LogitProcessor = spec.processor  # type: ignore[assignment]  # made by our own registry
        logits[row] = line = processor.apply(line, spec.prompt, spec.output)
        changed = True
    if params.repetition_penalty != 1.0:
        seen = _ids(np.unique(np.concatenate([_array(spec.prompt), _array(spec.output)])), line)
        values = line[seen]
        line[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
        changed = True
    if (params.presence_penalty or params.frequency_penalty) and len(spec.output):
        unique, counts = np.unique(_array(spec.output), return_counts=True)
        weight = torch.from_numpy(counts).to(line.device, line.dtype)
        line[_ids(unique, line)] -= params.presence_penalty + params.frequency_penalty * weight
        changed = True
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=line.device)
        line[ids] += torch.tensor(list(params.logit_bias.values()), device=line.device, dtype=line.dtype)
        changed = True
    return changed


def _array(tokens: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.asarray(tokens, np.int64).reshape(-1)


def _ids(values: np.ndarray[tuple[int], np.dtype[np.int64]], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device)


def _draw(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """Temperature, filters and the draw; rows without filters never sort."""
    device = logits.device
    params = [spec.params for spec in specs]
    temperatures = torch.tensor([p.temperature for p in params], device=device, dtype=torch.float64)
    # The peak is subtracted first: a temperature near zero overflows to -inf elsewhere, never to inf.
    scaled = (logits - logits.max(dim=-1, keepdim=True).values).double() / temperatures.unsqueeze(1)
    for row, p in enumerate(params):
        if p.top_k or p.top_p < 1 or p.min_p > 0:
            _filter(scaled[row], p)
    weights = scaled.exp_()
    cumulative = weights.cumsum(dim=-1)
    draws = torch.tensor(
        [uniform(spec.params.seed, spec.index) for spec in specs], device=device, dtype=torch.float64
    )
    targets = (draws * cumulative[:, -1]).unsqueeze(1)
    # The first id whose cumulative weight exceeds the target: never one of weight zero. Rounding at the
    # very top may exceed the last positive one; the clamp keeps it there.
    picked = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1)
    return [int(token) for token in torch.minimum(picked, last).tolist()]


def _filter(line: torch.Tensor, params: SamplingParams) -> None:
    """Sets what top-k, top-p and min-p exclude to -inf, in place; `line` is scaled, its peak is 0.

    Equal logits at a boundary are treated alike for top-k and min-p; for top-p the lower id goes first.
    """
    if 0 < params.top_k < len(line):
        threshold = line.topk(params.top_k).values[-1]
        line.masked_fill_(line < threshold, -torch.inf)
    if params.top_p < 1:
        order = torch.argsort(line, descending=True, stable=True)
        probabilities = line[order].softmax(dim=-1)
        # Kept: the smallest prefix that reaches top_p, at least one token.
        beyond = probabilities.cumsum(dim=-1) - probabilities >= params.top_p
        beyond[0] = False
        line[order[beyond]] = -torch.inf
    if params.min_p > 0:
        line.masked_fill_(line < np.log(params.min_p), -torch.inf)
