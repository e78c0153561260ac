"""``mplug ablate fusion``: tables, JSON, and the folder that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mplug_core.recipe import find_recipe, read_yaml

SHAPE = ("--size", "tiny", "--image-tokens", "9", "--text-tokens", "4", "--repeats", "1")


def test_costs_as_a_table(mplug) -> None:
    done = mplug("ablate", "fusion", *SHAPE)
    assert done.code == 0
    assert "9 image and 4 text tokens" in done.lines[0]
    rows = [line for line in done.lines if "GFLOP" in line]
    assert len(rows) == 11 and rows[1].startswith("connected in every layer")


def test_costs_as_json_and_markdown(mplug, tmp_path: Path) -> None:
    done = mplug("ablate", "fusion", *SHAPE, "--only", "co", "--only", "asymmetric", "--json", "--markdown",
                 tmp_path / "t.md")  # fmt: skip
    costs = done.objects[0]["costs"]
    assert list(costs) == ["co", "asymmetric"]
    assert costs["co"]["forward_flops"] > costs["asymmetric"]["forward_flops"]
    assert done.objects[0]["machine"]["threads"] >= 1
    assert (tmp_path / "t.md").read_text().startswith("### Fusion networks: 3 layers of width 128")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "conected"], "did you mean 'connected'"),
        (["data.root=x"], "fields of a recipe are for --train"),
        (["--seeds", "2"], "--seeds is for --train"),
        (["--recipe", "tiny"], "--recipe is for --train"),
        (["--size", "huge"], "no model size 'huge'"),
    ],
)
def test_usage_errors(mplug, arguments: list[str], said: str) -> None:
    done = mplug("ablate", "fusion", *arguments)
    assert done.code == 2 and said in done.error


@pytest.mark.slow
def test_training_writes_figure_page_and_tables(mplug, scenes: Path, tmp_path: Path) -> None:
    values = read_yaml(find_recipe("ablation/fusion"))
    values["stages"][0]["steps"], values["stages"][1]["steps"] = 1, 4
    values["run"] |= {"evaluate_every": 2, "save_every": 2}
    values["model"]["fusion_layers"] = 2
    values["data"]["sources"]["scenes"] |= {"batch_size": 4, "limit": 16}
    for section in values["evaluate"].values():
        section["limit"] = 8
    recipe = tmp_path / "short.yaml"
    recipe.write_text(yaml.safe_dump(values))
    folder = tmp_path / "runs"
    arguments = ("ablate", "fusion", *SHAPE, "--only", "connected", "--only", "asymmetric", "--train", folder,
                 "--recipe", recipe, f"data.root={scenes}", "--seeds", "2", "--quiet", "--json")  # fmt: skip
    done = mplug(*arguments)
    assert done.code == 0, done.err
    quality = done.objects[1]
    assert quality["seeds"] == [0, 1] and quality["steps"] == 4
    assert set(quality["quality"]["val/vqa/accuracy"]["connected"]) == {
        "equal_steps", "equal_time", "steps_in_time", "spread",
    }  # fmt: skip
    assert json.loads((folder / "fusion.json").read_text())[1]["steps"] == 4
    assert (folder / "fusion.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "fusion.html").read_text()
    assert "<svg" in page and "connected in every layer" in page and "http://" not in page.split("</svg>")[1]
    assert "equal time" in (folder / "fusion.md").read_text()
