"""A process without a home folder and without a name has both."""

from __future__ import annotations

import getpass
import os
import pwd
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mplug_core.home import cache_home, settle_home
from mplug_core.weights import cache

NAMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "MPLUG_HOME")


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user that no list knows, in an empty environment."""
    for name in NAMES:
        monkeypatch.setenv(name, "x")  # restored after the test, whatever it sets
        monkeypatch.delenv(name)

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("home", [None, ""])
def test_nobody_gets_a_home_of_its_own_and_a_name(nobody, monkeypatch, tmp_path, home):
    if home is not None:
        monkeypatch.setenv("HOME", home)
    settle_home()
    place = Path(os.environ["HOME"])
    assert place.parent == tmp_path and stat.S_IMODE(place.stat().st_mode) == 0o700
    assert Path.home() == place and os.path.expanduser("~") == str(place)
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert cache_home() == place / ".cache" and cache.home() == place / ".cache" / "mplug"
    monkeypatch.delenv("HOME")
    settle_home()
    assert os.environ["HOME"] == str(place)


def test_the_folder_of_another_is_not_used(nobody, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"mplug-home-{os.getuid()}").symlink_to(elsewhere)
    settle_home()
    assert Path(os.environ["HOME"]).resolve() != elsewhere and Path(os.environ["HOME"]).is_dir()


def test_no_place_for_temporary_files(nobody, monkeypatch):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    settle_home()
    assert os.path.isabs(os.path.expanduser("~"))


def test_a_user_with_a_home_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "somebody")
    before = dict(os.environ)
    settle_home()
    assert dict(os.environ) == before


@pytest.mark.parametrize(("given", "expected"), [("/x", "/x"), ("x", None), ("", None)])
def test_cache_home(monkeypatch, tmp_path, given, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_home() == (Path(expected) if expected else tmp_path / ".cache")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="only root can be another user")
def test_a_command_of_nobody(tmp_path):
    """In a container with a user number of its own: the model answers, and nothing is written into a folder '~'."""
    tmp_path.chmod(0o777)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    code = "import os, sys; os.setuid(54321); from mplug_cli.app import main; sys.exit(main(['model', 'ls']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    if "PermissionError" in done.stderr or "No module named" in done.stderr:
        pytest.skip("the installation is for root alone")
    assert done.returncode == 0 and "mplug-base" in done.stdout, done.stderr
    assert not (tmp_path / "~").exists()
