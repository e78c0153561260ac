"""Whatever the bytes: each reader gives a value or the project's own error, in one line, at once, in little memory."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mplug_core.bounded import Unreadable, parse_json, parse_pickle, parse_yaml, shown
from mplug_core.data.records import read_captions, read_entailments, read_phrases, read_questions, read_statements
from mplug_core.data.records.inspection import inspect
from mplug_core.data.shards.index import parse_index
from mplug_core.data.shards.inputs import open_inputs
from mplug_core.data.shards.samples import decode
from mplug_core.data.text import Tokenizer
from mplug_core.errors import LINE, MplugError
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import check_recipe, parse_override, parse_recipe, read_yaml
from mplug_core.tasks.stored import read_predictions
from mplug_core.weights.card import read_card
from mplug_core.weights.modelscope import read_settings
from mplug_core.weights.pretrained import read_tensors
from mplug_core.weights.sharded import files_of

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SECONDS, KILOBYTES = 2.0, 500_000
BOUNDED = hypothesis.settings(
    derandomize=True, max_examples=25, deadline=None, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
PIECES = (
    b"[", b"{", b"]", b"}", b'"', b",", b":", b"\n", b"\r", b"\t", b"\0", b"\xff", b"&a ", b"*a", b"- ", b"!!int ",
    b"|", b"9" * 400, b"1e999", b"NaN", b"[" * 80, b"---\n", b"\xef\xbb\xbf", b"\\ud800", b"\x80\x02",
    b"r\xff\xff\xff\xff", b"2024-13-45", b"\xf0\x9f\x98\x80",
)  # fmt: skip
"""What makes trouble somewhere."""


def torch_bytes(old: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": {"a": torch.ones(2), "b": torch.zeros(1)}}, stream, _use_new_zipfile_serialization=not old)
    return stream.getvalue()


def scripted_bytes() -> bytes:
    """A TorchScript archive as far as its reader looks."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02c__torch__\nM\nq\0)\x81q\1}q\2X\1\0\0\0aq\3K\1sb.")
        archive.writestr("x/constants.pkl", b"\x80\x02).")
    return stream.getvalue()


def tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in (("a.jpg", b"x"), ("a.txt", b"hello"), ("b.in.jpg", b"y"), ("b.json", b'{"caption": "b"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


COCO = {
    "images": [{"id": 1, "file_name": "1.jpg", "width": 8, "height": 6}],
    "annotations": [{"id": 1, "image_id": 1, "caption": "a", "category_id": 1, "bbox": [1, 1, 2, 2]}],
    "categories": [{"id": 1, "name": "cat"}],
}
REFS = [{"image_id": 1, "ann_id": 1, "split": "val", "sentences": [{"sent": "it", "sent_id": 1}]}]
RECORD = {"image": "1.jpg", "caption": "a", "question": "b?", "answer": "c", "phrase": "d", "box": [1, 1, 2, 2]}
RECORD |= {"size": [8, 6], "statement": "e", "label": True, "hypothesis": "f", "images": ["1.jpg", "1.jpg"]}
RECIPE = b"name: x\nmodel: {size: tiny, vision: {image_size: 64}}\nsteps: 3\nobjectives: {itc: 1}\n"


def in_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A reader of a file of this name."""

    def call(data: bytes) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name
            file.parent.mkdir(exist_ok=True)
            (Path(folder) / "1.jpg").write_bytes(b"")
            (Path(folder) / "instances.json").write_bytes(as_json(COCO))
            file.write_bytes(data)
            return read(file)

    return call


def packed(file: Path) -> None:
    """What ``data pack`` takes of a file, and of the folder of a tar."""
    for item in open_inputs(str(file.parent if file.suffix == ".tar" else file)):
        assert len(getattr(item, "message", "")) <= LINE


def recipe(file: Path) -> None:
    check_recipe(read_yaml(file))


def all_records(*reads: Callable[[Path], Any]) -> Callable[[Path], None]:
    def read(file: Path) -> None:
        for one in reads:
            try:
                found = one(file)
            except MplugError as error:
                check_line(error)
                continue
            for error in found.broken:
                check_line(error)

    return read


def check_line(error: MplugError) -> None:
    assert len(str(error)) <= LINE and "\n" not in str(error)


def every(file: Path) -> None:
    """All that ``data inspect`` and training read of a file or folder."""
    all_records(read_captions, read_questions, read_phrases, read_statements, read_entailments)(file)
    inspect(file)


READERS: dict[str, tuple[Callable[[bytes], Any], list[bytes]]] = {
    "json": (parse_json, [as_json(COCO)]),
    "yaml": (lambda data: parse_yaml(data.decode("latin1")), [RECIPE, b"a: &a [1]\nb: *a\n"]),
    "pickle": (lambda data: shown(parse_pickle(data, "latin1")), [pickle.dumps(REFS, 2), pickle.dumps(REFS, 0)]),
    "recipe": (in_file("x.yaml", recipe), [RECIPE]),
    "recipe text": (lambda data: parse_recipe(data.decode("latin1"), "x"), [RECIPE]),
    "override": (lambda data: parse_override(data.decode("latin1")), [b"model.vision.image_size=[1, 2]"]),
    "config": (in_file("config.json", MplugConfig.load), [as_json(MplugConfig.named("tiny").model_dump(mode="json"))]),
    "card": (in_file("README.md", lambda f: read_card(f.parent).scores()), [b"---\na: b\n---\n| a/b/c | 0.5 |\n"]),
    "vocabulary": (in_file("vocab.txt", Tokenizer.load), [b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"]),
    "modelscope": (in_file("config.yaml", lambda f: read_settings(f.parent)), [b"image_res: 384\nbeam_size: 5\n"]),
    "task": (in_file("configuration.json", lambda f: read_settings(f.parent)), [as_json({"task": "image-captioning"})]),
    "bert": (in_file("config_bert.json", lambda f: read_settings(f.parent)), [as_json({"hidden_size": 768})]),
    "index of shards": (in_file("x.bin.index.json", files_of), [as_json({"weight_map": {"a": "1.jpg"}})]),
    "pack's index": (lambda data: parse_index(data, "x"), [as_json({"format": "mplug-shards", "version": 1})]),
    "sample": (decode, [as_json({"images": ["a"], "captions": [{"captions": ["b"], "image": 0, "image_id": "c"}]})]),
    "predictions": (in_file("p.jsonl", lambda f: read_predictions(f, "caption")), [as_json({"caption": "a"}) + b"\n"]),
    "tensors": (in_file("x.pth", read_tensors), [torch_bytes(), torch_bytes(old=True), scripted_bytes()]),
    "safetensors": (in_file("x.safetensors", read_tensors), [b"\x10\0\0\0\0\0\0\0" + b'{"a": {}}       ']),
    "lines": (in_file("x.jsonl", every), [as_json(RECORD) + b"\n" + as_json(RECORD)]),
    "list": (in_file("x.json", every), [as_json([RECORD]), as_json(COCO)]),
    "csv": (in_file("x.csv", every), [b'image,caption\n1.jpg,"a\nb"\n', b"question,answer,image_id\na,b,c\n"]),
    "bars": (in_file("results.csv", every), [b"image_name| comment_number| comment\n1.jpg| 0| a\n"]),
    "token": (in_file("x.token", every), [b"1.jpg#0\ta\n1.jpg#1\tb\n"]),
    "refs": (in_file("refs(unc).p", every), [pickle.dumps(REFS, 2)]),
    "marks": (in_file("Sentences/1.txt", lambda f: every(f.parent.parent)), [b"[/EN#1/people A man] runs .\n"]),
    "tsv": (in_file("x.tsv", packed), [b'caption\turl\n"a\nb"\thttp://x/y\n']),
    "urls": (in_file("x.jsonl", packed), [as_json({"url": "http://x/y", "caption": "a"})]),
    "tar": (in_file("00000.tar", packed), [tar_bytes()]),
}


@st.composite
def changed(draw: Any, seeds: list[bytes]) -> bytes:
    """A good file, or an empty one, with places overwritten, cut out, repeated or filled with what makes trouble."""
    data = bytearray(draw(st.sampled_from([*seeds, b""])))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, len(data)))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=8)))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            data[place:place] = piece
        elif kind == 1:
            data[place : place + len(piece)] = piece
        elif kind == 2:
            del data[place : place + draw(st.integers(1, 40))]
        else:
            data[place:place] = bytes(data[place : place + 30]) * draw(st.integers(1, 300))
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_whatever_the_bytes(name: str) -> None:
    resource = pytest.importorskip("resource")
    read, seeds = READERS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @BOUNDED
    @hypothesis.given(changed(seeds))
    def check(data: bytes) -> None:
        began = time.process_time()
        try:
            read(data)
        except MplugError as error:
            check_line(error)
        except Unreadable as error:
            assert len(str(error)) <= 200
        assert time.process_time() - began < SECONDS

    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES
