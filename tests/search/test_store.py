"""Features on disk: used while they hold, and never otherwise."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mplug_core.errors import ImageError
from mplug_core.search import store
from mplug_core.search.gallery import Gallery, open_gallery
from mplug_core.search.store import Stamp, cache_folder, fingerprint, places, read_store, stamp_of, write_store
from mplug_core.weights.folder import Loaded, load_model


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def same(first: Gallery, second: Gallery) -> bool:
    return first.names == second.names and torch.allclose(first.features, second.features, atol=1e-5)


def test_the_second_time_nothing_is_opened(loaded: Loaded, photos: Path, names: list[str], reader) -> None:
    first = open_gallery(loaded, names, reader, batch_size=4)
    assert (first.computed, sorted(reader.opened)) == (6, [Path(n).name for n in names])
    assert len(files(photos)) == 1 and files(photos)[0].parent == photos / ".mplug"
    second = open_gallery(loaded, names, reader)
    assert second.computed == 0 and len(reader.opened) == 6 and torch.equal(first.features, second.features)


def test_features_are_those_of_the_model(loaded: Loaded, names: list[str], reader) -> None:
    gallery = open_gallery(loaded, names, reader)
    with torch.no_grad():
        expected = loaded.model.encode_image(torch.stack([reader(name) for name in names])).feature
    assert torch.allclose(gallery.features, expected, atol=1e-5)
    # different photos have different features, or nothing here shows anything
    assert (gallery.features @ gallery.features.T).fill_diagonal_(0).max() < 0.9999


def test_a_folder_whose_name_is_no_unicode(loaded: Loaded, photos: Path, tmp_path: Path, reader) -> None:
    try:
        folder = photos.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    except OSError:
        pytest.skip("names have to be Unicode here")
    names = [str(photo) for photo in sorted(folder.glob("*.png"))]
    first = open_gallery(loaded, names, reader)
    second = open_gallery(loaded, names, reader)
    assert (first.computed, second.computed) == (6, 0) and not second.notes and same(first, second)


def test_changed_added_and_deleted_files(loaded: Loaded, photos: Path, names: list[str], reader) -> None:
    open_gallery(loaded, names, reader)
    reader.opened.clear()
    Image.new("RGB", (20, 16), "white").save(photos / "2.png")
    Image.new("RGB", (20, 16), "black").save(photos / "6.png")
    (photos / "4.png").unlink()
    now = [str(photo) for photo in sorted(photos.glob("*.png"))]
    gallery = open_gallery(loaded, now, reader)
    assert sorted(reader.opened) == ["2.png", "6.png"] and gallery.computed == 2
    known = {name for name, _ in read_store(str(photos), fingerprint(loaded), 16).known}
    assert known == {"0.png", "1.png", "2.png", "3.png", "5.png", "6.png"}
    assert same(gallery, open_gallery(loaded, now, reader, keep=False))


def test_the_same_size_at_another_time_is_a_change(loaded: Loaded, names: list[str], reader) -> None:
    open_gallery(loaded, names, reader)
    reader.opened.clear()
    os.utime(names[3], ns=(1, 1))
    assert open_gallery(loaded, names, reader).computed == 1 and reader.opened == ["3.png"]


def test_a_part_of_the_folder_keeps_the_rest(loaded: Loaded, names: list[str], reader) -> None:
    open_gallery(loaded, names[:4], reader)
    open_gallery(loaded, names[3:], reader)
    assert len(reader.opened) == 6 and open_gallery(loaded, names, reader).computed == 0


def test_each_folder_has_its_own(loaded: Loaded, photos: Path, names: list[str], reader) -> None:
    shutil.copytree(photos, photos / "deep")
    every = [*names, *(str(photos / "deep" / Path(name).name) for name in names)]
    assert open_gallery(loaded, every, reader).computed == 12
    assert [file.parent.parent for file in files(photos)] == [photos, photos / "deep"]


def test_an_image_named_twice_is_there_once(loaded: Loaded, names: list[str], reader) -> None:
    assert open_gallery(loaded, [names[1], names[0], names[1]], reader).names == [names[1], names[0]]


def test_keep_and_rebuild(loaded: Loaded, photos: Path, names: list[str], reader) -> None:
    assert open_gallery(loaded, names, reader, keep=False).computed == 6 and not files(photos)
    open_gallery(loaded, names, reader)
    assert open_gallery(loaded, names, reader, keep=False).computed == 6
    assert open_gallery(loaded, names, reader, rebuild=True).computed == 6
    assert open_gallery(loaded, names, reader).computed == 0


def test_bad_images_are_reported_each_time(loaded: Loaded, photos: Path, names: list[str], reader) -> None:
    (photos / "bad.png").write_bytes(b"\x89PNG broken")
    for _ in range(2):
        gallery = open_gallery(loaded, [str(photos / "bad.png"), *names, str(photos / "gone.png")], reader)
        assert [(Path(name).name, type(error)) for name, error in gallery.failed] == [
            ("bad.png", ImageError), ("gone.png", ImageError),
        ]  # fmt: skip
        assert gallery.names == names


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_bytes(b"not a store at all, but long enough for a header of safetensors")
    elif how == "no index":
        save_file({"features": torch.zeros(6, 16)}, file)
    elif how == "other shape":
        save_file({"features": torch.zeros(5, 16)}, file, {"index": '[["0.png", 1, 2]]'})
    elif how == "index is no list":
        save_file({"features": torch.zeros(1, 16)}, file, {"index": '{"a": 3}'})
    elif how == "not numbers":
        save_file({"features": torch.full((1, 16), float("nan"))}, file, {"index": '[["0.png", 1, 2]]'})
    else:
        file.unlink()
        file.mkdir()


DAMAGES = ["cut", "empty", "text", "no index", "other shape", "index is no list", "not numbers"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_store_is_rebuilt_with_a_note(
    loaded: Loaded, photos: Path, names: list[str], reader, how: str
) -> None:
    first = open_gallery(loaded, names, reader)
    damage(files(photos)[0], how)
    again = open_gallery(loaded, names, reader)
    assert again.computed == 6 and same(first, again)
    assert len(again.notes) == 1 and "damaged" in again.notes[0] and "\n" not in again.notes[0]
    last = open_gallery(loaded, names, reader)
    assert last.computed == 0 and last.notes == []


def test_another_model_has_another_store(
    loaded: Loaded, model_folder: Path, photos: Path, names: list[str], reader, tmp_path: Path
) -> None:
    open_gallery(loaded, names, reader)
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-3] ^= 1
    status = (copy / "model.safetensors").stat()
    (copy / "model.safetensors").write_bytes(data)
    # as unpacked from an archive: same size, same time
    os.utime(copy / "model.safetensors", ns=(status.st_mtime_ns, status.st_mtime_ns))
    other = load_model(str(copy))
    assert fingerprint(other) != fingerprint(loaded)
    assert open_gallery(other, names, reader).computed == 6 and len(files(photos)) == 2
    # both are still known
    assert open_gallery(loaded, names, reader).computed == 0 == open_gallery(other, names, reader).computed
    assert fingerprint(loaded) == fingerprint(load_model(str(model_folder)))
    half = load_model(str(model_folder), dtype=torch.bfloat16)
    assert fingerprint(half) != fingerprint(loaded)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    """The photos' folder can't be written; permissions would not stop a test that root runs."""
    make = Path.mkdir

    def mkdir(self: Path, *arguments, **options) -> None:
        if str(self).startswith(str(photos)):
            raise PermissionError(13, "Permission denied")
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)


@pytest.mark.usefixtures("read_only")
def test_a_folder_that_cannot_be_written(loaded: Loaded, photos: Path, names: list[str], reader) -> None:
    first = open_gallery(loaded, names, reader)
    assert not files(photos) and len(files(cache_folder())) == 1 and first.notes == []
    assert open_gallery(loaded, names, reader).computed == 0
    Image.new("RGB", (20, 16), "white").save(photos / "2.png")
    assert open_gallery(loaded, names, reader).computed == 1
    assert open_gallery(loaded, names, reader).computed == 0


def test_a_folder_that_can_be_written_no_more_keeps_what_it_has(
    loaded: Loaded, photos: Path, names: list[str], reader, request: pytest.FixtureRequest
) -> None:
    open_gallery(loaded, names, reader)
    Image.new("RGB", (20, 16), "white").save(photos / "2.png")
    request.getfixturevalue("read_only")
    assert open_gallery(loaded, names, reader).computed == 1
    # the folder's own store still says what 2.png was
    assert open_gallery(loaded, names, reader).computed == 0


@pytest.mark.usefixtures("read_only")
def test_nowhere_to_write(
    loaded: Loaded, names: list[str], reader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    gallery = open_gallery(loaded, names, reader)
    assert len(gallery.names) == 6 and len(gallery.notes) == 1 and "can't be kept" in gallery.notes[0]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / ".cache" / "mplug" / "features"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "mplug" / "features"
    first, second = (places(str(tmp_path / name), "k")[1] for name in "ab")
    assert first != second and first.parent.parent == cache_folder()


def test_an_interrupt_keeps_what_is_done(loaded: Loaded, names: list[str], reader) -> None:
    def advance(done: int) -> None:
        if len(reader.opened) >= 4 and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_gallery(loaded, names, reader, batch_size=2, advance=advance)
    left = open_gallery(loaded, names, reader).computed
    assert 0 < left < 6


def test_two_at_once_lose_nothing(loaded: Loaded, photos: Path) -> None:
    """What another process wrote after this one had read is still there."""
    folder, key = str(photos), fingerprint(loaded)
    first, second = (("0.png", stamp_of(str(photos / "0.png"))), ("1.png", stamp_of(str(photos / "1.png"))))
    assert write_store(folder, key, 16, {first: torch.ones(16)}) is None
    assert write_store(folder, key, 16, {second: torch.zeros(16)}) is None
    assert set(read_store(folder, key, 16).known) == {first, second}


def test_a_write_that_fails_leaves_the_old_store(
    loaded: Loaded, photos: Path, names: list[str], reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_gallery(loaded, names[:5], reader)
    before = files(photos)[0].read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    assert open_gallery(loaded, names, reader).notes
    assert [file.name for file in (photos / ".mplug").iterdir()] == [files(photos)[0].name]
    assert files(photos)[0].read_bytes() == before


def test_names_that_are_no_unicode(loaded: Loaded, photos: Path, reader) -> None:
    name = os.fsdecode(os.fsencode(photos) + b"/\xff\xfe.png")
    os.rename(photos / "0.png", name)
    open_gallery(loaded, [name], reader)
    assert open_gallery(loaded, [name], reader).computed == 0


def test_stamps(photos: Path) -> None:
    status = (photos / "0.png").stat()
    assert stamp_of(str(photos / "0.png")) == Stamp(status.st_size, status.st_mtime_ns)
    assert stamp_of(str(photos)) is stamp_of("https://example.org/a.jpg") is stamp_of("a\0b") is None
