"""Texts and pickles from outside, read within bounds: size, depth, aliases, long numbers; nothing in them is run.

Whatever is wrong is an :class:`Unreadable`, which says it in a few words; who reads a file says which file it is. Only
plain values come out: texts, numbers, truth values, lists and mappings (of a pickle also bytes, tuples and sets).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml

from mplug_core.errors import shortened
from mplug_core.json_text import to_json

MAX_TEXT = 8 << 20
"""Bytes of a JSON file of settings."""
MAX_YAML = 256 << 10
"""Bytes of YAML, which takes a second for so much."""
MAX_PICKLE = 32 << 20
"""Bytes of a pickle, without the tensors beside it."""
MAX_DEPTH = 60
"""Lists and mappings inside one another."""
MAX_VALUES = 25_000
"""Values of a YAML text, each counted as often as aliases repeat it."""
MAX_CONTAINERS = 2_000_000
"""Lists and mappings of a pickle."""
MAX_REPEATED = 50_000_000
"""Values of a pickle, each counted as often as it is repeated."""
MAX_DIGITS = 300
"""Digits of a number: what a float can hold."""
ATOMS = (str, bytes, int, float, bool, type(None))


class Unreadable(ValueError):
    """What is wrong with a text or file, in a few words; ``place`` is ":LINE:COLUMN" or empty."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(shortened(" ".join(reason.split()), 160))
        self.place = place


def readable(name: str) -> str:
    """The name of a file as Unicode: bytes in it that are none are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if not name.isascii() else name


def shown(value: Any, length: int = 80) -> str:
    """The beginning of a value as JSON, for messages; never fails, and looks at no more than it shows."""
    try:
        text = to_json(_sketch(value, length, 4), ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        return f"a {type(value).__name__}"
    return text[:length].encode("utf-8", "replace").decode()


def _sketch(value: Any, length: int, depth: int) -> Any:
    if isinstance(value, str):
        return value[:length]
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value.bit_length() < 4 * MAX_DIGITS else "a huge number"
    if isinstance(value, dict):
        if not depth:
            return {}
        pairs = [pair for _, pair in zip(range(8), value.items(), strict=False)]
        return {str(_sketch(k, length, 0)): _sketch(v, length, depth - 1) for k, v in pairs}
    if isinstance(value, list | tuple | set | frozenset):
        items = [item for _, item in zip(range(16), value, strict=False)] if depth else []
        return [_sketch(item, length, depth - 1) for item in items]
    return value if isinstance(value, float | bool | type(None)) else f"a {type(value).__name__}"


# -- files -----------------------------------------------------------------------------------------------------------


def open_regular(file: str | Path) -> IO[bytes]:
    """A regular file to read; Unreadable for a pipe or device, which may never end, and for what can't be opened."""
    try:
        # a pipe that nobody writes to must not be waited for
        number = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from error
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise Unreadable("it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")
    return open(number, "rb")


def read_up_to(stream: IO[bytes], most: int) -> bytes:
    """At most so many bytes; in pieces, as one call would take memory for all of them even where there are few."""
    data = bytearray()
    while len(data) < most and (piece := stream.read(min(1 << 20, most - len(data)))):
        data += piece
    return bytes(data)


def read_bytes(file: str | Path, limit: int = MAX_TEXT) -> bytes:
    """The bytes of a regular file; Unreadable where there are more than ``limit``."""
    try:
        with open_regular(file) as stream:
            data = read_up_to(stream, limit + 1)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    if len(data) > limit:
        raise Unreadable(f"it has more than {size_shown(limit)}")
    return data


def read_text(file: str | Path, limit: int = MAX_TEXT) -> str:
    """The text of a regular file in UTF-8, without a byte order mark."""
    return as_text(read_bytes(file, limit))


def as_text(data: bytes) -> str:
    """Bytes as text; Unreadable for what is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable("it is not UTF-8 text") from error


def read_json(file: str | Path, limit: int = MAX_TEXT) -> Any:
    """The value of a JSON file."""
    return parse_json(read_text(file, limit))


def read_yaml(file: str | Path) -> Any:
    """The value of a YAML file."""
    return parse_yaml(read_text(file, MAX_YAML))


def size_shown(count: int) -> str:
    """A number of bytes for people."""
    return f"{count >> 20} MB" if count >= 1 << 20 else f"{count >> 10} kB"


# -- JSON ------------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text of settings; Unreadable also where it is nested deeply, or has a number of many
    digits."""
    try:
        value = json.loads(as_text(text) if isinstance(text, bytes) else text, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        where = f":{error.lineno}:{error.colno}"
        raise Unreadable(f"it is not JSON: {error.msg} at line {error.lineno} column {error.colno}", where) from error
    except RecursionError as error:
        raise Unreadable(_too_deep()) from error
    check_plain(value)
    return value


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise Unreadable(f"it has a number of more than {MAX_DIGITS} digits")
    return int(text)


def _too_deep() -> str:
    return f"it is nested more than {MAX_DEPTH} deep"


def check_plain(value: Any) -> None:
    """Unreadable for lists and mappings that are nested too deeply, that hold themselves, or that repeat others so
    often that nobody can walk through them."""
    if not isinstance(value, _CONTAINERS):
        return
    sizes: dict[int, int] = {}
    within = {id(value)}
    # depth first without recursion: (a container, those in it, how many of them were looked at)
    stack: list[tuple[Any, list[Any], int]] = [(value, _containers(value), 0)]
    while stack:
        one, inner, seen = stack.pop()
        while seen < len(inner) and id(inner[seen]) in sizes:
            seen += 1
        if seen < len(inner):
            child = inner[seen]
            if id(child) in within:
                raise Unreadable("it holds itself")
            if len(stack) + 2 > MAX_DEPTH:
                raise Unreadable(_too_deep())
            within.add(id(child))
            stack += [(one, inner, seen), (child, _containers(child), 0)]
            continue
        within.discard(id(one))
        sizes[id(one)] = size = 1 + len(one) + sum([sizes[id(child)] for child in inner])
        if size > MAX_REPEATED:
            raise Unreadable("it repeats its values too often")


def _containers(value: Any) -> list[Any]:
    """The lists, tuples and mappings right inside another."""
    return [v for v in (value.values() if isinstance(value, Mapping) else value) if isinstance(v, _CONTAINERS)]


_CONTAINERS = (dict, list, tuple)


# -- YAML ------------------------------------------------------------------------------------------------------------


class PlainLoader(yaml.SafeLoader):
    """YAML's plain values within bounds. Dates are texts; binary data, sets and pairs are refused."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._values = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        repeated = self.check_event(yaml.AliasEvent)
        before = self._values
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if repeated and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="a value holds itself", problem_mark=mark)
        self._values += self._sizes[id(node)] if repeated else 1
        if self._values > MAX_VALUES:
            problem = f"more than {MAX_VALUES:,} values, with those that aliases repeat"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        if not repeated:
            self._sizes[id(node)] = self._values - before
        return node

    def _number(self, node: Any, construct: Callable[[Any], Any]) -> Any:
        if len(str(node.value)) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(
                problem=f"a number of more than {MAX_DIGITS} digits", problem_mark=node.start_mark
            )
        return construct(node)

    def construct_yaml_int(self, node: Any) -> Any:
        return self._number(node, super().construct_yaml_int)

    def construct_yaml_float(self, node: Any) -> Any:
        return self._number(node, super().construct_yaml_float)


PlainLoader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if str(tag).rpartition(":")[2] not in ("timestamp", "binary", "set", "omap", "pairs")
}
PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_yaml_float)
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, loader: type[PlainLoader] = PlainLoader) -> Any:
    """The value of a YAML text; Unreadable also where it is nested deeply, where aliases repeat too much, or where a
    number has many digits."""
    if len(text) > MAX_YAML:
        raise Unreadable(f"it has more than {size_shown(MAX_YAML)}")
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or next(iter(str(error).split("\n")))
        raise Unreadable(f"it is not YAML: {reason}", place) from error
    except RecursionError as error:
        raise Unreadable(_too_deep()) from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # what PyYAML lets through, such as `!!int x`
        raise Unreadable(f"it is not YAML: a value is not what its tag says ({error})") from error


# -- pickles ---------------------------------------------------------------------------------------------------------


class PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Reads plain values of a pickle within bounds, and refuses every class or function that it names.

    Python's own reader that is written in C takes memory that a few bytes ask for before it reads what is behind them;
    the one in Python, which this is, does not. A subclass that knows harmless classes overrides ``find_class``.
    """

    dispatch = {
        code: function
        for code, function in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if bytes([code])
        not in (
            pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
        )
    }  # fmt: skip

    def __init__(self, file: Any, encoding: str = "ASCII") -> None:
        super().__init__(file, encoding=encoding)
        self._containers = 0

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {shortened(f'{module}.{name}', 100)}, and only plain values are read")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside of it")

    def count(self) -> None:
        self._containers += 1
        if self._containers > MAX_CONTAINERS:
            raise pickle.UnpicklingError(f"it has more than {MAX_CONTAINERS:,} lists and mappings")

    def set_items(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise pickle.UnpicklingError("it gives names to the values of something else than a mapping")
        for place in range(0, len(items), 2):
            target[_hashable(items[place])] = items[place + 1]


def _hashable(key: Any) -> Any:
    """A key of a mapping: tuples in tuples could take for ever to be hashed."""
    plain = isinstance(key, ATOMS) or (isinstance(key, tuple) and all(isinstance(item, ATOMS) for item in key))
    if not plain:
        raise pickle.UnpicklingError("it has a key that is neither a text nor a number")
    return key


class OrderedMapping(dict[Any, Any]):
    """Stands for ``collections.OrderedDict``, of pairs with keys as above; with attributes, as state dicts have."""

    def __init__(self, pairs: Any = ()) -> None:
        super().__init__()
        for key, value in pairs:
            self[_hashable(key)] = value


def _operation(code: bytes) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        PlainUnpickler.dispatch[code[0]] = function
        return function

    return register


def _counted(code: bytes) -> None:
    inner = PlainUnpickler.dispatch[code[0]]

    def load(reader: PlainUnpickler) -> None:
        reader.count()
        inner(reader)

    PlainUnpickler.dispatch[code[0]] = load


@_operation(pickle.SETITEM)
def _set_item(reader: PlainUnpickler) -> None:
    value, key = reader.stack.pop(), reader.stack.pop()
    reader.set_items(reader.stack[-1], [key, value])


@_operation(pickle.SETITEMS)
def _set_items(reader: PlainUnpickler) -> None:
    items = reader.pop_mark()
    reader.set_items(reader.stack[-1], items)


@_operation(pickle.DICT)
def _dict(reader: PlainUnpickler) -> None:
    made: dict[Any, Any] = {}
    reader.set_items(made, reader.pop_mark())
    reader.append(made)


@_operation(pickle.ADDITEMS)
def _add_items(reader: PlainUnpickler) -> None:
    items = [_hashable(item) for item in reader.pop_mark()]
    target = reader.stack[-1]
    if not isinstance(target, set):
        raise pickle.UnpicklingError("it adds items to something else than a set")
    target.update(items)


@_operation(pickle.FROZENSET)
def _frozen_set(reader: PlainUnpickler) -> None:
    reader.append(frozenset(_hashable(item) for item in reader.pop_mark()))


@_operation(pickle.LONG1)
def _long1(reader: PlainUnpickler) -> None:
    reader.append(pickle.decode_long(_number_of(reader, reader.read(1)[0])))


@_operation(pickle.LONG4)
def _long4(reader: PlainUnpickler) -> None:
    reader.append(pickle.decode_long(_number_of(reader, int.from_bytes(reader.read(4), "little"))))


def _number_of(reader: PlainUnpickler, length: int) -> bytes:
    if length > MAX_DIGITS * 10 // 24:  # a byte holds 2.4 digits
        raise pickle.UnpicklingError(f"it has a number of more than {MAX_DIGITS} digits")
    return reader.read(length)


for _code in (
    pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_SET, pickle.LIST, pickle.DICT, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3, pickle.FROZENSET,
):  # fmt: skip
    _counted(_code)


# Bytes behind the operations that plain lists, mappings, numbers and texts are made of; or what
# says how many they are: a byte, four bytes, the end of the line.
_BYTE, _FOUR, _LINE, _UNUSUAL = -1, -2, -3, -4
_BEHIND = [_UNUSUAL] * 256
for _codes, _count in (
    (b".(]}ldaesuN\x88\x89\x94", 0), (b"\x80Kqh", 1), (b"M", 2), (b"Jrj", 4), (b"G\x95", 8),
    (b"U\x8c\x8aC", _BYTE), (b"TXB", _FOUR), (b"IFSVpg", _LINE),
):  # fmt: skip
    for _one in _codes:
        _BEHIND[_one] = _count


def _is_usual(data: bytes) -> bool:
    """Whether a pickle is made of lists, mappings, numbers and texts alone, and asks for no more memory than that."""
    place, end, containers = 0, len(data), 0
    while place < end:
        code = data[place]
        behind = _BEHIND[code]
        if behind == 0:
            if code == 0x2E:  # STOP
                return True
            if code in b"]}ld":
                containers += 1
        elif behind == _FOUR:
            behind = 4 + int.from_bytes(data[place + 1 : place + 5], "little", signed=code == 0x54)
            if not 4 <= behind <= end:
                return False
        elif behind == _BYTE:
            behind = 1 + data[place + 1] if place + 1 < end else end
            if code == 0x8A and behind > MAX_DIGITS * 10 // 24:  # LONG1
                return False
        elif behind == _LINE:
            stop = data.find(b"\n", place)
            line = data[place + 1 : stop]
            # a memo is as long as the highest number in it
            if stop < 0 or (code in b"pI" and (len(line) > 20 or (code == 0x70 and not line.isdigit()))):
                return False
            if code == 0x70 and int(line) > place:
                return False
            behind = stop - place
        elif behind == 4:
            if code == 0x72 and int.from_bytes(data[place + 1 : place + 5], "little") > place:  # LONG_BINPUT
                return False
        elif behind == 8:
            if code == 0x95 and int.from_bytes(data[place + 1 : place + 9], "little") > end:  # FRAME
                return False
        elif behind == _UNUSUAL:
            return False
        place += 1 + behind
    return containers <= MAX_CONTAINERS


class _Quick(pickle.Unpickler):
    """Python's reader in C, for usual pickles: there is nothing in them to be found."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError("it names a class")


def parse_pickle(data: bytes, encoding: str = "ASCII", limit: int = MAX_PICKLE) -> Any:
    """The plain values of a pickle; Unreadable for any other, and for what is damaged."""
    if len(data) > limit:
        raise Unreadable(f"it has more than {size_shown(limit)}")
    kind = _Quick if _is_usual(data) else PlainUnpickler
    return unpickled(kind(io.BytesIO(data), encoding=encoding))


def unpickled(reader: pickle.Unpickler | PlainUnpickler) -> Any:
    """What a reader gives; Unreadable for a damaged pickle, which may fail in any way, and for one out of bounds."""
    try:
        value = reader.load()
    except Unreadable:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__} {error}".strip()
        raise Unreadable(reason if reason.startswith("it ") else f"it is damaged ({reason})") from error
    check_plain(value)
    return value
