"""How a token is drawn: vectorised over the rows of a step, reproducible whatever else is in the batch.

Order (as in vLLM and Hugging Face): minimum tokens, logit processor, repetition, presence and
frequency penalties, bias; then temperature, top-k, top-p, min-p; then the draw. Log-probabilities are
those of the raw distribution, before any of it.

A draw is `u(seed, index)` through the inverse cumulative distribution in order of token id, summed in
float64. `u` is a counter-based hash, so there is no generator state to keep, to share or to move with
a hand-over: the same seed gives the same token at the same index in any batch, on any executor, up to
the rounding of the logits.

Rows stand alone: one that no token can be drawn from gets an error, its neighbours get their tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from flowserve.engine.processors import LogitProcessor
from flowserve.engine.types import SamplingParams, TokenLogprobs
from flowserve.executor.interface import SampleSpec

log = logging.getLogger(__name__)

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
MIN_TEMPERATURE = 1e-30
"""Below it a division would leave float32's range (ours); the result is the same: the peak alone."""
FLOORS = (-8.0, -16.0, -np.inf)
"""Where top-k and top-p look for candidates: so far below the peak (nats) first, further only if that
was not enough. Sorting a whole vocabulary costs milliseconds a row, these few hundred nothing (ours)."""
ROWS_AT_ONCE = 8
"""Rows drawn together: in host memory their arrays then stay near a core (measured on a vocabulary of
49,152: 32 rows take a third of the time they take at once)."""

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class SamplingError(Exception):
    """Logits that no token can be drawn from: NaN, nothing left after masking, a bad bias or processor."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What became of a row: a token, or the reason why there is none."""

    token: int | None = None
    logprobs: TokenLogprobs | None = None
    error: SamplingError | None = None


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
def sample(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[Draw]:
    """Draws one token a row. `logits` float32 [len(specs), vocab]; it may be changed."""
    if not specs:
        return []
    errors: dict[int, SamplingError] = {}
    peaks, best = logits.max(dim=-1)  # NaN anywhere in a row is its maximum
    for row in torch.nonzero(~torch.isfinite(peaks))[:, 0].tolist():
        errors[row] = SamplingError("the model gave logits that are not finite")
    wanted = [i for i, spec in enumerate(specs) if spec.params.logprobs is not None and i not in errors]
    raw = logits[wanted].log_softmax(dim=-1) if wanted else None
    changed = []
    for row, spec in enumerate(specs):
        if row not in errors:
            try:
                if _reshape(logits, row, spec):
                    changed.append(row)
            except SamplingError as error:
                errors[row] = error
    if changed:
        peaks[changed], best[changed] = logits[changed].max(dim=-1)
        for row in torch.nonzero(~torch.isfinite(peaks))[:, 0].tolist():
            errors.setdefault(row, SamplingError("bias or a processor left no token to choose from"))
    tokens = best.tolist()
    random = [i for i, spec in enumerate(specs) if spec.params.temperature > 0 and i not in errors]
    for start in range(0, len(random), ROWS_AT_ONCE):
        rows = random[start : start + ROWS_AT_ONCE]
        drawn = _draw(logits[rows], peaks[rows], [specs[i] for i in rows])
        for i, token in zip(rows, drawn, strict=True):
            tokens[i] = token
    scores: dict[int, TokenLogprobs] = {}
    if raw is not None:
        counts = [specs[i].params.logprobs or 0 for i in wanted]
        scores = dict(zip(wanted, token_logprobs(raw, [tokens[i] for i in wanted], counts), strict=True))
    return [
        Draw(error=errors[i]) if i in errors else Draw(token, scores.get(i)) for i, token in enumerate(tokens)
    ]


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
    """Everything that changes single logits of a row; returns whether anything did.

    Raises SamplingError.
    """
    params = spec.params
    line = logits[row]
    changed = False
    if spec.index < params.min_tokens:
        ends = [token for token in spec.eos_token_ids if token < len(line)]  # others cannot be drawn anyway
        line[ends] = -torch.inf
        changed = bool(ends)
    if spec.processor is not None:
        logits[row] = line = _processed(line, spec)
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
        if max(params.logit_bias) >= len(line):
            raise SamplingError(f"logit_bias names a token outside of the vocabulary of {len(line)}")
        ids = torch.tensor(list(params.logit_bias), device=line.device)
        line[ids] += torch.tensor(list(params.logit_bias.values()), device=line.device, dtype=line.dtype)
        changed = True
    return changed


def _processed(line: torch.Tensor, spec: SampleSpec) -> torch.Tensor:
    processor: LogitProcessor = spec.processor  # type: ignore[assignment]  # made by our own registry
    try:
        return processor.apply(line, spec.prompt, spec.output)
    except Exception as error:  # a task boundary: one sequence's processor, from outside of this room
        log.exception("a logit processor failed")
        raise SamplingError(f"the logit processor failed: {type(error).__name__}: {error}") from error


def _array(tokens: Sequence[int]) -> Ids:
    return np.asarray(tokens, np.int64).reshape(-1)


def _ids(values: Ids, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device)


def _draw(logits: torch.Tensor, peaks: torch.Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """Temperature, filters and the draw; rows without filters never sort."""
    params = [spec.params for spec in specs]
    device = logits.device
    temperatures = torch.tensor([max(p.temperature, MIN_TEMPERATURE) for p in params], device=device)
    # The peak is subtracted first: a temperature near zero overflows to -inf elsewhere, never to inf.
    scaled = (logits - peaks.unsqueeze(1)).div_(temperatures.unsqueeze(1))
    draws = [uniform(spec.params.seed, spec.index) for spec in specs]
    filtered = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1 or p.min_p > 0]
    plain = [i for i in range(len(params)) if i not in set(filtered)]
    tokens = [0] * len(params)
    if filtered:
        lines = scaled[filtered].cpu()
        weights = lines.exp().numpy()
        for i, line, weight in zip(filtered, lines.numpy(), weights, strict=True):
            kept = _kept(line, weight, params[i])
            cumulative = np.cumsum(weight[kept], dtype=np.float64)
            picked = np.searchsorted(cumulative, draws[i] * cumulative[-1], "right")
            tokens[i] = int(kept[min(picked, np.searchsorted(cumulative, cumulative[-1]))])
    if plain:
        cumulative_sums = (scaled[plain] if filtered else scaled).exp().cumsum(dim=-1, dtype=torch.float64)
        totals = cumulative_sums[:, -1:].contiguous()
        targets = torch.tensor([draws[i] for i in plain], device=device, dtype=torch.float64).unsqueeze(1)
        # The first id whose cumulative weight exceeds the target: never one of weight zero. Where rounding
        # lifts the target to the total, the last positive one.
        first_above = torch.searchsorted(cumulative_sums, targets * totals, right=True)
        last_positive = torch.searchsorted(cumulative_sums, totals)
        for i, token in zip(plain, torch.minimum(first_above, last_positive)[:, 0].tolist(), strict=True):
            tokens[i] = token
    return tokens


def _kept(line: Floats, weights: Floats, params: SamplingParams) -> Ids:
    """The ids that top-k, top-p and min-p leave, ascending. `line` is scaled, its peak is 0.

    Equal logits at a boundary are treated alike for top-k and min-p; for top-p the lower id goes first.
    """
    top_k = params.top_k if params.top_k < len(line) else 0
    likely = np.float32(np.log(params.min_p)) if params.min_p > 0 else -np.inf
    if not top_k and params.top_p >= 1:
        return np.flatnonzero(line >= likely)
    order = np.zeros(0, np.int64)
    for floor in FLOORS:
        # All above a floor: a prefix of the whole vocabulary's order, equal logits included.
        order = np.flatnonzero(line > floor)
        if len(order) < top_k and floor > -np.inf:
            continue
        order = order[np.argsort(-line[order], kind="stable")]
        if top_k and len(order) > top_k:
            order = order[: np.searchsorted(-line[order], -line[order[top_k - 1]], "right")]
        if params.top_p >= 1:
            break
        mass = np.cumsum(weights[order], dtype=np.float64)
        total = mass[-1] if top_k else weights.sum(dtype=np.float64)
        # Kept: the smallest prefix that reaches top_p, at least one token.
        enough = int(np.searchsorted(mass, params.top_p * total))
        if enough < len(order) or floor == -np.inf:
            order = order[: enough + 1]
            break
    return np.sort(order[line[order] >= likely])
