"""Where a plan is computed: the seam between deciding and doing."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable
from concurrent.futures import Future
from types import ModuleType
from typing import Any, Protocol

from tokenmill.device import machine
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.grammar import Grammars
from tokenmill.engine.memory import ModelFacts, size_memory
from tokenmill.engine.plan import StepPlan, StepResult
from tokenmill.engine.request import PREPARED
from tokenmill.types import SamplingParams

__all__ = ["Executor", "LocalExecutor", "Progress"]

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all) while weights are loaded."""

# The operators of a smaller model take less time than handing a part of them to a second thread.
_SMALL_MODEL_BYTES = 64 * 2**20


class Executor(Protocol):
    """Computes plans. One call at a time."""

    facts: ModelFacts

    def prepare(self, params: SamplingParams) -> Future[Any]:
        """Begins what a request with `params` needs before a token of it can be chosen; it waits until that is done."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Computes one step. Changes KV memory only. An exception fails the requests of this plan alone."""


class LocalExecutor:
    """Loads the model into this process and computes here.

    Raises:
        ModelError, ConfigError: the model cannot be loaded, or its memory does not fit.
        MissingDependencyError: the grammar engine asked for is not installed.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        torch = _import_torch()

        from tokenmill.engine.runner import Runner
        from tokenmill.kernels.probe import choose_device, native_isa
        from tokenmill.models.folder import read_generation, resolve
        from tokenmill.models.loader import load

        self.grammars = Grammars(config)
        device = choose_device(config.model.device)
        path = resolve(config.model.model)
        threads = config.model.threads or machine().cores
        if native_isa() is not None:
            from tokenmill.kernels.cpu import _native

            _native.set_thread_count(threads)
            _native.keep_freed_memory()
        decoder = load(
            path,
            config.model.dtype,
            device,
            progress,
            config.model.max_model_len,
            config.model.rounding,
            config.cache.block_size,
            config.model.pack_cache,
        )
        if decoder.native:
            # One team of threads: what torch still does beside the native kernels is small.
            torch.set_num_threads(1)
        else:
            small = decoder.weight_bytes <= _SMALL_MODEL_BYTES
            torch.set_num_threads(config.model.threads or (1 if small else threads))
        available = torch.cuda.mem_get_info()[0] if device.type == "cuda" else machine().available_bytes
        eos_ids = read_generation(path).eos_ids
        self.facts = size_memory(config, decoder.spec, decoder.dtype.itemsize, available, eos_ids)
        self._runner = Runner(decoder, self.facts, self.grammars)

    def prepare(self, params: SamplingParams) -> Future[Any]:
        return PREPARED if params.structured is None else self.grammars.compile(params.structured)

    def execute(self, plan: StepPlan) -> StepResult:
        return self._runner.execute(plan)


def _import_torch() -> ModuleType:
    """Torch, whose hundreds of thousands of objects the garbage collector does not look at before the end: they last.

    Looking at them while they are made takes a tenth of the import, and each full collection later as much again.
    """
    if "torch" in sys.modules or not gc.isenabled():
        import torch
    else:
        gc.disable()
        try:
            import torch

            gc.freeze()
            atexit.register(gc.unfreeze)
        finally:
            gc.enable()
    return torch
