"""How long an answer will be: buckets of 128 tokens, learned from the traffic itself.

DeepServe places decodes by a predicted length (section 5.4, with a model of its own that it does not
publish). Two predictors run side by side here, both online and small:

- a fading histogram per tenant and endpoint, and one over everybody for those that are new;
- a softmax regression over what is known of the request (prompt length, bound, endpoint, temperature, the
  prompt's beginning), trained by one gradient step an answer.

Each is scored on every answer before it learns from it; the one with the smaller recent loss speaks. What is
asked of it is a quantile, and how often answers stayed below it is watched: the quantile asked inside moves
until the promised share does (adaptive conformal inference, Gibbs and Candès 2021). With too little seen
there is no prediction, and callers do as if there were no predictor. Pure: no clock, no randomness.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BUCKET_TOKENS = 128
BUCKETS = 64
"""The last one is open: 8,064 tokens and more (ours)."""
MIN_SEEN = 32
"""Answers before anything is predicted, of a tenant's endpoint or of all (ours)."""
FADE = 0.99
"""What an answer's weight keeps per later one: about the last hundred count (ours)."""
SCORE_FADE = 0.98
MAX_KEYS = 4096
"""Tenants times endpoints remembered, least recently used forgotten first (ours: half a kilobyte each)."""
QUANTILE = 0.8
"""Share of answers that shall be no longer than predicted (ours: KV that is kept free costs little, a
preempted sequence is computed again)."""
RATE, LEAST_RATE, RATE_HALVES = 0.5, 0.05, 20
"""Of the classifier's steps, over the features' squared length: falling with the root of what was seen in
units of RATE_HALVES, but not below the least, as traffic changes (ours, tried on Azure's trace)."""
STEP = 0.02  # of the asked quantile, per answer
BEGINNINGS = 16  # hashed prompt beginnings that the classifier tells apart
KINDS = 8
FEATURES = 5 + KINDS + BEGINNINGS

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is known of a request before it runs."""

    tenant: str
    endpoint: str
    prompt: int  # tokens
    bound: int  # most tokens it may make
    temperature: float = 1.0
    beginning: int = 0  # a hash of its first block: templates and system prompts have answers of a kind


@dataclass(frozen=True, slots=True)
class Predicted:
    tokens: int  # no more than so many, with the probability QUANTILE
    likely: int  # the likeliest bucket's upper edge
    source: str  # "classifier", "tenant" or "all"

    def close(self, tokens: int) -> bool:
        """So many were in the bucket that was called the likeliest."""
        return self.likely - BUCKET_TOKENS <= tokens <= self.likely


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Over the answers of late; NaN before any was predicted."""

    seen: int  # answers learned from
    hits: float  # share whose bucket was the likeliest
    covered: float  # share no longer than predicted; QUANTILE if calibrated
    classifier_speaks: bool


class LengthPredictor:
    """Mutable, one owner. Some tens of microseconds an answer."""

    def __init__(self) -> None:
        self._seen = 0
        self._all = np.zeros(BUCKETS)
        self._keys: OrderedDict[tuple[str, str], Floats] = OrderedDict()
        self._weights = np.zeros((BUCKETS, FEATURES))
        self._losses = [math.log(BUCKETS)] * 2  # histogram, classifier
        self._asked = QUANTILE
        self._hits = self._covered = self._scored = 0.0

    def predict(self, asked: Asked) -> Predicted | None:
        """None while too little was seen."""
        found = self._chances(asked)
        if found is None:
            return None
        chances, source = found
        total = np.cumsum(chances)
        most = max(asked.bound, 1)
        likely = (int(chances.argmax()) + 1) * BUCKET_TOKENS
        return Predicted(min(_edge(total, self._asked), most), min(likely, most), source)

    def learn(self, asked: Asked, tokens: int, predicted: Predicted | None) -> None:
        """An answer ended by itself or at its bound with so many tokens. `predicted`: what was said of it."""
        bucket = min(tokens // BUCKET_TOKENS, BUCKETS - 1)
        if predicted is not None:
            covered = tokens <= predicted.tokens
            fade = SCORE_FADE
            self._hits = self._hits * fade + predicted.close(tokens)
            self._covered = self._covered * fade + covered
            self._scored = self._scored * fade + 1
            self._asked = min(0.99, max(0.5, self._asked + STEP * (QUANTILE - covered)))
        features = _features(asked)
        chances = self._classified(features)
        histogram = self._histogram(asked)[0]
        for which, share in enumerate((histogram[bucket], chances[bucket])):
            loss = -math.log(max(float(share), 1e-4))
            self._losses[which] += (1 - SCORE_FADE) * (loss - self._losses[which])
        chances[bucket] -= 1.0
        rate = max(LEAST_RATE, RATE / math.sqrt(1 + self._seen / RATE_HALVES))
        self._weights -= rate / float(features @ features) * np.outer(chances, features)
        self._all *= FADE
        self._all[bucket] += 1
        key = (asked.tenant, asked.endpoint)
        own = self._keys.pop(key, None)
        if own is None:
            own = np.zeros(BUCKETS)
            if len(self._keys) >= MAX_KEYS:
                self._keys.popitem(last=False)
        own *= FADE
        own[bucket] += 1
        self._keys[key] = own
        self._seen += 1

    @property
    def accuracy(self) -> Accuracy:
        scored = self._scored
        return Accuracy(
            self._seen,
            self._hits / scored if scored else math.nan,
            self._covered / scored if scored else math.nan,
            self._classifier_speaks,
        )

    # -- inside ------------------------------------------------------------------------------------------

    @property
    def _classifier_speaks(self) -> bool:
        return self._losses[1] < self._losses[0]

    def _chances(self, asked: Asked) -> tuple[Floats, str] | None:
        if self._seen < MIN_SEEN:
            return None
        if self._classifier_speaks:
            return self._classified(_features(asked)), "classifier"
        return self._histogram(asked)

    def _histogram(self, asked: Asked) -> tuple[Floats, str]:
        own = self._keys.get((asked.tenant, asked.endpoint))
        # A faded count grows towards 1 / (1 - FADE), slower than what it counts.
        enough = (1 - FADE**MIN_SEEN) / (1 - FADE)
        counts, source = (
            (own, "tenant") if own is not None and own.sum() >= enough * 0.999 else (self._all, "all")
        )
        smooth = counts + 1e-3
        return smooth / smooth.sum(), source

    def _classified(self, features: Floats) -> Floats:
        scores = self._weights @ features
        scores -= scores.max()
        chances: Floats = np.exp(scores)
        chances /= chances.sum()
        return chances


def _edge(total: Floats, quantile: float) -> int:
    """Upper edge in tokens of the bucket where the running sum reaches the quantile."""
    return (min(int(np.searchsorted(total, quantile)), BUCKETS - 1) + 1) * BUCKET_TOKENS


def _features(asked: Asked) -> Floats:
    found = np.zeros(FEATURES)
    length = math.log2(max(asked.prompt, 1))
    found[:5] = (
        1.0,
        length / 8,
        (length / 8) ** 2,
        math.log2(max(asked.bound, 1)) / 8,
        min(asked.temperature, 2.0),
    )
    found[5 + _spread(asked.endpoint) % KINDS] = 1.0
    found[5 + KINDS + asked.beginning % BEGINNINGS] = 1.0
    return found


def _spread(text: str) -> int:
    """The same in every process, unlike `hash`."""
    return sum(ord(letter) * 31**at for at, letter in enumerate(text[:16]))
