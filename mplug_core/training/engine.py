"""What computes a step: DeepSpeed for any number of processes, or plain PyTorch for one.

Both keep fp32 master weights and optimizer states and compute in fp32 or bf16; a trainer can't tell them apart.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mplug_core.errors import CheckpointError, RecipeError
from mplug_core.recipe import EngineSection, OptimizerSection
from mplug_core.training.distributed import World
from mplug_core.training.optimizer import build_optimizer, parameter_groups, scheduled_lr
from mplug_core.weights.pickled import read_pickled


class Engine(Protocol):
    """Computes steps on ``module``, which the engine may have cast or sharded."""

    module: nn.Module
    dtype: torch.dtype

    def forward(self, *inputs: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, learning_rate_step: int, steps: int) -> float | None:
        """After every backward; each ``accumulate``-th one updates the weights and returns the gradient's norm
        before clipping, the others return None."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager:
        """A context within which sharded parameters are whole."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


def build_engine(
    module: nn.Module, settings: EngineSection, optimizer: OptimizerSection, world: World, batch_size: int
) -> Engine:
    """The engine that a recipe names."""
    if settings.name == "plain":
        if world.size > 1:
            raise RecipeError("engine.name: plain runs in one process", "set engine.name=deepspeed")
        return PlainEngine(module, settings, optimizer, world)
    return DeepSpeedEngine(module, settings, optimizer, world, batch_size)


class PlainEngine:
    """One process, no DeepSpeed."""

    def __init__(self, module: nn.Module, settings: EngineSection, optimizer: OptimizerSection, world: World) -> None:
        self.settings, self.optimizer_settings = settings, optimizer
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
        state = {
            "module": self.module.state_dict(),
            "masters": [master.detach() for master in self.masters],
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, folder / "plain.pt")

    def load(self, folder: Path) -> None:
        if not (folder / "plain.pt").is_file():
            raise CheckpointError(f"{folder} is not a checkpoint of the plain engine")
        state = read_pickled(folder / "plain.pt", "--resume never starts anew")
        try:
            self.module.load_state_dict(state["module"])
            with torch.no_grad():
                for master, saved in zip(self.masters, state["masters"], strict=True):
                    master.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{folder} does not fit the recipe's model: {reason}") from error


class DeepSpeedEngine:
    """DeepSpeed's engine: ZeRO stage 0-3, bf16 with fp32 masters, on CPU (gloo) or CUDA (NCCL)."""

    def __init__(
        self, module: nn.Module, settings: EngineSection, optimizer: OptimizerSection, world: World, batch_size: int
    ) -> None:
        deepspeed = import_deepspeed()
        self.deepspeed, self.settings, self.optimizer_settings = deepspeed, settings, optimizer
        self.world = world
        groups = parameter_groups(module, optimizer)
        built = build_optimizer(groups, optimizer)
        config = deepspeed_config(settings, optimizer, batch_size, world.size)
        # it prints its memory use, and standard output is for results
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=built, config=config)
        self.module = self.engine.module
        self.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32

    def forward(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate_step: int, steps: int) -> float | None:
        last = self.engine.is_gradient_accumulation_boundary()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = scheduled_lr(learning_rate_step, steps, group["base_lr"], self.optimizer_settings)
        self.engine.step()
        if not last:
            return None
        norm = self.engine.get_global_grad_norm()
        # stage 0 doesn't tell
        return float(norm) if norm is not None else 0.0

    def whole(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager:
        if self.settings.zero_stage < 3:
            return contextlib.nullcontext()
        return self.deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)

    def save(self, folder: Path) -> None:
        # `latest` is ours to write: DeepSpeed writes its own before the other ranks are done
        self.engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        if not (folder / "engine").is_dir():
            raise CheckpointError(f"{folder} is not a checkpoint of the deepspeed engine")
        self.engine.load_checkpoint(str(folder), tag="engine")
        # stage 3 leaves small parameters whole after loading; it learns who uses a parameter of another module only
        # from finding it sharded, and otherwise stops with a tracing error some steps later
        with self.whole(list(self.module.parameters())):
            pass


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
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed


def deepspeed_config(
    settings: EngineSection, optimizer: OptimizerSection, batch_size: int, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's configuration; it ignores unknown keys silently, so nothing is passed through unread."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "train_batch_size": batch_size * settings.accumulate * world_size,
        "gradient_clipping": optimizer.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "bf16": {"enabled": settings.precision == "bf16"},
    }
    if settings.zero_stage in (1, 2):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
