"""The paper's tables become runs, every run is counted once, and what is printed is what the runs
measured.
"""

import copy
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablate
from benchmarks.cues import accuracy_by_cue
from benchmarks.paper_tables import TABLES, UNCHANGED, paper_table
from configs import caer_s_r50, debug, demo, emotic_r50
from data.pipeline import make_dataset
from dsct_jax.cli import run_command
from dsct_jax.config import to_builtins
from dsct_jax.errors import UserError
from dsct_jax.evaluation.results import ImageResult, ResultsInfo, stack_results
from dsct_jax.model.modalities import MODALITIES
from dsct_jax.postprocess import Decoder
from train import RunConfig

# Stands in for train.py: notes how it was called and writes the files of a run, the accuracy being
# 0.5 + seed / 10 and 0.25 more without context.
FAKE = """
import json, pathlib, sys
flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[3:])
config = json.loads(pathlib.Path(flags["config"]).read_text())
workdir = pathlib.Path(flags["workdir"])
with open(pathlib.Path(__file__).with_suffix(".calls"), "a") as calls:
    print(workdir.parent.name, workdir.name, flags.get("mode", "train"), file=calls)
if workdir.name == "seed9":
    sys.exit("error: the disk is full")
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "config.json").write_text(json.dumps(config))
if flags.get("mode") == "eval":
    accuracy = 0.5 + config["seed"] / 10 + 0.25 * (config["model"]["num_context_queries"] == 0)
    one = {"images": 2, "people": 2, "accuracy": accuracy, "mAP": 0.1}
    buckets = {"1": one, "2": {"images": 0, "people": 0}}
    metrics = {"accuracy": accuracy, "mAP": 0.1, "mean_iou": 0.8, "majority_accuracy": 0.3}
    metrics |= {"num_images": 4, "num_people": 7, "buckets": buckets}
    (workdir / "metrics_test.json").write_text(json.dumps(metrics))
    (workdir / "predictions_test.npz").touch()
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Calls the command with the stand-in for train.py; returns its status and the calls of the
    stand-in so far.
    """
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)
    monkeypatch.setattr(
        ablate,
        "accuracy_by_cue",
        lambda workdir, split: {"expression": 0.9, "near": 0.5, "far": 0.25},
    )

    def call(*arguments, config="configs/demo.py"):
        launch = shlex.join([sys.executable, str(fake)])
        argv = [
            f"--config={config}",
            f"--output={tmp_path / 'out'}",
            f"--launch={launch}",
            *arguments,
        ]
        status = run_command(lambda: ablate.run(argv))
        calls = tmp_path / "fake.calls"
        return status, calls.read_text().splitlines() if calls.exists() else []

    return call


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("configuration", [demo, emotic_r50, caer_s_r50])
def test_every_row_is_a_configuration_that_the_model_accepts(name, configuration):
    config = to_builtins(configuration.get_config())
    if name == "13":  # it compares what is named
        with pytest.raises(UserError, match="--table=13: needs"):
            paper_table(name, config)
        files = ("a/scene.pth", "b/semantic.pth", "c/instance.pth")
        config["model"] |= {"modalities": MODALITIES, "modality_weights": files}
    before = copy.deepcopy(config)
    table = paper_table(name, config)
    assert len({row.key for row in table.rows}) == len(table.rows)
    for run in ablate.make_runs(table, config, seeds=(0,), output=Path("out")):
        RunConfig.from_mapping(run.config)
        assert "/" not in run.row.key and before == config  # the rows change copies


def test_the_rows_of_the_papers_size_are_the_papers():
    config = to_builtins(emotic_r50.get_config())
    components = paper_table("6", config).rows
    changes = [
        (
            row.changes.get("model.num_spatial_neighbors"),
            row.changes.get("model.num_semantic_neighbors"),
        )
        for row in components
    ]
    assert changes == [(None, None), (300, 0), (100, 0), (0, 50), (100, 50)]
    assert components[0].changes == {"model.num_context_queries": 0}
    assert [row.paper["EMOTIC"] for row in components] == [36.55, 36.73, 37.11, 36.85, 37.26]
    locations = paper_table("8", config).rows
    assert [row.changes["model.fusion_layers"] for row in locations] == [
        (),
        (1, 2, 3, 4, 5),
        (3, 4, 5),
        (5,),
    ]
    assert [row.name for row in locations] == [
        "1st to 6th layer",
        "2nd to 6th layer",
        "4th to 6th layer",
        "6th layer only (late)",
    ]
    assert components[-1].key == locations[0].key == UNCHANGED  # one run serves both tables
    assert len(paper_table("figure11", config).rows) == 16
    assert paper_table("3", config).rows[3].paper == {"EMOTIC": 36.01}


def test_a_shallow_decoder_has_fewer_places_to_fuse():
    rows = paper_table("8", to_builtins(demo.get_config())).rows
    assert [
        (row.name, row.changes["model.fusion_layers"], row.paper["EMOTIC"]) for row in rows
    ] == [
        ("1st to 3rd layer", (), 37.01),
        ("2nd to 3rd layer", (1, 2), 36.82),
        ("3rd layer only (late)", (2,), 36.44),
    ]


def test_every_row_runs_once_and_the_table_holds_mean_and_spread(command, tmp_path, capsys):
    status, calls = command("--table=6", "--seeds=0,2")
    assert status == 0
    assert len(calls) == 5 * 2 * 2  # rows, seeds, training and evaluation
    assert calls[:2] == [
        "model.num_context_queries=0 seed0 train",
        "model.num_context_queries=0 seed0 eval",
    ]
    text = (tmp_path / "out/table6.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert (
        "| baseline: no context queries | 2 | 85.0 ± 14.1 | 90.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 "
        "| 80.0 ± 0.0 | 36.55 |" in text
    )
    assert "| + both selections | 2 | 60.0 ± 14.1 |" in text
    assert "4 images, 7 people; the most frequent class: 30.0 %" in text
    numbers = json.loads((tmp_path / "out/table6.json").read_text())
    np.testing.assert_allclose(numbers["+ both selections"]["ours"]["accuracy"], [50, 70])


def test_finished_runs_are_skipped_and_shared_between_tables(command):
    command("--table=6", "--seeds=0")
    before = command("--table=6", "--seeds=0")[1]
    assert len(before) == 5 * 2
    _, calls = command("--table=8", "--seeds=0")
    assert [line for line in calls[len(before) :] if UNCHANGED in line] == []
    assert len(calls) == len(before) + 2 * 2


def test_some_rows_of_a_table(command, tmp_path):
    status, calls = command("--table=6", "--seeds=0", "--rows=baseline,both")
    assert (status, len(calls)) == (0, 2 * 2)
    lines = (tmp_path / "out/table6.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[4:6]] == [
        "| baseline: no context queries",
        "| + both selections",
    ]
    assert lines[6] == ""


def test_a_run_without_evaluation_is_continued(command, tmp_path):
    command("--table=8", "--seeds=0")
    (tmp_path / "out" / UNCHANGED / "seed0" / "metrics_test.json").unlink()
    assert len(command("--table=8", "--seeds=0", "--report")[1]) == 3 * 2  # a report trains nothing
    assert command("--table=8", "--seeds=0")[1][3 * 2 :] == [
        f"{UNCHANGED} seed0 train",
        f"{UNCHANGED} seed0 eval",
    ]


def test_columns_by_people_leave_out_what_has_nobody(command, tmp_path):
    assert command("--table=12", "--seeds=0")[0] == 0
    lines = (tmp_path / "out/table12.md").read_text().splitlines()
    assert (
        lines[2]
        == "| Table 12 | seeds | 1 | paper: 1 | paper: 2 | paper: 3 | paper: 4 | paper: >=5 |"
    )
    assert lines[4] == "| late fusion | 1 | 50.0 | 36.94 | 35.02 | 31.21 | 40.52 | 35.36 |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table=4"], "--table=4: must be one of 3, 5, 6"),
        (
            ["--table=8", "--rows=1st,early"],
            "--rows=1st,early: 'early' is in no name of this table's rows: 1st to 3rd layer; 2nd "
            "to 3rd layer; ",
        ),
        (["--table=6", "--seeds=0,0"], "--seeds=0,0: must be whole numbers"),
        (["--table=6", "--seeds=one"], "--seeds=one: must be whole numbers"),
        (
            ["--table=6", "--config.model.num_context_queries=0"],
            "--table=6: needs config.model.num_context_queries above 0",
        ),
        (
            ["--table=6", "--config.model.num_semantic_neighbors=0"],
            "--table=6: needs config.model.num_spatial_neighbors and",
        ),
        (["--table=6", "--split=holdout"], "argument --split: invalid choice: 'holdout'"),
        (
            ["--table=6", "--seeds=9"],
            "row 'baseline: no context queries', seed 9: train.py ended with status 1: error: the "
            "disk is full (all of it: ",
        ),
    ],
)
def test_a_mistake_is_one_line(command, capsys, arguments, message):
    status, _ = command(*arguments)
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_directory_of_another_budget_is_refused(command, capsys):
    command("--table=8", "--seeds=0")
    capsys.readouterr()
    assert command("--table=8", "--seeds=0", "--config.train.epochs=3")[0] == 2
    error = capsys.readouterr().err
    assert "holds a run with other settings (config.train.epochs: 12.0 -> 3.0)" in error


def test_cues_are_told_apart(tmp_path):
    """A model that is right for faces alone: 100 % of the expressions and of no other cue, people
    answered by their own box.
    """
    config = to_builtins(debug.get_config()) | {"multi_label": False}
    config["data"]["test"] = "30"
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = RunConfig.from_mapping(config)
    results = []
    for record in make_dataset(run.data, "test", batch_size=1, seed=0, training=False).records:
        size = np.array([record.width, record.height] * 2, np.float32)
        corners = record.boxes / size
        boxes = np.concatenate(
            [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1
        )
        logits = np.concatenate([record.labels, np.zeros((len(boxes), 1), np.float32)], -1)
        wrong = np.array([cue != "expression" for cue in record.cues])
        logits[wrong, :-1] = np.roll(record.labels[wrong], 1, -1)
        filled = np.zeros((4, logits.shape[-1]), np.float32), np.full((4, 4), 0.001, np.float32)
        filled[0][: len(boxes)], filled[1][: len(boxes)] = logits, boxes
        results.append(
            ImageResult(
                record.image_id, *filled, (record.height, record.width), record.boxes, record.labels
            )
        )
    decoder = Decoder(run.class_names, multi_label=False, subject_logit=True)
    stack_results(results, ResultsInfo(decoder)).save(tmp_path / "predictions_test.npz")
    assert accuracy_by_cue(tmp_path, "test") == {"expression": 1.0, "near": 0.0, "far": 0.0}


def test_cues_of_other_data_are_unknown(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_builtins(emotic_r50.get_config())))
    with pytest.raises(UserError, match=r"cues are known for config.data.source='scenes'"):
        accuracy_by_cue(tmp_path, "test")
