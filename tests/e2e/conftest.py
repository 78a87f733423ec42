"""Stacks that several end-to-end tests share: real processes, real model, started as a user starts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import Stack, running_stack


@pytest.fixture(scope="session")
def stack_float32(small_model_path: Path) -> Iterator[Stack]:
    """1P1D in float32: tokens are exact, so runs can be compared one by one."""
    with running_stack("1P1D", "--dtype", "float32", "--kv-cache-bytes", "2G") as stack:
        yield stack


@pytest.fixture(scope="session")
def stack_default(small_model_path: Path) -> Iterator[Stack]:
    """What `./dev up` gives: 1P1D, bf16."""
    with running_stack("1P1D") as stack:
        yield stack
