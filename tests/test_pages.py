"""The commands of the pages: README.md is walked through on small data, each other command has a test that runs it."""

# ruff: noqa: E501, the names of tests are long

import re
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dvc_queue import run_queue
from imports import ROOT
from PIL import Image
from project import reproduced_project

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
# What is run elsewhere, by how it begins: the test, or why it is not run
ELSEWHERE = {
    "make repro": "test_reproduce.py::test_a_fresh_clone_gives_the_committed_results",
    "make test": "it is what runs this",
    ". .venv/bin/activate": "the tests run in an environment",
    "make ui": "test_ui.py::test_the_run_list_shows_the_sweep_with_its_parameters_and_results",
    "make seeds": "test_repetitions.py::test_two_seeds_are_run_kept_and_summed_up",
    "make report": "test_report.py::test_it_is_compared_with_the_commit_or_experiment_that_is_named",
    # docs/experiments.md
    "dvc exp run --name lr-0.01": "test_experiments.py::test_the_artifacts_of_a_run_open",
    "dvc exp run train": "test_pipeline.py::test_a_trial_ends_with_the_training_and_is_evaluated_and_exported_when_applied",
    "dvc exp run --temp": "test_experiments.py::test_a_run_used_its_experiments_own_copy_of_the_code",
    "dvc exp run -S lr=abc": "test_restore.py::test_a_wrong_parameter_is_found_before_dvc_removes_anything",
    "dvc exp run --queue": "test_ui.py::test_a_grid_leaves_one_finished_run_for_each_pair_of_values",
    "dvc queue": "test_ui.py::test_a_grid_leaves_one_finished_run_for_each_pair_of_values",
    "git status --short": "test_reproduce.py::test_a_fresh_clone_gives_the_committed_results",
    "classifier restore": "test_restore.py::test_after_a_commit_from_another_machine_nothing_is_trained_again",
    "dvc exp show": "test_dvc_views.py::test_exp_show_lists_the_rate_and_the_accuracy_of_both",
    "dvc exp diff": "test_dvc_views.py::test_exp_diff_shows_old_new_and_change",
    "dvc metrics diff": "test_dvc_views.py::test_metrics_diff_shows_old_new_and_change",
    "dvc params diff": "test_dvc_views.py::test_params_diff_shows_the_parameter_that_differs",
    "dvc plots diff": "test_dvc_views.py::test_plots_diff_holds_curves_confusion_and_pictures_of_both",
    "dvc dag": "test_dvc_views.py::test_dag_names_the_stages_in_order",
    "classifier lineage": "test_lineage.py::test_the_text_has_the_whole_chain",
    "classifier verify": "test_verify.py::test_a_clean_clone_is_verified_and_stays_as_it_is",
    "ATEN_CPU_CAPABILITY=default": "test_verify.py::test_in_another_environment_the_results_are_within_tolerance_and_what_differs_is_told",
    "echo $?": "test_verify.py::test_one_changed_image_and_a_changed_training_loop_are_drift",
    "classifier promote": "test_lineage.py::test_an_experiment_is_found_by_its_name_and_by_its_run",
    "MLFLOW_TRACKING_URI=sqlite:///mlflow.db python": "test_registry.py::test_the_champion_loads_in_a_process_without_the_project_and_without_torch",
    "gto": "test_dvc_views.py::test_gto_lists_the_versions_of_the_model",
    "dvc artifacts get": "test_dvc_views.py::test_artifacts_get_brings_the_model_of_a_version_from_outside_the_repository",
    ".ci/metrics-comment": "test_ci_comment.py::test_the_text_shows_old_new_and_change_of_each_metric_and_the_parameters_that_differ",
    # docs/own-images.md
    "python digits.py": "test_docs.py::test_the_commands_of_own_images_do_what_the_page_says",
    "dvc exp run -S source=folder -S data_path=data/own/digits": "test_docs.py::test_the_commands_of_own_images_do_what_the_page_says",
    "dvc exp run -S source=folder -S data_path=photos.zip": "test_the_commands_of_the_readme_run_one_after_the_other",
    "dvc exp run -S source=folder -S data_path=photos -S 'group": "test_own_images.py::test_photos_of_many_kinds_are_split_by_group_augmented_and_predicted_as_evaluated",
    "classifier folds": "test_repetitions.py::test_folds_share_the_training_images_and_leave_the_test_out",
    "classifier samples": "test_docs.py::test_the_commands_of_own_images_do_what_the_page_says",
    "classifier predict": "test_docs.py::test_the_commands_of_own_images_do_what_the_page_says",
    # docs/serving.md
    "export MLFLOW_TRACKING_URI=sqlite:///mlflow.db": "test_serving.py::test_every_form_of_a_request_gets_the_answers_of_predict",
    "mlflow models serve": "test_serving.py::test_every_form_of_a_request_gets_the_answers_of_predict",
    "printf": "test_serving.py::test_every_form_of_a_request_gets_the_answers_of_predict",
    "curl http://127.0.0.1:5001": "test_serving.py::test_a_bad_request_is_answered_with_its_reason_and_the_image_at_fault",
    # docs/accelerators.md
    "make accelerator": "test_benchmarks.py::test_the_script_of_accelerators_runs_on_a_cpu",
    # docs/processes.md
    "dvc exp run -S 'launcher=\"torchrun --nproc-per-node=2\"'": "test_distributed.py::test_two_processes_write_what_one_does_once",
    "dvc exp run -S 'launcher=\"torchrun --nproc-per-node=2 --max-restarts=3\"'": "test_distributed.py::test_torchrun_starts_a_killed_process_again_and_training_goes_on_to_the_same_bytes",
    "export PET_NNODES": "test_distributed.py::test_a_second_machine_joins_the_training_that_dvc_runs_on_the_first",
    "PET_NODE_RANK": "test_distributed.py::test_a_second_machine_joins_the_training_that_dvc_runs_on_the_first",
    "sbatch": "test_distributed.py::test_a_slurm_job_trains_on_all_of_its_nodes",
    # docs/reliability.md
    "git restore dvc.lock": "test_kill.py::test_a_few_kills_at_random_moments_leave_no_difference",
    "git checkout --force main": "test_resume.py::test_an_experiment_killed_in_the_workspace_goes_on_after_the_way_back",
    "classifier queue resume": "test_queue.py::test_experiments_whose_workers_are_killed_are_continued",
    "classifier sync": "test_sync.py::test_a_store_that_is_locked_in_the_middle_gets_all_by_the_same_process_when_it_is_free",
    # docs/remotes.md
    "dvc remote": "test_remotes.py::test_a_clone_pulls_data_and_model_and_has_nothing_left_to_do",
    "git add .dvc/config": "test_remotes.py::test_a_clone_pulls_data_and_model_and_has_nothing_left_to_do",
    "dvc push": "test_remotes.py::test_a_clone_pulls_data_and_model_and_has_nothing_left_to_do",
    "git clone": "test_remotes.py::test_a_clone_pulls_data_and_model_and_has_nothing_left_to_do",
    "dvc pull": "test_remotes.py::test_a_clone_pulls_data_and_model_and_has_nothing_left_to_do",
    "dvc repro": "test_remotes.py::test_what_another_has_trained_comes_from_the_run_cache",
    "classifier push": "test_remotes.py::test_what_another_has_trained_comes_from_the_run_cache",
    "dvc fetch": "test_remotes.py::test_what_another_has_trained_comes_from_the_run_cache",
    # docs/team.md
    "export MLFLOW_TRACKING_U": "test_team.py::test_who_has_no_password_is_refused_and_loses_nothing",
    "dvc exp run -S lr=0.01": "test_team.py::test_two_members_share_runs_models_and_data_and_a_lost_clone_loses_nothing",
    "umask": "it makes passwords for Docker",
    "for name in": "it makes passwords for Docker",
    "echo \"$name": "it makes passwords for Docker",
    "done > deploy/.env": "it makes passwords for Docker",
    "docker compose": "it needs Docker; the script that it starts is run by test_team.py",
    "sudo": "they change the system; test_team.py starts a PostgreSQL of its own",
    "export PGHOST": "test_team.py::test_experiments_at_once_lose_nothing_while_the_server_restarts",
    "export AWS_ACCESS": "test_team.py::test_experiments_at_once_lose_nothing_while_the_server_restarts",
    "export ARTIFACTS": "test_team.py::test_experiments_at_once_lose_nothing_while_the_server_restarts",
    "deploy/mlflow-server.sh": "test_team.py::test_experiments_at_once_lose_nothing_while_the_server_restarts",
    "curl --user admin": "test_team.py::test_who_has_no_password_is_refused_and_loses_nothing",
    "git pull": "test_team.py::test_a_sweep_on_two_machines_is_one_table",
    "dvc exp push": "test_team.py::test_a_sweep_on_two_machines_is_one_table",
    "dvc exp pull": "test_team.py::test_a_sweep_on_two_machines_is_one_table",
    "dvc exp apply": "test_team.py::test_two_members_share_runs_models_and_data_and_a_lost_clone_loses_nothing",
    # docs/scale.md
    "dask": "test_preprocessing.py::test_a_cluster_writes_the_same_bytes_as_this_machine",
    "PYTHONPATH=/shared/project dask": "test_preprocessing.py::test_a_cluster_writes_the_same_bytes_as_this_machine",
    "dvc exp run -S source=folder -S data_path=/shared": "test_preprocessing.py::test_a_cluster_writes_the_same_bytes_as_this_machine",
    "python -m benchmarks": "test_benchmarks.py runs parts of them; all of them take hours",
}  # fmt: skip


def commands(page: Path) -> list[str]:
    """Each command of a page's blocks of shell, without the comment behind it."""
    found = []
    for language, block in re.findall(
        r"^```(sh|console)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    ):
        lines = block.replace("\\\n", " ").splitlines()
        if language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found += [re.sub(r"\s+# .*", "", line).strip() for line in lines if line.strip()]
    return found


def elsewhere(command: str) -> str | None:
    """What is said of the longest beginning that a command has in ELSEWHERE."""
    begins = [begin for begin in ELSEWHERE if command.startswith(begin)]
    return ELSEWHERE[max(begins, key=len)] if begins else None


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md"], ids=lambda page: page.name)
def test_every_command_has_a_test_that_runs_it_or_a_reason(page: Path) -> None:
    assert [command for command in commands(page) if elsewhere(command) is None] == []


def test_the_tests_that_run_commands_exist() -> None:
    for told in ELSEWHERE.values():
        if match := re.fullmatch(r"(?:(test_\w+\.py)::)?(test_\w+)", told):
            assert f"\ndef {match[2]}(" in (ROOT / "tests" / (match[1] or Path(__file__).name)).read_text(), told
        else:
            assert " " in told  # a reason


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    project = reproduced_project(tmp_path_factory, export_formats="[onnx]")
    project.dvc("remote", "add", "--default", "team", str(tmp_path / "remote"))
    project.commit()
    write_photos(project.root / "photos.zip")
    walked = [command for command in commands(ROOT / "README.md") if not command.startswith(("make ", ". "))]
    assert len(walked) > 15
    for command in walked:
        if command == "classifier predict holiday.jpg":
            Image.new("RGB", (40, 30), "red").save(project.root / "holiday.jpg")
        if command == "classifier lineage model.onnx":
            shutil.copy(project.root / "models/export/model.onnx", project.root)
        if command.startswith("dvc queue start"):
            run_queue(project)
        else:
            # One epoch of the recipe: bfloat16 takes minutes on a processor that has none
            command = command.replace("epochs=16", "epochs=1")
            # The command `classifier` is of the checkout that it was installed in
            project.run("sh", "-c", re.sub(r"^classifier ", "python -m classifier ", command))
        if "network=cnn" in command:  # else all experiments that follow have its parameters, which take long
            project.run("sh", "-c", "git restore params.yaml dvc.lock metrics && dvc checkout")
    assert shlex.split(walked[-1])[-1] == "sync"


def write_photos(path: Path) -> None:
    """A zip of 20 noisy pictures of each of three colours, a folder for each."""
    noise = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for number, colour in enumerate(("red", "green", "blue")):
            for index in range(20):
                pixels = noise.integers(0, 100, (16, 16, 3), dtype=np.uint8)
                pixels[:, :, number] += 150
                with archive.open(f"photos/{colour}/{index}.png", "w") as file:
                    Image.fromarray(pixels).save(file, "PNG")
