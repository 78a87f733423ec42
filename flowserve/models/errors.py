"""Why a model cannot be loaded. The TE-shell turns these into gRPC status codes by their built-in bases."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be loaded; the message says which file or tensor, and what can be done."""


class ModelNotFound(ModelError, FileNotFoundError):
    """The path does not exist or holds no model files."""


class UnsupportedModel(ModelError, ValueError):
    """A readable model of an architecture, quantization or option that is not implemented."""


class BadWeights(ModelError, ValueError):
    """Torn or inconsistent files: truncated, missing tensors, wrong shapes."""
