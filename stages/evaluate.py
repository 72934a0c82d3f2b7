"""Evaluate stage: measure the trained network on the test images, and draw pictures.

Reads   data/images/, data/annotations/, models/model_weights.pth
Writes  metrics/test.json, metrics/classes.csv, metrics/predictions.csv, metrics/plots/
"""

from classifier.compute.device import choose_kernels, environment, seed_everything, select_device, set_threads
from classifier.data.dataset import load_splits
from classifier.data.loader import batches_of
from classifier.data.lockfile import locked_md5s, verified
from classifier.evaluation.metrics import class_scores, largest_class, overall_scores, wilson_interval
from classifier.evaluation.pictures import draw
from classifier.evaluation.prediction_table import Predicted, write_predictions
from classifier.pipeline import paths
from classifier.pipeline.annotations import class_names, csv_cell
from classifier.pipeline.errors import printable
from classifier.pipeline.outputs import atomic, write_json
from classifier.pipeline.params import load_params
from classifier.tracking.tracker import Tracker
from classifier.training.inference import advice, predict_logits, score, trained_network


def main() -> None:
    params = load_params()
    md5s = locked_md5s(paths.LOCK)
    data = (paths.IMAGES, paths.ANNOTATIONS)
    tracker = Tracker(params.experiment, md5s, paths.PARAMS, data, paths.WEIGHTS)
    device = select_device(params.device)
    set_threads(params.threads)
    choose_kernels(deterministic=params.deterministic, precision=params.precision)
    seed_everything(params.seed)

    images, annotations = (verified(path, md5s) for path in data)
    names = class_names(annotations)
    val_set, test_set = load_splits(["val", "test"], annotations, images, len(names), params.image_sides)
    weights, shape = verified(paths.WEIGHTS, md5s), test_set.image_shape()
    network = trained_network(weights, params.network, shape, len(names), device, test_flip=params.test_flip)
    logits = predict_logits(batches_of(test_set, params, device), network, params.precision)

    loss, accuracy = score(logits, test_set.labels, params.batch_size)
    low, high = wilson_interval(round(accuracy * len(test_set)), len(test_set))
    scores = class_scores(logits.numpy(), test_set.labels.numpy(), names)
    figures = {"accuracy": accuracy, "loss": loss, "accuracy_ci95": [low, high]}
    overall = overall_scores(logits.numpy(), test_set.labels.numpy())
    other = {key: value for key, value in overall.items() if key not in figures}
    print(f"Accuracy: {accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}), Avg loss: {loss:.6f}")
    label, share = largest_class(test_set.labels.numpy())
    print(f"Always predicting {printable(names[label])} has an accuracy of {share:.1%}")
    if told := advice(accuracy, test_set.labels):
        print(told)
    print(", ".join(f"{name}: {value:.3f}" for name, value in other.items()))
    print(scores.assign(**{"class": [*map(printable, names)]}).to_string(index=False, float_format="%.3f"))

    with atomic(paths.CLASS_METRICS) as path:
        scores.assign(**{"class": [*map(csv_cell, names)]}).to_csv(path, index=False, lineterminator="\n")
    with atomic(paths.PLOTS) as folder:
        folder.mkdir()
        draw(folder, network, test_set, logits.numpy(), names, params.seed)
    predicted = [Predicted("test", test_set.files, test_set.labels.numpy(), logits.numpy())]
    if len(val_set):
        val_logits = predict_logits(batches_of(val_set, params, device), network, params.precision)
        predicted.insert(0, Predicted("val", val_set.files, val_set.labels.numpy(), val_logits.numpy()))
    with atomic(paths.PREDICTIONS) as path:
        write_predictions(path, predicted, names)
    write_json(paths.TEST_METRICS, figures | other)

    with tracker.weights(environment(device)):
        tracker.log_evaluation(paths.TEST_METRICS, [paths.CLASS_METRICS, paths.PLOTS], test_set.md5())
