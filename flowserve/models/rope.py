"""Rotary position embedding tables (Su et al. 2021), with linear and Llama 3.1 frequency scaling."""

from __future__ import annotations

import math

import torch

from flowserve.models.config import ModelConfig


def rotary_tables(
    config: ModelConfig, max_len: int, divisors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 `[max_len, head_dim / 2]` each.

    `divisors` [head_dim / 2] stretch every frequency on its own (GGUF files carry Llama 3.1's so).
    """
    # In float32 on purpose: the reference implementation, with which the models were trained, rounds so too.
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies /= scaling.factor
    elif scaling is not None:
        # Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated.
        wavelengths = 2 * math.pi / frequencies
        low = scaling.original_max_len / scaling.low_freq_factor
        high = scaling.original_max_len / scaling.high_freq_factor
        smooth = (scaling.original_max_len / wavelengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        stretched = frequencies / scaling.factor
        between = (1 - smooth) * stretched + smooth * frequencies
        frequencies = torch.where(
            wavelengths > low, stretched, torch.where(wavelengths < high, frequencies, between)
        )
    if divisors is not None:
        frequencies /= divisors
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()
