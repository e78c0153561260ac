"""The shared cross-entropy: hard, smoothed and distilled targets against values from paper."""

from __future__ import annotations

from math import log

import pytest
import torch

from mplug_core.objectives.cross_entropy import full_precision, token_cross_entropy

# two rows over a vocabulary of three: softmax = (1/2, 1/4, 1/4) and (1/6, 2/6, 3/6)
LOGITS = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 3.0]], dtype=torch.float64).log()
LABELS = torch.tensor([0, 1])
# the teacher says (1/4, 1/2, 1/4) and (0, 1/2, 1/2)
TEACHER = torch.tensor([[1.0, 2.0, 1.0], [1e-30, 1.0, 1.0]], dtype=torch.float64).log()


def test_hard_targets():
    # -ln 1/2, -ln 2/6
    assert token_cross_entropy(LOGITS, LABELS).tolist() == pytest.approx([log(2), log(3)])


def test_label_smoothing():
    # target 0.7 on the label plus 0.1 on each of the three: 0.8 ln2 + 0.1 ln4 + 0.1 ln4, and so on
    expected = [0.8 * log(2) + 0.2 * log(4), 0.1 * log(6) + 0.8 * log(3) + 0.1 * log(2)]
    assert token_cross_entropy(LOGITS, LABELS, label_smoothing=0.3).tolist() == pytest.approx(expected)


def test_distilled():
    # 0.6 * hard + 0.4 * (1/4 ln2 + 1/2 ln4 + 1/4 ln4); second row: 0.4 * (1/2 ln3 + 1/2 ln2)
    expected = [0.6 * log(2) + 0.4 * (log(2) / 4 + 0.75 * log(4)), 0.6 * log(3) + 0.4 * (log(3) + log(2)) / 2]
    losses = token_cross_entropy(LOGITS, LABELS, teacher_logits=TEACHER, alpha=0.4)
    assert losses.tolist() == pytest.approx(expected)


def test_smoothing_touches_only_the_hard_part():
    mixed = token_cross_entropy(LOGITS, LABELS, teacher_logits=TEACHER, alpha=0.4, label_smoothing=0.3)
    hard = token_cross_entropy(LOGITS, LABELS, label_smoothing=0.3)
    soft = token_cross_entropy(LOGITS, LABELS, teacher_logits=TEACHER, alpha=1.0)
    torch.testing.assert_close(mixed, 0.6 * hard + 0.4 * soft)


def test_gradient_flows_to_the_student_alone():
    teacher = TEACHER.clone().requires_grad_()
    student = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: token_cross_entropy(x, LABELS, teacher_logits=TEACHER, alpha=0.4, label_smoothing=0.1), student
    )
    token_cross_entropy(student, LABELS, teacher_logits=teacher, alpha=0.4).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_precision():
    assert full_precision(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert full_precision(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert token_cross_entropy(LOGITS.bfloat16(), LABELS).dtype == torch.float32


def test_alpha_needs_a_teacher():
    with pytest.raises(ValueError, match="teacher_logits"):
        token_cross_entropy(LOGITS, LABELS, alpha=0.4)
