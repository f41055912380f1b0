"""The comparison trains every network for the same time, asks every two-stage network twice, and
prints what the runs measured.
"""

import json

import pytest

from benchmarks import one_stage_or_two
from dsct_jax.cli import run_command

SECONDS = {"dsct": 0.05, "dsct_without_context": 0.04, "caer_net_s": 0.02}


@pytest.fixture
def calls(monkeypatch):
    """Stands in for train.py: notes the runs and writes their files; with boxes found, accuracy is
    0.25 lower.
    """
    noted = []

    def train(run, *, split, launch, boxes=()):
        noted.append((run.row.key, run.seed, run.config["train"]["steps"], *boxes))
        run.workdir.mkdir(parents=True, exist_ok=True)
        (run.workdir / "config.json").write_text(json.dumps(run.config))
        times = {"step": 1, "time/step_seconds_p50": SECONDS[run.row.key]}
        (run.workdir / "metrics.jsonl").write_text(json.dumps(times) + "\n")
        for suffix, lost in (("", 0.0), *(("_found", 0.25) for _ in boxes)):
            right = 0.5 + run.seed / 10 - lost
            buckets = {"1": {"accuracy": right}, "2": {"accuracy": right}, "3": {"people": 0}}
            metrics = {"accuracy": right, "macro_f1": right / 2, "mean_iou": 0.8}
            metrics |= {"majority_accuracy": 0.3, "num_images": 4, "num_people": 7}
            file = run.workdir / f"metrics_{split}{suffix}.json"
            file.write_text(json.dumps(metrics | {"buckets": buckets}))
        (run.workdir / f"predictions_{split}.npz").touch()

    monkeypatch.setattr(one_stage_or_two, "train", train)
    monkeypatch.setattr(one_stage_or_two, "milliseconds", lambda *_: 5.0)
    return noted


def run(tmp_path, *more):
    flags = ["--config=configs/debug.py", "--minutes=1", "--two-stage=caer_net_s", "--seeds=0,1"]
    command = [*flags, f"--output={tmp_path}", *more]
    return run_command(lambda: one_stage_or_two.run(command))


def test_same_time_and_both_kinds_of_boxes(tmp_path, calls, capsys):
    assert run(tmp_path) == 0
    pytest.importorskip("matplotlib")
    steps = {"dsct": 1200, "dsct_without_context": 1500, "caer_net_s": 3000}
    timing = [(name, 0, one_stage_or_two.MEASURED_STEPS) for name in steps]
    assert [one[:3] for one in calls] == timing + [
        (name, seed, count) for seed in (0, 1) for name, count in steps.items()
    ]
    assert calls[-1][3:] == (f"--boxes={tmp_path / 'dsct/seed1'}",) and len(calls[-2]) == 3
    done = len(calls)
    assert run(tmp_path) == 0 and len(calls) == done  # nothing is trained twice
    numbers = json.loads((tmp_path / "one_stage_or_two.json").read_text())
    assert numbers["percent"]["caer_net_s given"]["accuracy"] == [50, 60]
    assert numbers["percent"]["caer_net_s found"]["2 in image"] == [25, 35]
    assert "box IoU" not in numbers["percent"]["caer_net_s given"]
    assert numbers["costs"]["caer_net_s"]["steps"] == 3000
    text = (tmp_path / "one_stage_or_two.md").read_text()
    assert "| dsct | its own | 55.0 ± 7.1 | 27.5 ± 3.5 | 80.0 ± 0.0 |" in text
    assert "the most frequent class: 30.0 %" in text and "1 minutes" in text
    assert (tmp_path / "one_stage_or_two.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--two-stage=nobody", "there is no configs/nobody.py"),
        ("--two-stage=demo", "configs/demo.py is no two-stage network"),
        ("--config=configs/caer_net_s.py", "must be one of DSCT"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, calls, capsys, flag, says):
    assert run(tmp_path, flag) == 2
    assert says in capsys.readouterr().err and not calls
