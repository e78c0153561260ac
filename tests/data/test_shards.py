"""Packs: what goes in comes out, byte for byte and record for record; batches are arithmetic on seed and lot."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import random
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mplug_cli.app import main
from mplug_core import download as downloads
from mplug_core.data.batches import Drawn, Lots
from mplug_core.data.records import read_captions, read_entailments, read_phrases, read_questions, read_statements
from mplug_core.data.shards import remote as remote_folders
from mplug_core.data.shards.download import download
from mplug_core.data.shards.index import PackIndex, parse_index
from mplug_core.data.shards.order import Order
from mplug_core.data.shards.pack import PackOptions, PackReport, pack
from mplug_core.data.shards.reading import Pack
from mplug_core.data.shards.remote import LocalFolder, RemoteFolder, locate
from mplug_core.data.shards.samples import read_sample
from mplug_core.data.shards.source import ShardSource, text_records
from mplug_core.data.shards.summary import inspect_pack
from mplug_core.errors import DataError, ImageError
from mplug_core.recipe import SourceSection, VisionSection

VISION = VisionSection(image_size=8)


def jpeg(shade: int = 0, side: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (shade % 256, shade // 256 % 256, 90)).save(stream, "JPEG")
    return stream.getvalue()


def photos(folder: Path, count: int) -> Path:
    """``captions.jsonl`` on ``count`` pictures."""
    (folder / "images").mkdir(parents=True)
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        for k in range(count):
            (folder / "images" / f"{k}.jpg").write_bytes(jpeg(k))
            file.write(json.dumps({"image": f"images/{k}.jpg", "caption": [f"photo number {k}", f"it is {k}"]}) + "\n")
    return folder


def packed(source: Path, out: Path, **options: Any) -> PackReport:
    """A pack of small shards."""
    return pack(PackOptions(str(source), **{"shard_size": 20_000, **options}), out, workers=4)


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of 100 photos in several shards."""
    folder = tmp_path_factory.mktemp("hundred")
    packed(photos(folder / "photos", 100), folder / "pack")
    return folder / "pack"


def encode(drawn: list[Drawn], rng: random.Random) -> dict[str, torch.Tensor]:
    numbers = [int(record.captions[0].split()[-1]) for _, record in drawn]
    return {"rows": torch.tensor([rows for rows, _ in drawn]), "numbers": torch.tensor(numbers)}


def stream(pack: Path | Pack, lots: int = 1, **section: Any) -> ShardSource:
    opened = pack if isinstance(pack, Pack) else Pack(LocalFolder(pack))
    values = {"path": "x", "batch_size": 4, "augment": "none", **section}
    return ShardSource("pack", SourceSection(**values), opened, VISION, {"pretrain": encode}, lots)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path, Counter[str]]]:
    """A folder on loopback HTTP: URL, folder, and how often each path was asked for."""
    monkeypatch.setattr(remote_folders, "PAUSE", 0.01)
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    root, asked = tmp_path / "www", Counter()
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[self.path] += 1
            if self.path.startswith("/flaky/") and asked[self.path] == 1:
                return self.send_error(503)
            if self.path.startswith("/away/"):
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
                return self.end_headers()
            self.path = self.path.replace("/flaky/", "/")
            super().do_GET()

        def log_message(self, *values: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", root, asked
        found.shutdown()


# -- packing ---------------------------------------------------------------------------------------------------------


def test_all_kinds_come_out_as_the_readers_gave_them(scenes: Path, tmp_path: Path) -> None:
    report = packed(scenes, tmp_path / "pack", split="train")
    opened = Pack(LocalFolder(tmp_path / "pack"))
    readers = {
        "captions": read_captions, "questions": read_questions, "phrases": read_phrases,
        "statements": read_statements, "entailments": read_entailments,
    }  # fmt: skip
    assert set(report.index.kinds) == set(readers)
    for kind, read in readers.items():
        wanted = read(scenes, "train").records
        found = list(opened.records(kind))
        assert len(found) == len(wanted) == report.index.kinds[kind].records

        def told(record: Any) -> str:
            return repr({k: v for k, v in vars(record).items() if k not in ("image", "images")})

        assert sorted(map(told, found)) == sorted(map(told, wanted))
        named = {Path(i).name for r in found for i in getattr(r, "images", None) or [r.image]}
        assert named == {Path(i).name for r in wanted for i in getattr(r, "images", None) or [r.image]}


def test_image_bytes_are_kept_and_samples_are_where_the_offsets_say(hundred: Path) -> None:
    opened = Pack(LocalFolder(hundred))
    assert len(opened.shards) > 3
    number = 0
    for shard, entry in enumerate(opened.shards):
        assert entry.bytes <= 20_000
        for k in range(entry.samples):
            sample = opened.shard(shard).read(k)
            assert sample.images == (jpeg(number),)
            assert sample.names == (f"images/{number}.jpg",)
            ((rows, record),) = sample.records["captions"]
            assert (rows, record.captions) == ((0,), (f"photo number {number}", f"it is {number}"))
            number += 1
    assert number == 100


def test_webdataset_reads_the_shards(hundred: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, hundred.glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [json.loads(s["json"])["images"] for s in samples] == [[f"images/{k}.jpg"] for k in range(100)]
    assert [s["jpg"] for s in samples] == [jpeg(k) for k in range(100)]


def test_same_input_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 30)
    for name, workers in (("a", 1), ("b", 7)):
        pack(PackOptions(str(source), shard_size=20_000), tmp_path / name, workers)
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1] and len(files[0]) > 4


def test_goes_on_after_an_interruption_with_the_same_bytes(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 40)
    packed(source, tmp_path / "whole")

    class Stop(BaseException):
        pass

    def stop(samples: int, bad: int) -> None:
        if samples > 20:
            raise Stop

    with pytest.raises(Stop):
        pack(PackOptions(str(source), shard_size=20_000), tmp_path / "parts", 1, progress=stop)
    assert not (tmp_path / "parts/index.json").exists()
    begun = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "parts").glob("*.tar")}
    assert begun
    with pytest.raises(DataError, match="begun with another shard_size"):
        packed(source, tmp_path / "parts", shard_size=30_000)
    packed(source, tmp_path / "parts")
    assert all((tmp_path / "parts" / name).stat().st_mtime_ns == time for name, time in begun.items())
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_nothing_is_overwritten_unasked(tmp_path: Path, hundred: Path) -> None:
    source = photos(tmp_path / "photos", 3)
    packed(source, tmp_path / "pack")
    with pytest.raises(DataError, match="is a pack already"):
        packed(source, tmp_path / "pack")
    packed_again = pack(PackOptions(str(source)), tmp_path / "pack", force=True)
    assert packed_again.index.samples == 3
    with pytest.raises(DataError, match="holds other files"):
        pack(PackOptions(str(source)), source, force=True)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "00000.tar").write_bytes(b"of someone else")
    with pytest.raises(DataError, match="holds other files"):
        pack(PackOptions(str(source)), theirs, force=True)
    assert (theirs / "00000.tar").read_bytes() == b"of someone else"


def test_bad_images_are_left_out_named_and_bounded(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 20)
    whole = jpeg(3, side=200)
    (source / "images/3.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "images/7.jpg").unlink()
    with pytest.raises(DataError, match=r"2 of 20 entries are bad.*images/3.jpg: broken") as caught:
        packed(source, tmp_path / "pack")
    assert caught.value.exit_code == 3
    report = pack(PackOptions(str(source), shard_size=20_000), tmp_path / "pack", max_bad=0.1)
    assert report.index.samples == 18 and report.index.left_out == {"broken": 1, "missing": 1}
    lines = [json.loads(line) for line in (tmp_path / "pack/left_out.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["images/3.jpg", "images/7.jpg"]


def test_of_a_pair_with_a_bad_image_the_records_on_the_other_stay(scenes: Path, tmp_path: Path) -> None:
    lines = [{"images": ["0.jpg", "1.jpg"], "statement": "both are grey", "label": True}]
    for k in range(2):
        (tmp_path / f"{k}.jpg").write_bytes(jpeg(k) if k else b"no image")
    (tmp_path / "statements.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "captions.jsonl").write_text(
        "\n".join(json.dumps({"image": f"{k}.jpg", "caption": f"picture {k}"}) for k in range(2))
    )
    report = pack(PackOptions(str(tmp_path)), tmp_path / "pack", max_bad=1)
    assert {kind: found.records for kind, found in report.index.kinds.items()} == {"captions": 1}
    sample = Pack(LocalFolder(tmp_path / "pack")).shard(0).read(0)
    assert sample.names == ("1.jpg",) and sample.records["captions"][0][0] == (0,)


def test_pairs_stay_together(scenes: Path, tmp_path: Path) -> None:
    index = packed(scenes, tmp_path / "pack", split="train").index
    assert index.per_sample == 2 and index.images == 40 and index.samples == 20
    found = Pack(LocalFolder(tmp_path / "pack")).shard(0).read(0)
    assert [len(rows) for rows, _ in found.records["statements"]] == [2] * len(found.records["statements"])


@pytest.mark.parametrize(
    "lines",
    [
        ["{image}\tphoto number {k}"],
        ["photo number {k}\t{image}"],
        ["id\tcaption\turl", "9\tphoto number {k}\t{image}"],
    ],
    ids=["url first", "caption first", "header"],
)
def test_tables_of_urls(server: tuple[str, Path, Counter[str]], tmp_path: Path, lines: list[str]) -> None:
    url, root, asked = server
    for k in range(4):
        (root / f"{k}.jpg").write_bytes(jpeg(k))
    rows = [*lines[:-1], *(lines[-1].format(k=k, image=f"{url}/flaky/{k}.jpg") for k in range(4))]
    rows += [lines[-1].format(k=9, image=f"{url}/none.jpg"), lines[-1].format(k=9, image=f"{url}/away/9.jpg")]
    (tmp_path / "pairs.tsv").write_text("\n".join(rows))
    report = pack(PackOptions(str(tmp_path / "pairs.tsv")), tmp_path / "pack", max_bad=0.5, retries=1, timeout=5)
    assert report.index.samples == 4 and report.index.left_out == {"missing": 2}
    assert asked["/flaky/0.jpg"] == 2 and asked["/none.jpg"] == 1
    captions = [record.captions for record in Pack(LocalFolder(tmp_path / "pack")).records("captions")]
    assert captions == [(f"photo number {k}",) for k in range(4)]


def test_urls_as_people_write_them(server: tuple[str, Path, Counter[str]], tmp_path: Path) -> None:
    url, root, _ = server
    (root / "caf\u00e9").mkdir()
    names = ["a b.jpg", "caf\u00e9/chat.jpg", "plain.jpg"]
    for k, name in enumerate(names):
        (root / name).write_bytes(jpeg(k))
    mine = url.replace("http://", "HTTP://me:hunter2@")
    rows = [f"photo {k}\t{url}/{name}" for k, name in enumerate(names)]
    rows += [f"photo 3\t {mine}/plain.jpg?token=hunter2 ", f"photo 4\t{mine}/a b.jpg?sig=hunter2"]
    rows += [f"photo 5\t{mine}/none.jpg?token=hunter2", "photo 6\thttp://me:hunter2/x@host/y.jpg"]
    (tmp_path / "pairs.tsv").write_text("\n".join(rows), encoding="utf-8")
    report = pack(PackOptions(str(tmp_path / "pairs.tsv")), tmp_path / "pack", max_bad=1, retries=0, timeout=5)
    assert report.index.samples == 5 and report.index.left_out == {"bad_url": 1, "missing": 1}
    records = list(Pack(LocalFolder(tmp_path / "pack")).records("captions"))
    assert len({record.image_id for record in records}) == 5
    files = [file for file in (tmp_path / "pack").rglob("*") if file.is_file()]
    texts = [gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in files]
    assert len(files) > 3 and not any(b"hunter2" in text for text in texts)
    assert "hunter2" not in str(report.first_bad)


def test_packs_with_a_password_and_a_signature(
    hundred: Path, server: tuple[str, Path, Counter[str]], tmp_path: Path
) -> None:
    url, root, asked = server
    (root / "my pack").symlink_to(hundred)
    address = f"{url.replace('http://', 'http://me:hunter2@')}/my pack?sig=hunter2"
    there = stream(Pack(remote(address, tmp_path / "cache")))
    assert len(numbers(there.draw(0, 0))) == 4 and "/my%20pack/index.json?sig=hunter2" in asked
    with pytest.raises(DataError) as caught:
        stream(Pack(remote(address.replace("my", "no"), tmp_path / "other"))).draw(0, 0)
    assert "hunter2" not in str(caught.value) and "***@" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "pipe:cat /etc/passwd", "http:///x", "http://[x"]
)
def test_only_http_is_downloaded(url: str) -> None:
    with pytest.raises(ImageError) as caught:
        download(url, attempts=1, timeout=1)
    assert caught.value.code == "bad_url"


def test_tables_and_lines_of_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for k in range(3):
        (tmp_path / "in" / f"{k}.jpg").write_bytes(jpeg(k))
    (tmp_path / "pairs.tsv").write_text("".join(f"{k}.jpg\tphoto number {k}\n" for k in range(3)) + "alone\n")
    options = PackOptions(str(tmp_path / "pairs.tsv"), images=str(tmp_path / "in"))
    report = pack(options, tmp_path / "pack", max_bad=0.3)
    assert report.index.samples == 3 and report.index.left_out == {"broken_entry": 1}


def img2dataset_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_img2dataset_tars_and_folders(tmp_path: Path) -> None:
    names = [f"{k:09d}" for k in range(6)]
    parts: list[dict[str, bytes]] = [{}, {}]
    for k, name in enumerate(names):
        values = {"caption": f"photo number {k}", "url": f"http://x/{k}", "key": name, "status": "success"}
        members = {f"{name}.jpg": jpeg(k), f"{name}.json": json.dumps(values).encode(), f"{name}.pkl": b"\x80never"}
        if k % 2:
            members[f"{name}.txt"] = f"photo number {k}".encode()
        parts[k // 3] |= members
    for number, members in enumerate(parts):
        img2dataset_tar(tmp_path / f"tars/{number:05d}.tar", members)
        for name, data in members.items():
            file = tmp_path / f"files/{number:05d}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        for where in ("tars", "files"):
            (tmp_path / where / f"{number:05d}.parquet").write_bytes(b"PAR1")
            (tmp_path / where / f"{number:05d}_stats.json").write_text("{}")
    for where in ("tars", "files"):
        report = packed(tmp_path / where, tmp_path / f"{where}-pack")
        assert report.index.samples == 6 and not report.index.left_out
        opened = Pack(LocalFolder(tmp_path / f"{where}-pack"))
        assert [r.captions[0] for r in opened.records("captions")] == [f"photo number {k}" for k in range(6)]
        assert [r.image_id for r in opened.records("captions")] == [f"http://x/{k}" for k in range(6)]
        assert opened.shard(0).read(0).images == (jpeg(0),)


def test_texts_alone(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"caption": f"text {k}"}) + "\n" for k in range(9)))
    report = packed(tmp_path / "captions.jsonl", tmp_path / "pack", text_only=True)
    assert report.index.text_only and (report.index.samples, report.index.images) == (9, 0)
    opened = Pack(LocalFolder(tmp_path / "pack"), limit=5)
    assert [r.captions for r in text_records(opened, "captions")] == [(f"text {k}",) for k in range(5)]
    assert len({r.image_id for r in opened.records("captions")}) == 5
    with pytest.raises(DataError, match="has no images.*text_only"):
        stream(opened)


def test_max_samples(tmp_path: Path) -> None:
    report = packed(photos(tmp_path / "photos", 30), tmp_path / "pack", max_samples=11)
    assert report.index.samples == 11


# -- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_an_epoch_has_no_sample_twice_and_leaves_out_less_than_a_batch(lanes: int, window: int | None) -> None:
    order = Order([7, 20, 13, 40, 3, 20], batch=8, lanes=lanes, window=window)
    epochs = []
    for epoch in range(3):
        places = range(epoch * order.epoch_length, (epoch + 1) * order.epoch_length)
        found = [order.sample(5, place) for place in places]
        assert len(set(found)) == len(found) > order.total - order.batch
        assert all(0 <= number < order.counts[shard] for shard, number in found)
        epochs.append(found)
    assert epochs[0] != epochs[1] != epochs[2]


def test_places_are_the_same_whenever_they_are_asked_for() -> None:
    counts = np.random.default_rng(0).integers(5, 60, 40).tolist()
    one = Order(counts, 16, 4, 32)
    asked = [random.Random(0).randrange(10 * one.epoch_length) for _ in range(200)]
    wanted = {place: one.sample(1, place) for place in sorted(asked)}
    fresh = Order(counts, 16, 4, 32)
    assert {place: fresh.sample(1, place) for place in reversed(asked)} == wanted
    assert {place: Order(counts, 16, 4, 32).sample(2, place) for place in asked} != wanted


def test_a_process_reads_shards_of_its_own() -> None:
    order = Order([100] * 80, batch=32, lanes=4)
    of_rank = [
        {order.sample(0, 32 * step + 8 * rank + i)[0] for step in range(250) for i in range(8)} for rank in range(4)
    ]
    shared = sum(len(a & b) for k, a in enumerate(of_rank) for b in of_rank[k + 1 :])
    assert [len(found) for found in of_rank] == [20] * 4 and shared == 0


def test_what_comes_next_is_known() -> None:
    order = Order([50] * 40, batch=8, lanes=2, window=100)
    for step in range(0, order.steps - 30, 7):
        places = range(8 * step, 8 * step + 4)
        ahead = set(order.ahead(0, places))
        first = 8 * (-(-(step + 1) * 4 // 100) * 25)  # the step at which the next window begins
        following = {order.sample(0, first + 8 * s + i)[0] for s in range(25) for i in range(4)}
        if first + 8 * 25 < order.epoch_length:
            assert following == ahead


# -- batches ---------------------------------------------------------------------------------------------------------


def numbers(batch: Any) -> list[int]:
    return batch.blocks["pretrain"]["numbers"].tolist()


def test_batches_have_each_image_once_an_epoch_with_its_own_caption(hundred: Path) -> None:
    one = stream(hundred)
    assert one.steps_per_epoch(1) == 25
    seen = []
    for lot in range(25):
        batch = one.draw(0, lot)
        assert batch.pixels.shape == (4, 3, 8, 8) and not batch.bad
        seen += numbers(batch)
        plain = [float(one.load(int(i), None)[0][0].mean()) for i in batch.image_ids]
        assert torch.allclose(batch.pixels[:, 0].mean((1, 2)), torch.tensor(plain))
        assert batch.image_ids.tolist() == numbers(batch)
    assert sorted(seen) == list(range(100)) and seen != sorted(seen)


def test_any_lot_at_any_time_in_any_process(hundred: Path) -> None:
    whole = [stream(hundred).draw(3, lot) for lot in range(40)]
    again = stream(hundred)
    for lot in (39, 3, 17):
        assert torch.equal(again.draw(3, lot).pixels, whole[lot].pixels)
        assert numbers(again.draw(3, lot)) == numbers(whole[lot])
    loaded = list(Lots([stream(hundred)], 3).loader(5, 12, workers=2))
    assert [numbers(batch) for (batch,) in loaded] == [numbers(batch) for batch in whole[5:12]]


def test_any_split_of_a_global_batch_draws_the_same(hundred: Path) -> None:
    """One process of 12, three of 4, and six parts of 2: the same samples in the same order, step for step."""
    splits = []
    for size, lots in ((12, 1), (4, 3), (2, 6)):
        one = stream(hundred, lots, batch_size=size, lanes=3)
        splits.append([[n for lot in range(step * lots, (step + 1) * lots) for n in numbers(one.draw(1, lot))]
                       for step in range(20)])  # fmt: skip
    assert splits[0] == splits[1] == splits[2]


def test_limit_uses_the_first_samples(hundred: Path) -> None:
    one = stream(Pack(LocalFolder(hundred), limit=10))
    assert {n for lot in range(8) for n in numbers(one.draw(0, lot))} <= set(range(10))


def test_less_than_a_batch_is_drawn_in_turn(hundred: Path) -> None:
    one = stream(Pack(LocalFolder(hundred), limit=3))
    drawn = [n for lot in range(3) for n in numbers(one.draw(0, lot))]
    assert set(Counter(drawn)) == {0, 1, 2} and one.steps_per_epoch(1) == 1


def test_pairs_and_boxes_stream(scenes: Path, tmp_path: Path) -> None:
    packed(scenes, tmp_path / "pack", split="train")
    tasks = {"statements": 1, "grounding": 2}
    got: list[Any] = []

    def keep(drawn: list[Drawn], rng: random.Random) -> dict[str, torch.Tensor]:
        got.extend(drawn)
        return {"rows": torch.tensor([rows for rows, _ in drawn])}

    section = SourceSection(path="x", batch_size=8, augment="flip", tasks=tasks)
    one = ShardSource("s", section, Pack(LocalFolder(tmp_path / "pack")), VISION, dict.fromkeys(tasks, keep))
    batch = one.draw(0, 0)
    assert len(batch.image_ids) == 8 and len(set(batch.image_ids.tolist())) == 8
    assert any(len(rows) == 2 for rows, _ in got)
    with pytest.raises(DataError, match="task patches needs generated scenes"):
        ShardSource("s", section.model_copy(update={"tasks": {"patches": 1}}), one.pack, VISION, {})


def test_a_task_that_the_pack_does_not_serve(hundred: Path) -> None:
    with pytest.raises(DataError, match="has no questions for task vqa"):
        stream(hundred, tasks={"vqa": 1})


# -- remote ----------------------------------------------------------------------------------------------------------


def remote(url: str, cache: Path, limit: int = 10**9) -> RemoteFolder:
    return RemoteFolder(url, cache, limit, attempts=2)


def test_streams_over_http_as_from_disk(hundred: Path, server: tuple[str, Path, Counter[str]], tmp_path: Path) -> None:
    url, root, asked = server
    (root / "pack").symlink_to(hundred)
    here = stream(hundred)
    there = stream(Pack(remote(f"{url}/pack", tmp_path / "cache")))
    for lot in range(25):
        assert torch.equal(here.draw(0, lot).pixels, there.draw(0, lot).pixels)
    again = stream(Pack(remote(f"{url}/pack/", tmp_path / "cache")))
    again.draw(0, 0)
    assert all(count == 1 for path, count in asked.items() if path.endswith(".tar"))
    assert list(there.pack.records("captions")) == list(here.pack.records("captions"))


def test_workers_share_the_cache(hundred: Path, server: tuple[str, Path, Counter[str]], tmp_path: Path) -> None:
    url, root, asked = server
    (root / "pack").symlink_to(hundred)
    there = stream(Pack(remote(f"{url}/pack", tmp_path / "cache")))
    there.draw(0, 0)  # its threads don't survive the fork
    batches = list(Lots([there], 0).loader(0, 25, workers=2))
    assert sorted(n for (batch,) in batches for n in numbers(batch)) == list(range(100))
    assert all(count == 1 for path, count in asked.items() if path.endswith(".tar"))


def test_the_cache_stays_below_its_size(hundred: Path, server: tuple[str, Path, Counter[str]], tmp_path: Path) -> None:
    url, root, asked = server
    (root / "pack").symlink_to(hundred)
    limit = 60_000
    there = stream(Pack(remote(f"{url}/pack", tmp_path / "cache", limit)))
    for lot in range(25):
        there.draw(0, lot)
        files = [f.stat().st_size for f in (tmp_path / "cache").glob("[!.]*")]
        assert sum(files) <= limit
    assert max(count for path, count in asked.items() if path.endswith(".tar")) == 1
    with pytest.raises(DataError, match="raise data.cache_gb"):
        stream(Pack(remote(f"{url}/pack", tmp_path / "other", 1000))).draw(0, 0)


def test_a_flaky_server_is_asked_again(hundred: Path, server: tuple[str, Path, Counter[str]], tmp_path: Path) -> None:
    url, root, asked = server
    (root / "pack").symlink_to(hundred)
    there = stream(Pack(remote(f"{url}/flaky/pack", tmp_path / "cache")), batch_size=1)
    assert len(numbers(there.draw(0, 0))) == 1 and asked["/flaky/pack/index.json"] == 2


def test_what_a_path_is(hundred: Path, tmp_path: Path) -> None:
    assert isinstance(locate(str(hundred)), LocalFolder)
    assert isinstance(locate(str(hundred.parent), hundred.name), LocalFolder)
    assert locate(str(tmp_path)) is None
    assert isinstance(locate("https://example.com/pack"), RemoteFolder)
    assert isinstance(locate("s3://bucket/pack"), RemoteFolder)
    for path, format in ((str(tmp_path), "shards"), (str(hundred), "coco"), ("https://x.org/a", "coco")):
        with pytest.raises(DataError):
            locate(path, None, format)
    with pytest.raises(DataError, match="has no split"):
        locate(str(hundred), "val")


# -- for people ------------------------------------------------------------------------------------------------------


def test_inspection_tells_counts_and_damage(hundred: Path, tmp_path: Path) -> None:
    found = inspect_pack(Pack(LocalFolder(hundred)))
    (view,) = found.tasks
    assert (view.task, view.splits[0].records, view.splits[0].images, view.splits[0].broken) == ("caption", 100, 100, 0)
    assert view.words == {"shortest": 3, "mean": 3.0, "longest": 3}
    assert view.examples[0]["captions"] == ["photo number 0", "it is 0"]
    with pytest.raises(DataError, match="no questions"):
        inspect_pack(Pack(LocalFolder(hundred)), "vqa")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = photos(tmp_path / "photos", 12)
    arguments = ["data", "pack", str(source), str(tmp_path / "pack"), "--shard-size", "10KB", "-q", "--json"]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["images"], told["kinds"]) == (12, 12, {"captions": 12}) and told["shards"] > 1
    assert main(arguments) == 3
    assert "is a pack already" in capsys.readouterr().err
    assert main([*arguments[:4], "--shard-size", "many"]) == 2
    assert main(["data", "pack", str(source), str(tmp_path / "x"), "--task", "capton"]) == 2
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "pack"), "--verify"]) == 0
    assert "shards" in capsys.readouterr().out


def test_the_index_is_what_it_says(hundred: Path) -> None:
    index = parse_index((hundred / "index.json").read_bytes(), "index")
    assert isinstance(index, PackIndex) and index.samples == 100
    data = (hundred / index.shards[0].name).read_bytes()
    places = np.frombuffer((hundred / index.shards[0].offsets_name).read_bytes(), "<u8", index.shards[0].samples + 1)
    assert read_sample(data[places[1] : places[2]], "000000001").names == ("images/1.jpg",)
