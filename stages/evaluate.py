"""Evaluate stage: how well the trained network does on the test images, in numbers and pictures.

Reads   data/images.zip, data/annotations/, data/originals.csv, models/model_weights.pth
Writes  metrics/test.json, metrics/classes.csv, metrics/predictions.csv, metrics/plots/
"""

from classifier import files
from classifier.annotations import class_names, csv_cell
from classifier.batches import batches_of
from classifier.dataset import annotated
from classifier.device import choose_kernels, environment, seed_everything, select_device, set_threads
from classifier.errors import printable, run_main
from classifier.inference import advice, predict, score, trained_network
from classifier.metrics import class_scores, largest_class, overall_scores, wilson_interval
from classifier.params import load_params
from classifier.pictures import draw
from classifier.prediction_table import Predicted, own_names, write_predictions
from classifier.tracking import Tracker


def main() -> None:
    params = load_params()
    tracker = Tracker()
    device = select_device(params.device)
    set_threads(params.threads)
    choose_kernels(deterministic=params.deterministic, precision=params.precision)
    seed_everything(params.seed)

    names = class_names(files.verified(files.ANNOTATIONS))
    val_set, test_set = annotated(["val", "test"], len(names))
    network = trained_network(params.network, test_set.image_shape(), len(names), device, test_flip=params.test_flip)
    logits = predict(batches_of(test_set, params, device), network, params.precision)

    loss, accuracy = score(logits, test_set.labels, params.batch_size)
    low, high = wilson_interval(round(accuracy * len(test_set)), len(test_set))
    scores = class_scores(logits.numpy(), test_set.labels.numpy(), names)
    overall = overall_scores(logits.numpy(), test_set.labels.numpy())
    print(f"Accuracy: {accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}), Avg loss: {loss:.6f}")
    label, share = largest_class(test_set.labels.numpy())
    print(f"Answering {printable(names[label])} every time would be right on {share:.1%}")
    if told := advice(accuracy, test_set.labels):
        print(told)
    print(", ".join(f"{name}: {value:.3f}" for name, value in overall.items()))
    print(scores.assign(**{"class": [*map(printable, names)]}).to_string(index=False, float_format="%.3f"))

    with files.atomic(files.CLASS_METRICS) as path:
        scores.assign(**{"class": [*map(csv_cell, names)]}).to_csv(path, index=False, lineterminator="\n")
    own = own_names(files.verified(files.ORIGINALS), [*val_set.files, *test_set.files])
    with files.atomic(files.PLOTS) as folder:
        folder.mkdir()
        draw(folder, network, test_set, logits.numpy(), names, own, params.seed)
    predicted = [Predicted("test", test_set.files, test_set.labels.numpy(), logits.numpy())]
    if len(val_set):
        val_logits = predict(batches_of(val_set, params, device), network, params.precision)
        predicted.insert(0, Predicted("val", val_set.files, val_set.labels.numpy(), val_logits.numpy()))
    with files.atomic(files.PREDICTIONS) as path:
        write_predictions(path, predicted, own, names)
    figures = {"accuracy": accuracy, "loss": loss, "accuracy_ci95": [low, high]} | overall
    files.write_json(files.TEST_METRICS, figures)

    with tracker.weights(params, environment(device)):
        tracker.log_evaluation(test_set.md5())


if __name__ == "__main__":
    run_main(main)
