"""Rows of several processes joined: in order, of different numbers, and with gradient."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from mplug_core.objectives.contrastive import contrastive_loss
from mplug_core.training.distributed import World

PARTS = (3, 5)
"""Pairs of each process."""


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(sum(PARTS), 6, generator=generator) for _ in range(2))
    return image, text, torch.arange(sum(PARTS))


TASKS = Path("/proc/self/task")
CONNECTED = """
import atexit, sys, torch
from mplug_cli import app
if "alone" not in sys.argv:
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
import mplug_core.training.distributed
class Dismantled:
    def __del__(self, write=sys.stderr.write):
        write("dismantled ")
sys.modules["kept"] = Dismantled()
atexit.register(print, "closed", end=" ")
def main():
    print("done", end=" ")
    return 75
app.main = main
app.entry_point()
"""
"""A command that ends with exit code 75, and tells what of the process is taken down in order."""


def loss_of_process(rank: int, port: int, folder: str, gather: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=len(PARTS))
    world = World(rank, len(PARTS), rank)
    image, text, ids = (rows.split(PARTS)[rank].clone() for rows in pairs())
    image.requires_grad_(True)
    features = torch.nn.functional.normalize(image, dim=-1)
    keys = {
        "image_keys": getattr(world, gather)(features),
        "text_keys": getattr(world, gather)(text),
        "key_ids": world.gather_rows(ids),
    }
    loss = contrastive_loss(features, text, 0.1, ids, **keys).loss * len(ids)
    loss.backward()
    torch.save((loss.detach(), image.grad, keys["key_ids"]), f"{folder}/{rank}.pt")
    assert working_threads() or not TASKS.is_dir()
    torch.distributed.destroy_process_group()
    assert not working_threads(), "something of the gathers holds the group, whose threads would see Python go"


def working_threads() -> list[Path]:
    """Those of this process that exchange tensors, where the system lists them."""
    return [task for task in TASKS.glob("*") if "gloo" in (task / "comm").read_text()]


@pytest.mark.parametrize("gather", ["gather_with_gradient", "gather_own_gradient"])
def test_processes_together_give_the_loss_and_gradient_of_one(tmp_path: Path, gather: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(loss_of_process, (port, str(tmp_path), gather), nprocs=len(PARTS))
    losses, gradients, ids = zip(*(torch.load(tmp_path / f"{r}.pt") for r in range(len(PARTS))), strict=True)

    image, text, all_ids = pairs()
    image.requires_grad_(True)
    features = torch.nn.functional.normalize(image, dim=-1)
    loss = contrastive_loss(features, text, 0.1, all_ids).loss * len(image)
    if gather == "gather_with_gradient":
        loss.backward()
    else:  # to each process's features by its own loss alone
        for own in torch.arange(len(image)).split(PARTS):
            keys = features.detach().index_copy(0, own, features[own])
            part = contrastive_loss(
                features[own], text[own], 0.1, all_ids[own], image_keys=keys, text_keys=text, key_ids=all_ids
            )
            (part.loss * len(own)).backward(retain_graph=True)
    assert all(torch.equal(gathered, all_ids) for gathered in ids)
    torch.testing.assert_close(sum(losses), loss.detach())
    torch.testing.assert_close(torch.cat(gradients), image.grad)


def test_one_process_gathers_nothing() -> None:
    rows = torch.ones(2, 3)
    world = World(0, 1, 0)
    assert world.gather_rows(rows) is rows
    assert world.gather_with_gradient(rows) is rows
    assert world.any(True)
    assert not world.any(False)


@pytest.mark.parametrize(("words", "said"), [([], ""), (["alone"], "dismantled ")])
def test_a_connected_process_ends_without_dismantling_python(tmp_path: Path, words: list[str], said: str) -> None:
    command = [sys.executable, "-c", CONNECTED, str(tmp_path / "meeting"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (75, "done closed ", said)
