"""Scores against published values and cases worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from classifier.metrics import class_scores, mcnemar, most_confident_mistakes, wilson_interval


def logits_of(answers: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers]


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [  # Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(correct: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_at_the_ends_and_at_another_confidence() -> None:
    assert wilson_interval(20, 20)[1] == 1
    assert wilson_interval(0, 20)[0] == 0
    narrow, wide = wilson_interval(50, 100, 0.5), wilson_interval(50, 100, 0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


def test_class_scores_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    answers = [0, 0, 1, 1, 0, 1]  # class 2 is never predicted, and there is no image of class 3
    scores = class_scores(logits_of(answers, 4), labels, ["boot", "bag", "coat", "hat"])
    expected = pd.DataFrame(
        {
            "class": ["boot", "bag", "coat", "hat"],
            "precision": [2 / 3, 1 / 3, 0, 0],
            "recall": [2 / 3, 1 / 2, 0, 0],
            "f1": [2 / 3, 2 / 5, 0, 0],
            "images": [3, 2, 1, 0],
        }
    )
    pd.testing.assert_frame_equal(scores, expected)


def test_mistakes_come_most_confident_first() -> None:
    labels = np.array([0, 0, 1, 1, 0, 1])
    logits = np.array([[0, 1], [9, 0], [3, 0], [2, 1], [0, 2], [0, 9]], np.float32)
    assert most_confident_mistakes(logits, labels, 10).tolist() == [2, 4, 0, 3]  # by margin 3, 2, 1, 1
    assert most_confident_mistakes(logits, labels, 2).tolist() == [2, 4]


def test_confidence_is_a_probability_not_a_logit() -> None:
    logits = np.array([[0, 100, 99], [0, 5, -5]], np.float32)  # 0.73 and 0.99 for class 1
    assert most_confident_mistakes(logits, np.array([0, 0]), 2).tolist() == [1, 0]


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[0, 5], [0, 1000]], np.float32)
    assert most_confident_mistakes(logits, np.array([0, 0]), 2).tolist() == [1, 0]


def test_no_mistakes() -> None:
    assert most_confident_mistakes(logits_of([0, 1, 2], 3), np.array([0, 1, 2]), 5).tolist() == []


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(0, 0, 1), (5, 5, 1), (0, 5, 2 / 2**5), (8, 1, 2 * (1 + 9) / 2**9), (30, 10, 0.0022215)],
)
def test_mcnemar_is_the_two_sided_binomial_test(only_first: int, only_second: int, p_value: float) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(p_value, rel=1e-4)
    assert mcnemar(only_second, only_first) == mcnemar(only_first, only_second)
