"""Architectures and weights: `open_model(path)` gives weights by canonical name, `TorchLlama` computes."""
