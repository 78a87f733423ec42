"""Hugging Face transformers as the reference: the same weights in its own model code, float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flowserve.models.gguf_file import GGUFSource

_PARTS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Agreement:
    """How a run's tokens stand in the reference's distribution, teacher-forced on the run itself."""

    tokens: int
    equal: int  # tokens that are the reference's argmax
    worst_gap: float  # nats that the least likely chosen token lies under the argmax

    @property
    def share(self) -> float:
        return self.equal / max(1, self.tokens)


class Reference:
    """A LlamaForCausalLM over a GGUF file's weights. (That they equal transformers' own reading of the
    file is tested in tests/unit/flowserve/models.)"""

    def __init__(self, path: Path) -> None:
        source = GGUFSource(path)
        config = source.config
        torch.set_num_threads(2)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden,
                intermediate_size=config.intermediate,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_len,
                rms_norm_eps=config.norm_epsilon,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=config.tied,
            )
        ).eval()
        state = {
            "model.embed_tokens.weight": source.tensor("embedding"),
            "model.norm.weight": source.tensor("final_norm"),
            "lm_head.weight": source.tensor("embedding" if config.tied else "lm_head"),
        }
        for index in range(config.layers):
            for part, name in _PARTS.items():
                state[f"model.layers.{index}.{name}.weight"] = source.tensor(f"layers.{index}.{part}")
        self.model.load_state_dict(state)

    @torch.inference_mode()
    def agreement(self, prompt: Sequence[int], output: Sequence[int]) -> Agreement:
        """Greedy equality token by token: by induction, all equal here means equal to its own greedy run."""
        ids = torch.tensor([[*prompt, *output]])
        logits = self.model(ids, logits_to_keep=len(output) + 1).logits[0, :-1]
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(output).unsqueeze(1))[:, 0]
        gaps = logprobs.max(-1).values - chosen
        return Agreement(len(output), int((gaps == 0).sum()), float(gaps.max()))
