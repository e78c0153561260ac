"""Damaged and hostile packs: what is bad is named and bounded, nothing outside is read, nothing is run."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mplug_cli.app import main
from mplug_core.data.shards.inputs import open_inputs
from mplug_core.data.shards.pack import PackOptions, pack
from mplug_core.data.shards.reading import Pack, pack_places
from mplug_core.data.shards.remote import LocalFolder, RemoteFolder, Unreachable, checked_url, locate
from mplug_core.data.shards.samples import END, DamagedSample, decode, read_sample, tar_member
from mplug_core.data.shards.source import ShardSource
from mplug_core.data.shards.summary import inspect_pack
from mplug_core.errors import DataError
from mplug_core.recipe import SourceSection, VisionSection
from tests.data.test_shards import encode, jpeg, packed, photos, server  # noqa: F401

JSON = json.dumps({"images": ["a.jpg"], "captions": [{"image": 0, "captions": ["photo 1"], "image_id": "a"}]}).encode()


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def source(folder: Path, bad: float = 0.05, **section: Any) -> ShardSource:
    values = {"path": "x", "batch_size": 4, "augment": "none", **section}
    opened = Pack(LocalFolder(folder))
    return ShardSource(
        "pack", SourceSection(**values), opened, VisionSection(image_size=8), {"pretrain": encode}, 1, bad
    )


def rewritten(folder: Path, shard: str, number: int, members: bytes) -> None:
    """Replace a sample by other members, with offsets, checksums and index that say that all is well."""
    stem = shard.removesuffix(".tar")
    tar, idx = folder / shard, folder / f"{stem}.idx"
    index = json.loads((folder / "index.json").read_text())
    entry = next(e for e in index["shards"] if e["name"] == shard)
    count = entry["samples"]
    places = np.frombuffer(idx.read_bytes(), "<u8", count + 1).tolist()
    data = tar.read_bytes()
    samples = [data[a:b] for a, b in zip(places, places[1:], strict=False)]
    samples[number] = members
    ends = [sum(map(len, samples[:k])) for k in range(count + 1)]
    tar.write_bytes(b"".join(samples) + END)
    idx.write_bytes(pack_places(ends, [zlib.crc32(sample) for sample in samples]))
    for file, values in ((tar, entry), (idx, entry["offsets"])):
        values["bytes"], values["sha256"] = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


def linked(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info.tobuf(tarfile.USTAR_FORMAT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pack of 40 photos in five or more shards."""
    packed(photos(tmp_path / "photos", 40), tmp_path / "pack")
    return tmp_path / "pack"


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / "index.json").read_text())
    change(values)
    (folder / "index.json").write_text(json.dumps(values))


# -- one sample ------------------------------------------------------------------------------------------------------

IMAGE = tar_member("000000003.jpg", jpeg(3))
TEXT = tar_member("000000003.json", JSON)
BAD_SAMPLES = {
    "image without json": (IMAGE, "missing_json"),
    "json without image": (TEXT, "missing_image"),
    "parent folder": (tar_member("../000000003.jpg", jpeg(3)) + TEXT, "unsafe_name"),
    "absolute": (tar_member("/tmp/000000003.jpg", jpeg(3)) + TEXT, "unsafe_name"),
    "symlink": (linked("000000003.jpg", "/etc/passwd") + TEXT, "unsafe_member"),
    "hard link": (linked("000000003.jpg", "000000003.json", tarfile.LNKTYPE) + TEXT, "unsafe_member"),
    "device": (linked("000000003.jpg", "", tarfile.CHRTYPE) + TEXT, "unsafe_member"),
    "another sample": (tar_member("000000009.jpg", jpeg(9)) + tar_member("000000009.json", JSON), "other_sample"),
    "no tar": (b"\xff" * 1024, "broken_tar"),
    "json is none": (IMAGE + tar_member("000000003.json", b"{"), "broken_json"),
    "pickle for json": (IMAGE + tar_member("000000003.pkl", pickle.dumps({"images": ["a"]})), "missing_json"),
    "an image that isn't there": (
        IMAGE + tar_member("000000003.json", JSON.replace(b'"image": 0', b'"image": 7')), "broken_json",
    ),
    "captions are numbers": (IMAGE + tar_member("000000003.json", JSON.replace(b'["photo 1"]', b"[1]")), "broken_json"),
}  # fmt: skip


@pytest.mark.parametrize(("members", "code"), BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_a_bad_sample_is_named_and_the_others_go_on(folder: Path, members: bytes, code: str) -> None:
    with pytest.raises(DamagedSample) as caught:
        read_sample(members, "000000003")
    assert caught.value.code == code
    rewritten(folder, "00000.tar", 3, members)
    one = source(folder)
    drawn = [one.draw(0, lot) for lot in range(10)]
    (bad,) = [line for batch in drawn for line in batch.bad]
    assert bad.startswith(f"00000.tar sample 3: {code}")
    seen = [n for batch in drawn for n in batch.blocks["pretrain"]["numbers"].tolist()]
    assert sorted(seen) == sorted(set(range(40)) - {3})
    with pytest.raises(DataError, match=r"bad samples of 40.*00000.tar sample 3"):
        strict = source(folder, bad=0.0)
        for lot in range(10):
            strict.draw(0, lot)


def test_pickles_are_never_decoded(folder: Path, tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    extra = b"".join(tar_member(f"000000003.{name}", trap) for name in ("pkl", "pyd", "pth", "pickle", "npy", "pt"))
    rewritten(folder, "00000.tar", 3, IMAGE + TEXT + extra)
    one = source(folder)
    assert all(not one.draw(0, lot).bad for lot in range(10))
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in (
            ("1.jpg", jpeg(1)),
            ("1.txt", b"photo 1"),
            ("1.pkl", trap),
            ("1.pyd", trap),
            ("1.pth", trap),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "in").mkdir()
    (tmp_path / "00000.tar").rename(tmp_path / "in/00000.tar")
    assert pack(PackOptions(str(tmp_path / "in")), tmp_path / "out").index.samples == 1
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_a_changed_byte_is_found(folder: Path) -> None:
    with open(folder / "00001.tar", "r+b") as file:
        file.seek(700)
        byte = file.read(1)
        file.seek(700)
        file.write(bytes([byte[0] ^ 1]))
    one = source(folder)
    bad = [line for lot in range(10) for line in one.draw(0, lot).bad]
    assert len(bad) == 1 and bad[0].startswith("00001.tar sample 0: checksum")
    assert inspect_pack(one.pack).tasks[0].splits[0].broken == 0
    told = inspect_pack(one.pack, verify=True).tasks[0].splits[0]
    assert told.broken == 1 and "00001.tar has another checksum" in told.first_broken[0]


def test_a_box_outside_and_a_caption_without_words_are_broken() -> None:
    for kind, record in (
        ("phrases", {"image": 0, "phrase": "x", "box": [0, 0, 2, 1]}),
        ("phrases", {"image": 0, "phrase": "x", "box": [0, 0, float("nan"), 1]}),
        ("captions", {"image": 0, "captions": [], "image_id": ""}),
        ("entailments", {"image": 0, "hypothesis": "x", "label": "perhaps"}),
        ("questions", {"image": 0, "question": "x", "answers": ["a"], "weights": [], "kind": ""}),
        ("statements", {"images": [0, -1], "statement": "x", "label": True}),
    ):
        with pytest.raises(DamagedSample):
            decode(json.dumps({"images": ["a.jpg"], kind: [record]}).encode())


# -- one shard -------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    data = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(data[: len(data) // 2])


def empty(folder: Path) -> None:
    (folder / "00002.tar").write_bytes(b"")


def gone(folder: Path) -> None:
    (folder / "00002.tar").unlink()


def other_offsets(folder: Path) -> None:
    (folder / "00002.idx").write_bytes((folder / "00001.idx").read_bytes()[:-4] + b"none")


@pytest.mark.parametrize("damage", [cut, empty, gone, other_offsets])
def test_a_damaged_shard_is_named_and_bounded(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(DataError, match=r"shards are damaged.*00002\.(tar|idx)") as caught:
        one = source(folder)
        for lot in range(10):
            one.draw(0, lot)
    assert caught.value.exit_code == 3
    lost = json.loads((folder / "index.json").read_text())["shards"][2]["samples"]
    one = source(folder, bad=0.5)
    batches = [one.draw(0, lot) for lot in range(10)]
    bad = [line for batch in batches for line in batch.bad]
    assert len(bad) == lost and all(line.startswith("00002.tar sample") for line in bad)
    seen = {n for batch in batches for n in batch.blocks["pretrain"]["numbers"].tolist()}
    assert len(seen) == 40 - lost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["shards"][0].update(name="../other.tar"), "shards.0.name"),
        (lambda v: v["shards"][0].update(name="/etc/passwd"), "shards.0.name"),
        (lambda v: v["shards"][0].update(name="http://127.0.0.1/0.tar"), "shards.0.name"),
        (lambda v: v["shards"][0].update(name="pipe:cat 00000.tar"), "shards.0.name"),
        (lambda v: v["shards"][0].update(name="00001.tar"), "comes twice"),
        (lambda v: v["shards"][0].update(samples=0), "shards.0.samples"),
        (lambda v: v["shards"][0].update(sha256="x"), "shards.0.sha256"),
        (lambda v: v.update(samples=41), "not the sum"),
        (lambda v: v.update(shards=[], samples=0), "lists no shards"),
        (lambda v: v.update(version=99), "version 99"),
        (lambda v: v.update(surprise=1), "surprise"),
    ],
)
def test_an_index_that_says_something_else(folder: Path, change: Callable[[Any], None], message: str) -> None:
    edit_index(folder, change)
    with pytest.raises(DataError, match=message):
        source(folder)


def test_an_index_that_counts_more_samples_than_a_shard_has(folder: Path) -> None:
    def change(shard: int) -> Callable[[dict[str, Any]], None]:
        def more(values: dict[str, Any]) -> None:
            values["shards"][shard]["samples"] += 1
            values["samples"] += 1

        return more

    edit_index(folder, change(-1))
    one = source(folder, bad=0.5)
    bad = [line for lot in range(10) for line in one.draw(0, lot).bad]
    assert bad and all(line.startswith(f"{one.pack.shards[-1].name} sample") and "places" in line for line in bad)
    edit_index(folder, change(1))
    with pytest.raises(DataError, match=r"00002.tar begins at"):
        source(folder)


# -- remote ----------------------------------------------------------------------------------------------------------


def test_another_checksum_and_another_size_are_never_used(
    folder: Path,
    tmp_path: Path,
    server: tuple[str, Path, Any],  # noqa: F811
) -> None:
    url, root, asked = server
    (root / "pack").symlink_to(folder)
    data = bytearray((folder / "00000.tar").read_bytes())
    data[900] ^= 1
    for changed, what in (
        (bytes(data), "another checksum"),
        (bytes(data) * 3, "more than"),
        (bytes(data[:99]), "has 99"),
    ):
        (folder / "00000.tar").write_bytes(changed)
        there = Pack(RemoteFolder(f"{url}/pack", tmp_path / "cache", 10**9, attempts=2))
        asked.clear()
        with pytest.raises(Unreachable, match=f"00000.tar.*{what}"):
            there.shard(0)
        assert asked["/pack/00000.tar"] == 2
        assert not [f for f in (tmp_path / "cache").iterdir() if f.suffix in (".tar", ".part")]
    (folder / "00000.tar").unlink()
    section = SourceSection(path="x", batch_size=4, augment="none")
    there = Pack(RemoteFolder(f"{url}/pack", tmp_path / "cache", 10**9, attempts=1))
    strict = ShardSource("p", section, there, VisionSection(image_size=8), {"pretrain": encode}, 1, 0.01)
    with pytest.raises(DataError, match=r"1 of \d shards are damaged.*00000.tar can't be fetched"):
        for lot in range(10):
            strict.draw(0, lot)


@pytest.mark.parametrize(
    "path",
    ["pipe:cat /etc/passwd", "pipe://cat", "file:///etc", "gs://b/x", "ftp://h/x", "simplecache::http://h/x", "http://",
     "PIPE:ls", "zip://x.tar::http://h/x", "data:text/plain,x::http://h"],
)  # fmt: skip
def test_other_schemes_are_refused_everywhere(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for work in (
        lambda: locate(path),
        lambda: checked_url(path),
        lambda: RemoteFolder(path, tmp_path, 1),
        lambda: list(open_inputs(path)),
    ):
        with pytest.raises(DataError):
            work()
    assert main(["data", "inspect", path]) == 3
    assert main(["data", "pack", path, str(tmp_path / "out"), "-q"]) == 3
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err.count("error: ") == 2


# -- packing ---------------------------------------------------------------------------------------------------------


def test_hostile_members_of_what_is_packed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(jpeg(9))
    parts = [tar_member(f"{k}.jpg", jpeg(k)) + tar_member(f"{k}.txt", f"photo {k}".encode()) for k in range(2)]
    hostile = [
        tar_member("../secret.jpg", jpeg(5)), linked("7.jpg", str(tmp_path / "secret.jpg")),
        tar_member("8.txt", b"no image"), tar_member("9.jpg", jpeg(9)),
    ]  # fmt: skip
    (tmp_path / "in/00000.tar").write_bytes(b"".join([parts[0], *hostile, parts[1]]) + END)
    cut_short = tar_member("20.jpg", jpeg(20)) + tar_member("20.txt", b"photo 20") + tar_member("21.jpg", jpeg(21))
    (tmp_path / "in/00001.tar").write_bytes(cut_short[:-600])
    with pytest.raises(DataError, match="entries are bad"):
        pack(PackOptions(str(tmp_path / "in")), tmp_path / "out")
    report = pack(PackOptions(str(tmp_path / "in")), tmp_path / "out", max_bad=1)
    assert report.index.samples == 3
    assert report.index.left_out.items() >= {"unsafe_name": 1, "unsafe_member": 1, "missing_image": 1}.items()
    assert report.index.left_out["missing_caption"] >= 1
    assert {"cut_short", "broken_tar"} & set(report.index.left_out)


def test_nothing_to_pack(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("only one column\n")
    with pytest.raises(DataError, match="nothing in"):
        pack(PackOptions(str(tmp_path / "pairs.tsv")), tmp_path / "out", max_bad=1)
    assert not (tmp_path / "out/index.json").exists()
