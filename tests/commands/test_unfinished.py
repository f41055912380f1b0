"""Prediction of what a photographer has: folders with files of every kind (rows 33, 34, 39 of the
field test), and an interruption that loses nothing.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dsct_jax import preprocess
from dsct_jax.__main__ import main
from dsct_jax.batch import Predictions
from dsct_jax.commands import predict
from dsct_jax.commands.inputs import find_inputs
from dsct_jax.errors import UserError
from dsct_jax.postprocess import Decoder
from dsct_jax.preprocess import Preprocessing, decode_image, image_suffixes

ROOT = Path(__file__).parents[2]
SIZES = [(90, 60), (60, 90), (64, 64)]


class Brightness:
    """A model by hand: one person, whose numbers are those of the pixels."""

    decoder = Decoder(("dark", "light"), multi_label=True, subject_logit=True)
    preprocessing = Preprocessing(
        short_side=64, max_long_side=96, buckets=((64, 96), (96, 64), (64, 64))
    )
    images = 0

    def __call__(self, images, padding_mask):
        self.images += len(images)
        light = np.asarray(images).mean((1, 2, 3))
        box = 0.5 + 0.1 * np.stack([np.sin(light), np.cos(light), light, -light], 1)
        logits = np.stack([-light, light, np.full_like(light, 3.0)], 1)[:, None]
        return Predictions(
            jnp.asarray(logits[None], jnp.float32), jnp.asarray(box[None, :, None], jnp.float32)
        )


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten images for three canvases, one of which is damaged."""
    (tmp_path / "in").mkdir()
    for number in range(10):
        Image.new("RGB", SIZES[number % 3], (20 * number, 90, 200 - 9 * number)).save(
            tmp_path / f"in/{number}.png"
        )
    (tmp_path / "in/4.png").write_bytes(b"no image")
    return tmp_path / "in"


def run(folder: Path, output: Path, monkeypatch, *, model=None, draw=None, more=()) -> int:
    monkeypatch.setattr(predict, "load_model", lambda _: model or Brightness())
    monkeypatch.setattr(predict, "draw_subjects", draw or predict_draw)
    flags = ["--checkpoint=run", f"--output={output}", "--batch-size=2", "--skip-unreadable"]
    return main(["predict", str(folder), *flags, *more])


predict_draw = predict.draw_subjects


class Killed(BaseException):
    """As a kill: nothing is cleaned up that the process would have to do itself."""


def killed_after(number: int):
    """Draws `number` images; the next one never is."""
    left = iter(range(number))

    def draw(image, subjects):
        if next(left, None) is None:
            raise Killed
        return predict_draw(image, subjects)

    return draw


@pytest.mark.parametrize("number", range(9))
def test_the_same_command_goes_on_and_the_result_is_the_same(
    folder, tmp_path, monkeypatch, capsys, number
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(folder, whole, monkeypatch) == 0
    with pytest.raises(Killed):
        run(folder, cut, monkeypatch, draw=killed_after(number))
    lines = cut / "predictions.jsonl"
    assert not (cut / "predictions.json").exists()
    if lines.exists():
        with lines.open("a") as file:
            file.write('[[[100, 200], {"file": "in/9.p')  # a line that the kill has cut
    model = Brightness()
    assert run(folder, cut, monkeypatch, model=model) == 0
    for name in ("predictions.json", "predictions.csv", "contact_sheet.png"):
        one, other = (output / name for output in (whole, cut))
        assert one.read_bytes() == other.read_bytes(), name
    assert sorted(path.name for path in cut.iterdir()) == sorted(p.name for p in whole.iterdir())
    done = number // 2 * 2  # a batch is kept when the next one has begun
    assert model.images <= 12 - done
    assert (f"{done} of 10 images were done before" in capsys.readouterr().out) == (done > 0)


@pytest.mark.parametrize("change", ["option", "image", "drawing"])
def test_what_has_changed_is_looked_at_again(folder, tmp_path, monkeypatch, change):
    whole, cut, more = tmp_path / "whole", tmp_path / "cut", []
    with pytest.raises(Killed):
        run(folder, cut, monkeypatch, draw=killed_after(7))
    if change == "option":
        more = ["--min-confidence=0.99"]
    elif change == "image":
        Image.new("RGB", (90, 60), "white").save(folder / "0.png")
    else:
        (cut / "drawn/0.png").unlink()
    assert run(folder, cut, monkeypatch, more=more) == 0
    assert run(folder, whole, monkeypatch, more=more) == 0
    one, other = ((out / "predictions.json").read_bytes() for out in (whole, cut))
    assert one == other and (cut / "drawn/0.png").exists()


def test_ctrl_c_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    assert run(folder, tmp_path / "out", monkeypatch, draw=interrupt) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on where it stopped\n"
    assert not (tmp_path / "out/predictions.jsonl").exists()


@pytest.mark.slow
def test_a_real_kill(folder, tmp_path):
    """SIGKILL in the middle, of the command with a trained model."""
    train = [sys.executable, "train.py", "--config=configs/debug.py", f"--workdir={tmp_path}/run"]
    subprocess.run(train, cwd=ROOT, check=True, capture_output=True)
    for copy in range(30):
        for path in [path for path in folder.iterdir() if path.stem in "012356789"]:
            (folder / f"{copy}_{path.name}").write_bytes(path.read_bytes())
    flags = [str(folder), f"--checkpoint={tmp_path}/run", "--batch-size=2", "--skip-unreadable"]
    command = [sys.executable, "-m", "dsct_jax", "predict", *flags, "--min-confidence=0"]
    subprocess.run([*command, f"--output={tmp_path}/whole"], cwd=ROOT, check=True)
    lines, kills = tmp_path / "cut/predictions.jsonl", 0
    for wanted in (2, 30, 60):  # each kill a little further on
        process = subprocess.Popen([*command, f"--output={tmp_path}/cut"], cwd=ROOT)
        while process.poll() is None:
            if lines.exists() and len(lines.read_bytes().splitlines()) >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    subprocess.run([*command, f"--output={tmp_path}/cut"], cwd=ROOT, check=True)
    one, other = ((tmp_path / out / "predictions.json").read_bytes() for out in ("whole", "cut"))
    assert one == other


# --- files of every kind --------------------------------------------------------------------------


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((90, 60)).convert("RGB")


def test_every_suffix_that_pil_reads(tmp_path, monkeypatch, capsys):
    names = ["a.jpg", "b.MPO", "c.jfif", "d.avif", "e.JPEG", "f.webp", "g.tga", "h.jp2", "i.ppm"]
    for name in names:
        picture().save(tmp_path / name)
    (tmp_path / ".hidden").touch()
    (tmp_path / "a.jpg.txt").touch()
    (tmp_path / "folder.png").mkdir()  # a folder called like an image
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nothing.jpg")
    images, videos = find_inputs([str(tmp_path)], exclude=tmp_path / "out")
    assert [path.name for path in images] == [*names, "link.jpg"] and videos == []
    assert capsys.readouterr().out == f"{tmp_path}: 1 other files left out: 1 .txt\n"
    for path in images:
        assert decode_image(path).size == (90, 60)


@pytest.mark.parametrize("installed", [False, True])
def test_heic_is_read_or_counted_with_the_remedy(tmp_path, monkeypatch, capsys, installed):
    for number in range(3):
        (tmp_path / f"{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    if installed:
        pytest.importorskip("pillow_heif")
        picture().save(tmp_path / "0.HEIC")
        assert decode_image(tmp_path / "0.HEIC").size == (90, 60)
        assert len(find_inputs([str(tmp_path)], exclude=tmp_path / "out")[0]) == 3
        return
    suffixes = tuple(one for one in image_suffixes() if not one.startswith(".hei"))
    monkeypatch.setattr(preprocess, "image_suffixes", lambda: suffixes)
    monkeypatch.setattr("dsct_jax.commands.inputs.image_suffixes", lambda: suffixes)
    what = "3 other files left out: 3 .heic (pip install 'dsct-jax[heic]')"
    with pytest.raises(UserError, match="the folder holds no image or video; ") as error:
        find_inputs([str(tmp_path)], exclude=tmp_path / "out")
    assert what in str(error.value)
    picture().save(tmp_path / "a.jpg")
    assert find_inputs([str(tmp_path)], exclude=tmp_path / "out")[0] == [tmp_path / "a.jpg"]
    assert capsys.readouterr().out == f"{tmp_path}: {what}\n"
    with pytest.raises(UserError, match=r"cannot be read as an image .*\[heic\]"):
        decode_image(tmp_path / "0.HEIC")


def test_a_panorama_up_to_a_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)  # PIL's own would refuse 90x60
    picture().save(tmp_path / "wide.png")
    assert decode_image(tmp_path / "wide.png").size == (90, 60)
    assert run(tmp_path / "wide.png", tmp_path / "out", monkeypatch) == 0
    more = ["--max-megapixels=0.005"]
    assert run(tmp_path / "wide.png", tmp_path / "small", monkeypatch, more=more) == 2
    out = capsys.readouterr().out
    assert "wide.png: is 90x60, more than 0.005 megapixels; make it smaller, or raise" in out
    assert Image.MAX_IMAGE_PIXELS == 2500


def test_results_do_not_go_among_the_images(folder):
    for output in (folder, folder.parent):
        with pytest.raises(UserError, match="holds the images to look at; name another folder"):
            find_inputs([str(folder)], exclude=output)
    assert len(find_inputs([str(folder)], exclude=folder / "out")[0]) == 10


def test_names_that_the_terminal_cannot_show(tmp_path):
    """LC_ALL=C, as in many containers and batch systems."""
    Image.new("RGB", (64, 64)).save(tmp_path / "größe.png")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "dsct_jax", "predict", "größe.png", "--checkpoint=ö", "--output=o"],
        env=os.environ | ascii_only | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith(b"error: "), done.stderr
    assert b"Traceback" not in done.stderr
