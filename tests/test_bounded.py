"""Bounds on what is read: whatever a few bytes ask for, the answer is one short line, at once."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mplug_core import bounded
from mplug_core.bounded import Unreadable, check_plain, parse_json, parse_pickle, parse_yaml, read_bytes, shown
from mplug_core.errors import LINE, DataError, RecipeError, shortened


def aliases(levels: int, wide: int) -> str:
    """YAML of which each level repeats the one before ``wide`` times."""
    lines = ["l0: &l0 [" + ",".join("1" * wide) + "]"]
    lines += [f"l{n}: &l{n} [{','.join([f'*l{n - 1}'] * wide)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (aliases(11, 9), "more than 25,000 values"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 100_000, "nested more than 60 deep"),
        ("- " * 500 + "x", "nested more than 60 deep"),
        ("{a: " * 3000, "nested more than 60 deep"),
        ("a: " + "9" * 5000, "more than 300 digits"),
        ("a: 0x" + "f" * 5000, "more than 300 digits"),
        ("a: 1" + ":1" * 5000, "more than 300 digits"),
        ("a: !!int x", "not what its tag says"),
        ("a: !!bool x", "not what its tag says"),
        ("a: !!binary aGk=", "tag"),
        ("a: !!python/object:os.system {}", "tag"),
        ("{? [1]: 2}", "unhashable"),
        ("a: \0", "special characters"),
        ("a: x\n" * 100_000, "more than 256 kB"),
    ],
)
def test_yaml(text: str, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        parse_yaml(text)


def test_yaml_that_is_meant() -> None:
    text = "a: &a {x: 1, y: [1.5, true, null]}\nb: *a\nc: {<<: *a, z: 2024-13-45}\nd: 2024-01-02"
    found = parse_yaml(text)
    assert found["b"] == found["a"] == {"x": 1, "y": [1.5, True, None]}
    assert found["c"] == {**found["a"], "z": "2024-13-45"}, "dates, also those that are none, are texts"
    assert found["d"] == "2024-01-02"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested more than 60 deep"),
        ("[" * 61 + "]" * 61, "nested more than 60 deep"),
        ('{"a": ' * 61 + "1" + "}" * 61, "nested more than 60 deep"),
        ("9" * 5000, "more than 300 digits"),
        ('{"a": -' + "9" * 400 + "}", "more than 300 digits"),
        ('{"a": 1', "not JSON: .* line 1 column"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_json(text: str | bytes, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        parse_json(text)


def nested(value: Any, levels: int, wide: int) -> list[Any]:
    for _ in range(levels):
        value = [value] * wide
    return value


def circle() -> list[Any]:
    made: list[Any] = []
    made.append([made])
    return made


class Calls:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("true",))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pickle.dumps(circle()), "holds itself"),
        (pickle.dumps(nested(1, 11, 9)), "repeats its values"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested more than 60 deep"),
        (b"\x80\x02}N" + b"2\x86" * 60 + b"Ns.", "a key that is neither"),
        (b"\x80\x04\x8e\0\0\0\0\1\0\0\0.", "damaged"),
        (b"X\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\0\0\0.", "damaged"),
        (b"\x80\x02\x8b\xff\xff\0\0" + b"\1" * 70_000 + b".", "more than 300 digits"),
        (b"I" + b"9" * 5000 + b"\n.", "damaged"),
        (pickle.dumps(Calls()), "posix.system|nt.system"),
        (b"", "Ran out of input|damaged"),
    ],
)
def test_pickles(data: bytes, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        parse_pickle(data)


def test_a_pickle_takes_no_memory_that_its_bytes_ask_for() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert parse_pickle(b"\x80\x02]r\xff\xff\xff\xff.") == [], "a memo of four billion places"
    assert parse_pickle(b"(lp4000000000\n.") == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_that_are_meant(protocol: int) -> None:
    value = {"a": [1, -2, 2.5, None, True, "é", 10**20], 3: {"b": [{}, []]}, "again": "a" * 300}
    assert parse_pickle(pickle.dumps([value, value], protocol)) == [value, value]
    if protocol > 3:
        assert parse_pickle(pickle.dumps({"t": (1, (2, 3)), "s": {1, 2}}, protocol)) == {"t": (1, (2, 3)), "s": {1, 2}}
    assert bounded._is_usual(pickle.dumps([value], protocol)) or protocol < 2, "most are read by the quick reader"


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(Unreadable, match="no regular file|a folder"):
            read_bytes(file)
    (tmp_path / "large").write_bytes(b"x" * 2000)
    with pytest.raises(Unreadable, match="more than 1 kB"):
        read_bytes(tmp_path / "large", 1 << 10)
    with pytest.raises(Unreadable):
        read_bytes("a\0b")


def test_shown_looks_at_no_more_than_it_shows() -> None:
    assert shown({"a": [1, "b", None]}) == '{"a": [1, "b", null]}'
    for value in (nested(1, 30, 9), circle(), "x" * 10**6, 10**5000, {i: i for i in range(10**5)}, object()):
        assert 0 < len(shown(value)) <= 80


def test_check_plain_lets_shared_values_pass() -> None:
    once = [1, 2]
    check_plain({"a": once, "b": once, "c": [once, {"d": once}]})


def test_an_error_is_one_line_that_fits() -> None:
    error = DataError("x" * 1000 + "\nthe end", "y" * 1000)
    assert len(str(error)) <= LINE and "\n" not in str(error) and "the end (" in str(error)
    assert shortened("short", 10) == "short" and len(shortened("long" * 10, 10)) == 10
    many = RecipeError.of("mine", [f"fault {number} of many" for number in range(500)])
    assert len(str(many)) <= LINE and "and 4" in str(many) and len(many.faults) == 500
    assert len(str(RecipeError.of("mine", ["z" * 5000, "w" * 5000]))) <= LINE
