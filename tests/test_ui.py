"""A grid of experiments, looked at in MLflow's pages as a person would: in a browser, on a real server.

Screenshots go to the folder that the environment variable SCREENSHOTS names, else among pytest's temporary files.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from browser import mlflow_pages, new_page, started_browser, take_screenshot
from dvc_queue import processes_in, run_queue
from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import Browser, Locator, Page, expect
from playwright.sync_api import Error as PlaywrightError
from project import Project, small_project

pytestmark = pytest.mark.slow

RATES = ["0.1", "0.01"]
OPTIMIZERS = ["sgd", "adam"]
PAIRS = sorted(product(RATES, OPTIMIZERS))
EPOCHS = 5
CLICKS = 6  # at most, before it is a fault
PATIENCE = 60_000  # milliseconds, where the machine is busy


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that had no store, in which the queue then ran a grid of experiments. Tests leave it as it is."""
    project = small_project(tmp_path_factory.mktemp("sweep"), epochs=str(EPOCHS))
    project.dvc("repro", "annotate")  # once, and not in each copy that the queue makes
    project.commit()
    assert not (project.root / "mlflow.db").exists()
    grid = ("-S", f"lr={','.join(RATES)}", "-S", f"optimizer={','.join(OPTIMIZERS)}")
    project.dvc("exp", "run", "--queue", *grid, "evaluate")  # the pages show nothing of the export
    run_queue(project)
    assert processes_in(project.root) == []
    return project


@pytest.fixture(scope="module")
def runs(sweep: Project) -> dict[str, Run]:
    """MLflow's runs by name."""
    client = MlflowClient(f"sqlite:///{sweep.root / 'mlflow.db'}")
    (kept,) = [experiment for experiment in client.search_experiments() if experiment.name == "fashion-mnist"]
    found = client.search_runs([kept.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {str(run.info.run_name): run for run in found}


@pytest.fixture(scope="module")
def address(sweep: Project) -> Iterator[str]:
    with mlflow_pages(sweep) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The list of runs, at the address that is printed. No page may ask for anything from another host."""
    with new_page(browser) as page:
        open_runs(page, address)
        yield page


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_runs(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_role("button", name="Close", exact=True).last.click()  # the assistant, which opens by itself
    expect(page.get_by_text(re.compile(r"^[1-9]\d* matching runs$"))).to_be_visible()


def choose_columns(page: Page, *changed: str) -> None:
    """Show columns of the list that are hidden, hide those that are shown."""
    page.get_by_role("button", name="Columns", exact=True).click()
    for name in changed:
        page.get_by_placeholder("Search columns").fill(name)
        page.locator("[class*=tree-title]").filter(has_text=re.compile(f"^{name}$")).click()
    page.get_by_role("heading", name="Runs").click()  # closes the menu


def compare_all(page: Page) -> tuple[Locator, Locator]:
    """Select every run of the list and open the comparison, reduced to what differs; returns its first two tables."""
    page.get_by_label("Select all runs").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    for index in (0, 1):  # of parameters, and of metrics
        page.get_by_text("Show diff only").nth(index).click()
    tables = page.get_by_role("table")
    return tables.nth(0), tables.nth(1)


def row(table: Locator, title: str) -> list[str]:
    """What stands in a row of a table beside its title."""
    return table.get_by_role("row").filter(has_text=re.compile(f"^{title}")).inner_text().split()[len(title.split()) :]


def draw_losses(page: Page) -> Locator:
    """From the comparison, open the chart of both losses; returns the curves."""
    # The comparison is laid out anew when its chart is there, and perhaps again: a click before that can be lost
    expect(page.locator(".parcoords .axis-title").first).to_be_visible(timeout=PATIENCE)
    metrics = page.get_by_role("combobox")
    for _ in range(CLICKS):
        with suppress(PlaywrightError):  # the link is gone
            page.get_by_role("link", name="train_loss").click(timeout=PATIENCE / CLICKS)
        with suppress(AssertionError):
            # The comparison, which stays until this page is there, has two
            expect(metrics).to_have_count(1, timeout=PATIENCE / CLICKS)
            break
    metrics.click()
    metrics.press_sequentially("val_loss")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Metrics").click()  # closes the list
    page.get_by_role("switch").last.click()  # logarithmic scale
    expect(page.get_by_text("train_loss vs val_loss")).to_be_visible()
    return page.locator(".scatterlayer .trace path.js-line")


def show_picture(page: Page, run: str, name: str) -> Locator:
    """From the list, open a picture of a run."""
    page.get_by_role("link", name=run, exact=True).click()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_label("plots", exact=True).click()
    page.get_by_label(name, exact=True).click()
    return page.get_by_role("img", name=name)


def test_a_grid_leaves_one_finished_run_for_each_pair_of_values(runs: dict[str, Run]) -> None:
    assert sorted((run.data.params["lr"], run.data.params["optimizer"]) for run in runs.values()) == PAIRS
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_dvc_shows_the_grids_experiments_under_the_names_of_the_runs(sweep: Project, runs: dict[str, Run]) -> None:
    table = pd.read_csv(io.StringIO(sweep.dvc("exp", "show", "--csv").stdout), dtype=str)
    shown = table.dropna(subset=["Experiment"]).set_index("Experiment")
    assert sorted(shown.index) == sorted(runs)
    for name, run in runs.items():
        assert (shown.lr[name], shown.optimizer[name]) == (run.data.params["lr"], run.data.params["optimizer"])
        assert float(shown.accuracy[name]) == pytest.approx(run.data.metrics["test_accuracy"])


@pytest.mark.browser
def test_the_run_list_shows_the_sweep_with_its_parameters_and_results(
    page: Page, runs: dict[str, Run], screenshots: Path
) -> None:
    choose_columns(page, "Dataset", "Source", "lr", "optimizer", "test_accuracy")
    take_screenshot(page, screenshots / "runs.png")
    expect(page.get_by_text(f"{len(PAIRS)} matching runs")).to_be_visible()
    for name, run in runs.items():
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
        for value in (run.data.params["lr"], run.data.params["optimizer"], f"{run.data.metrics['test_accuracy']:g}"):
            expect(page.get_by_role("gridcell", name=value, exact=True).first).to_be_visible()


@pytest.mark.browser
def test_the_comparison_shows_the_parameters_that_differ(page: Page, runs: dict[str, Run], screenshots: Path) -> None:
    details, parameters = compare_all(page)
    expect(page.locator(".parcoords .axis-title")).to_have_text(["lr", "optimizer", "val_accuracy"])
    page.get_by_role("heading", name=f"Comparing {len(PAIRS)} Runs from 1 Experiment").scroll_into_view_if_needed()
    take_screenshot(page, screenshots / "compare.png")
    parameters.scroll_into_view_if_needed()
    take_screenshot(page, screenshots / "parameters.png")
    shown = zip(row(details, "Run Name:"), row(parameters, "lr"), row(parameters, "optimizer"), strict=True)
    expected = [(name, run.data.params["lr"], run.data.params["optimizer"]) for name, run in runs.items()]
    assert sorted(shown) == sorted(expected)


@pytest.mark.browser
def test_the_comparison_leads_to_the_loss_curves_of_all_its_runs(
    page: Page, runs: dict[str, Run], screenshots: Path
) -> None:
    compare_all(page)
    curves = draw_losses(page)
    for name, run in runs.items():
        lines = page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))
        for index, loss in enumerate(("train_loss", "val_loss")):
            expect(lines.nth(index)).to_contain_text(f"{run.data.metrics[loss]} (step={EPOCHS})")
    take_screenshot(page, screenshots / "curves.png")
    # Each run has a continuous line for one loss and a dashed one for the other; MLflow may draw them twice
    dashes = curves.evaluate_all("lines => lines.map(line => getComputedStyle(line).strokeDasharray)")
    continuous = dashes.count("none")
    assert continuous == len(dashes) - continuous > 0
    assert continuous % len(runs) == 0


@pytest.mark.browser
def test_a_picture_of_a_run_is_displayed(page: Page, runs: dict[str, Run], screenshots: Path) -> None:
    picture = show_picture(page, next(iter(runs)), "samples.png")
    expect(picture).to_be_visible()
    take_screenshot(page, screenshots / "pictures.png")
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=picture.element_handle())
