"""Boxes through squash, pad, flip and crop, by hand; and what each does to the words on a picture."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mplug_core.data.placement import VISIBLE, WHOLE, Placement, adapt, names_direction, swap_sides
from mplug_core.data.records import CaptionRecord, EntailmentRecord, PhraseRecord, QuestionRecord, StatementRecord

MIRROR = Placement.of_region((0, 0, 1, 1), flipped=True)
LEFT_HALF = Placement.of_region((0.0, 0.0, 0.5, 1.0), flipped=False)
PHOTO = Path("photo.jpg")


@pytest.mark.parametrize(
    ("placement", "square"),
    [
        (WHOLE, (0.1, 0.2, 0.4, 0.6)),
        (MIRROR, (0.6, 0.2, 0.9, 0.6)),
        # the left half fills the square: twice as wide
        (LEFT_HALF, (0.2, 0.2, 0.8, 0.6)),
        # the part 0.1..0.6 x 0.2..0.7, mirrored: 0.1 is its right end
        (Placement.of_region((0.1, 0.2, 0.6, 0.7), True), (0.4, 0.0, 1.0, 0.8)),
        # a picture twice as wide as high in the middle of the square
        (Placement.of_region((0, 0, 1, 1), False, (0, 0.25, 1, 0.75)), (0.1, 0.35, 0.4, 0.55)),
        # the same at 80 percent, mirrored
        (Placement.of_region((0, 0, 1, 1), True, (0.1, 0.3, 0.9, 0.7)), (0.58, 0.38, 0.82, 0.54)),
    ],
)
def test_boxes_by_hand(placement: Placement, square: tuple[float, ...]) -> None:
    box = (0.1, 0.2, 0.4, 0.6)
    assert placement.to_square(box) == pytest.approx(square)
    assert placement.to_picture(square) == pytest.approx(box)


def test_there_and_back_is_the_same_box() -> None:
    rng = random.Random(0)
    for _ in range(500):
        x0, x1, y0, y1 = (*sorted((rng.random(), rng.random())), *sorted((rng.random(), rng.random())))
        (a, b), (c, d) = sorted((rng.random(), rng.random() + 0.1)), sorted((rng.random(), rng.random() + 0.1))
        target = (0.1 * rng.random(), 0.2 * rng.random(), 1 - 0.3 * rng.random(), 1 - 0.2 * rng.random())
        placement = Placement.of_region((a, c, b, d), rng.random() < 0.5, target)
        assert placement.to_picture(placement.to_square((x0, y0, x1, y1))) == pytest.approx((x0, y0, x1, y1), abs=1e-9)


def test_answers_are_cut_at_the_picture() -> None:
    padded = Placement.of_region((0, 0, 1, 1), False, (0, 0.25, 1, 0.75))
    assert padded.to_picture((0.2, 0.0, 0.5, 0.5)) == pytest.approx((0.2, 0.0, 0.5, 0.5))
    assert padded.to_picture((0.2, 0.0, 0.5, 0.1)) == pytest.approx((0.2, 0.0, 0.5, 0.0))


def test_what_is_cropped_and_visible() -> None:
    assert not WHOLE.crops and not MIRROR.crops and LEFT_HALF.crops
    assert not Placement.of_region((0, 0, 1, 1), True, (0.1, 0.3, 0.9, 0.7)).crops
    assert LEFT_HALF.visible((0.1, 0.1, 0.3, 0.3)) == pytest.approx(1)
    assert LEFT_HALF.visible((0.4, 0.1, 0.6, 0.3)) == pytest.approx(0.5)
    assert LEFT_HALF.visible((0.6, 0.1, 0.8, 0.3)) == 0
    # what reaches over the picture's border was never visible
    assert WHOLE.visible((-0.5, 0.0, 0.5, 1.0)) == pytest.approx(1)
    for nothing in ((0.2, 0.2, 0.2, 0.8), (float("nan"), 0, 1, 1), (2, 2, 3, 3), (0.5, 0.5, 0.2, 0.8)):
        assert WHOLE.visible(nothing) == 0


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("the dog left of the cat", "the dog right of the cat"),
        ("Left dog, RIGHT cat", "Right dog, LEFT cat"),
        ("leftmost of the two, not the right-hand one", "rightmost of the two, not the left-hand one"),
        ("facing leftward in the righthand corner", "facing rightward in the lefthand corner"),
        ("a bright copyright upright sinister rightly", "a bright copyright upright sinister rightly"),
        ("a man right behind the car", "a man right behind the car"),
        ("the man on the right behind the car", "the man on the left behind the car"),
        ("right next to the left door", "right next to the right door"),
        ("a bag left behind on the left", "a bag left behind on the right"),
        ("the top right in front", "the top left in front"),
        ("all right then, the left", "all right then, the right"),
        ("", ""),
    ],
)
def test_sides_change_places(text: str, swapped: str) -> None:
    assert swap_sides(text) == swapped
    assert swap_sides(swapped) == text


def test_directions() -> None:
    named = [
        "left dog",
        "the leftmost",
        "dog at the top",
        "topmost",
        "in the middle",
        "third from the end",
        "upper one",
    ]
    assert all(names_direction(phrase) for phrase in named)
    assert not any(names_direction(phrase) for phrase in ("the bright dog", "a laptop", "the red circle", "a friend"))


def test_phrases_follow_the_picture() -> None:
    record = PhraseRecord(PHOTO, "the dog", (0.1, 0.2, 0.4, 0.6))
    assert adapt(record, [WHOLE]) is record
    assert adapt(record, [MIRROR]).box == pytest.approx((0.6, 0.2, 0.9, 0.6))
    assert adapt(record, [LEFT_HALF]).box == pytest.approx((0.2, 0.2, 0.8, 0.6))
    left = PhraseRecord(PHOTO, "the left dog", record.box, phrase_id="7")
    mirrored = adapt(left, [MIRROR])
    assert (mirrored.phrase, mirrored.phrase_id) == ("the right dog", "7")
    # the left dog of a part of the picture may be another
    assert adapt(left, [LEFT_HALF]) is None
    # cut at the square, and left out where too much is gone
    at = lambda share: PhraseRecord(PHOTO, "the dog", (0.5 - 0.1 * share, 0.0, 0.6 - 0.1 * share, 1.0))  # noqa: E731
    assert adapt(at(VISIBLE + 0.01), [LEFT_HALF]).box[2] == 1.0
    assert adapt(at(VISIBLE - 0.01), [LEFT_HALF]) is None
    # a box over the border is cut there
    assert adapt(PhraseRecord(PHOTO, "x", (-0.1, 0.0, 0.5, 1.2)), [WHOLE]).box == (0.0, 0.0, 0.5, 1.0)


def test_every_text_on_a_mirrored_picture() -> None:
    caption = CaptionRecord(PHOTO, ("left", "on the right"), "1", domain="in-domain")
    assert adapt(caption, [LEFT_HALF]) is caption
    assert adapt(caption, [MIRROR]) == CaptionRecord(PHOTO, ("right", "on the left"), "1", domain="in-domain")
    question = QuestionRecord(PHOTO, "left or right?", ("left", "right"), (0.7, 0.3), "side")
    mirrored = adapt(question, [MIRROR])
    assert (mirrored.question, mirrored.answers, mirrored.weights) == ("right or left?", ("right", "left"), (0.7, 0.3))
    entailment = EntailmentRecord(PHOTO, "a left dog", "neutral")
    assert adapt(entailment, [MIRROR]).hypothesis == "a right dog"
    assert adapt(StatementRecord((PHOTO,), "left", True), [MIRROR]).statement == "right"


@pytest.mark.parametrize(
    ("statement", "stays"),
    [
        ("the left image has more dogs than the right image", True),
        ("a cat is in the image on the left and in the right-hand photo", True),
        ("both images contain a dog", True),
        ("the left image shows a dog facing left", False),
    ],
)
def test_pairs_keep_their_order(statement: str, stays: bool) -> None:
    record = StatementRecord((PHOTO, Path("other.jpg")), statement, True)
    assert adapt(record, [WHOLE, WHOLE]) is record
    for placements in ([MIRROR, WHOLE], [WHOLE, MIRROR], [MIRROR, MIRROR]):
        assert adapt(record, placements) is (record if stays else None)
