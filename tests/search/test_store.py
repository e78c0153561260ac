"""Features on disk: used while they hold, and never otherwise."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

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
    assert len(files(photos)) == 1 and files(photos)[0].parent.parent == photos / ".mplug"
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
    known = read_store(str(photos), fingerprint(loaded), 16)
    assert known.names() == {"0.png", "1.png", "2.png", "3.png", "5.png", "6.png"}
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
    assert [file.parent.parent.parent for file in files(photos)] == [photos, photos / "deep"]


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


CHANGES = {
    "other shape": {"features": torch.zeros(5, 16)},
    "other stamps": {"stamps": torch.zeros(6, 3, dtype=torch.int64)},
    "ends are no numbers of bytes": {"ends": torch.zeros(6)},
    "fewer names": {"ends": torch.tensor([5, 10])},
    "not numbers": {"features": torch.full((6, 16), float("nan"))},
}


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_bytes(b"not a store at all, but long enough for a header of safetensors")
    elif how in CHANGES:
        save_file(load_file(file) | CHANGES[how], file)
    elif how == "no names":
        save_file({name: value for name, value in load_file(file).items() if name != "names"}, file)
    else:
        file.unlink()
        file.mkdir()


DAMAGES = ["cut", "empty", "text", "no names", *CHANGES, "folder"]


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
    known = read_store(folder, key, 16)
    assert known.names() == {"0.png", "1.png"}
    assert torch.equal(known.feature(*first), torch.ones(16)) and torch.equal(known.feature(*second), torch.zeros(16))


def test_a_write_that_fails_leaves_the_old_store(
    loaded: Loaded, photos: Path, names: list[str], reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_gallery(loaded, names[:5], reader)
    before = files(photos)[0].read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    assert open_gallery(loaded, names, reader).notes
    assert [file.name for file in (photos / ".mplug").rglob("*.safetensors*")] == [files(photos)[0].name]
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


def older(folder: Path, key: str, names: list[str]) -> Path:
    """The one file that earlier versions wrote, of features that no image here has."""
    stamps = [stamp_of(str(folder / name)) for name in names]
    index = json.dumps([[n, s.size, s.mtime_ns] for n, s in zip(names, stamps, strict=True)])
    (folder / ".mplug").mkdir()
    file = folder / ".mplug" / f"features-{key}.safetensors"
    file.write_bytes(save({"features": torch.arange(16.0).expand(len(names), 16).contiguous()}, {"index": index}))
    return file


def test_the_file_of_an_earlier_version_is_read_and_replaced(
    loaded: Loaded, photos: Path, names: list[str], reader
) -> None:
    file = older(photos, fingerprint(loaded), ["0.png", "1.png", "2.png", "3.png"])
    gallery = open_gallery(loaded, names, reader)
    assert gallery.computed == 2 and not gallery.notes and not file.exists()
    assert torch.equal(gallery.features[:4], torch.arange(16.0).expand(4, 16))
    assert open_gallery(loaded, names, reader).computed == 0 and len(files(photos)) == 1


def test_a_damaged_file_of_an_earlier_version_is_named(loaded: Loaded, photos: Path, names: list[str], reader) -> None:
    older(photos, fingerprint(loaded), ["0.png"]).write_bytes(b"junk")
    gallery = open_gallery(loaded, names, reader)
    assert gallery.computed == 6 and len(gallery.notes) == 1 and "damaged" in gallery.notes[0]


def many(first: int, count: int) -> dict[tuple[str, Stamp], torch.Tensor]:
    """New features of files with long names."""
    number = {f"{n:09d}-{'x' * 60}.jpg": n for n in range(first, first + count)}
    return {(name, Stamp(n, n)): torch.tensor([n, 1.0]) for name, n in number.items()}


@pytest.fixture
def all_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which every file is said to be that was ever named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "stamp_of", lambda file: Stamp(*2 * [int(Path(file).name[:9])]))
    return tmp_path


def test_very_many_files(all_there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many names as made the header too large to be read are a part with a short header, written a few times."""
    monkeypatch.setattr(store, "SMALL", 0)
    written = []
    replace = store._replace
    monkeypatch.setattr(store, "_replace", lambda place, data: (written.append(len(data)), replace(place, data)))
    folder, step, count = str(all_there), 500, 16_000
    for first in range(0, count, step):
        assert write_store(folder, "k", 2, many(first, step)) is None
    parts = files(all_there)
    assert len(parts) <= 8
    assert max(int.from_bytes(part.read_bytes()[:8], "little") for part in parts) < 1000
    # written anew each time it would be half the number of times as much
    assert sum(written) < 10 * sum(part.stat().st_size for part in parts)
    known = read_store(folder, "k", 2)
    assert known.note is None and len(known.names()) == count
    for n in (0, 1, count // 2, count - 1):
        ((of, feature),) = many(n, 1).items()
        assert torch.equal(known.feature(*of), feature)
    assert known.feature(of[0], Stamp(1, 1)) is None


def test_killed_between_two_parts(all_there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was merged goes when the new part is there: who is killed before has both, and loses nothing."""
    folder = str(all_there)
    assert write_store(folder, "k", 2, many(0, 5)) is None

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            write_store(folder, "k", 2, many(5, 5))
    assert len(files(all_there)) == 2 and len(read_store(folder, "k", 2).names()) == 10
    with monkeypatch.context() as patched:
        patched.setattr(store.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_store(folder, "k", 2, many(10, 5))
    assert len(read_store(folder, "k", 2).names()) == 10
    assert write_store(folder, "k", 2, many(10, 5)) is None
    assert len(files(all_there)) == 1 and len(read_store(folder, "k", 2).names()) == 15


def test_a_link_beside_the_images_is_not_followed(
    loaded: Loaded, photos: Path, names: list[str], reader, tmp_path: Path
) -> None:
    """It came with the images, maybe from somebody who wants something written elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (photos / ".mplug").symlink_to(elsewhere)
    first = open_gallery(loaded, names, reader)
    assert not list(elsewhere.iterdir()) and files(cache_folder()) and not first.notes
    assert open_gallery(loaded, names, reader).computed == 0  # kept in the cache
    shutil.copy(files(cache_folder())[0], elsewhere)
    shutil.rmtree(cache_folder())
    assert open_gallery(loaded, names, reader).computed == len(names)  # nor is read through it


def test_a_store_that_is_a_link_is_not_followed(loaded: Loaded, photos: Path, names: list[str], reader) -> None:
    """It may lead to a folder of models, whose files are no features: nothing there is read or removed."""
    models = photos.parent / "models"
    models.mkdir()
    (models / "model.safetensors").write_bytes(save({"weight": torch.ones(1)}))
    (photos / ".mplug").mkdir()
    (photos / ".mplug" / f"features-{fingerprint(loaded)}").symlink_to(models)
    assert open_gallery(loaded, names, reader).computed == len(names)
    assert [file.name for file in models.iterdir()] == ["model.safetensors"]
