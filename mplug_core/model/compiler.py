"""torch's compiler is left alone where nothing is compiled: its import takes as long as torch's own.

torchvision asks it a question for later, timm and torch's operations on the meta device tell it what not to compile.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"


@contextmanager
def without_compiler() -> Iterator[None]:
    """Within, what torch's compiler would be imported for is put off until it is there, or somebody needs it.

    A stand-in has its place among the modules. Whatever else somebody wants of it has the compiler imported after all.
    """
    if COMPILER in sys.modules:
        yield
        return
    stand_ins = {name: _StandIn(name) for name in (COMPILER, f"{COMPILER}.utils")}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        _remove(stand_ins)


class _StandIn(ModuleType):
    """Knows the two functions that are asked for while modules are imported and layers built."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        if name == COMPILER:
            self.disable = disable
        else:
            self.is_compile_supported = is_compile_supported

    def __getattr__(self, name: str) -> Any:
        # inspect asks every module for a file, and imports ask what is none for the path of a package
        if name == "__file__" or (name == "__path__" and self.__name__ != COMPILER):
            raise AttributeError(name)
        return getattr(_compiler(self.__name__), name)


def disable(function: Callable[..., Any] | None = None, recursive: bool = True, **options: Any) -> Callable[..., Any]:
    """As ``torch._dynamo.disable``: while no compiler is there, a function is as it is."""
    if function is None:
        return functools.partial(disable, recursive=recursive, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        compiler = sys.modules.get(COMPILER)
        if compiler is None or isinstance(compiler, _StandIn):
            return function(*args, **kwargs)
        return compiler.disable(function, recursive, **options)(*args, **kwargs)

    return call


def is_compile_supported(device_type: Any) -> bool:
    """As ``torch._dynamo.utils.is_compile_supported``, which is asked when something is to be compiled."""
    return _compiler(f"{COMPILER}.utils").is_compile_supported(device_type)


def _compiler(name: str) -> ModuleType:
    """The module itself; stand-ins make room for it."""
    _remove({key: module for key, module in sys.modules.items() if isinstance(module, _StandIn)})
    return import_module(name)


def _remove(stand_ins: dict[str, Any]) -> None:
    for name, stand_in in stand_ins.items():
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
