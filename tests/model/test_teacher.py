"""The teacher follows the student exactly; the queue holds the last pairs whatever the batch."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from mplug_core.model.teacher import CHUNK, FeatureQueue, Teacher


class Student(nn.Module):
    """Stand-in with the model's traits: parts, own parameter and buffer, shared weights, running statistics."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.text = nn.Embedding(7, 4)
        self.fusion = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight = self.text.weight
        self.projection = None
        self.temperature = nn.Parameter(torch.tensor([0.07]))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.visual(x)
        for layer in self.fusion:
            x = layer(x)
        return x


def disturb(student: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


def test_starts_equal_without_gradient_in_evaluation_mode():
    student = Student().bfloat16().train()
    teacher = Teacher(student)
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    for name, parameter in teacher.model.named_parameters():
        assert parameter.dtype == torch.float32 and not parameter.requires_grad
        assert torch.equal(parameter, dict(student.named_parameters())[name].float())
    # the student is left alone
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in student.parameters()) and student.training
    assert not any(module is teacher for module in student.modules())


@pytest.mark.parametrize("momentum", [0.995, 0.9, 0.3, 0.0, 1.0])
def test_update_equals_a_loop(momentum: float):
    student = Student(layers=CHUNK)  # two parameters a layer: more than one chunk
    teacher = Teacher(student, momentum)
    expected = {name: value.clone() for name, value in teacher.model.named_parameters()}
    for step in range(4):
        disturb(student, step)
        teacher.update(student)
        for name, parameter in student.named_parameters():
            expected[name].lerp_(parameter.detach(), 1 - momentum)
    for name, parameter in teacher.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_update_is_the_moving_average():
    student = Student().double()
    teacher = Teacher(student, 0.9)
    before = teacher.model.fusion[2].weight.double()
    disturb(student)
    teacher.update(student)
    expected = 0.9 * before + 0.1 * student.fusion[2].weight
    torch.testing.assert_close(teacher.model.fusion[2].weight.double(), expected, atol=1e-6, rtol=0)


def test_small_steps_are_not_lost_to_a_bfloat16_student():
    student = Student().bfloat16()
    teacher = Teacher(student, 0.995)
    with torch.no_grad():
        start = teacher.model.fusion[0].weight.clone()
        student.fusion[0].weight += 0.01
    for _ in range(100):
        teacher.update(student)
    gap = student.fusion[0].weight.float() - start
    torch.testing.assert_close(teacher.model.fusion[0].weight - start, gap * (1 - 0.995**100), atol=1e-5, rtol=1e-3)


def test_every_part_follows_and_shared_weights_once():
    student = Student()
    teacher = Teacher(student, 0.5)
    start = {name: value.clone() for name, value in teacher.model.named_parameters()}
    disturb(student)
    teacher.update(student)
    assert all(not torch.equal(value, start[name]) for name, value in teacher.model.named_parameters())
    assert teacher.model.decoder.weight is teacher.model.text.weight
    torch.testing.assert_close(teacher.model.text.weight, (start["text.weight"] + student.text.weight) / 2)


def test_buffers_are_copied():
    student = Student().train()
    teacher = Teacher(student)
    student(torch.randn(5, 4))
    student.steps += 3
    teacher.update(student)
    assert torch.equal(teacher.model.visual[1].running_mean, student.visual[1].running_mean)
    assert teacher.model.visual[1].num_batches_tracked == 1 and teacher.model.steps == 3
    assert teacher.model.steps.dtype == torch.long


def test_parts_left_out_are_not_copied_and_say_so():
    student = Student()
    teacher = Teacher(student, 0.5, ["visual", "decoder", "projection"])
    names = [name for name, _ in teacher.model.named_parameters()]
    # the shared weight comes under the decoder's name, the student lists it under the text's
    assert not any(name.startswith(("text", "fusion")) for name in names)
    assert {"decoder.weight", "temperature"} <= set(names)
    disturb(student)
    before = teacher.model.decoder.weight.clone()
    teacher.update(student)
    torch.testing.assert_close(teacher.model.decoder.weight, (before + student.text.weight) / 2)
    with pytest.raises(RuntimeError, match="no copy of 'text'"):
        teacher.model.text(torch.tensor([1]))
    with pytest.raises(AttributeError, match="no copy of 'text'"):
        teacher.model.text.weight  # noqa: B018
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_reset():
    student = Student()
    teacher = Teacher(student, 0.995)
    disturb(student)
    teacher.reset(student)
    theirs = dict(student.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in teacher.model.named_parameters())


def test_gather_sees_every_parameter_once_in_chunks():
    """Sharded parameters are empty outside the context and whole inside, as under ZeRO-3."""
    student = Student(layers=CHUNK)
    teacher = Teacher(student, 0.5)
    disturb(student)
    expected = Teacher(student, 0.0)
    whole = {id(p): p.data for p in student.parameters()}
    start = {name: value.clone() for name, value in teacher.model.named_parameters()}
    seen: list[int] = []

    @contextmanager
    def gather(chunk):
        assert 0 < len(chunk) <= CHUNK
        seen.extend(id(p) for p in chunk)
        for p in chunk:
            p.data = whole[id(p)]
        yield
        for p in chunk:
            p.data = torch.empty(0)

    for p in student.parameters():
        p.data = torch.empty(0)
    teacher.update(student, gather)
    assert sorted(seen) == sorted(whole)
    target = dict(expected.model.named_parameters())
    for name, value in teacher.model.named_parameters():
        torch.testing.assert_close(value, (start[name] + target[name]) / 2)
    with pytest.raises(ValueError, match="shape"):
        teacher.update(student)


def test_mismatch_is_refused():
    teacher = Teacher(Student(layers=2))
    with pytest.raises(ValueError, match="fusion.1.weight"):
        teacher.update(Student(layers=1))
    # a student with more than the teacher follows would leave a part of the target behind
    with pytest.raises(ValueError, match="fusion.2.weight"):
        teacher.update(Student(layers=3))
    wider = Student(layers=2)
    wider.fusion[1] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="fusion.1.weight"):
        teacher.update(wider)
    with pytest.raises(ValueError, match="no part vision"):
        Teacher(Student(), parts=["vision", "text"])
    with pytest.raises(ValueError, match="momentum"):
        Teacher(Student(), 1.5)


def test_state_resumes():
    student = Student()
    teacher, queue = Teacher(student, 0.9), FeatureQueue(5, 2)
    disturb(student)
    teacher.update(student)
    queue.push(torch.randn(3, 2), torch.randn(3, 2), torch.arange(3))
    resumed, resumed_queue = Teacher(Student(), 0.9), FeatureQueue(5, 2)
    resumed.load_state_dict(teacher.state_dict())
    resumed_queue.load_state_dict(queue.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(queue.buffers(), resumed_queue.buffers(), strict=True))


def test_queue_holds_the_last_pairs_for_every_batch_size():
    size = 4
    for batch in range(2 * size + 2):
        queue, pushed = FeatureQueue(size, 3), []
        for start in range(5):
            ids = torch.arange(batch) + start * batch
            pushed += ids.tolist()
            rows = ids.unsqueeze(1).expand(-1, 3).float()
            queue.push(rows, -rows, ids)
            image, text, kept = queue.keys()
            # slot by slot what pushing one pair at a time would have left
            slots = [-1] * size
            for position, value in enumerate(pushed):
                slots[position % size] = value
            assert kept.tolist() == slots
            assert queue.pointer.item() == len(pushed) % size
            full = kept >= 0
            assert torch.equal(image[full][:, 0].long(), kept[full]) and torch.equal(text, -image)


def test_queue_keeps_float32_takes_no_gradient_and_may_be_empty():
    queue = FeatureQueue(4, 2)
    assert queue.keys()[2].tolist() == [-1] * 4 and not list(queue.parameters())
    feature = torch.randn(2, 2, requires_grad=True)
    queue.push(feature, feature.bfloat16(), torch.tensor([1, 2]))
    image, text, _ = queue.keys()
    assert image.dtype == text.dtype == torch.float32 and not image.requires_grad
    with pytest.raises(ValueError, match="pairs"):
        queue.push(feature, feature[:1], torch.tensor([1, 2]))
    none = FeatureQueue(0, 2)
    none.push(feature, feature, torch.tensor([1, 2]))
    assert [tuple(part.shape) for part in none.keys()] == [(0, 2), (0, 2), (0,)]


def test_teacher_of_the_model_covers_the_fusion():
    config = pytest.importorskip("mplug_core.model.config")
    mplug = pytest.importorskip("mplug_core.model.mplug")
    student = mplug.MplugModel(config.MplugConfig.named("tiny"))
    teacher = Teacher(student, 0.5)
    disturb(student)
    teacher.update(student)
    theirs = dict(student.named_parameters())
    fusion = [name for name, _ in teacher.model.named_parameters() if name.startswith("fusion.")]
    assert fusion and {name for name in theirs} == {name for name, _ in teacher.model.named_parameters()}
    teacher.reset(student)
    for name, value in teacher.model.named_parameters():
        assert torch.equal(value, theirs[name]), name
