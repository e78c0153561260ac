"""What an engine knows of each parameter, by its name: files that any engine, on any number of processes, can read.

Of every trained parameter they hold the fp32 weight (``master/NAME``), Adam's two averages (``exp_avg/NAME``,
``exp_avg_sq/NAME``) and its count of updates (``step/NAME``), each whole; of frozen parameters and buffers their value
(``other/NAME``). The names are divided over the processes, each of which writes one file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mplug_core.errors import CheckpointError, Diverged
from mplug_core.training.agreement import together
from mplug_core.training.distributed import World
from mplug_core.weights.tensor_files import Entry, TensorFile, TensorFiles, size_of

AVERAGES = ("exp_avg", "exp_avg_sq")
KEYS = ("master", *AVERAGES)
LARGEST = torch.finfo(torch.bfloat16).max
"""Of a weight: models are exported in bf16."""
CHUNK = 64
"""Parameters that are read, and gathered where they are sharded, at a time."""


class ParameterState(Protocol):
    """An engine's fp32 weights and Adam's state. Reading and writing are meetings of all processes."""

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """One of ``KEYS`` of a trained parameter, fp32 and whole; zeros before the first update."""

    def steps(self, parameter: nn.Parameter) -> float:
        """Adam's count of updates of a trained parameter."""

    def begin(self, steps: Mapping[nn.Parameter, float]) -> None:
        """Have Adam's state exist, with these counts of updates, before it is written."""

    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set what :meth:`read` reads; of the weight the computing copy is not set."""

    def round(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        """Set the parameters that are computed with to ``values``, rounded to their type."""


class HasState(Protocol):
    """The part of an engine that is saved."""

    module: nn.Module
    state: ParameterState
    trained: Sequence[nn.Parameter]
    world: World

    def whole(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager: ...


class ClientState:
    """State that lies in PyTorch's optimizer as it does without any engine; ``masters``: fp32 copies by parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Mapping[nn.Parameter, nn.Parameter]) -> None:
        self.optimizer, self.masters = optimizer, masters

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        master = self.masters[parameter]
        if key == "master":
            return master.detach()
        state = self.optimizer.state.get(master)
        return state[key] if state else torch.zeros_like(master)

    def steps(self, parameter: nn.Parameter) -> float:
        state = self.optimizer.state.get(self.masters[parameter])
        return float(state["step"]) if state else 0.0

    def begin(self, steps: Mapping[nn.Parameter, float]) -> None:
        for parameter, count in steps.items():
            # what never had a gradient has no state, and Adam corrects its averages by the parameter's own count
            if count:
                self.optimizer.state[self.masters[parameter]] = fresh_state(self.masters[parameter], count)

    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        master = self.masters[parameter]
        if key == "master":
            master.data.copy_(value)
        elif master in self.optimizer.state:
            self.optimizer.state[master][key].copy_(value)

    def round(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)


class ZeroState:
    """State that DeepSpeed has flattened and divided over the processes (ZeRO 1 to 3).

    ``optimizer``: PyTorch's, inside DeepSpeed's. ``groups``: the parameters of each of its groups.
    """

    def __init__(
        self, deepspeed: Any, engine: Any, optimizer: torch.optim.Optimizer, groups: Sequence[list], stage: int
    ) -> None:
        self.deepspeed, self.api = deepspeed, deepspeed.utils
        self.engine, self.optimizer, self.groups, self.stage = engine, optimizer, groups, stage
        self._linked = False

    def _flats(self) -> list[Tensor]:
        """The flat tensors that PyTorch's optimizer works on; stage 3 takes them out of it between steps."""
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self.optimizer.param_groups for flat in group["params"]]

    def _link(self) -> None:
        """Tell DeepSpeed where Adam's averages are: by itself it does so after the first group's first step, when
        the other groups have none yet."""
        if self.stage < 3:
            for flat, parameters in zip(self._flats(), self.groups, strict=True):
                self.api.lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _begun(self) -> bool:
        return all(self.optimizer.state.get(flat) for flat in self._flats())

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        if key == "master":
            return self.api.safe_get_full_fp32_param(parameter)
        if not self._begun():
            return torch.zeros(whole_shape(parameter))
        if not self._linked:
            self._link()
            self._linked = True
        return self.api.safe_get_full_optimizer_state(parameter, key)

    def steps(self, parameter: nn.Parameter) -> float:
        # every update is one of all parameters
        states = [self.optimizer.state.get(flat) for flat in self._flats()]
        return max((float(state["step"]) for state in states if state), default=0.0)

    def begin(self, steps: Mapping[nn.Parameter, float]) -> None:
        count = max(steps.values(), default=0.0)
        for flat in self._flats() if count else ():
            self.optimizer.state[flat] = fresh_state(flat, count)
        self._linked = False

    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if key != "master":
            if not self._begun():
                return
            if not self._linked:
                self._link()
                self._linked = True
        if self.stage < 3:
            if key == "master":
                self.api.safe_set_full_fp32_param(parameter, value)
            else:
                self.api.safe_set_full_optimizer_state(parameter, value, key)
            return
        # safe_set_full_* reads past the end of a parameter whose size the processes don't divide
        part = torch.zeros(parameter.ds_tensor.numel(), dtype=value.dtype)
        start = torch.distributed.get_rank(parameter.ds_process_group) * len(part)
        mine = value.reshape(-1)[start : start + len(part)]
        part[: len(mine)] = mine
        if key == "master":
            self.api.safe_set_local_fp32_param(parameter, part)
        else:
            self.api.safe_set_local_optimizer_state(parameter, part, key)

    def round(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        gathered = contextlib.nullcontext()
        if self.stage == 3:
            gathered = self.deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
        with gathered:
            for parameter, value in zip(parameters, values, strict=True):
                # below stage 3 every process has all of them, and they are views of DeepSpeed's flat tensors
                parameter.data.copy_(value)


def fresh_state(weight: Tensor, steps: float) -> dict[str, Tensor]:
    """Adam's state as PyTorch makes it before the first update, but for the count of updates."""
    averages = {key: torch.zeros_like(weight, memory_format=torch.preserve_format) for key in AVERAGES}
    return {"step": torch.tensor(steps, dtype=torch.float32, device=weight.device), **averages}


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter that may be sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def named_parts(engine: HasState) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Trained parameters by name, and by name what else belongs to the module's state; each tensor once."""
    trained, others, seen = {}, {}, set()
    chosen = {id(parameter) for parameter in engine.trained}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            (trained if id(value) in chosen else others)[name] = value
    return trained, others


def entries_of(engine: HasState) -> list[dict[str, Entry]]:
    """What each process writes: file entries (type and shape by name), about as many bytes each."""
    trained, others = named_parts(engine)
    units: list[dict[str, Entry]] = []
    for name, parameter in trained.items():
        unit: dict[str, Entry] = {f"{key}/{name}": (torch.float32, whole_shape(parameter)) for key in KEYS}
        units.append({**unit, f"step/{name}": (torch.float32, ())})
    units += [{f"other/{name}": (value.dtype, whole_shape(value))} for name, value in others.items()]
    files: list[dict[str, Entry]] = [{} for _ in range(engine.world.size)]
    sizes = [0] * len(files)
    for unit in units:
        lightest = sizes.index(min(sizes))
        files[lightest] |= unit
        sizes[lightest] += sum(map(size_of, unit.values()))
    return files


def state_bytes(engine: HasState) -> int:
    """Bytes of all files of :func:`save_state`, but for their headers."""
    return sum(size_of(entry) for entries in entries_of(engine) for entry in entries.values())


def is_finite(value: Tensor) -> bool:
    """Whether all numbers of a tensor are finite, also when they are rounded to bf16."""
    if not value.is_floating_point() or not value.numel():
        return True
    low, high = torch.aminmax(value.detach())
    return float(low) >= -LARGEST and float(high) <= LARGEST


def save_state(engine: HasState, folder: Path) -> None:
    """Write this process's file. A meeting of all processes, at the end of which an OSError of this one is raised, or
    Diverged for the weights and averages in its file."""
    trained, others = named_parts(engine)
    files = entries_of(engine)
    mine, rank = files[engine.world.rank], engine.world.rank
    out: TensorFile | None = None
    failed: Exception | None = None
    unsound: Diverged | None = None
    try:
        out = TensorFile(folder / f"engine-{rank:05d}-of-{len(files):05d}.safetensors", mine)
    except OSError as error:
        failed = error
    # in the order of the files, which have all fp32 tensors first; every process takes part in reading every one
    everything = {name: entry for entries in files for name, entry in entries.items()}
    order = [name for entries in files for name in sorted(entries, key=lambda name: -entries[name][0].itemsize)]
    for full_name in order:
        key, _, name = full_name.partition("/")
        value = _value(engine, key, trained.get(name), others.get(name))
        if full_name in mine and failed is None:
            try:
                out.add(full_name, value.to(everything[full_name][0]).reshape(everything[full_name][1]))
            except OSError as error:  # the others go on, and so does this process, to be met by them
                failed = error
        weight = name in trained or isinstance(others.get(name), nn.Parameter)
        if full_name in mine and weight and unsound is None and not is_finite(value):
            unsound = Diverged(f"{'the optimizer state' if key in AVERAGES else 'the weight'} {name} is not finite")
        del value
    try:
        if failed is None:
            out.close()
    except OSError as error:
        failed = error
    if failed is not None:
        if out is not None:
            out.abandon()
        raise failed
    if unsound is not None:
        raise unsound


def _value(engine: HasState, key: str, trained: nn.Parameter | None, other: Tensor | None) -> Tensor:
    if key == "step":
        return torch.tensor(engine.state.steps(trained))
    if trained is not None:
        return engine.state.read(trained, key)
    with engine.whole([other]) if isinstance(other, nn.Parameter) else contextlib.nullcontext():
        return other.detach().clone()


def load_state(engine: HasState, folder: Path) -> None:
    """Set an engine to what was saved, by any engine on any number of processes.

    Raises CheckpointError, on all processes, for a tensor that is missing, unknown, or of another shape.
    """
    trained, others = named_parts(engine)
    with together(engine.world):
        saved = TensorFiles(sorted(folder.glob("engine-*.safetensors")))
        refuse_other_names(saved, entries_of(engine), folder)
        steps = {parameter: float(saved.read(f"step/{name}")) for name, parameter in trained.items()}
    engine.state.begin(steps)
    for names in chunks(list(trained)):
        with together(engine.world):
            values = {name: {key: saved.read(f"{key}/{name}") for key in KEYS} for name in names}
        for name in names:
            for key in KEYS:
                engine.state.write(trained[name], key, values[name][key])
        engine.state.round([trained[name] for name in names], [values[name]["master"] for name in names])
    for names in chunks(list(others)):
        with together(engine.world):
            values = {name: saved.read(f"other/{name}") for name in names}
        frozen = [name for name in names if isinstance(others[name], nn.Parameter)]
        engine.state.round([others[name] for name in frozen], [values[name] for name in frozen])
        for name in set(names) - set(frozen):
            others[name].copy_(values[name])


def refuse_other_names(saved: TensorFiles, files: Sequence[Mapping[str, Entry]], folder: Path) -> None:
    """CheckpointError that names a tensor by which the files and the model differ."""
    wanted = {name: entry for entries in files for name, entry in entries.items()}
    for name, (_, shape) in wanted.items():
        if name not in saved:
            raise CheckpointError(f"{folder} lacks {name}", "it is damaged or of another model")
        if saved.shape(name) != tuple(shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {saved.shape(name)}, the recipe's model {tuple(shape)}",
                "it is damaged or of another model",
            )
    if unknown := [name for name in saved if name not in wanted]:
        raise CheckpointError(
            f"{folder} holds {unknown[0]}, which the recipe's model has not", "it is damaged or of another model"
        )


def chunks(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), CHUNK):
        yield names[start : start + CHUNK]


def whole_state(model: nn.Module, engine: HasState, keep: bool = True) -> dict[str, Tensor]:
    """The state of a part of the engine's module, on the CPU in fp32: weights as the optimizer has them, not rounded.

    A meeting of all processes; those that don't ``keep`` it get nothing.
    """
    state: dict[str, Tensor] = {}
    chosen = {id(parameter) for parameter in engine.trained}
    for name, part in model.state_dict(keep_vars=True).items():
        trained = part if id(part) in chosen else None
        value = _value(engine, "master" if trained is not None else "other", trained, part)
        if keep:
            value = value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
            # a value of its own: the optimizer goes on, and tied weights are here by each of their names
            state[name] = value.clone() if trained is not None else value
    return state
