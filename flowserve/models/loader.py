"""Opens a model by path: a GGUF file, or a folder with `config.json` and safetensors."""

from __future__ import annotations

from pathlib import Path

import torch

from flowserve.models.errors import ModelNotFound, UnsupportedModel
from flowserve.models.weights import WeightSource

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def open_model(path: str | Path) -> WeightSource:
    """The weight source of `path`. Raises ModelNotFound, UnsupportedModel, BadWeights."""
    path = Path(path)
    if path.is_dir():
        single = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and len(single) == 1:
            path = single[0]
        else:
            from flowserve.models.safetensors_folder import SafetensorsSource

            return SafetensorsSource(path)
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist")
    if path.suffix != ".gguf":
        raise UnsupportedModel(
            f"{path} is neither a .gguf file nor a folder with config.json and safetensors"
        )
    from flowserve.models.gguf_file import GGUFSource

    return GGUFSource(path)


def parse_dtype(name: str) -> torch.dtype:
    """ "auto" is bfloat16. Raises UnsupportedModel for another name than those of DTYPES."""
    if name in ("", "auto"):
        return torch.bfloat16
    if name not in DTYPES:
        raise UnsupportedModel(
            f"dtype {name!r} is not implemented; implemented are auto, {', '.join(DTYPES)}"
        )
    return DTYPES[name]
