"""Scores against published values and cases worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from classifier.evaluation.metrics import (
    CALIBRATION_BINS,
    calibration_bins,
    class_scores,
    expected_calibration_error,
    largest_class,
    mcnemar,
    most_confident_mistakes,
    negative_log_likelihood,
    overall_scores,
    wilson_interval,
)


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


def test_wilson_interval_at_the_ends() -> None:
    assert wilson_interval(20, 20)[1] == 1
    assert wilson_interval(0, 20)[0] == 0


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


def test_overall_scores_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    logits = logits_of([0, 0, 1, 1, 0, 1], 5)  # class 2 is never predicted, and there is no image of classes 3 and 4
    logits[:, 3] = 0.5  # which is second everywhere, and of the others those with the lowest labels are third
    scores = overall_scores(logits, labels)
    assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert scores["top3_accuracy"] == pytest.approx(5 / 6)  # all but the image of class 2


def test_a_class_without_images_counts_where_it_is_predicted() -> None:
    scores = overall_scores(logits_of([0, 1, 3], 4), np.array([0, 1, 1]))
    assert scores["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_overall_scores_where_all_is_right_or_wrong() -> None:
    labels = np.array([0, 1, 2, 3, 0])
    right = overall_scores(1000 * logits_of(labels.tolist(), 4), labels)
    assert right == {"balanced_accuracy": 1, "macro_f1": 1, "top3_accuracy": 1, "ece": 0}
    certain = 1000 * logits_of(((labels + 1) % 4).tolist(), 4)
    certain[np.arange(5), labels] = -1000  # the right class is the last
    wrong = overall_scores(certain, labels)
    assert wrong == {"balanced_accuracy": 0, "macro_f1": 0, "top3_accuracy": 0, "ece": 1}


def test_overall_scores_of_one_class_alone() -> None:
    one_label = overall_scores(1000 * logits_of([2, 2], 3), np.array([2, 2]))
    assert one_label == {"balanced_accuracy": 1, "macro_f1": 1, "ece": 0}


def test_ties_go_to_the_lower_label_as_in_the_accuracy() -> None:
    logits = np.zeros((5, 5), np.float32)
    assert overall_scores(logits, np.arange(5))["top3_accuracy"] == pytest.approx(3 / 5)
    assert overall_scores(logits[:3], np.array([0, 1, 2]))["top3_accuracy"] == 1
    assert overall_scores(logits[:2], np.array([3, 4]))["top3_accuracy"] == 0


def two_classes(*confidences: float) -> np.ndarray:
    """Probabilities of images that all have answer 1."""
    return np.array([[1 - confidence, confidence] for confidence in confidences])


def test_calibration_error_by_hand() -> None:
    probabilities = two_classes(0.9, 0.88, 0.6, 0.65, 0.64)  # the bins from 13/15 to 14/15, and from 9/15 to 10/15
    labels = np.array([1, 0, 0, 1, 1])  # 0.6 is the upper end of the bin from 8/15
    gaps = 2 * abs(1 / 2 - 0.89), 1 * abs(0 - 0.6), 2 * abs(1 - 0.645)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(sum(gaps) / 5)
    bins = calibration_bins(probabilities, labels)
    assert len(bins) == CALIBRATION_BINS == 15
    assert bins["images"].to_dict() == {index: {8: 1, 9: 2, 13: 2}.get(index, 0) for index in range(15)}
    assert bins["accuracy"].dropna().to_dict() == {8: 0, 9: 1, 13: 0.5}
    assert bins["confidence"].dropna().to_dict() == pytest.approx({8: 0.6, 9: 0.645, 13: 0.89})


def test_certain_answers_are_in_the_last_bin() -> None:
    bins = calibration_bins(two_classes(1.0, 1.0, 1.0), np.array([1, 1, 0]))
    assert bins["images"].tolist() == [0] * 14 + [3]
    assert expected_calibration_error(two_classes(1.0, 1.0, 1.0), np.array([1, 1, 0])) == pytest.approx(1 / 3)


def test_no_calibration_error_where_answers_are_right_as_often_as_they_say() -> None:
    assert expected_calibration_error(two_classes(0.75, 0.75, 0.75, 0.75), np.array([1, 1, 1, 0])) == 0


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (np.empty((0, 2)), "there are no images"),
        (np.array([[0.5, 0.5], [0.5, 0.498]]), r"the probabilities of image 1 sum to 0\.998, not to 1"),
        (np.array([[2.0, 3.0]]), "the probabilities of image 0 sum to 5, not to 1"),
        (np.array([[np.nan, 1.0]]), "the probabilities of image 0 sum to nan, not to 1"),
    ],
)
def test_what_are_no_probabilities_has_no_calibration_error(probabilities: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        expected_calibration_error(probabilities, np.zeros(len(probabilities), np.int64))


def test_an_answer_of_many_classes_can_be_in_the_first_bin() -> None:
    probabilities = np.full((2, 20), 0.05)
    assert calibration_bins(probabilities, np.array([0, 1]))["images"].tolist() == [2] + [0] * 14


def test_a_thousandth_is_rounding() -> None:
    assert calibration_bins(np.array([[1.0009, 0.0]]), np.array([0]))["images"].tolist() == [0] * 14 + [1]
    assert expected_calibration_error(np.array([[0.9995, 0.0]]), np.array([0])) == pytest.approx(0.0005)


def test_negative_log_likelihood_by_hand() -> None:
    logits = np.log(np.array([[0.25, 0.75], [0.5, 0.5]]))
    assert negative_log_likelihood(logits, np.array([1, 0])) == pytest.approx(-(np.log(0.75) + np.log(0.5)) / 2)
    assert negative_log_likelihood(np.array([[0, 5000]], np.float32), np.array([0])) == 5000  # without overflow


def test_mistakes_come_most_confident_first() -> None:
    labels = np.array([0, 0, 1, 1, 0, 1])
    logits = np.array([[0, 1], [9, 0], [3, 0], [2, 1], [0, 2], [0, 9]], np.float32)
    assert most_confident_mistakes(logits, labels, 10).tolist() == [2, 4, 0, 3]  # by margin 3, 2, 1, 1
    assert most_confident_mistakes(logits, labels, 2).tolist() == [2, 4]


def test_mistakes_of_the_same_confidence_come_in_the_order_of_the_images() -> None:
    logits = np.array([[0, 2], [0, 1]] * 50, np.float32)
    assert most_confident_mistakes(logits, np.zeros(100, np.int64), 100).tolist() == [
        *range(0, 100, 2),
        *range(1, 100, 2),
    ]


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


def test_the_accuracy_of_an_answer_that_never_changes_is_the_share_of_the_largest_class() -> None:
    assert largest_class(np.array([2, 0, 2, 1])) == (2, 0.5)
