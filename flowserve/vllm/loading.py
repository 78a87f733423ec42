"""From a path and a revision to a running vLLM, behind what the TE-shell asks of a loader."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from flowserve.engine.types import Role, StepEvent
from flowserve.executor.interface import ModelInfo
from flowserve.shell.loading import Asleep, LoadFailed, LoadReason, LoadSpec
from flowserve.shell.settings import Settings
from flowserve.shell.start import Start, process_age, start_of
from flowserve.vllm.engine import STOP_SECONDS, Loop, VllmEngine

if TYPE_CHECKING:
    from flowserve.vllm.client import VllmClient

log = logging.getLogger(__name__)

LOAD_SECONDS = 1800.0


class VllmModel:
    """A model that vLLM serves; a `flowserve.shell.served.ServedModel`."""

    store = None
    image = None
    can_sleep = False

    def __init__(
        self, spec: LoadSpec, engine: VllmEngine, client: VllmClient, loop: Loop, start: Start
    ) -> None:
        self.spec, self.engine, self.start = spec, engine, start
        self.load_seconds = 0.0
        self._client, self._loop = client, loop
        loaded = client.loaded
        self.num_blocks, self.block_tokens = loaded.num_blocks, loaded.block_tokens
        self.max_model_len, self.dtype = loaded.max_model_len, loaded.dtype

    def sleep(self) -> Asleep:
        raise RuntimeError("engine vllm does not sleep")

    def close(self) -> bool:
        """Ends vLLM's processes."""
        self.engine.stop(STOP_SECONDS)
        close(self._client, self._loop)
        return True


class VllmLoader:
    """Builds models for one process; a `flowserve.shell.lifecycle.ModelLoader`."""

    weights = None

    def __init__(self, settings: Settings, on_event: Callable[[StepEvent], None]) -> None:
        self._settings, self._on_event = settings, on_event
        self._lock = threading.Lock()
        self._preloaded = False
        self._ready_age = 0.0

    def preload(self) -> None:
        """Imports vLLM. Blocks; repeatable, from any thread. Raises ImportError, ValueError."""
        with self._lock:
            if self._preloaded:
                return
            if importlib.util.find_spec("vllm") is None:
                raise ImportError(
                    "--engine vllm needs vLLM: install the extra `vllm`, or use the image with it"
                )
            import flowserve.vllm.client  # noqa: F401  seconds of imports, before there is a model

            self._ready_age = process_age()
            self._preloaded = True

    def __call__(self, spec: LoadSpec, role: Role) -> VllmModel:
        """Loads and starts. Raises LoadFailed."""
        asked, cold = time.time(), not self._preloaded
        spec.check(pool=False)
        if spec.quantization:
            raise LoadFailed(
                LoadReason.UNSUPPORTED,
                f"quantization {spec.quantization} is FlowServe's: vLLM reads the model's",
            )
        self.preload()
        from flowserve.vllm.client import VllmClient

        settings = self._settings
        arguments = {
            "model": spec.path,
            "dtype": spec.dtype,
            "max_model_len": spec.max_model_len or None,
            "tensor_parallel_size": spec.tensor_parallel or settings.tensor_parallel,
            "kv_cache_memory_bytes": spec.kv_cache_bytes or None,
            "max_num_seqs": settings.max_running,
            "enable_prefix_caching": settings.prefix_cache,
            "scheduling_policy": "priority",
            **settings.engine_args,
        }
        loop = Loop()
        loop.start()

        async def make() -> VllmClient:
            return VllmClient(arguments)

        began = time.perf_counter()
        try:
            client: VllmClient = loop.call(make(), LOAD_SECONDS)
        except (ValueError, TypeError) as error:
            loop.stop()
            raise LoadFailed(LoadReason.UNSUPPORTED, str(error)) from error
        except BaseException:
            loop.stop()
            raise
        loaded = client.loaded
        info = ModelInfo(
            revision=spec.revision,
            layers=loaded.layers,
            kv_heads=loaded.kv_heads,
            head_dim=loaded.head_dim,
            vocab_size=loaded.vocab_size,
            max_model_len=loaded.max_model_len,
            eos_token_ids=(),
            dtype=loaded.dtype,
        )
        engine = VllmEngine(
            client,
            loop,
            info,
            num_blocks=loaded.num_blocks,
            block_tokens=loaded.block_tokens,
            max_tasks=settings.max_tasks,
            on_event=self._on_event,
        )
        start = start_of(
            cold=cold,
            weights="",
            decided_unix=spec.decided_unix,
            asked_unix=asked,
            ready_age=self._ready_age,
            load=time.perf_counter() - began,
            post_load=0.0,  # vLLM warms up as it loads
        )
        return VllmModel(spec, engine, client, loop, start)

    def wake(self, asleep: Asleep, spec: LoadSpec, role: Role) -> VllmModel:
        raise LoadFailed(LoadReason.UNSUPPORTED, "engine vllm does not sleep")

    def preload_weights(self, spec: LoadSpec) -> str:
        raise LoadFailed(LoadReason.UNSUPPORTED, "engine vllm keeps no weights in the node's memory")


def close(client: VllmClient, loop: Loop) -> None:
    async def end() -> None:
        client.shutdown()

    try:
        loop.call(end(), STOP_SECONDS)
    except TimeoutError:
        log.error("vLLM did not end in %.0f s", STOP_SECONDS)
    loop.stop()
