"""The small model's card and token table, read once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from controlplane.gateway.detokenize import TokenTable
from controlplane.gateway.modelcard import ModelCard, build_card


@pytest.fixture(scope="session")
def card(small_model_path: Path) -> ModelCard:
    return build_card(small_model_path)


@pytest.fixture(scope="session")
def tokenizer(card: ModelCard) -> Tokenizer:
    return Tokenizer.from_buffer(card.tokenizer_json)


@pytest.fixture(scope="session")
def table(card: ModelCard, tokenizer: Tokenizer) -> TokenTable:
    return TokenTable(tokenizer, card)
