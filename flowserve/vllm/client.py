"""AsyncLLM behind `flowserve.vllm.engine.Client`: the only file that imports vLLM (tested with 0.32)."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import vllm
from vllm import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from flowserve.engine.types import EngineTask
from flowserve.vllm.engine import EngineLost, Stats

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What vLLM made of its arguments."""

    num_blocks: int
    block_tokens: int
    max_model_len: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str


class VllmClient:
    """One AsyncLLM. Made, used and shut down on its loop."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Loads the model. Blocks. `arguments` are those of AsyncEngineArgs. Raises what vLLM raises:
        ValueError for what it does not know, RuntimeError where its processes do not start."""
        stats = self._stats = Stats()

        class Logger(StatLoggerBase):  # type: ignore[misc]  # vLLM is not there where types are checked
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                """Nothing is kept of them."""

            def record(self, scheduler_stats: Any, iteration_stats: Any, *rest: Any, **named: Any) -> None:
                if scheduler_stats is not None:
                    stats.steps += 1
                    stats.running = scheduler_stats.num_running_reqs
                    stats.waiting = scheduler_stats.num_waiting_reqs
                    stats.kv_used = scheduler_stats.kv_cache_usage

            def log_engine_initialized(self) -> None:
                """Told by whoever loads."""

        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**{"enable_log_requests": False, **arguments}), stat_loggers=[Logger]
        )

    @property
    def loaded(self) -> Loaded:
        config = self._llm.vllm_config
        model, cache = config.model_config, config.cache_config
        return Loaded(
            num_blocks=int(cache.num_gpu_blocks or 0),
            block_tokens=int(cache.block_size),
            max_model_len=int(model.max_model_len),
            vocab_size=int(model.get_vocab_size()),
            layers=int(model.get_total_num_hidden_layers()),
            kv_heads=int(model.get_total_num_kv_heads()),
            head_dim=int(model.get_head_size()),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    @property
    def stats(self) -> Stats:
        return self._stats

    @property
    def lost(self) -> str:
        return f"vLLM's engine is dead: {self._llm.dead_error}" if self._llm.errored else ""

    async def generate(
        self, task: EngineTask, request_id: str, max_tokens: int
    ) -> AsyncGenerator[vllm.RequestOutput, None]:
        prompt = TokensPrompt(prompt_token_ids=[*map(int, task.prompt), *map(int, task.output)])
        try:
            async for output in self._llm.generate(
                prompt, params_of(task, max_tokens), request_id, priority=-task.priority
            ):
                yield output
        except EngineDeadError as error:
            raise EngineLost(str(error) or "vLLM's engine is dead") from error

    def shutdown(self) -> None:
        self._llm.shutdown()


def params_of(task: EngineTask, max_tokens: int) -> SamplingParams:
    """Draws are vLLM's own: a seed repeats them within one attempt, not over a replay at another executor."""
    sampling = task.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed & 0x7FFF_FFFF_FFFF_FFFF,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs if not task.output else None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        ignore_eos=sampling.ignore_eos,
        min_tokens=min(max_tokens, max(0, sampling.min_tokens - len(task.output))),
        max_tokens=max_tokens,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
