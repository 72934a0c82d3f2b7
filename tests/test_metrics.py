"""Metrics against published values, scikit-learn, and cases worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, top_k_accuracy_score

from classifier.evaluation.metrics import (
    CALIBRATION_BINS,
    METRICS,
    calibration_bins,
    class_scores,
    expected_calibration_error,
    largest_class,
    mcnemar,
    metrics_for,
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
    logits[:, 3] = 0.5  # second largest everywhere; ties for the third place go to the lower label
    scores = overall_scores(logits, labels)
    assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert scores["top3_accuracy"] == pytest.approx(5 / 6)  # all except the image of class 2


def test_a_class_without_images_counts_in_f1_if_it_is_predicted() -> None:
    scores = overall_scores(logits_of([0, 1, 3], 4), np.array([0, 1, 1]))
    assert scores["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_overall_scores_of_perfect_and_wrong_predictions() -> None:
    labels = np.array([0, 1, 2, 3, 0])
    right = overall_scores(1000 * logits_of(labels.tolist(), 4), labels)
    assert right == {"accuracy": 1, "loss": 0, "balanced_accuracy": 1, "macro_f1": 1, "top3_accuracy": 1, "ece": 0}
    certain = 1000 * logits_of(((labels + 1) % 4).tolist(), 4)
    certain[np.arange(5), labels] = -1000  # the right class is the last
    wrong = overall_scores(certain, labels)
    assert wrong == {
        "accuracy": 0,
        "loss": 2000,
        "balanced_accuracy": 0,
        "macro_f1": 0,
        "top3_accuracy": 0,
        "ece": 1,
    }


def test_overall_scores_of_images_of_one_class() -> None:
    one_label = overall_scores(1000 * logits_of([2, 2], 3), np.array([2, 2]))
    assert one_label == {"accuracy": 1, "loss": 0, "balanced_accuracy": 1, "macro_f1": 1, "ece": 0}


@pytest.mark.parametrize("classes", [4, 10, 100])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_are_those_of_scikit_learn_to_the_last_bit(classes: int) -> None:
    generator = np.random.default_rng(classes)
    logits = generator.normal(size=(150, classes)).astype(np.float32)
    labels = generator.integers(0, classes, 150)
    scores = overall_scores(logits, labels)
    predicted = logits.argmax(1)
    assert scores["accuracy"] == (predicted == labels).mean()
    assert scores["balanced_accuracy"] == balanced_accuracy_score(labels, predicted)
    assert scores["macro_f1"] == f1_score(labels, predicted, average="macro")
    assert scores["top3_accuracy"] == top_k_accuracy_score(labels, logits, k=3, labels=range(classes))


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_every_registered_metric_is_a_finite_number_that_ignores_the_order_of_images(classes: int) -> None:
    generator = np.random.default_rng(classes)
    logits, labels = generator.normal(size=(40, classes)).astype(np.float32), generator.integers(0, classes, 40)
    assert {metric.key for metric in METRICS.values() if metric.min_classes <= classes} == {
        metric.key for metric in metrics_for(classes)
    }
    for metric in metrics_for(classes):
        value = metric.value(logits, labels)
        assert type(value) is float
        assert np.isfinite(value)
        assert metric.value(logits[::-1], labels[::-1]) == pytest.approx(value), metric.key
        assert metric.title == metric.title.strip() != ""


def test_ties_go_to_the_lower_label_as_in_the_accuracy() -> None:
    logits = np.zeros((5, 5), np.float32)
    assert overall_scores(logits, np.arange(5))["top3_accuracy"] == pytest.approx(3 / 5)
    assert overall_scores(logits[:3], np.array([0, 1, 2]))["top3_accuracy"] == 1
    assert overall_scores(logits[:2], np.array([3, 4]))["top3_accuracy"] == 0


def two_classes(*confidences: float) -> np.ndarray:
    """Return probabilities of images that are all predicted as class 1."""
    return np.array([[1 - confidence, confidence] for confidence in confidences])


def test_calibration_error_by_hand() -> None:
    probabilities = two_classes(0.9, 0.88, 0.6, 0.65, 0.64)  # the bins from 13/15 to 14/15, and from 9/15 to 10/15
    labels = np.array([1, 0, 0, 1, 1])  # 0.6 is the upper end of the bin that starts at 8/15
    gaps = 2 * abs(1 / 2 - 0.89), 1 * abs(0 - 0.6), 2 * abs(1 - 0.645)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(sum(gaps) / 5)
    bins = calibration_bins(probabilities, labels)
    assert len(bins) == CALIBRATION_BINS == 15
    assert bins["images"].to_dict() == {index: {8: 1, 9: 2, 13: 2}.get(index, 0) for index in range(15)}
    assert bins["accuracy"].dropna().to_dict() == {8: 0, 9: 1, 13: 0.5}
    assert bins["confidence"].dropna().to_dict() == pytest.approx({8: 0.6, 9: 0.645, 13: 0.89})


def test_confidence_1_is_in_the_last_bin() -> None:
    bins = calibration_bins(two_classes(1.0, 1.0, 1.0), np.array([1, 1, 0]))
    assert bins["images"].tolist() == [0] * 14 + [3]
    assert expected_calibration_error(two_classes(1.0, 1.0, 1.0), np.array([1, 1, 0])) == pytest.approx(1 / 3)


def test_accuracy_equal_to_confidence_has_no_calibration_error() -> None:
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
def test_invalid_probabilities_raise(probabilities: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        expected_calibration_error(probabilities, np.zeros(len(probabilities), np.int64))


def test_with_many_classes_the_first_bin_can_have_images() -> None:
    probabilities = np.full((2, 20), 0.05)
    assert calibration_bins(probabilities, np.array([0, 1]))["images"].tolist() == [2] + [0] * 14


def test_sums_within_a_thousandth_are_accepted() -> None:
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


def test_mistakes_of_equal_confidence_keep_the_order_of_the_images() -> None:
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


def test_largest_class() -> None:
    assert largest_class(np.array([2, 0, 2, 1])) == (2, 0.5)
