"""Recipes: what is shipped is valid, faults come all at once with the nearest key, overrides mean what they say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mplug_core.errors import LINE, RecipeError
from mplug_core.recipe import (
    Recipe,
    apply_overrides,
    check_recipe,
    find_recipe,
    load_recipe,
    merge,
    parse_override,
    read_yaml,
    shipped_recipes,
)

VALUES: dict[str, Any] = {
    "name": "test",
    "model": {"size": "tiny"},
    "data": {"sources": {"a": {"path": "{root}/a"}, "b": {"path": "b"}}},
    "stages": [{"name": "see", "steps": 5}, {"name": "learn", "steps": 10, "sources": ["a"]}],
}


def faults_of(values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipe(values, overrides)
    assert caught.value.exit_code == 3
    assert len(str(caught.value)) <= LINE
    return "; ".join(caught.value.faults)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name.split("/")[-1]
    assert recipe.data.sources, "a recipe names its data"
    # what a run writes down is what it was
    assert check_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_says_what_it_costs(name: str) -> None:
    header = [line for line in shipped_recipes()[name].read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    for word in ("command", "data", "cost", "expected"):
        assert f"# {word}" in text, f"{name} does not say its {word}"


def test_all_faults_come_at_once_with_the_nearest_key() -> None:
    values = {**VALUES, "optimiser": {}, "data": {**VALUES["data"], "max_txt": 3}, "seed": "x"}
    said = faults_of(values, "optimizer.weight_decy=0.1", "engine.zero_stage=7", "nonsense", "model.size=tinny")
    assert len(said.split("; ")) == 7
    for fault in (
        "optimiser: unknown key, did you mean 'optimizer'?",
        "data.max_txt: unknown key, did you mean 'max_text'?",
        "optimizer.weight_decy: unknown key, did you mean 'weight_decay'?",
        "engine.zero_stage: Input should be 0, 1, 2 or 3 (got 7)",
        "seed: Input should be a valid integer",
        "'nonsense' is not key.path=value",
        "no model size 'tinny', did you mean 'tiny'?",
    ):
        assert fault in said


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("stages.learn.stps=5", "stages.1.stps: unknown key, did you mean 'steps'?"),
        ("stages.2.steps=5", "stages.2 is not a section"),
        ("stages=5", "stages: Input should be a valid list"),
        ("stages.learn=5", "stages.learn: name a field of the list's item"),
        ("data.sources.a.pth=x", "data.sources.a.pth: unknown key, did you mean 'path'?"),
        ("data.sources.a.tasks.captions=1", "data.sources.a.tasks.captions: unknown key, did you mean 'caption'?"),
        ("objectives.itcc=1", "objectives.itcc: unknown key, did you mean 'itc'?"),
        ("model.vision.image_siz=64", "model.vision.image_siz: unknown key, did you mean 'image_size'?"),
        ("seed.x=1", "seed is not a section"),
        ("optimizer.lr=0", "optimizer.lr: Input should be greater than 0 (got 0)"),
        ("optimizer.lr=fast", "optimizer.lr: Input should be a valid number"),
        ("model.heads=5", "model: width 128 is not a multiple of heads 5"),
        ("model.decoding={caption: {max_tokens: 5000}}", "decoding.caption.max_tokens 5000: at most 63 fit"),
        ("model.decoding={vqa: {beams: 1000}}", "model.decoding.vqa.beams: Input should be less than or equal to 128"),
        ("model.decoding={vqa: {min_tokens: 5, max_tokens: 3}}", "min_tokens 5 is above max_tokens 3"),
        ("self_critical.captions=1000", "self_critical.captions: Input should be less than or equal to 128"),
        ("self_critical={min_tokens: 9, max_tokens: 3}", "min_tokens 9 is above max_tokens 3"),
        (
            "evaluate={val: {path: x, tasks: [caption], options: {decoding: {max_tokens: 600}}}}",
            "evaluate.val.options.decoding.max_tokens: 600 is too much, at most 63",
        ),
        (
            "evaluate={val: {path: x, tasks: [caption], options: {decoding: {beams: 1000}}}}",
            "evaluate.val.options.decoding.beams: 1000 is too much, at most 128",
        ),
        ("=5", "'=5' is not key.path=value"),
        ("a..b=5", "'a..b=5' is not key.path=value"),
        ("seed=[1", "'seed=[1': the value is not YAML"),
        ("objectives.box=1", None),
        ("engine={zero_stage: 0, precision: bf16}", "engine: bf16 needs zero_stage >= 1"),
        ("stages.learn.sources=[c]", "stages: learn: no source 'c' in data.sources"),
        ("evaluate={val: {path: x, tasks: [pretrain]}}", "evaluate.val.tasks.0: Input should be 'caption'"),
    ],
)
def test_fault(override: str, fault: str | None) -> None:
    model = {"size": "tiny", "width": 128, "heads": 4, "max_positions": 64}
    values = {**copy.deepcopy(VALUES), "seed": 0, "model": model}
    if fault is None:
        check_recipe(values, [override])
    else:
        assert fault in faults_of(values, override)


@pytest.mark.parametrize(
    ("overrides", "needs"),
    [
        (["objectives={box: 1}", "model.box_bins=0"], "box needs model.box_bins"),
        (["objectives={caption: 1}", "model.decoder_layers=0"], "caption needs model.decoder_layers"),
        (["objectives={statement: 1}"], "statement needs model.classifiers.statement: {images: 2, labels"),
        (
            ["objectives={entailment: 1}", "model.classifiers={entailment: {labels: [a, b]}}"],
            "entailment needs model.classifiers.entailment",
        ),
        (
            ["data.sources.a.text_only=true", "model.summary_tokens=0"],
            "data.sources.a: text_only needs model.summary_tokens",
        ),
    ],
)
def test_objective_without_its_part(overrides: list[str], needs: str) -> None:
    assert needs in faults_of(VALUES, *overrides)


def test_objective_of_weight_zero_needs_nothing() -> None:
    check_recipe(VALUES, ["objectives={itc: 1, statement: 0}"])


class TestLength:
    """``steps`` and ``epochs`` are refused where no stage asks for them."""

    @pytest.mark.parametrize("name", ["pretrain/mini", "pretrain/tiny", "ablation/fusion"])
    @pytest.mark.parametrize("override", ["steps=5", "epochs=2"])
    def test_stages_decide(self, name: str, override: str) -> None:
        with pytest.raises(RecipeError, match=f"{override.split('=')[0]}: every stage has its own length; set stages."):
            load_recipe(name, [override])

    @pytest.mark.parametrize("name", ["base", "finetune/vqa_base", "finetune/scenes"])
    def test_no_stages(self, name: str) -> None:
        assert load_recipe(name, ["steps=5"]).steps == 5

    def test_a_stage_without_a_length(self) -> None:
        stages = [{"name": "see", "steps": 5}, {"name": "learn"}]
        assert check_recipe({**VALUES, "stages": stages}, ["steps=3"]).steps == 3

    def test_epochs_beside_steps(self) -> None:
        said = "epochs: has no effect beside steps: 1500; add steps=null"
        with pytest.raises(RecipeError, match=said):
            load_recipe("finetune/scenes", ["epochs=2"])
        assert load_recipe("finetune/scenes", ["epochs=2", "steps=null"]).epochs == 2


CAPTIONS_ALONE: dict[str, Any] = {
    "name": "test",
    "model": {"size": "tiny", "summary_tokens": 2, "image_head": {"hidden": 20}},
    "data": {
        "sources": {
            "photos": {"path": "p", "cached_views": 1, "tasks": {"caption": 1}},
            "texts": {"path": "t", "text_only": True, "tasks": {"caption": 1}},
            "questions": {"path": "q", "tasks": {"vqa": 1}},
        }
    },
    "stages": [{"name": "align", "align": {}, "sources": ["photos", "texts"]}, {"name": "learn", "steps": 3}],
}


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["stages=[]", "steps=4"], "source 'texts' is text_only, which needs a stage with `align` before"),
        (["stages.align.sources=[photos]"], "stages: learn: source 'texts' is text_only"),
        (["stages=[{name: learn, steps: 3}, {name: align, align: {}, sources: [photos, texts]}]"],
         "stages: learn: source 'texts' is text_only"),
        (["data.sources.photos.cached_views=0"], "stages: align: align needs a source with cached_views"),
        (["stages.align.sources=[photos, texts, questions]"], "source 'questions' has no cached_views"),
        (["data.sources.photos.tasks={vqa: 1}"], "source 'photos' has none of the tasks pretrain and caption"),
        (["stages.align.sources=null", "data.sources.questions.cached_views=1"],
         "stages: align: source 'questions' has none of the tasks"),
        (["model.image_head=null"], "stages: align: align needs model.image_head"),
        (["model.image_head.hidden=21"], "model.image_head.hidden 21 is not a multiple of folds 5"),
        (["stages.learn.sources=[]"], "stages: learn: sources is empty"),
        (["stages.learn.name=align"], "stages: two stages have the name 'align'"),
        (["data.sources.texts.cached_views=1"], "data.sources.texts: text_only has no photos for cached_views"),
        (["data.sources.texts.tasks={caption: 1, vqa: 1}"], "texts: text_only has captions alone, not vqa"),
    ],
)  # fmt: skip
def test_stages_and_captions_without_photos(overrides: list[str], fault: str) -> None:
    check_recipe(CAPTIONS_ALONE)
    assert fault in faults_of(CAPTIONS_ALONE, *overrides)


def test_a_shipped_recipe_without_its_align_stage() -> None:
    rest = [stage.model_dump() for stage in load_recipe("mini").stages if stage.align is None]
    with pytest.raises(RecipeError, match="'flickr_text' is text_only.*'coco_text' is text_only"):
        load_recipe("mini", [f"stages={yaml.safe_dump(rest, default_flow_style=True, width=10**6)}"])


class TestOverrides:
    def test_values(self) -> None:
        recipe = check_recipe(
            VALUES,
            [
                "optimizer.lr=1e-4", "optimizer.betas=[0.9, 0.98]", "optimizer.eps=1e-6", "stages.learn.lr=3E-4",
                "stages.0.steps=7", "engine.checkpointing=[visual, text]", "run.folder=runs/x=1",
                "data.sources.a.split=val",
                "objectives={itc: 1, mlm: 0.5}", "freeze=[]", "epochs=null", "name=nan", "data.root=1e5x",
            ],
        )  # fmt: skip
        assert recipe.optimizer.lr == 1e-4 and recipe.optimizer.betas == (0.9, 0.98) and recipe.optimizer.eps == 1e-6
        assert recipe.stages[1].lr == 3e-4 and recipe.stages[0].steps == 7
        assert recipe.engine.checkpointing == ["visual", "text"]
        assert recipe.run.folder == "runs/x=1" and recipe.data.sources["a"].split == "val"
        assert recipe.objectives == {"itc": 1.0, "mlm": 0.5}
        assert recipe.name == "nan" and recipe.data.root == "1e5x"

    def test_numbers_in_lists_and_mappings(self) -> None:
        assert parse_override("a.b=[1e-4, 2]")[1] == [1e-4, 2]
        assert parse_override("a={x: 5e-3}")[1] == {"x": 5e-3}

    def test_quotes_keep_text(self) -> None:
        assert parse_override("a='1e-4'") == (["a"], "1e-4")

    def test_missing_sections_are_made(self) -> None:
        values: dict[str, Any] = {}
        assert apply_overrides(values, ["teacher.alpha=0.1"]) == []
        assert values == {"teacher": {"alpha": 0.1}}

    def test_the_given_values_are_not_changed(self) -> None:
        values = copy.deepcopy(VALUES)
        check_recipe(values, ["data.sources.a.path=other", "stages.0.steps=77", "model.width=64"])
        assert values == VALUES

    def test_last_one_wins(self) -> None:
        assert check_recipe(VALUES, ["seed=1", "seed=2"]).seed == 2


class TestSizes:
    def test_fields_override_the_size(self) -> None:
        base = check_recipe({"name": "x", "model": {"size": "base"}}).model
        recipe = check_recipe({"name": "x", "model": {"size": "base", "width": 96}}, ["model.vision.image_size=64"])
        assert recipe.model.width == 96 and recipe.model.heads == base.heads
        assert recipe.model.vision.image_size == 64 and recipe.model.vision.backbone == base.vision.backbone

    def test_size_by_override(self) -> None:
        assert (
            check_recipe({"name": "x"}, ["model.size=large"]).model
            == check_recipe({"name": "x", "model": {"size": "large"}}).model
        )

    def test_options_of_another_backbone_do_not_mix(self) -> None:
        assert merge({"options": {"a": 1}}, {"options": {"b": 2}}) == {"options": {"b": 2}}
        over = {"vision": {"backbone": "other"}}
        assert merge({"vision": {"backbone": "one", "options": {"a": 1}, "image_size": 9}}, over) == {
            "vision": {"backbone": "other", "image_size": 9}
        }
        same = {"vision": {"backbone": "one", "options": {"a": 1}}}
        assert merge(same, {"vision": {"backbone": "one"}}) == same


class TestFiles:
    def test_bad_yaml_names_its_line(self, tmp_path: Path) -> None:
        file = tmp_path / "bad.yaml"
        file.write_text("name: x\ndata: [1, 2\nseed: 3\n", encoding="utf-8")
        with pytest.raises(RecipeError, match=r"bad\.yaml:3:\d+: not YAML"):
            load_recipe(str(file))

    @pytest.mark.parametrize("content", [b"- a\n- b\n", b"", b"5"])
    def test_no_mapping(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(RecipeError, match="a recipe is a mapping of sections"):
            load_recipe(str(tmp_path / "bad.yaml"))

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \x00"])
    def test_no_text(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(RecipeError, match="not"):
            load_recipe(str(tmp_path / "bad.yaml"))

    def test_code_in_yaml_is_not_run(self, tmp_path: Path) -> None:
        (tmp_path / "evil.yaml").write_text("name: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
        with pytest.raises(RecipeError, match="not YAML"):
            load_recipe(str(tmp_path / "evil.yaml"))

    def test_floats_as_people_write_them(self, tmp_path: Path) -> None:
        file = tmp_path / "x.yaml"
        file.write_text("a: 1e-4\nb: 1.0e-4\nc: -2E5\nd: .5\ne: 12\nf: 1e\ng: 3.\nh: 1.2.3\n", encoding="utf-8")
        assert read_yaml(file) == {
            "a": 1e-4,
            "b": 1e-4,
            "c": -2e5,
            "d": 0.5,
            "e": 12,
            "f": "1e",
            "g": 3.0,
            "h": "1.2.3",
        }

    def test_find_by_name_file_and_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert find_recipe("tiny") == find_recipe("pretrain/tiny") == shipped_recipes()["pretrain/tiny"]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "own.yaml").write_text("name: own\n", encoding="utf-8")
        assert find_recipe("own.yaml") == Path("own.yaml")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("tinny", "no recipe 'tinny', did you mean 'tiny'"),
            ("missing.yaml", "no recipe file missing.yaml"),
            ("qqqq", "no recipe 'qqqq'"),
        ],
    )
    def test_not_found(self, name: str, said: str) -> None:
        with pytest.raises(RecipeError, match=said):
            find_recipe(name)


def test_defaults_are_a_valid_recipe() -> None:
    assert Recipe(name="x").engine.zero_stage == 2


class TestInheritance:
    """``base: NAME`` in a recipe file."""

    def test_sections_are_merged_and_lists_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "low.yaml").write_text(
            "name: low\nseed: 3\noptimizer: {lr: 1e-3, clip: 2}\nfreeze: [visual, text]\nobjectives: {caption: 1}\n"
        )
        (tmp_path / "mid.yaml").write_text("base: low.yaml\nname: mid\noptimizer: {lr: 2e-3}\nfreeze: [text]\n")
        (tmp_path / "top.yaml").write_text("base: mid.yaml\nname: top\nobjectives: {caption: 0, itc: 1}\n")
        recipe = load_recipe(str(tmp_path / "top.yaml"), ["seed=4"])
        assert (recipe.name, recipe.seed, recipe.optimizer.lr, recipe.optimizer.clip) == ("top", 4, 2e-3, 2)
        assert recipe.freeze == ["text"] and recipe.objectives == {"caption": 0, "itc": 1}

    def test_shipped_base(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("base: pretrain/tiny\nname: mine\nmodel: {width: 96}\n")
        mine, tiny = load_recipe(str(file)), load_recipe("tiny")
        assert mine.model.width == 96 and mine.model.heads == tiny.model.heads and mine.stages == tiny.stages

    @pytest.mark.parametrize(
        ("base", "said"),
        [
            ("tinny", "base: no recipe 'tinny', did you mean 'tiny'"),
            ("none.yaml", "base: no recipe file none.yaml"),
            ("[a]", r'base: not the name of a recipe \(got \["a"\]\)'),
            ("mine.yaml", "base: mine.yaml is built on this recipe itself"),
            ("other.yaml", "base: mine.yaml is built on this recipe itself"),
        ],
    )
    def test_faults(self, tmp_path: Path, base: str, said: str) -> None:
        (tmp_path / "mine.yaml").write_text(f"base: {base}\nname: mine\n")
        (tmp_path / "other.yaml").write_text("base: mine.yaml\nname: other\n")
        with pytest.raises(RecipeError, match=said):
            load_recipe(str(tmp_path / "mine.yaml"))


class TestStart:
    """With start.model the recipe's model section is what changes of it."""

    def test_what_the_model_lacks_is_asked_of_the_model(self) -> None:
        values = {"name": "x", "start": {"model": "m"}, "objectives": {"box": 1, "statement": 1}}
        recipe = check_recipe(values)
        assert [fault.split(" needs ")[0] for fault in recipe.lacks(recipe.model)] == [
            "objectives: box",
            "objectives: statement",
        ]
        assert "box needs model.box_bins" in faults_of(values, "start.model=null")

    def test_extending_a_vocabulary_needs_one(self) -> None:
        check_recipe({"name": "x", "start": {"model": "m"}, "data": {"vocabulary": "extend"}})
        assert "data.vocabulary: extend needs start.model" in faults_of(VALUES, "data.vocabulary=extend")

    @pytest.mark.parametrize(
        ("start", "said"),
        [
            ({"fusion": "text"}, "start.fusion: text means the BERT of start.text, which is not set"),
            ({"text": "b", "layers": {"decoder": [0, 1]}}, "start.layers.decoder: needs start.decoder"),
            (
                {"text": "b", "layers": {"text": [0, 1, 2]}},
                "start.layers.text: 3 layers for the 2 of model.text_layers",
            ),
            ({"text": "b", "layers": {"text": [0, -1]}}, "start.layers.text.1: Input should be greater than or equal"),
            ({"text": "b", "layers": {"txt": [0]}}, "start.layers.txt: unknown key, did you mean 'text'?"),
            ({"decodr": "b"}, "start.decodr: unknown key, did you mean 'decoder'?"),
        ],
    )
    def test_berts_and_layers(self, start: dict[str, object], said: str) -> None:
        assert said in faults_of({"name": "x", "start": start, "model": {"size": "tiny"}, "objectives": {"itc": 1}})

    def test_parts_that_the_model_does_not_have(self) -> None:
        values = {"name": "x", "objectives": {"itc": 1}, "start": {"text": "b", "fusion": "text", "decoder": "c"}}
        said = faults_of(values, "model.fusion=none", "model.decoder_layers=0")
        assert "start.fusion: the model has no fusion layers" in said
        assert "start.decoder: the model has no decoder layers" in said
        # of a start model it is not known yet
        check_recipe(values, ["model.fusion=none", "model.decoder_layers=0", "start.model=m"])

    def test_text_is_another_name_for_its_bert(self) -> None:
        start = check_recipe({"name": "x", "start": {"text": "b", "fusion": "text", "decoder": "c"}}).start
        assert [start.bert(part) for part in ("text", "fusion", "decoder")] == ["b", "b", "c"]

    @pytest.mark.parametrize("name", ["base", "large"])
    def test_the_papers_start(self, name: str) -> None:
        start = load_recipe(name).start
        assert start.visual.startswith("timm:vit_") and start.visual.endswith("_clip_quickgelu_224.openai")
        bert = "hf:google-bert/bert-base-uncased"
        assert [start.bert(part) for part in ("text", "fusion", "decoder")] == [bert] * 3

    def test_defaults_are_below_the_recipe(self, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text("name: x\nstart: {text: bert}\n")
        start = load_recipe(str(tmp_path / "x.yaml"), [], {"start": {"model": "mini", "text": "no"}}).start
        assert (start.model, start.text) == ("mini", "bert")


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["run.patience=3"], "run.patience: needs run.best"),
        (["run.best=val/vqa/accuracy", "run.patience=3"], "run.patience: needs run.evaluate_every"),
        (["run.best=vall/vqa/accuracy"], "run.best: no evaluation 'vall/vqa' among val/vqa, did you mean 'val/vqa'?"),
        (["run.best=-val/vqa/accuracy"], None),
    ],
)
def test_best(overrides: list[str], fault: str | None) -> None:
    values = {**VALUES, "evaluate": {"val": {"path": "x", "tasks": ["vqa"]}}}
    if fault is None:
        check_recipe(values, overrides)
    else:
        assert fault in faults_of(values, *overrides)
