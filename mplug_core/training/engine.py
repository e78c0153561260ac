"""What computes a step: DeepSpeed for any number of processes, or plain PyTorch for one.

Both keep fp32 master weights and optimizer states and compute in fp32 or bf16; a trainer can't tell them apart.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mplug_core.errors import RecipeError
from mplug_core.recipe import EngineSection, OptimizerSection
from mplug_core.training.compilation import compile_layers
from mplug_core.training.distributed import World
from mplug_core.training.engine_state import ClientState, ParameterState, ZeroState, load_state, save_state
from mplug_core.training.optimizer import build_optimizer, parameter_groups, scheduled_lr

BUCKET = 50_000_000
"""Elements of gradients that are sent at once. DeepSpeed's default, ten times as many, is a buffer larger than most of
these models, made anew in each step."""


class Engine(Protocol):
    """Computes steps on ``module``, which the engine may have cast or sharded."""

    module: nn.Module
    dtype: torch.dtype
    world: World
    trained: Sequence[nn.Parameter]
    state: ParameterState

    def forward(self, *inputs: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, learning_rate_step: int, steps: int) -> float | None:
        """After every backward; each ``accumulate``-th one updates the weights and returns the gradient's norm
        before clipping, the others return None. A norm that is not finite says that the update was left out."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager:
        """A context within which sharded parameters are whole."""

    def save(self, folder: Path) -> None:
        """Write this process's part of a checkpoint: a meeting of all processes (see ``engine_state``)."""

    def load(self, folder: Path) -> None:
        """Go on from what any engine saved; CheckpointError, on all processes, if it doesn't fit the model."""

    def close(self) -> None:
        """Free what the engine holds beside the module; nothing can be computed any more."""


def build_engine(
    module: nn.Module, settings: EngineSection, optimizer: OptimizerSection, world: World, batch_size: int
) -> Engine:
    """The engine that a recipe names."""
    if settings.name == "plain" and world.size > 1:
        raise RecipeError("engine.name: plain runs in one process", "set engine.name=deepspeed")
    if settings.compile:
        compile_layers(module, world.device)
    if settings.name == "plain":
        return PlainEngine(module, settings, optimizer, world)
    return DeepSpeedEngine(module, settings, optimizer, world, batch_size)


class PlainEngine:
    """One process, no DeepSpeed."""

    def __init__(self, module: nn.Module, settings: EngineSection, optimizer: OptimizerSection, world: World) -> None:
        self.settings, self.optimizer_settings, self.world = settings, optimizer, world
        self.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.module = module.to(world.device)
        groups = parameter_groups(self.module, optimizer)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        if self.dtype == torch.float32:
            self.masters = self.trained
        else:
            # bf16 can't hold a step's change of a weight: the optimizer works on fp32 copies
            copies = {p: nn.Parameter(p.detach().clone()) for p in self.trained}
            self.masters = [copies[p] for p in self.trained]
            groups = [{**group, "params": [copies[p] for p in group["params"]]} for group in groups]
            self.module.to(self.dtype)
        self.optimizer = build_optimizer(groups, optimizer)
        self.state = ClientState(self.optimizer, dict(zip(self.trained, self.masters, strict=True)))
        self.pending = 0

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.settings.accumulate).backward()
        self.pending += 1
        if self.masters is not self.trained:
            for master, parameter in zip(self.masters, self.trained, strict=True):
                if parameter.grad is not None:
                    grad = parameter.grad.float()
                    master.grad = grad if master.grad is None else master.grad.add_(grad)
                    parameter.grad = None

    def step(self, learning_rate_step: int, steps: int) -> float | None:
        if self.pending < self.settings.accumulate:
            return None
        self.pending = 0
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.optimizer_settings.clip))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            return norm
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled_lr(learning_rate_step, steps, group["base_lr"], self.optimizer_settings)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not self.trained:
            with torch.no_grad():
                torch._foreach_copy_(self.trained, self.masters)
        return norm

    def whole(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def save(self, folder: Path) -> None:
        save_state(self, folder)

    def load(self, folder: Path) -> None:
        load_state(self, folder)

    def close(self) -> None:
        self.optimizer.state.clear()


class DeepSpeedEngine:
    """DeepSpeed's engine: ZeRO stage 0-3, bf16 with fp32 masters, on CPU (gloo) or CUDA (NCCL)."""

    def __init__(
        self, module: nn.Module, settings: EngineSection, optimizer: OptimizerSection, world: World, batch_size: int
    ) -> None:
        deepspeed = import_deepspeed()
        self.deepspeed, self.settings, self.optimizer_settings = deepspeed, settings, optimizer
        self.world = world
        groups = parameter_groups(module, optimizer)
        divided = [list(group["params"]) for group in groups]  # DeepSpeed puts its flat tensors in their place
        self.trained = [parameter for parameters in divided for parameter in parameters]
        built = build_optimizer(groups, optimizer)
        config = deepspeed_config(settings, optimizer, batch_size, world.size)
        # it prints its memory use, and standard output is for results
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=built, config=config)
        self.module = self.engine.module
        if settings.zero_stage == 0:
            self.state: ParameterState = ClientState(built, {parameter: parameter for parameter in self.trained})
        else:
            self.state = ZeroState(deepspeed, self.engine, built, divided, settings.zero_stage)
        self.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32

    def forward(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate_step: int, steps: int) -> float | None:
        last = self.engine.is_gradient_accumulation_boundary()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = scheduled_lr(learning_rate_step, steps, group["base_lr"], self.optimizer_settings)
        norm = self._guarded_norm() if last and self.settings.zero_stage == 0 else None
        self.engine.step()
        if not last:
            return None
        return norm if norm is not None else float(self.engine.get_global_grad_norm())

    def _guarded_norm(self) -> float:
        """Clip at stage 0, which neither tells the gradient's norm nor leaves a step out where that is not finite."""
        given = [parameter for parameter in self.trained if parameter.grad is not None]
        # DeepSpeed would clip, but can't where no parameter has a gradient
        norm = float(torch.nn.utils.clip_grad_norm_(given, self.optimizer_settings.clip))
        if not math.isfinite(norm):
            for parameter in given:
                parameter.grad = None  # without a gradient the optimizer leaves a parameter as it is
        return norm

    def whole(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager:
        if self.settings.zero_stage < 3:
            return contextlib.nullcontext()
        return self.deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)

    def save(self, folder: Path) -> None:
        # DeepSpeed's own files are pickles, and of one ZeRO stage and number of processes
        save_state(self, folder)

    def load(self, folder: Path) -> None:
        load_state(self, folder)
        # stage 3 leaves small parameters whole; it learns who uses a parameter of another module only from finding it
        # sharded, and otherwise stops with a tracing error some steps later
        with self.whole(list(self.module.parameters())):
            pass

    def close(self) -> None:
        # its hooks hold it, and with it the weights and averages of a whole stage
        self.engine.destroy()


def import_deepspeed() -> Any:
    """DeepSpeed, set up so that it needs no compiler, no MPI and no launcher for a single process."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # compiled at first use otherwise, for 1-6 % of speed on a CPU
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        # before the processes meet: gathered objects go by way of the current device, which NCCL holds them to
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # the others wait while the first process evaluates; what hangs ends by run.stall_seconds
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(hours=12))
    return deepspeed


def deepspeed_config(
    settings: EngineSection, optimizer: OptimizerSection, batch_size: int, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's configuration; it ignores unknown keys silently, so nothing is passed through unread."""
    zero: dict[str, Any] = {"stage": settings.zero_stage, "reduce_bucket_size": BUCKET}
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "train_batch_size": batch_size * settings.accumulate * world_size,
        "gradient_clipping": optimizer.clip if settings.zero_stage else 0.0,  # at stage 0 this file clips
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloading takes PyTorch's AdamW, too
        "steps_per_print": 10**9,
        "bf16": {"enabled": settings.precision == "bf16"},
    }
    if settings.zero_stage in (1, 2):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
