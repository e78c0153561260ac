"""A training step on shapes alone: the real modules and losses, without weights, pixels or arithmetic.

What counts, ids, masks and rows, is computed; what is large, weights and activations, are fake tensors that know their
shape and type only. Operations are counted with PyTorch's own formulas, and every tensor's bytes from when it is made
until nothing holds it, also those that autograd keeps: this is the step's memory but for the engine's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import conv_flop_count, flop_registry

from mplug_core.model import attention
from mplug_core.training.storages import LiveStorages

aten = torch.ops.aten
CPU = torch.device("cpu")


def convolution_backward_flops(gradient: Tensor, x: Tensor, weight: Tensor, *others: Any, **known: Any) -> int:
    """The FLOPs of ``aten.convolution_backward``: of each gradient as many as the convolution has.

    PyTorch's own formula leaves the groups out, and counts the gradient of depthwise weights hundreds of times.
    """
    transposed, wanted = others[4], others[7]
    return conv_flop_count(x.shape, weight.shape, gradient.shape, transposed) * (wanted[0] + wanted[1])


FORMULAS = {
    **flop_registry,
    aten.convolution_backward: convolution_backward_flops,
    # PyTorch counts the fused attention of GPUs alone
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""Operations to what counts their FLOPs: PyTorch's formulas but for two."""
_BY_ROWS = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
_PLAIN = (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass
class Trace:
    """What a step costs. FLOPs by kind: ``forward``, ``backward``, ``recomputed`` (checkpointing), ``teacher``.

    ``saved`` bytes live after the forward pass, ``peak`` most bytes at once in forward and backward, ``left`` bytes
    after it (gradients, and what the losses return). Weights, teacher and queue are in none of them.
    """

    flops: Counter[str] = field(default_factory=Counter)
    saved: int = 0
    peak: int = 0
    left: int = 0

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


class ShapeMode(TorchDispatchMode):
    """Runs operations on fake tensors by shape and the others really, and keeps a :class:`Trace`.

    ``seen``: what operations gave, to be kept for further traces of like shapes.
    """

    def __init__(self, seen: dict[Any, Any] | None = None) -> None:
        super().__init__()
        self.trace = Trace()
        self.storages = LiveStorages()
        self._fakes = FakeTensorMode()
        self._seen = {} if seen is None else seen
        self._in_teacher = self._in_backward = False

    def fake(self, like: Tensor, dtype: torch.dtype | None = None) -> FakeTensor:
        """A fake tensor of the shape of ``like``, of ``dtype`` if that is given; its bytes are not counted."""
        shape = torch.empty_like(like.detach(), dtype=dtype, device="meta")
        return FakeTensor(self._fakes, shape, CPU)

    def empty_like_module(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Make fake tensors of a module's parameters and floating-point buffers, in place; other buffers are zero."""
        made: dict[int, Tensor] = {}

        def known(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                if tensor.is_floating_point():
                    fake = self.fake(tensor, dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    # it is there before the step: a view of it, such as a transposed weight, takes no memory
                    self.storages.ignore(fake)
                    made[id(tensor)] = fake
                else:
                    made[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            return made[id(tensor)]

        for part in module.modules():
            for store in (part._parameters, part._buffers):
                store.update({name: known(value) for name, value in store.items() if value is not None})

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """What is computed within belongs to the teacher."""
        before, self._in_teacher = self._in_teacher, True
        try:
            yield
        finally:
            self._in_teacher = before

    @contextmanager
    def backward(self) -> Iterator[None]:
        """What is computed within belongs to the backward pass."""
        self.trace.saved = self.storages.live
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False
            self.trace.left = self.storages.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # a value that isn't known: losses ask whether all is finite, and it is
            return torch.ones((), dtype=args[0].dtype).item()
        if func in _BY_ROWS and isinstance(args[0], FakeTensor):
            # the rows that a mask chooses are known while the mask is: later only its shape is
            args = (args[0], [row for index in args[1] for row in chosen_rows(index)], *args[2:])
        shapes = Description()
        key = (func, *map(shapes.of, args), *((name, shapes.of(value)) for name, value in kwargs.items()))
        if not shapes.fake:
            out = func(*args, **kwargs)
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._follow(leaf)
            return out
        known = self._seen.get(key) if shapes.complete else None
        if known is not None:
            outputs, spec, flops = known
            storage = args[0].untyped_storage() if kind_of(func) == "views" else None
            made = [self._made(output, storage) for output in outputs]
            out = made[0] if spec is None else tree_unflatten(made, spec)
        else:
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
            out = func(*args, **kwargs)
            formula = FORMULAS.get(getattr(func, "overloadpacket", None))
            flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
            made, spec = tree_flatten(out)
            if (
                shapes.complete
                and kind_of(func) != "writes"
                and all(x is None or isinstance(x, FakeTensor) for x in made)
            ):
                described = [None if x is None else Description().of(x) for x in made]
                self._seen[key] = (described, None if isinstance(out, FakeTensor) else spec, flops)
        if flops:
            self.trace.flops[self._kind()] += flops
        for tensor in made:
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return out

    def _faked(self, tensor: Tensor) -> FakeTensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake(tensor)

    def _made(self, description: Any, storage: torch.UntypedStorage | None) -> FakeTensor | None:
        """A fake tensor as described, of its own or in ``storage``."""
        if description is None:
            return None
        shape, stride, offset, dtype = description
        if storage is None:
            shaped = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            shaped = torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, shape, stride)
        return FakeTensor(self._fakes, shaped, CPU)

    def _kind(self) -> str:
        if self._in_teacher:
            return "teacher"
        if self._in_backward:
            # autograd computes without gradient; checkpointing turns it on again to repeat the forward pass
            return "recomputed" if torch.is_grad_enabled() else "backward"
        return "forward"

    def _follow(self, tensor: Tensor) -> None:
        self.storages.follow(tensor)
        self.trace.peak = self.storages.peak


@cache
def kind_of(func: Any) -> str:
    """Whether an operation ``makes`` new tensors, ``views`` its first argument, or ``writes`` to an argument."""
    aliases = [argument.alias_info for argument in func._schema.arguments]
    if not any(aliases):
        return "makes"
    return "views" if aliases[0] and not any(aliases[1:]) and not aliases[0].is_write else "writes"


class Description:
    """What an operation's result may depend on: of tensors shape and type, of all else the value.

    ``fake``: a fake tensor was among them; ``complete``: nothing was that can't be compared.
    """

    def __init__(self) -> None:
        self.fake, self.complete = False, True

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.fake |= isinstance(value, FakeTensor)
            return (value.shape, value.stride(), value.storage_offset(), value.dtype)
        if isinstance(value, list | tuple):
            return tuple(map(self.of, value))
        if value is None or isinstance(value, _PLAIN):
            return (type(value), value)  # 1, 1.0 and True are equal, and not the same
        self.complete = False
        return None


def chosen_rows(index: Tensor | None) -> list[Tensor | None]:
    """An index into a tensor with masks replaced by the numbers that they choose."""
    if index is None or isinstance(index, FakeTensor) or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return list(index.nonzero(as_tuple=True))


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as GPUs compute it, without ever holding the weights of all keys; a CPU does in bf16 training."""
    with mock.patch.object(attention, "attend", fused_attend):
        yield


def fused_attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout: float = 0.0) -> Tensor:
    """As :func:`attention.attend`, by the one operation; a GPU's draws dropout inside and keeps none of it."""
    mask = None if allowed is None else attention.additive_mask(allowed, query.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, attn_mask=mask)[0]
