"""From a path and a revision to a running engine, on a worker thread; and the typed ways it fails."""

from __future__ import annotations

import enum
import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flowserve.engine.types import Role, StepEvent
from flowserve.executor.interface import QUANTIZATIONS
from flowserve.shell.start import Start, process_age, start_of
from kvtransfer.pool import available_memory
from kvtransfer.weights import WeightPeer

if TYPE_CHECKING:  # both import torch: a warm process listens before that is done
    from flowserve.engine.engine import Engine
    from flowserve.executor.local import LocalExecutor
    from flowserve.executor.ranks import WarmRanks
    from flowserve.models.weight_cache import Feed, Named, WeightCache
    from flowserve.rtc import RTC
    from flowserve.rtc.disk import DiskTier
    from flowserve.shell.forks import Forks
    from flowserve.shell.handover import Handover
    from flowserve.shell.settings import Settings
    from kvtransfer.pool import BlockStore

log = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32", "auto")
STOP_ENGINE_SECONDS = 5.0
"""Ten times the bound of a step."""


class LoadReason(enum.Enum):
    NOT_FOUND = "not_found"
    UNSUPPORTED = "unsupported"
    NO_MEMORY = "no_memory"
    STOPPED = "stopped"
    INTERNAL = "internal"


class LoadFailed(Exception):
    """No model was loaded and nothing of it is held."""

    def __init__(self, reason: LoadReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What to load. Equal specs are the same model."""

    revision: str
    path: str
    dtype: str = "auto"
    kv_cache_bytes: int = 0  # 0 = what the device has room for
    max_model_len: int = 0  # 0 = the model's own
    tensor_parallel: int = 0  # 0 = over all ranks of the executor; more than it has is refused
    quantization: str = ""
    fork_from: tuple[WeightPeer, ...] = field(default=(), compare=False)  # who may have the weights
    decided_unix: float = field(default=0.0, compare=False)  # when it was decided; 0 = not told

    def check(self, *, pool: bool = True) -> None:
        """Raises LoadFailed for what cannot be loaded anywhere; with `pool` for one that does not fit too."""
        if not 0 < len(self.revision) <= 256:
            raise LoadFailed(LoadReason.UNSUPPORTED, "model_revision must have 1 to 256 characters")
        if not self.path or "\0" in self.path:
            raise LoadFailed(LoadReason.UNSUPPORTED, "path must name a file or folder")
        if self.dtype not in DTYPES:
            raise LoadFailed(LoadReason.UNSUPPORTED, f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.quantization not in QUANTIZATIONS:
            known = ", ".join(filter(None, QUANTIZATIONS))
            raise LoadFailed(LoadReason.UNSUPPORTED, f"quantization {self.quantization!r} is none of {known}")
        if not self.fork_from and not os.path.exists(self.path):
            raise LoadFailed(LoadReason.NOT_FOUND, f"no model at {self.path}")
        free = available_memory()
        if pool and self.kv_cache_bytes > free:
            raise LoadFailed(
                LoadReason.NO_MEMORY,
                f"a KV pool of {self.kv_cache_bytes} bytes does not fit {free} free bytes",
            )


@dataclass(slots=True)
class Model:
    """A loaded model: its executor, cache and running engine."""

    spec: LoadSpec
    executor: LocalExecutor
    cache: RTC
    engine: Engine
    store: BlockStore
    start: Start
    image: Named | None = None  # its weights in the node's cache
    load_seconds: float = 0.0

    @property
    def can_sleep(self) -> bool:
        return True

    @property
    def num_blocks(self) -> int:
        return self.store.num_blocks

    @property
    def block_tokens(self) -> int:
        return self.store.layout.block_tokens

    @property
    def max_model_len(self) -> int:
        return self.executor.info.max_model_len

    @property
    def dtype(self) -> str:
        return self.executor.info.dtype

    def close(self) -> bool:
        """Ends the engine, then gives memory back. False: a step hangs, so nothing was given back."""
        if not self._stop():
            return False
        self.executor.close()
        return True

    def sleep(self) -> Asleep:
        """Ends the engine and gives the memory of its KV back; what it preserves goes to the disk tier where
        there is one. Blocks; no task and no transfer may be left. Raises RuntimeError where a step hangs."""
        if not self._stop():
            raise RuntimeError("its engine does not stop")
        self.executor.sleep()
        gc.unfreeze()  # what served is garbage now, and may hold views of the pool
        gc.collect()
        gc.freeze()
        return Asleep(self.spec, self.executor, self.image)

    def _stop(self) -> bool:
        if not self.engine.stop(STOP_ENGINE_SECONDS):
            log.error("the engine did not stop in %.0f s", STOP_ENGINE_SECONDS)
            return False
        self.cache.close()
        return True


@dataclass(frozen=True, slots=True)
class Asleep:
    """A model whose weights wait in host memory, without KV memory and engine."""

    spec: LoadSpec
    executor: LocalExecutor
    image: Named | None = None

    def close(self) -> None:
        self.executor.close()


class Loader:
    """Builds models for one process. `preload` makes the first load cheap."""

    def __init__(
        self,
        settings: Settings,
        handover: Handover,
        on_event: Callable[[StepEvent], None],
        forks: Forks | None = None,
    ) -> None:
        """`forks` brings weights from other executors; without it they come from storage."""
        self._settings = settings
        self._forks = forks
        self._handover = handover
        self._on_event = on_event
        self._lock = threading.Lock()
        self._preloaded = False
        self._ready_age = 0.0  # of the process when its libraries were ready, seconds
        self.weights: WeightCache | None = None
        self._ranks: WarmRanks | None = None

    def preload(self) -> None:
        """Imports the libraries, readies the device. Blocks; repeatable, from any thread.

        Raises ImportError or ValueError where this process can never load a model.
        """
        with self._lock:
            if self._preloaded:
                return
            import torch

            import flowserve.engine.engine
            import flowserve.engine.processors
            import flowserve.executor.local
            import flowserve.rtc  # noqa: F401  what a load and a submit need
            from flowserve.devices import open_device

            torch.set_num_threads(self._settings.threads)
            open_device(self._settings.device)  # its driver is up, or this process is of no use
            self.weights = self._weight_cache()
            if self.weights is not None and self._settings.weights_reserve_bytes:
                self.weights.reserve(self._settings.weights_reserve_bytes)
            if self._settings.tensor_parallel > 1:
                from flowserve.executor.ranks import WarmRanks

                self._ranks = WarmRanks(self._settings.device, self._settings.tensor_parallel - 1)
            self._ready_age = process_age()
            gc.collect()
            gc.freeze()  # what was imported is never garbage: collections need not look at it again
            self._preloaded = True

    def __call__(self, spec: LoadSpec, role: Role) -> Model:
        """Loads and starts. Raises LoadFailed; other errors are the loader's own."""
        try:
            return self._load(spec, role)
        except BaseException:
            if self._forks is not None:
                self._forks.forget()
            raise

    def wake(self, asleep: Asleep, spec: LoadSpec, role: Role) -> Model:
        """`asleep` serves again; `spec` says who decided it, and when. Blocks. Raises LoadFailed where there
        is no memory for its KV. Whatever goes wrong, its weights are given back too."""
        from kvtransfer.pool import PoolError

        asked = time.time()
        executor = asleep.executor
        began = time.perf_counter()
        try:
            executor.wake()
            woken = time.perf_counter()
            cache, engine = self._serve(executor, role)
        except BaseException as error:
            executor.close()
            if isinstance(error, PoolError | MemoryError):
                raise LoadFailed(LoadReason.NO_MEMORY, str(error) or "out of memory") from error
            raise
        start = start_of(
            cold=False,
            weights="asleep",
            decided_unix=spec.decided_unix,
            asked_unix=asked,
            ready_age=self._ready_age,
            load=woken - began,
            post_load=time.perf_counter() - woken,
        )
        return Model(spec, executor, cache, engine, executor.store, start, asleep.image)

    def _serve(self, executor: LocalExecutor, role: Role) -> tuple[RTC, Engine]:
        """A cache and an engine that turns, over an executor with an empty pool."""
        from flowserve.engine.config import EngineConfig
        from flowserve.engine.engine import Engine
        from flowserve.rtc import RTC

        settings = self._settings
        cache = RTC(
            executor.store, host_bytes=settings.host_cache_bytes, disk=self._disk_tier(executor.store)
        )
        config = EngineConfig(
            max_tasks=settings.max_tasks,
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            chunked_prefill=settings.chunked_prefill,
            compact_call_seconds=settings.compact_call_us / 1e6,
            enable_prefix_cache=settings.prefix_cache,
        )
        engine = Engine(
            executor, cache, config, handover=self._handover, exchange=self._handover, on_event=self._on_event
        )
        engine.set_role(role)
        executor.warm_up()
        engine.start()
        gc.collect()
        gc.freeze()
        return cache, engine

    def _load(self, spec: LoadSpec, role: Role) -> Model:
        asked, cold = time.time(), not self._preloaded
        spec.check()
        self.preload()
        from flowserve.executor.local import open_executor
        from kvtransfer.pool import PoolError

        settings = self._settings
        if spec.tensor_parallel > settings.tensor_parallel:
            raise LoadFailed(
                LoadReason.UNSUPPORTED,
                f"tensor_parallel {spec.tensor_parallel}: this executor has {settings.tensor_parallel} ranks",
            )
        try:
            executor = open_executor(
                Path(spec.path),
                revision=spec.revision,
                device=settings.device,
                dtype=spec.dtype,
                kv_cache_bytes=spec.kv_cache_bytes,
                max_batch_tokens=settings.max_batch_tokens,
                block_tokens=settings.block_tokens,
                max_model_len=spec.max_model_len or None,
                threads=settings.threads,
                quantization=spec.quantization,
                tensor_parallel=spec.tensor_parallel or settings.tensor_parallel,
                ranks=self._ranks,
                weights=self.weights,
                feed=self._feed(spec),
            )
            opened = time.perf_counter()
        except FileNotFoundError as error:
            raise LoadFailed(LoadReason.NOT_FOUND, str(error)) from error
        except (MemoryError, PoolError) as error:
            raise LoadFailed(LoadReason.NO_MEMORY, str(error) or "out of memory") from error
        except ValueError as error:
            raise LoadFailed(LoadReason.UNSUPPORTED, str(error)) from error
        cache, engine = self._serve(executor, role)
        opening = executor.opening
        start = start_of(
            cold=cold,
            weights=opening.weights,
            decided_unix=spec.decided_unix,
            asked_unix=asked,
            ready_age=self._ready_age,
            load=opening.weights_seconds,
            post_load=opening.pool_seconds + time.perf_counter() - opened,
        )
        return Model(spec, executor, cache, engine, executor.store, start, opening.image)

    def preload_weights(self, spec: LoadSpec) -> str:
        """Puts the weights of a model into the node's cache; how they came. Blocks. Raises LoadFailed."""
        spec.check(pool=False)
        self.preload()
        from flowserve.executor.local import preload_weights

        settings, weights = self._settings, self.weights
        if weights is None or settings.tensor_parallel > 1:
            raise LoadFailed(LoadReason.UNSUPPORTED, "no weights are kept here: --weights-dir, and one rank")
        try:
            came = preload_weights(
                spec.path,
                weights,
                device=settings.device,
                dtype=spec.dtype,
                block_tokens=settings.block_tokens,
                max_model_len=spec.max_model_len or None,
                quantization=spec.quantization,
                feed=self._feed(spec),
            )
        except FileNotFoundError as error:
            raise LoadFailed(LoadReason.NOT_FOUND, str(error)) from error
        except ValueError as error:
            raise LoadFailed(LoadReason.UNSUPPORTED, str(error)) from error
        if came == "private":
            raise LoadFailed(LoadReason.NO_MEMORY, "the node's weight cache has no room for it")
        return came

    def _feed(self, spec: LoadSpec) -> Feed | None:
        """None where nobody has them, or without a cache: an image is kept there."""
        if self._forks is None or self.weights is None or not spec.fork_from:
            return None
        return self._forks.feed(spec)

    def _weight_cache(self) -> WeightCache | None:
        """None where there is none, or where its folder cannot be used: weights are this process's alone."""
        from flowserve.models.weight_cache import WeightCache

        settings = self._settings
        if settings.weights_dir is None:
            return None
        try:
            return WeightCache(settings.weights_dir, settings.weights_bytes)
        except OSError as error:
            log.error("no weight cache: %s", error)
            return None

    def _disk_tier(self, store: BlockStore) -> DiskTier | None:
        """None where there is none, or where its folder cannot be used any more: serving goes on."""
        from flowserve.rtc.disk import DiskTier

        settings = self._settings
        if settings.disk_cache is None:
            return None
        try:
            return DiskTier(
                settings.disk_cache, settings.disk_cache_bytes, store.layout, token=settings.token
            )
        except OSError as error:
            log.error("no disk tier: %s", error)
            return None
