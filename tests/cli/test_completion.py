"""Shell completion, lists of commands, and that every command has -q."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mplug_cli import app


def leaves(command, name="mplug"):
    """Every command that does something, by what is typed."""
    found = getattr(command, "commands", None)
    if found is None:
        return {name: command}
    below = {}
    for word, inner in found.items():
        whole = app.load_command(word) if name == "mplug" else inner
        below |= leaves(whole, f"{name} {word}")
    return below


def groups(command, name="mplug"):
    found = getattr(command, "commands", None)
    if found is None:
        return {}
    inner = {word: app.load_command(word) if name == "mplug" else one for word, one in found.items()}
    return {name: command} | {k: v for word, one in inner.items() for k, v in groups(one, f"{name} {word}").items()}


ROOT = app.typer.main.get_command(app.app)


@pytest.mark.parametrize("name", leaves(ROOT))
def test_q_is_quiet(name):
    short = [parameter for parameter in leaves(ROOT)[name].params if "-q" in parameter.opts]
    assert [(parameter.opts, parameter.is_flag) for parameter in short] == [(["--quiet", "-q"], True)]


@pytest.mark.parametrize("name", groups(ROOT))
def test_lists_of_commands_are_not_cut(mplug, monkeypatch, name):
    """At the usual width, and at half of it."""
    for columns in ("80", "50"):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("TERMINAL_WIDTH", columns)
        shown = mplug(*name.split()[1:], "--help").out
        assert "..." not in shown.partition("Commands:")[2]
        assert max(map(len, shown.splitlines())) <= 80
        joined = " ".join(shown.split())
        for word, command in groups(ROOT)[name].commands.items():
            line = app.COMMANDS[word][1] if name == "mplug" else command.get_short_help_str(10_000)
            assert f"{word} {line}" in joined


def complete(mplug, monkeypatch, *words: str) -> list[str]:
    """What bash is told for the last of the words."""
    monkeypatch.setenv("_MPLUG_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(("mplug", *words)))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    done = mplug()
    assert (done.code, done.err) == (0, "")
    return done.lines


@pytest.mark.parametrize(
    ("words", "some", "none"),
    [
        ([""], ["caption", "runs"], ["--help"]),
        (["re"], ["reason", "retrieve", "recipe"], ["caption"]),
        (["model", "p"], ["pull", "push"], ["ls"]),
        (["eval", "--pre"], ["--predictions"], ["--data"]),
        (["pretrain", "--recipe", "t"], ["tiny"], ["base"]),
        (["finetune", "--recipe", "finetune/v"], ["finetune/vqa_base"], ["vqa_base"]),
        (["recipe", "show", "caption_l"], ["caption_large"], ["caption_base"]),
        (["caption", "--model", "m"], ["mini", "mplug-base"], ["none"]),
        (["eval", "--model", ""], ["mini", "mplug-base", "none"], []),
        (["model", "info", "mplug-b"], ["mplug-base"], ["mini"]),
        (["model", "export", "mini", "x", "--format", ""], ["safetensors", "int8", "onnx"], []),
        (["model", "export", "mini", "x", "--dtype", "f"], ["fp16", "fp32"], ["bf16"]),
        (["eval", "--task", "v"], ["vqa"], ["caption"]),
        (["eval", "--rerank", ""], ["itm", "itm+itc"], []),
        (["data", "inspect", "x", "--format", "vq"], ["vqa"], ["coco"]),
        (["data", "scenes", "x", "--world", ""], ["full", "small"], []),
        (["vqa", "--device", "c"], ["cpu", "cuda"], ["mps"]),
        (["bench", "decode", "--size", ""], ["tiny", "large"], []),
        (["recipe", "validate", "--"], ["--quiet"], []),
    ],
)
def test_completions(mplug, monkeypatch, words, some, none):
    found = complete(mplug, monkeypatch, *words)
    assert set(some) <= set(found) and not set(none) & set(found), found


def test_completing_does_without_torch():
    """Of all that is completed, in a process of its own."""
    lines = [
        [""], ["eval", "--"], ["pretrain", "--recipe", ""], ["caption", "--model", ""], ["eval", "--task", ""],
        ["data", "pack", "x", "y", "--format", ""], ["model", "export", "mini", "x", "--format", ""], ["bench", ""],
        ["calibrate", "--task", ""], ["runs", ""], ["ablate", "fusion", "--size", ""], ["ground", "--device", ""],
    ]  # fmt: skip
    code = (
        "import os, sys; from mplug_cli.app import main\n"
        f"for words in {lines!r}:\n"
        "    os.environ |= {'_MPLUG_COMPLETE': 'complete_bash', 'COMP_WORDS': ' '.join(['mplug', *words]),\n"
        "                   'COMP_CWORD': str(len(words))}\n"
        "    print('>', *words, flush=True); main([])\n"
        "heavy = {'torch', 'timm', 'transformers', 'deepspeed', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    parts = done.stdout.split("> ")[1:]
    assert len(parts) == len(lines) and all(part.count("\n") > 1 for part in parts), done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_show_completion(mplug, monkeypatch, shell):
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell)
    done = mplug("--show-completion")
    assert (done.code, done.err) == (0, "")
    assert "_MPLUG_COMPLETE" in done.out and "mplug" in done.out


def test_install_completion(mplug, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("typer._completion_shared._get_shell_name", lambda: "bash")
    done = mplug("--install-completion")
    assert (done.code, done.err) == (0, "")
    assert "_MPLUG_COMPLETE" in (tmp_path / ".bash_completions" / "mplug.sh").read_text()
    assert "mplug.sh" in (tmp_path / ".bashrc").read_text()


def test_bash_completes(tmp_path):
    """The script that is shown, in a real shell, calls a command of this name."""
    if not os.path.exists("/bin/bash"):
        pytest.skip("no bash")
    from typer._completion_shared import get_completion_script

    (tmp_path / "mplug").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mplug_cli.app "$@"\n')
    (tmp_path / "mplug").chmod(0o755)
    script = get_completion_script(prog_name="mplug", complete_var="_MPLUG_COMPLETE", shell="bash")
    ask = 'COMP_WORDS=(mplug recipe sh); COMP_CWORD=2; _mplug_completion mplug; echo "${COMPREPLY[@]}"'
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    asked = ["bash", "-c", f"{script}\n{ask}"]
    done = subprocess.run(asked, capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout, done.stderr) == ("show\n", "")


@pytest.mark.parametrize("command", ["caption", "vqa", "ground", "reason", "retrieve", "eval", "calibrate", "finetune"])
def test_help_says_what_model_takes(mplug, command):
    shown = " ".join(mplug(command, "--help").out.split()).lower()
    for words in ("run folder", "released checkpoint", "hf:org/name", "ms:org/name", "a url", "mplug model ls"):
        assert words in shown
