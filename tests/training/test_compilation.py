"""engine.compile: compiled layers learn the same under the same names, and what is missing is said in one line.

What PyTorch's own compiler makes takes minutes, so its tracing alone is tested, on the backend that runs the traced
operations one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mplug_core.errors import MplugError
from mplug_core.generation import Decoding, generate
from mplug_core.recipe import EngineSection, OptimizerSection
from mplug_core.training import compilation
from mplug_core.training.compilation import compile_layers
from mplug_core.training.distributed import ALONE
from mplug_core.training.engine import build_engine
from tests.small import random_inputs, small_config, small_model
from tests.training.losses import RUNS, Step, losses
from tests.training.processes import result

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A backend that compiles nothing."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


def compiled_calls(model: torch.nn.Module) -> int:
    return sum(module._compiled_call_impl is not None for module in model.modules())


def test_the_engine_compiles_and_learns_the_same(quick: None) -> None:
    plain, compiled = (losses({**RUNS["plain"], "compile": switch}) for switch in (False, True))
    assert compiled["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert compiled["weights"] == pytest.approx(plain["weights"], rel=1e-5)


def test_layers_of_all_towers_and_nothing_else_are_compiled(quick: None) -> None:
    module = Step()
    names = list(module.state_dict())
    engine = build_engine(module, EngineSection(name="plain", compile=True), OptimizerSection(), ALONE, 4)
    config = small_config()
    towers = config.text_layers + config.fusion_layers + config.decoder_layers
    assert compiled_calls(engine.module) == towers + len(module.model.visual.backbone.blocks)
    assert list(module.state_dict()) == names
    other = Step()
    build_engine(other, EngineSection(name="plain"), OptimizerSection(), ALONE, 4)
    assert compiled_calls(other) == 0


def test_goes_with_checkpointing(quick: None) -> None:
    gradients = []
    for compiled in (False, True):
        model = small_model().train()
        model.set_checkpointing(["visual", "text", "fusion", "decoder"])
        if compiled:
            compile_layers(model, CPU)
        image, ids, mask = random_inputs(model)
        memory, memory_mask = model.memory(image, model.encode_text(ids, mask), mask)
        model.decode(ids, memory, memory_mask).log_softmax(-1)[..., 7].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, want in gradients[0].items():
        assert torch.allclose(gradients[1][name], want, atol=1e-3, rtol=1e-3), name


def test_writes_as_before(quick: None) -> None:
    """As an evaluation within a run does: other shapes, a cache, no gradient."""
    model = small_model()
    image, _, _ = random_inputs(model)
    decoding = Decoding(strategy="beam", beams=3, max_tokens=8)
    found = []
    for _ in range(2):
        with torch.inference_mode():
            rows = generate(model.decoder, image.tokens, image.mask, decoding, start=1, end=2)
        found.append([hypothesis.ids for row in rows for hypothesis in row])
        compile_layers(model, CPU)
    assert found[0] == found[1]


@pytest.mark.slow
def test_goes_with_deepspeed() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    code = (
        "from mplug_core.training import compilation; compilation.BACKEND = 'eager'\n"
        "from mplug_core.training.distributed import end_process\n"
        "from tests.training.losses import losses\n"
        "print('RESULT', losses({'zero_stage': 2, 'precision': 'fp32', 'compile': True})['loss'])\n"
        "end_process(0)"
    )
    assert result("-c", code) == pytest.approx(losses(RUNS["plain"])["loss"], abs=1e-4)


def test_stage_3_is_refused() -> None:
    with pytest.raises(ValueError, match="compile needs zero_stage <= 2"):
        EngineSection(zero_stage=3, compile=True)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    settings = EngineSection(name="plain", compile=True)
    with pytest.raises(MplugError, match="needs a C.. compiler, and there is no no-such-compiler") as caught:
        build_engine(Step(), settings, OptimizerSection(), ALONE, 4)
    assert "CXX" in caught.value.hint
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    with pytest.raises(MplugError, match="needs Triton"):
        compile_layers(Step(), torch.device("cuda"))
