"""An archive: one row per image, whoever was killed and however many processes took part."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dsct_jax
from dsct_jax.__main__ import main
from dsct_jax.commands import predict_many
from dsct_jax.commands.predict_many import parse_shard
from dsct_jax.config import read_config
from dsct_jax.errors import UserError
from dsct_jax.model.build import Network, network_config
from tests.commands.test_unfinished import Brightness

pyarrow_dataset = pytest.importorskip("pyarrow.dataset", reason="the parquet extra is missing")
ROOT = Path(__file__).parents[2]
SIZES = [(90, 60), (60, 90), (64, 64)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """23 images for three canvases, one of which is damaged; 6 chunks of 4."""
    monkeypatch.setattr(predict_many, "load_model", lambda _: Brightness())
    (tmp_path / "in").mkdir()
    for number in range(23):
        color = (9 * number, 90, 200 - 7 * number)
        Image.new("RGB", SIZES[number % 3], color).save(tmp_path / f"in/{number:02d}.png")
    (tmp_path / "in/04.png").write_bytes(b"no image")
    return tmp_path


def run(folder, *more: str) -> int:
    flags = ["--checkpoint=run", f"--output={folder / 'out'}", "--chunk=4", "--batch-size=2"]
    return main(["predict-many", str(folder / "in"), *flags, *more])


def rows_of(folder) -> list[dict]:
    return pyarrow_dataset.dataset(folder / "out").to_table().to_pylist()


def test_each_image_has_one_row(folder, capsys):
    assert run(folder) == 0
    said = capsys.readouterr().out
    assert "23 images; shard 0 of 1; 0 of 6 chunks were done before" in said
    assert "23 images in" in said and "1 of them unreadable" in said
    rows = rows_of(folder)
    assert [row["path"][-6:-4] for row in rows] == [f"{number:02d}" for number in range(23)]
    for row in rows:
        if "04.png" in row["path"]:
            assert "cannot be read as an image" in row["error"] and row["people"] == []
            continue
        (expected,) = dsct_jax.predict(Brightness(), row["path"], batch_size=2)
        (person,) = row["people"]
        assert person["box"] == pytest.approx(expected.box, rel=1e-5)
        assert person["labels"] == list(expected.labels)
        np.testing.assert_allclose(
            person["probabilities"], list(expected.probabilities.values()), rtol=1e-5
        )
        assert (row["width"], row["height"]) == SIZES[int(row["path"][-6:-4]) % 3]
    schema = pyarrow_dataset.dataset(folder / "out").schema
    assert json.loads(schema.metadata[b"class_names"]) == ["dark", "light"]
    assert run(folder) == 0
    assert "6 of 6 chunks were done before" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_and_shared_by_other_numbers(folder, monkeypatch, seed):
    rng, real = np.random.default_rng(seed), predict_many.predict_chunk

    class Killed(BaseException):
        pass

    def chunk(*what):
        if rng.random() < 0.5:
            raise Killed
        return real(*what)

    monkeypatch.setattr(predict_many, "predict_chunk", chunk)
    for _ in range(6):
        shards = int(rng.integers(1, 5))
        for shard in rng.permutation(shards):
            with contextlib.suppress(Killed):
                run(folder, f"--shard={shard}/{shards}")
    monkeypatch.setattr(predict_many, "predict_chunk", real)
    assert run(folder) == 0
    assert set(Counter(row["path"] for row in rows_of(folder)).values()) == {1}
    assert len(rows_of(folder)) == 23
    assert not list((folder / "out").glob(".*"))


def test_a_list_names_the_images(folder, capsys):
    names = folder / "list.txt"
    names.write_text(f"{folder}/in/03.png\n\n{folder}/in/gone.png\n{folder}/in/03.png\n")
    flags = ["--checkpoint=run", f"--output={folder / 'out'}"]
    assert main(["predict_many", str(names), *flags]) == 0
    rows = rows_of(folder)
    assert [row["path"][-8:] for row in rows] == ["n/03.png", "gone.png"]
    assert "no such image file" in rows[1]["error"]


def test_results_of_another_job_are_left_alone(folder, capsys):
    assert run(folder, "--shard=0/2") == 0
    for more in ("--min-confidence=0.7", "--chunk=5"):
        assert run(folder, more) == 2
        assert "holds results of other images, weights or options" in capsys.readouterr().err
    assert not list((folder / "out").glob(".*"))
    (folder / "in/99.png").write_bytes((folder / "in/01.png").read_bytes())
    assert run(folder) == 2


def test_shards_by_flag_and_by_slurm():
    slurm = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    assert parse_shard(None, {}) == (0, 1) and parse_shard(None, slurm) == (2, 8)
    assert parse_shard("3/8", slurm) == (3, 8)
    for text in ("8/8", "1", "a/b", "-1/3"):
        with pytest.raises(UserError, match=r"--shard=.*must be k/n"):
            parse_shard(text, {})


COUNT = 400


def wait_for(happens, process, seconds=120):
    """Until it happens or the process ends."""
    start = time.monotonic()
    while not happens() and process.poll() is None and time.monotonic() < start + seconds:
        time.sleep(0.01)


@pytest.mark.slow
def test_real_processes_killed_by_sigkill(tmp_path):
    """A real model, real SIGKILLs at random moments, another number of shards each time."""
    config = read_config(ROOT / "configs" / "debug.py")
    network = Network(network_config(config["model"], len(config["class_names"])))
    dsct_jax.Model(network, *network.init(0), config).save(tmp_path / "model.safetensors")
    (tmp_path / "in").mkdir()
    for number in range(COUNT):
        Image.new("RGB", (80, 60), (number % 256, 90, 60)).save(tmp_path / f"in/{number:03d}.png")
    command = [sys.executable, "-m", "dsct_jax", "predict-many", str(tmp_path / "in")]
    command += [f"--checkpoint={tmp_path / 'model.safetensors'}", f"--output={tmp_path / 'out'}"]
    command += ["--chunk=4", "--batch-size=4"]
    rng, ends = np.random.default_rng(0), []
    for _ in range(10):
        shards = int(rng.integers(1, 4))
        shard = f"--shard={rng.integers(shards)}/{shards}"
        process = subprocess.Popen([*command, shard], cwd=ROOT)
        chunks = len(list((tmp_path / "out").glob("*.parquet")))
        wait_for(lambda n=chunks: len(list((tmp_path / "out").glob("*.parquet"))) > n, process)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        ends.append(process.wait())
    assert ends.count(-signal.SIGKILL) >= 6, ends
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    rows = rows_of(tmp_path)
    assert Counter(row["path"] for row in rows) == {
        str(tmp_path / f"in/{number:03d}.png"): 1 for number in range(COUNT)
    }
    assert not any(row["error"] for row in rows)
