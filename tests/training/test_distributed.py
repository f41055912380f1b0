"""One run as several processes: the numbers of a single one, files of process 0 alone, and words
for flags that do not fit.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsct_jax.errors import UserError
from dsct_jax.runtime import detect_launcher, init_distributed
from dsct_jax.weights.run_directory import load_weights

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "--config=configs/debug.py",
    "--config.train.batch_size=8",
    "--config.train.eval_batch_size=8",
    "--config.data.train=16",
]
SETTINGS += [
    "--config.train.steps=10",
    "--config.train.eval_every=5.0",
    "--config.train.checkpoint_every=5.0",
    "--config.data.test=11",
]
# Adam makes a whole step of a gradient that is rounding noise, and that differs from program to
# program. Clipped far below Adam's epsilon of 1e-8, gradients move the parameters in proportion to
# their size: gradient descent with momentum.
DESCENT = ("learning_rate=10.0", "clip_norm=1e-10", "weight_decay=0.0")
SETTINGS += [f"--config.optimizer.{setting}" for setting in DESCENT]


def start(workdir: Path, *more: str, devices: int) -> subprocess.Popen[str]:
    # of two flags, the last counts
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "train.py", *SETTINGS, f"--workdir={workdir}", *more]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [stdout for stdout, _ in outputs]


def start_two(workdir: Path, *more: str, devices: int = 4) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    several = [f"--coordinator={address}", "--num_processes=2"]
    return [
        start(workdir, *more, *several, f"--process_id={number}", devices=devices)
        for number in range(2)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Work directories after ten steps on one device, and in two processes of four
    (tests/training/test_step.py has one process of eight).
    """
    folder = tmp_path_factory.mktemp("distributed")
    workdirs = {name: folder / name for name in ("one", "two_processes")}
    finish(start(workdirs["one"], devices=1))
    spoken, silent = finish(*start_two(workdirs["two_processes"]))
    assert (
        "8 device(s)" in spoken
        and "process 0 of 2, the only one that writes" in spoken
        and "step 10/10" in spoken
    )
    assert not [
        line
        for line in silent.splitlines()
        if line.startswith(("step", "train:", "validation", "debug"))
    ]
    return workdirs


def lines_of(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(workdir: Path, other: Path) -> None:
    """Losses within 1e-5, relative, and the weights within 1e-5, averaged where the run keeps an
    average.
    """
    expected, found = (
        [line for line in lines_of(run) if "train/total" in line] for run in (workdir, other)
    )
    assert [line["step"] for line in expected] == list(range(1, 11))
    for one, two in zip(expected, found, strict=True):
        assert one.keys() == two.keys() and one["step"] == two["step"]
        for key in one:
            if key.startswith(("train/loss", "train/total")):
                assert two[key] == pytest.approx(one[key], rel=1e-5), (one["step"], key)
    # Clipping hides a factor common to all gradients. The median, because a gradient jumps where
    # rounding takes a sampling point into the next cell: by 1e-4 or so, at one step in several.
    name, pairs = "train/grad_norm", zip(expected, found, strict=True)
    ratios = np.array([two[name] / one[name] for one, two in pairs])
    assert np.median(np.abs(ratios - 1)) < 1e-5
    for ema in (True, False):
        (params, norm_stats, *_), (params2, frozen2, *_) = (
            load_weights(workdir, ema=ema),
            load_weights(other, ema=ema),
        )
        for path, value in (params | norm_stats).items():
            np.testing.assert_allclose(
                (params2 | frozen2)[path], value, rtol=0, atol=1e-5, err_msg=path
            )


def test_the_same_losses_and_parameters(runs):
    same(runs["one"], runs["two_processes"])


@pytest.mark.slow
def test_state_that_is_spread_over_two_processes(tmp_path):
    """Parameters, average and optimizer in four places on two machines: trained, saved and taken up
    again there, and read by one process alone.
    """
    # Layers that are large enough to be spread; and no drop of the learning rate, so that five
    # steps are the beginning of ten.
    changed = [
        "--config.model.feedforward_dim=512",
        "--config.train.ema_decay=0.9",
        "--config.optimizer.drop_at=1.0",
    ]
    finish(start(tmp_path / "one", *changed, devices=1))
    changed += ["--config.train.fsdp=True"]
    finish(*start_two(tmp_path / "spread", *changed, "--config.train.steps=5", devices=2))
    parts = [
        tmp_path / "spread" / "checkpoints" / "5" / part / "ocdbt.process_1" / "d"
        for part in ("model", "training")
    ]
    assert all(any(part.iterdir()) for part in parts)  # each process writes what it holds
    spoken, _ = finish(*start_two(tmp_path / "spread", *changed, devices=2))
    assert "steps 5 to 10" in spoken
    same(tmp_path / "one", tmp_path / "spread")
    assert (
        "steps 10 to 12"
        in finish(start(tmp_path / "spread", *changed, "--config.train.steps=12", devices=1))[0]
    )


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped_and_evaluate_every_image_once(runs, tmp_path):
    spoken, _ = finish(*start_two(runs["two_processes"], "--mode=eval", "--split=test"))
    finish(start(runs["one"], "--mode=eval", "--split=test", devices=1))
    metrics, metrics2 = (
        json.loads((runs[name] / "metrics_test.json").read_text())
        for name in ("one", "two_processes")
    )
    assert (
        metrics2["num_images"] == metrics["num_images"] == 11
        and metrics2["num_people"] == metrics["num_people"] > 0
    )
    assert metrics2["mean_iou"] == pytest.approx(metrics["mean_iou"], abs=1e-4)
    spoken, _ = finish(
        *start_two(runs["one"], "--config.train.steps=12")
    )  # a checkpoint of one process on one device
    assert "steps 10 to 12" in spoken
    assert [line["step"] for line in lines_of(runs["one"])][-1] == 12


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
            None,
        ),  # inside an allocation, but not started by srun
        ({"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "8"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"}, "TPU pod"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "TPU pod"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod of its own
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_launchers_are_recognised(environment, launcher):
    assert detect_launcher(environment) == launcher


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((None, 2, None), "need --coordinator=HOST:PORT"),
        ((None, None, 0), "need --coordinator=HOST:PORT"),
        (("10.0.0.1:1", None, 0), "needs --num_processes and --process_id"),
        (("10.0.0.1:1", 2, 2), "--process_id=2 cannot be used: must be 0 to 1"),
        (("10.0.0.1", 2, 0), "must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(flags, says):
    with pytest.raises(UserError, match=says) as error:
        init_distributed(*flags)
    assert "\n" not in str(error.value)


def test_a_process_of_its_own_joins_nobody(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert init_distributed(None, None, None) is None
