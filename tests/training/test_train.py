"""The run from the command line: what two steps leave behind, what a kill costs, and the one line
that each bad input gets.

The whole program runs in processes of its own, with the shared compilation cache; what concerns the
loop alone runs here with a step that only counts.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import train
from dsct_jax.batch import Predictions
from dsct_jax.config import read_config, to_builtins
from dsct_jax.model.build import Network
from dsct_jax.runtime import Preemption
from dsct_jax.weights.run_directory import load_weights

ROOT = Path(__file__).parents[2]
DEBUG = "--config=configs/debug.py"
EIGHT = [
    "--config.train.batch_size=8",
    "--config.train.eval_batch_size=8",
]  # the tests' own process has 8 devices
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
}  # one device; compiled in a third of the time


def command(*arguments: str) -> list[str]:
    return [sys.executable, "train.py", *map(str, arguments)]


def run(arguments: list[str], *, killed: bool = False) -> str:
    """The stdout of a process that ends well, or by SIGKILL."""
    done = subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stdout + done.stderr
    return done.stdout


def lines_of(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))}
        for line in lines
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(workdir, stdout) of the debug run, six steps in three epochs."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    return workdir, run(command(DEBUG, f"--workdir={workdir}"))


def test_a_run_leaves_everything_behind(unbroken):
    workdir, stdout = unbroken
    files = {
        "checkpoints",
        "compilations.jsonl",
        "config.json",
        "env.json",
        "metrics.jsonl",
        "tensorboard",
        "val_predictions.png",
    }
    assert {path.name for path in workdir.iterdir()} == files
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert [path for path in (workdir / "tensorboard").iterdir() if path.stat().st_size > 500]
    assert to_builtins(json.loads((workdir / "config.json").read_text())) == read_config(
        ROOT / "configs" / "debug.py"
    )
    environment = json.loads((workdir / "env.json").read_text())
    assert environment["versions"].keys() >= {"jax", "flax", "python"}
    assert environment["devices"] == {"platform": "cpu", "kind": "cpu", "count": 1}
    assert "compiled for images (2, 80, 80, 3) in" in stdout
    assert "step 6/6" in stdout


def test_every_logged_number_is_finite(unbroken):
    lines = lines_of(unbroken[0])
    steps = [line for line in lines if "train/total" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(value) for line in steps for value in line.values())
    assert [line["step"] for line in lines if "val/mean_iou" in line] == [2, 4, 6]


def test_what_should_move_moved_and_what_is_frozen_stayed(unbroken):
    workdir, _ = unbroken
    after, norm_stats, *_ = load_weights(workdir)
    config = train.RunConfig.from_mapping(read_config(ROOT / "configs" / "debug.py"))
    before, statistics = Network(config.model).init(seed=0)
    assert after.keys() == before.keys()
    assert norm_stats.keys() == statistics.keys() == set()  # group norm: no statistics
    moved = {name for name in after if not np.array_equal(after[name], before[name])}
    still = {name for name in after if name.startswith(("backbone/stem/", "backbone/layer1/"))}
    assert still
    assert moved == after.keys() - still


def test_a_line_tells_how_fast_how_large_and_how_far(unbroken):
    line = json.loads((unbroken[0] / "metrics.jsonl").read_text().splitlines()[0])
    assert {
        "time/images_per_s",
        "time/data_wait",
        "time/step_seconds_p50",
        "time/step_seconds_p90",
        "time/step_seconds_p99",
    } <= line.keys()
    assert {
        "memory/process_mib",
        "train/learning_rate",
        "train/learning_rate/0.1x",
        "train/grad_norm/backbone",
        "train/nonfinite",
    } <= line.keys()
    np.testing.assert_allclose(
        line["train/learning_rate/0.1x"], 0.1 * line["train/learning_rate"], rtol=1e-6
    )
    assert 100 < line["memory/process_mib"] < 20000


def test_every_program_is_told_and_each_half_is_compiled_once_a_bucket(unbroken):
    programs = [
        json.loads(line) for line in (unbroken[0] / "compilations.jsonl").read_text().splitlines()
    ]
    in_steps = [program for program in programs if program["bucket"] == "2x80x80x3"]
    assert {program["step"] for program in in_steps} == {1}
    halves = [
        program["program"]
        for program in in_steps
        if program["program"] in ("jit(_predict)", "jit(_finish_whole)")
    ]
    assert sorted(halves) == ["jit(_finish_whole)", "jit(_predict)"]
    assert all(program["seconds"] > 0 for program in in_steps)
    assert {program["step"] for program in programs if program["bucket"] == "validation"} <= {
        2
    }  # the first one


def test_evaluation_repeats_the_last_validation(unbroken):
    workdir, _ = unbroken
    stdout = run(command(DEBUG, f"--workdir={workdir}", "--mode=eval", "--split=val"))
    metrics = json.loads((workdir / "metrics_val.json").read_text())
    last = lines_of(workdir)[-1]
    expected = {
        name.removeprefix("val/"): value for name, value in last.items() if name.startswith("val/")
    }
    assert len(expected) > 5
    assert {name: metrics[name] for name in expected} == expected
    assert "mean_iou" in stdout


# Runs train.py with a SIGKILL waiting where the first argument says.
KILLED_RUN = """
import os, signal, sys
import train

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def while_writing(event, arguments):
    # orbax has written one part of checkpoint 4 and renames it; the others are not complete
    if event == "os.rename" and "checkpoints/4.orbax-checkpoint-tmp" in str(arguments[0]):
        kill()

if sys.argv[1] == "writing":
    sys.addaudithook(while_writing)
else:
    progress = train.Logbook.progress
    train.Logbook.progress = lambda self, step, *text: (
        kill() if step == int(sys.argv[1]) else progress(self, step, *text)
    )
sys.exit(train.main(sys.argv[2:]))
"""


def test_a_killed_run_continues_as_if_nothing_had_happened(unbroken, tmp_path):
    workdir = tmp_path / "run"
    arguments = [DEBUG, f"--workdir={workdir}"]
    run([sys.executable, "-c", KILLED_RUN, "writing", *arguments], killed=True)
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert "2" in left
    assert "4" not in left
    assert any(name.startswith("4.") for name in left), (
        "the kill came before or after the checkpoint, not in the middle"
    )

    run([sys.executable, "-c", KILLED_RUN, "5", *arguments], killed=True)  # an epoch has two steps
    assert lines_of(workdir)[-1]["step"] == 5

    stdout = run(command(*arguments))
    assert (
        "steps 2 to 6" in stdout or "steps 4 to 6" in stdout
    )  # checkpoint 4 was being written in the background when the kill came
    assert "settings changed" not in stdout
    assert lines_of(workdir) == lines_of(unbroken[0])
    for ours, theirs in zip(
        load_weights(workdir)[0].values(), load_weights(unbroken[0])[0].values(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


# --- the loop, with a step that only counts -------------------------------------------------------


def only_count(functions, optimizer, **_):
    def step(state, batch):
        number = int(state.step) + 1
        return dataclasses.replace(state, step=jnp.int32(number)), {
            "total": jnp.float32(number),
            "nonfinite": jnp.float32(0),
        }

    return step


@functools.cache
def model_functions(config):
    functions = Network(config)
    functions.init = functools.cache(functions.init)
    return functions


@pytest.fixture
def counting(monkeypatch):
    """train.main on one device, with a step that only counts and a model that answers nothing in
    particular.
    """

    def eval_step(params, norm_stats, batch):
        b = len(batch.real)
        return Predictions(jnp.zeros((1, b, 4, 5)), jnp.full((1, b, 4, 4), 0.5))

    mesh = train.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(train, "make_mesh", lambda **_: mesh)
    monkeypatch.setattr(train, "make_train_step", only_count)
    monkeypatch.setattr(train, "make_eval_step", lambda functions, mesh: eval_step)
    monkeypatch.setattr(train, "Network", model_functions)
    return train.main


def test_a_longer_schedule_goes_on_from_the_end(counting, tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert counting([DEBUG, workdir, "--config.train.steps=3", "--config.train.log_every=2"]) == 0
    assert counting([DEBUG, workdir, "--config.train.steps=3", "--config.train.log_every=2"]) == 0
    assert "nothing left to train" in capsys.readouterr().out
    assert counting([DEBUG, workdir, "--config.train.steps=5", "--config.train.log_every=2"]) == 0
    out = capsys.readouterr().out
    assert "steps 3 to 5" in out
    assert "settings changed since the last start: config.train.steps: 3 -> 5" in out
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines if "train/total" in line] == [
        2,
        3,
        4,
        5,
    ]  # every second step, and the last one
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 5


def test_lines_between_checkpoints_are_means(counting, tmp_path):
    arguments = [
        "--config.train.steps=7",
        "--config.train.log_every=2",
        "--config.train.checkpoint_every=2.5",
    ]
    assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", *arguments]) == 0
    lines = [
        (line["step"], line["train/total"])
        for line in lines_of(tmp_path / "run")
        if "train/total" in line
    ]
    assert lines == [(2, 1.5), (4, 3.5), (5, 5.0), (6, 6.0), (7, 7.0)]
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        2,
        5,
        7,
    ]  # 2: the best validation


def losing(first: int, last: int):
    """A step that counts, and whose loss is lost from step `first` to step `last`."""

    def make(functions, optimizer, **_):
        step = only_count(functions, optimizer)

        def lost(state, batch):
            state, terms = step(state, batch)
            if not first <= state.step <= last:
                return dataclasses.replace(state, skipped=jnp.int32(0)), terms
            return dataclasses.replace(state, skipped=state.skipped + 1), {
                "total": jnp.float32(np.nan),
                "nonfinite": jnp.float32(1),
            }

        return lost

    return make


def test_a_loss_that_stays_lost_stops_the_run_before_anything_is_overwritten(
    counting, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(train, "make_train_step", losing(3, 99))
    assert (
        counting(
            [
                DEBUG,
                f"--workdir={tmp_path / 'run'}",
                "--config.train.epochs=5",
                "--config.train.max_skipped=0",
            ]
        )
        == 2
    )
    assert one_error(
        capsys,
        "step 3",
        "not finite, 1 step(s) in a row",
        "config.optimizer.learning_rate",
        "not_finite_step3_process0.npz",
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert [line["step"] for line in lines_of(tmp_path / "run")][-1] == 2
    with np.load(tmp_path / "run" / "not_finite_step3_process0.npz") as batch:
        assert (
            batch["images"].shape == (2, 80, 80, 3)
            and batch["boxes"].shape == (2, 4, 4)
            and set(batch["image_ids"]) <= {0, 1, 2, 3}
        )


def test_single_steps_that_are_lost_are_skipped_and_counted(counting, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "make_train_step", losing(3, 3))
    arguments = [
        "--config.train.steps=6",
        "--config.train.log_every=2",
        "--config.train.checkpoint_every=50.0",
    ]
    assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", *arguments]) == 0
    lines = [
        (line["step"], line["train/total"], line["train/nonfinite"])
        for line in lines_of(tmp_path / "run")
        if "train/total" in line
    ]
    assert lines == [(2, 1.5, 0), (4, 4.0, 0.5), (6, 5.5, 0)]


def test_sigterm_saves_and_the_same_command_goes_on(counting, monkeypatch, tmp_path, capsys):
    def told_to_stop(functions, optimizer, **_):
        step = only_count(functions, optimizer)

        def stopped(state, batch):
            state, terms = step(state, batch)
            if state.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return state, terms

        return stopped

    arguments = [
        DEBUG,
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=6",
        "--config.train.checkpoint_every=50.0",
    ]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "make_train_step", told_to_stop)
    assert counting(arguments) == 0
    assert (
        "asked to stop: saved at step 3; the same command continues from there"
        in capsys.readouterr().out
    )
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "2",
        "3",
    ]  # 2: the best validation
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(train, "make_train_step", only_count)
    assert counting(arguments) == 0
    assert "steps 3 to 6" in capsys.readouterr().out
    assert [
        line["train/total"] for line in lines_of(tmp_path / "run") if "train/total" in line
    ] == [1, 2, 3, 4, 5, 6]


def test_an_interrupt_that_a_callback_swallows_is_not_lost(counting, monkeypatch, tmp_path, capsys):
    def interrupted(functions, optimizer, **_):
        step = only_count(functions, optimizer)

        def swallowing(state, batch):
            state, terms = step(state, batch)
            if state.step == 3:
                with contextlib.suppress(
                    KeyboardInterrupt
                ):  # as Python does with what is raised inside a callback of its garbage collector
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(1)
            return state, terms

        return swallowing

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "make_train_step", interrupted)
    assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", "--config.train.steps=6"]) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert [line["step"] for line in lines_of(tmp_path / "run") if "train/total" in line] == [1, 2]


def test_starting_from_the_weights_of_another_run(counting, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert counting([DEBUG, f"--workdir={first}", "--config.train.steps=1", "--config.seed=7"]) == 0
    capsys.readouterr()
    other_classes = "--config.class_names=('Sad','Happy','Fear','Anger')"
    arguments = [
        DEBUG,
        f"--workdir={second}",
        "--config.train.steps=1",
        f"--config.init_from={first}",
        other_classes,
    ]
    assert counting(arguments) == 0
    out = capsys.readouterr().out
    assert "re-initialized: class_head" in out and (second / "init_from.txt").read_text() in out
    theirs, ours = load_weights(first).params, load_weights(second).params
    for path, value in ours.items():
        assert path.startswith("class_head") or np.array_equal(value, theirs[path]), path
    assert not np.array_equal(
        ours["class_head/kernel"], theirs["class_head/kernel"]
    )  # number 0 is another class now
    assert counting([*arguments[:2], "--config.train.steps=2", *arguments[3:]]) == 0
    assert "steps 1 to 2" in capsys.readouterr().out  # a run that continues has its own weights
    assert (
        counting([DEBUG, f"--workdir={tmp_path / 'third'}", "--config.init_from=/nowhere.pth"]) == 2
    )
    assert one_error(capsys, "/nowhere.pth")


def test_a_plan_needs_neither_a_workdir_nor_data(counting, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(
        train,
        "make_plan",
        lambda step, state, buckets, **sizes: asked.update(sizes, buckets=buckets),
    )
    monkeypatch.setattr(train, "format_plan", lambda plan: "the plan")
    assert counting([DEBUG, "--mode=plan", "--config.data.data_dir=/nowhere"]) == 0
    sizes = {"batch_size": 2, "max_targets": 4, "num_classes": 4, "buckets": ((80, 80),)}
    assert asked == sizes | {"crops": None}
    assert "the plan" in capsys.readouterr().out


def test_the_best_validation_is_kept_and_no_better_one_ends_the_run(
    counting, monkeypatch, tmp_path, capsys
):
    values = iter([0.3, 0.5, 0.4, 0.45, 0.9])
    monkeypatch.setattr(
        train, "evaluate", lambda *_, **__: {"accuracy": next(values), "mean_iou": 1.0}
    )
    settings = [
        "--config.train.epochs=9",
        "--config.train.early_stopping=2",
        "--config.train.keep_checkpoints=1",
    ]
    assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", *settings]) == 0
    out = capsys.readouterr().out
    assert (
        "stopped early: accuracy has not improved in 2 validations since step 4 "
        "(config.train.early_stopping=2)" in out
    )
    assert "best validation: accuracy 0.500 at step 4" in out
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["4", "8"]
    assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", *settings]) == 0  # remembered
    assert "stopped early" in capsys.readouterr().out
    assert (
        counting([DEBUG, f"--workdir={tmp_path / 'other'}", "--config.train.best_metric=mAPP"]) == 2
    )
    assert one_error(capsys, "config.train.best_metric='mAPP'", "accuracy")


def test_a_stop_between_two_lines_leaves_the_curve_as_it_is(
    counting, monkeypatch, tmp_path, capsys
):
    settings = [
        "--config.train.steps=9",
        "--config.train.log_every=5",
        "--config.train.eval_every=2.0",
        "--config.train.checkpoint_every=4.0",
    ]
    assert counting([DEBUG, f"--workdir={tmp_path / 'unbroken'}", *settings]) == 0
    for asked in (3, 4, 7):  # 4: a validation is due, and is made up for
        monkeypatch.setattr(Preemption, "reached", lambda self, step, asked=asked: step == asked)
        assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", *settings]) == 0
        assert f"asked to stop: saved at step {asked};" in capsys.readouterr().out
        assert (tmp_path / "run" / "checkpoints" / str(asked)).is_dir()
    monkeypatch.setattr(Preemption, "reached", lambda self, step: False)
    assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", *settings]) == 0
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "unbroken")


def test_the_best_calibration_is_the_lowest(counting, monkeypatch, tmp_path, capsys):
    values = iter([0.4, 0.1, 0.2, 0.3])
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: {"brier": next(values)})
    settings = ["--config.train.epochs=4", "--config.train.best_metric=brier"]
    assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", *settings]) == 0
    assert "best validation: brier 0.100 at step 4" in capsys.readouterr().out


def test_a_validation_is_kept_with_its_checkpoint(counting, monkeypatch, tmp_path):
    settings = ["--config.train.steps=4", "--config.train.checkpoint_every=0.5"]
    monkeypatch.setattr(Preemption, "reached", lambda self, step: step == 4)
    assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", *settings]) == 0
    decoders = [load_weights(tmp_path / "run", step).metadata.get("decoder") for step in (2, 3, 4)]
    assert decoders[0]["fitted_on"] == "val"
    assert decoders[1:] == [None, None]  # none was made; one was due, and is made up for later


def test_a_validation_that_was_owed_is_written_once(counting, monkeypatch, tmp_path):
    settings = ["--config.train.steps=6", "--config.train.checkpoint_every=50.0"]
    assert counting([DEBUG, f"--workdir={tmp_path / 'unbroken'}", *settings]) == 0
    monkeypatch.setattr(Preemption, "reached", lambda self, step: step == 4)
    assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", *settings]) == 0
    monkeypatch.setattr(Preemption, "reached", lambda self, step: False)
    for end in ("killed", "the end"):
        loop = train.train_loop if end == "the end" else (lambda *_, **__: None)
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_loop", loop)
            assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", *settings]) == 0
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "unbroken")


def test_compiled_programs_have_one_place(counting, monkeypatch, tmp_path):
    """That of the user's cache (start_process), whatever the run."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_compilation_cache_dir
    assert counting([DEBUG, f"--workdir={tmp_path / 'run'}", "--config.train.steps=1"]) == 0
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "run" / "compiled").exists()


def test_weights_and_biases_only_where_it_is_asked_for(counting, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert (
        counting(
            [
                DEBUG,
                f"--workdir={tmp_path / 'run'}",
                "--config.train.wandb=emotions",
                "--config.train.steps=1",
            ]
        )
        == 2
    )
    assert one_error(capsys, "config.train.wandb='emotions'", "pip install wandb")
    logged = []

    class FakeRun:
        def log(self, scalars, step):
            logged.append((step, scalars.get("train/total")))

        def finish(self):
            logged.append("finished")

    fake = types.ModuleType("wandb")
    fake.init = lambda **about: logged.append(about["project"]) or FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert (
        counting(
            [
                DEBUG,
                f"--workdir={tmp_path / 'run'}",
                "--config.train.wandb=emotions",
                "--config.train.steps=1",
            ]
        )
        == 0
    )
    assert logged == ["emotions", (1, 1.0), (1, None), "finished"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--config.model.fusion=released"], ["config.model.fusion: 'paper' -> 'released'"]),
        (["--config.model.hidden_dim=64"], ["config.model.hidden_dim: 32 -> 64"]),
        (
            ["--config.multi_label=True", "--config.train.seed=1"],
            ["--config.train.seed: unknown field"],
        ),
        (["--config.multi_label=True"], ["config.multi_label: False -> True"]),
    ],
)
def test_the_checkpoint_of_another_model_is_refused_and_kept(
    counting, changes, says, tmp_path_factory, capsys
):
    workdir = tmp_path_factory.getbasetemp() / "another_model"
    arguments = [DEBUG, f"--workdir={workdir}", "--config.train.steps=1"]
    if not workdir.exists():
        assert counting(arguments) == 0
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    for mode in ("train", "eval"):
        assert counting([*arguments, *changes, f"--mode={mode}"]) == 2
        assert one_error(capsys, *says)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


# --- bad input: one line, exit status 2 -----------------------------------------------------------


def one_error(capsys, *needles: str) -> str:
    """The one line on stderr, which names all of `needles`."""
    written = capsys.readouterr().err
    lines = [line for line in written.splitlines() if line]
    assert len(lines) == 1, written
    assert lines[0].startswith("error: ")
    for needle in needles:
        assert needle in lines[0]
    return lines[0]


def write_config(path: Path, body: str) -> str:
    path.write_text(
        "from configs import debug\n\n\ndef get_config():\n    config = debug.get_config()\n    "
        f"{body}\n    return config\n"
    )
    return f"--config={path}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config=configs/nope.py"], ["configs/nope.py", "no such file"]),
        (["--mode=train"], ["--config is missing"]),
        ([DEBUG, "--config.model.foo=1"], ["--config.model.foo: unknown field", "hidden_dim"]),
        (
            [DEBUG, "--config.modle.hidden_dim=64"],
            ["--config.modle", "did you mean --config.model?"],
        ),
        ([DEBUG, "--config.train.epochs=many"], ["--config.train.epochs=many"]),
        (
            [DEBUG, "--config.data.buckets=(80,80)"],
            ["config.data.buckets=(80, 80)", "a list, each entry (a whole number, a whole number)"],
        ),
        ([DEBUG, "--config.train.log_every=0"], ["config.train.log_every=0", "at least 1"]),
        ([DEBUG, "--config.train.eval_every=0.0"], ["config.train.eval_every=0.0", "more than 0"]),
        ([DEBUG, "--config.data.train=0"], ["config.data.train='0'", "number of images"]),
        ([DEBUG, "--config.model.num_heads=5"], ["model.num_heads"]),
        ([DEBUG, "--wrokdir=x"], ["--wrokdir=x: unexpected argument"]),
        ([DEBUG, "--config.seed", "1"], ["1: unexpected argument", "--config.section.field=value"]),
        ([DEBUG, "--profile=3"], ["--profile=3", "STEP:NUMBER"]),
        ([DEBUG, "--config.train.ema_decay=1.5"], ["ema_decay=1.5"]),
        ([DEBUG, "--mode=evaluate"], ["--mode", "'evaluate'"]),
        ([DEBUG, "--mode=eval", "--split=tset"], ["--split", "'tset'", "'test'"]),
        ([DEBUG, "--mode=eval"], ["no checkpoints/ here", "--workdir"]),
        ([DEBUG, "--mode=eval", "--checkpoint=best"], ["no checkpoints/ here", "--workdir"]),
        (
            [DEBUG, "--mode=eval", "--checkpoint=bset"],
            ["--checkpoint=bset", "newest, best or the step"],
        ),
    ],
)
def test_a_command_that_cannot_be_used(arguments, says, tmp_path, capsys):
    assert (
        train.main(
            [*arguments, f"--workdir={tmp_path / 'run'}", *(EIGHT if DEBUG in arguments else [])]
        )
        == 2
    )
    assert one_error(capsys, *says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "config.model.hiden_dim = 64",
            ["config.model.hiden_dim: unknown field", "did you mean config.model.hidden_dim?"],
        ),
        (
            "config.train.epoch = 3",
            ["config.train.epoch: unknown field", "did you mean config.train.epochs?"],
        ),
        ("config.sede = 3", ["config.sede: unknown field", "did you mean config.seed?"]),
        ("config.data.train = 4", ["x.py, line 6", "4 is of original type <class 'int'>"]),
        ("config.modle.hidden_dim = 4", ["x.py, line 6", "modle"]),
        ("del config.train", ["config.train: missing", "configs/base.py"]),
        ("del config.name", ["config.name: missing", "configs/base.py"]),
        (
            "config.loss.update({'class_weights': ('heavy',)})",
            ["config.loss.class_weights", "a number"],
        ),
        ("return None", ["x.py", "gives no mapping"]),
        ("return (", ["x.py", "SyntaxError"]),
    ],
)
def test_a_configuration_that_cannot_be_used(body, says, tmp_path, capsys):
    assert train.main([write_config(tmp_path / "x.py", body), f"--workdir={tmp_path / 'run'}"]) == 2
    assert one_error(capsys, *says)


def test_a_batch_that_the_devices_cannot_share(tmp_path, capsys):
    assert train.main([DEBUG, f"--workdir={tmp_path / 'run'}", "--config.train.batch_size=12"]) == 2
    assert one_error(capsys, "config.train.batch_size=12", "8 devices", "a multiple of 8")
    assert train.main([DEBUG, f"--workdir={tmp_path / 'run'}", "--config.train.batch_size=16"]) == 2
    assert one_error(capsys, "config.train.eval_batch_size=2")


def test_a_workdir_that_is_none(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main([DEBUG, f"--workdir={tmp_path / 'file'}", *EIGHT]) == 2
    assert one_error(capsys, "--workdir", "is a file")
    assert train.main([DEBUG, f"--workdir={tmp_path / 'file' / 'run'}", *EIGHT]) == 2
    assert one_error(capsys, "--workdir", "file/run")


def images(
    root: Path, *, category: object = 1, box: object = (10, 10, 20, 20), number: int = 8
) -> list[str]:
    """A COCO-style data set of small images with one person each, for every split; the arguments
    that name it.
    """
    root.mkdir()
    for index in range(number):
        pixels = np.random.default_rng(index).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
    document = {
        "images": [
            {"id": index, "file_name": f"{index}.png", "width": 64, "height": 48}
            for index in range(number)
        ],
        "annotations": [
            {"id": index, "image_id": index, "category_id": category, "bbox": list(box)}
            for index in range(number)
        ],
    }
    for split in ("train", "val", "test"):
        (root / f"{split}.json").write_text(json.dumps(document))
    files = [f"--config.data.{split}={split}.json" for split in ("train", "val", "test")]
    return [*files, f"--config.data.data_dir={root}", "--config.data.source=coco"]


def damage(path: Path) -> None:
    """A file whose header is good and whose pixels end early."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_split(root: Path) -> None:
    (root / "train.json").unlink()


def cut_json(root: Path) -> None:
    (root / "train.json").write_text((root / "train.json").read_text()[:100])


def no_image(root: Path) -> None:
    (root / "3.png").unlink()


def no_picture(root: Path) -> None:
    (root / "3.png").write_text("this is no picture")


@pytest.mark.parametrize(
    ("data", "spoil", "says"),
    [
        ({}, no_split, ["train.json: no such annotation file", "config.data.data_dir"]),
        ({}, cut_json, ["train.json: not valid json", "cut short"]),
        (
            {},
            no_image,
            ["3.png: no such image file", "config.data.data_dir", "config.data.skip_corrupt"],
        ),
        ({}, no_picture, ["3.png: cannot be read as an image", "config.data.skip_corrupt"]),
        (
            {"category": 9},
            None,
            ["train.json: annotation 0", "category_id 9", "unknown category", "0, 1, 2, 3"],
        ),
        ({"box": (70, 5, 9, 9)}, None, ["train.json: shows no person"]),
        ({"box": (1, 2, 3)}, None, ["train.json: annotation 0 needs a bbox"]),
    ],
)
def test_data_that_cannot_be_used(data, spoil, says, tmp_path, capsys):
    arguments = images(tmp_path / "data", **data)
    if spoil is not None:
        spoil(tmp_path / "data")
    assert train.main([DEBUG, f"--workdir={tmp_path / 'run'}", *EIGHT, *arguments]) == 2
    assert one_error(capsys, *says)
    assert not (tmp_path / "run").exists()


def test_a_missing_data_dir(tmp_path, capsys):
    arguments = [
        "--config.data.source=coco",
        f"--config.data.data_dir={tmp_path / 'nowhere'}",
        "--config.data.train=train.json",
    ]
    assert train.main([DEBUG, f"--workdir={tmp_path / 'run'}", *EIGHT, *arguments]) == 2
    assert one_error(capsys, "nowhere/train.json", "config.data.data_dir")


def test_boxes_without_area_are_dropped_and_counted(counting, tmp_path, capsys):
    arguments = images(tmp_path / "data")
    path = tmp_path / "data" / "train.json"
    document = json.loads(path.read_text())
    document["annotations"][2]["bbox"] = [70, 5, 9, 9]
    document["annotations"][5]["bbox"] = [5, 5, 0, 9]
    path.write_text(json.dumps(document))
    assert (
        counting([DEBUG, f"--workdir={tmp_path / 'run'}", *arguments, "--config.train.steps=1"])
        == 0
    )
    assert (
        "8 images, 6 people; 2 boxes dropped, outside the image or without area (first: 2.png"
        in capsys.readouterr().out
    )


def test_a_damaged_image_stops_the_run_or_is_counted_at_the_end(counting, tmp_path, capsys):
    arguments = [
        DEBUG,
        f"--workdir={tmp_path / 'run'}",
        *images(tmp_path / "data"),
        "--config.train.steps=3",
    ]
    damage(tmp_path / "data" / "4.png")
    assert counting(arguments) == 2
    assert one_error(capsys, "4.png", "config.data.skip_corrupt=True")
    no_image(tmp_path / "data")
    assert counting([*arguments, "--config.data.skip_corrupt=True"]) == 0
    out = capsys.readouterr().out
    assert "7 images, 7 people; 1 images skipped, missing or damaged (first: 3.png)" in out
    assert (
        "left out: 2 image(s) that could not be opened and 1 with damaged pixels" in out
    )  # the two: 3.png in train and in val
    assert [line["step"] for line in lines_of(tmp_path / "run") if "train/total" in line] == [
        1,
        2,
        3,
    ]
    assert counting([*arguments, "--config.data.skip_corrupt=True", "--mode=eval"]) == 0
    out = capsys.readouterr().out
    assert "left out: 1 image(s) that could not be opened and 1 with damaged pixels" in out
    assert json.loads((tmp_path / "run" / "metrics_test.json").read_text())["num_images"] == 6


def test_an_unreadable_last_checkpoint_is_named(counting, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        sys, "unraisablehook", lambda _: None
    )  # as in tests/training/test_checkpoint.py
    arguments = [DEBUG, f"--workdir={tmp_path / 'run'}", "--config.train.steps=2"]
    assert counting(arguments) == 0
    for path in (tmp_path / "run" / "checkpoints" / "2" / "model").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            damage(path)
    for mode in ("train", "eval"):
        assert counting([*arguments, f"--mode={mode}"]) == 2
        assert one_error(capsys, "checkpoints/2", "remove")


def test_the_results_name_the_checkpoint_that_was_read(counting, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    arguments = [DEBUG, f"--workdir={tmp_path / 'run'}", "--config.train.steps=4"]
    assert counting(arguments) == 0
    for path in (tmp_path / "run" / "checkpoints" / "4" / "model").rglob("*"):
        if path.is_file():
            damage(path)
    assert counting([*arguments, "--mode=eval", "--split=val"]) == 0
    for name in ("metrics_val.json", "thresholds.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["checkpoint"] == "step 2"


def test_nothing_is_drawn_where_the_first_images_are_damaged(counting, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "DRAWN_IMAGES", 2)
    monkeypatch.setattr(train, "DRAWN_IN_TRAINING", 2)
    arguments = [
        DEBUG,
        f"--workdir={tmp_path / 'run'}",
        *images(tmp_path / "data"),
        "--config.data.skip_corrupt=True",
        "--config.train.steps=2",
    ]
    for index in (0, 1):
        damage(tmp_path / "data" / f"{index}.png")
    assert counting(arguments) == 0
    assert counting([*arguments, "--mode=eval"]) == 0
    assert not list((tmp_path / "run").glob("*predictions*.png"))
    assert json.loads((tmp_path / "run" / "metrics_test.json").read_text())["num_images"] == 6


def test_a_configuration_comes_back_from_json():
    run = train.RunConfig.from_mapping(read_config(ROOT / "configs" / "emotic_r50.py"))
    stored = to_builtins(json.loads(json.dumps(run.to_dict())))
    assert train.RunConfig.from_mapping(stored) == run


def test_the_process_ends_with_status_2_and_one_line(tmp_path):
    done = subprocess.run(
        command(DEBUG, f"--workdir={tmp_path}", "--config.model.foo=1"),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --config.model.foo: unknown field")
    assert done.stderr.count("\n") == 1


def test_an_interrupt_says_how_to_continue(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    assert train.main([DEBUG, f"--workdir={tmp_path}"]) == 130
    assert "continues from the last checkpoint" in capsys.readouterr().err


def test_an_interrupted_evaluation_promises_nothing(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "evaluate_checkpoint", interrupted)
    monkeypatch.setattr(train, "print_plan", interrupted)
    for mode in ("eval", "plan"):
        assert train.main([DEBUG, f"--workdir={tmp_path}", f"--mode={mode}"]) == 130
        assert capsys.readouterr().err == "interrupted\n"
