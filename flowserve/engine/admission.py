"""Which tasks the engine refuses at the door, and with what words. Pure; called by `Engine.submit`."""

from __future__ import annotations

from flowserve.engine.types import EngineTask, ErrorCode, TaskError, TaskKind
from flowserve.executor.interface import ModelInfo


def context_limit(info: ModelInfo, pool_tokens: int) -> int:
    """Tokens a sequence may reach: the model's context, or the pool if that is smaller."""
    return min(info.max_model_len, pool_tokens)


def check_task(task: EngineTask, info: ModelInfo, pool_tokens: int, can_hand_over: bool) -> TaskError | None:
    """The reason to refuse `task` for good on this executor; None if it can run here."""
    problem = _invalid(task, info, can_hand_over)
    if problem is not None:
        return TaskError(ErrorCode.INVALID_ARGUMENT, problem)
    length = len(task.prompt) + len(task.output)
    if length > pool_tokens:
        return TaskError(
            ErrorCode.OUT_OF_KV, f"{length} tokens can never fit the {pool_tokens} tokens of this KV pool"
        )
    return None


def _invalid(task: EngineTask, info: ModelInfo, can_hand_over: bool) -> str | None:
    prompt, output = task.prompt, task.output
    if len(prompt) == 0:
        return "prompt is empty"
    for name, tokens in (("prompt", prompt), ("output", output)):
        if len(tokens) and not (min(tokens) >= 0 and max(tokens) < info.vocab_size):
            return f"{name} has a token id outside of the vocabulary of {info.vocab_size}"
    if task.max_output_tokens < len(output):
        return f"max_output_tokens {task.max_output_tokens} is below the {len(output)} tokens already out"
    # A context that is full has no room for a token, but its prompt can still be scored.
    room = 0 if task.max_output_tokens == len(output) else 1
    length = len(prompt) + len(output)
    if length + room > info.max_model_len:
        return f"prompt and output of {length} tokens leave no room in a context of {info.max_model_len}"
    if task.adapter_id:
        return f"adapter {task.adapter_id!r}: adapters are not loaded"
    if task.kind is TaskKind.DECODE:
        if len(output) == 0 and not task.early:
            return "a decode task needs the output token its prefill sampled"
        if task.kv_source is None:
            return "a decode task needs a kv_source"
        if task.sampling.prompt_logprobs is not None:
            return "prompt_logprobs belong to the prefill, not to a decode task"
    if task.kind is not TaskKind.UNIFIED and not can_hand_over:
        return f"this executor has no KV transfer, so it cannot run {task.kind.value} tasks"
    return None
