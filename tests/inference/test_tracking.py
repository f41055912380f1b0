"""People through a video: who stays who when they cross, are missed, or the shot changes; and what
the command leaves behind.
"""

import csv
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsct_jax.__main__ import main
from dsct_jax.commands import predict
from dsct_jax.commands.frames import FOLDER
from dsct_jax.commands.timeline import MOST_BARS, draw_timeline, person_series, write_timelines
from dsct_jax.inference.tracking import (
    SIGHTINGS,
    FollowedSubject,
    Tracker,
    smoothed,
    subjects_to_supervision,
)
from dsct_jax.inference.video import video_writer
from dsct_jax.postprocess import Subject
from tests.commands.test_unfinished import Brightness

ROOT, RATE = Path(__file__).parents[2], 25.0


def subject(box, confidence=0.9, **scores):
    scores = scores or {"calm": 1.0}
    return Subject(tuple(map(float, box)), scores, (max(scores, key=scores.get),), 0.0, confidence)


def walkers(frames, *, apart, missed, jitter, seed):
    """Four people who cross, `apart` pixels one behind the other: (truth, what is seen of them) in
    each frame. Of whom somebody in front covers more than half, nothing is seen.
    """
    rng = np.random.default_rng(seed)
    for frame in range(frames):
        truth, seen = [], []
        for person in range(4):
            speed = (1.3, -1.1, 0.8, -1.6)[person]
            x = 160 + 130 * np.sin(0.02 * speed * frame + person)
            y = 60 + apart * person
            truth.append((person, (x, y, x + 30, y + 38)))
        for person, box in truth:
            covered = max((_covered(box, front) for _, front in truth[person + 1 :]), default=0.0)
            if rng.random() >= missed and covered <= 0.5:
                moved = np.array(box) + rng.normal(0, jitter * 34, 4)
                seen.append((person, subject(moved, rng.uniform(0.3, 1.0))))
        yield truth, seen


def _covered(box, front):
    (a, b, c, d), (e, f, g, h) = box, front
    width, height = min(c, g) - max(a, e), min(d, h) - max(b, f)
    return max(width, 0) * max(height, 0) / ((c - a) * (d - b))


def identity_measures(frames):
    """(switches of number per 500 frames, IDF1) of (true person, number) pairs per frame."""
    last, switches, pairs, truths, given = {}, 0, {}, 0, 0
    for truth, found in frames:
        truths += len(truth)
        given += len(found)
        for person, number in found:
            switches += person in last and last[person] != number
            last[person] = number
            pairs[person, number] = pairs.get((person, number), 0) + 1
    from scipy.optimize import linear_sum_assignment

    people, numbers = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
    table = np.array([[pairs.get((a, b), 0) for b in numbers] for a in people])
    right = table[linear_sum_assignment(-table)].sum()
    return switches, 2 * right / (truths + given)


@pytest.mark.parametrize(
    ("apart", "missed", "jitter", "most", "least"),
    [(22, 0.1, 0.04, 1, 0.9), (22, 0.3, 0.08, 1, 0.75), (10, 0.1, 0.04, 4.5, 0.83),
     (10, 0.3, 0.08, 8.7, 0.71)],
)  # fmt: skip
def test_crossing_people_keep_their_numbers(apart, missed, jitter, most, least):
    """The bounds of those who hide each other are what was measured of ByteTrack and of a tracker
    like this one on such a film.
    """
    results = []
    for seed in range(6):
        tracker, frames = Tracker(certain=0.5), []
        for index, (truth, seen) in enumerate(
            walkers(500, apart=apart, missed=missed, jitter=jitter, seed=seed)
        ):
            people = tracker.update([one for _, one in seen], index / RATE)
            boxes = {one.box: person for person, one in seen}
            numbered = [(boxes[one.box], one.person) for one in people if one.person is not None]
            frames.append((truth, numbered))
        results.append(identity_measures(frames))
    switches, idf1 = np.mean(results, 0)
    print(f"{switches:.1f} switches, IDF1 {idf1:.2f}")
    assert switches <= most and idf1 >= least, (switches, idf1)


def test_a_number_at_the_third_sighting_and_only_from_the_certain():
    tracker, box = Tracker(certain=0.5), (10, 10, 40, 50)
    numbers = [tracker.update([subject(box)], i / RATE)[0].person for i in range(4)]
    assert numbers == [None] * (SIGHTINGS - 1) + [1, 1]
    (doubtful,) = tracker.update([subject(box, 0.2)], 4 / RATE)  # goes on
    assert doubtful.person == 1
    assert tracker.update([subject((200, 10, 240, 50), 0.2)], 5 / RATE) == []  # does not begin
    assert tracker.update([subject(box)], 3.0)[0].person is None  # unseen for too long


def test_a_cut_ends_everybody():
    tracker, box = Tracker(certain=0.5), (10, 10, 40, 50)
    dark, light = (Image.new("RGB", (64, 64), (shade,) * 3) for shade in (40, 160))
    for i in range(3):
        assert not tracker.cut_at(dark)
        tracker.update([subject(box)], i / RATE)
    assert tracker.cut_at(light)
    assert tracker.update([subject(box)], 3 / RATE)[0].person is None


def test_smoothing_is_a_weighted_mean_of_a_second():
    seconds = np.array([0.0, 0.2, 0.4, 5.0])
    raw = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    found = smoothed(seconds, raw, np.array([1.0, 0.5, 1.0, 0.1]))
    np.testing.assert_allclose(found[:3], [[0.8, 0.2]] * 3)
    np.testing.assert_allclose(found[3], [0.0, 1.0])


def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("cv2", reason="the video extra is not installed")
    with video_writer(tmp_path / "film.mp4", RATE) as add:
        for i in range(12):
            add(Image.new("RGB", (64, 64), (100 + i, 90, 80)))
    monkeypatch.setattr(predict, "load_model", lambda _: Brightness())
    flags = ["--checkpoint=run", f"--output={tmp_path / 'out'}", "--follow"]
    assert main(["predict", str(tmp_path / "film.mp4"), *flags]) == 0
    assert "timelines:" in capsys.readouterr().out
    document = json.loads((tmp_path / "out/predictions.json").read_text())
    (film,) = document["videos"]
    numbers = [frame["subjects"][0]["person"] for frame in film["frames"]]
    assert numbers == [1] * 12 and "track" not in film["frames"][0]["subjects"][0]
    assert not (tmp_path / "out" / FOLDER).exists()
    with (tmp_path / "out/timeline.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {row["person"] for row in rows} == {"1"}
    assert float(rows[2]["seconds"]) == 0.08 and "light_smooth" in rows[0]
    series = person_series(film, document["class_names"])
    assert list(series) == [1] and draw_timeline(film, document["class_names"]) is not None
    assert (tmp_path / "out/timeline_film.png").stat().st_size > 1000


def test_a_long_film_is_drawn_with_few_bars():
    person = {"person": 1, "box": [0, 0, 9, 9], "confidence": 0.9, "probabilities": {"calm": 1.0}}
    times = [i / RATE for i in range(10_000) if not 4_000 <= i < 6_000]
    frames = [{"seconds": at, "subjects": [person]} for at in times]
    entry = {"file": "film.mp4", "frames": frames, "every": 1, "frames_per_second": RATE}
    (axes,) = draw_timeline(entry, ["calm"]).axes
    bars = axes.patches
    assert 0.7 * MOST_BARS < len(bars) < 0.9 * MOST_BARS
    lefts = np.array([bar.get_x() for bar in bars])
    assert not ((lefts > 161) & (lefts < 239)).any()  # a gap stays a gap
    np.testing.assert_allclose([bar.get_height() for bar in bars], -0.9)


LONG_FILM = """
import resource, sys
from pathlib import Path
from PIL import Image
from dsct_jax.__main__ import main
from dsct_jax.commands import predict
from dsct_jax.inference.video import video_writer
from tests.commands.test_unfinished import Brightness

folder, frames = Path(sys.argv[1]), int(sys.argv[2])
with video_writer(folder / "film.mp4", 25.0) as add:
    for i in range(frames):
        add(Image.new("RGB", (64, 64), (100 + i % 50, 90, 80)))
predict.load_model = lambda _: Brightness()
flags = ["--checkpoint=run", f"--output={folder / 'out'}", "--follow"]
assert main(["predict", str(folder / "film.mp4"), *flags]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
"""


@pytest.mark.slow
def test_half_an_hour_of_film_takes_no_more_memory(tmp_path):
    pytest.importorskip("cv2", reason="the video extra is not installed")
    peaks = []
    for minutes in (1, 30):
        folder = tmp_path / str(minutes)
        folder.mkdir()
        command = [sys.executable, "-c", LONG_FILM, str(folder), str(minutes * 60 * 25)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.splitlines()[-1]))
    print(f"peak MiB of a film of 1 and 30 minutes: {peaks}")
    # 45,000 sightings as dictionaries would take about 100 MiB, as numbers they take 3
    assert peaks[1] - peaks[0] < 60, peaks


def test_films_of_one_name_have_a_timeline_each(tmp_path):
    entry = {"frames": [], "every": 1, "frames_per_second": RATE, "drawn": "drawn/a/film.mp4"}
    person = {"person": 1, "box": [0, 0, 9, 9], "confidence": 0.9, "probabilities": {"calm": 1.0}}
    entry["frames"] = [{"frame": 0, "seconds": 0.0, "subjects": [person]}]
    films = [
        entry | {"file": f"{name}/film.mp4", "drawn": f"drawn/{name}/film.mp4"} for name in "ab"
    ]
    paths = write_timelines(films, ["calm"], tmp_path)
    names = ["timeline.csv", "timeline_a_film.png", "timeline_b_film.png"]
    assert [path.name for path in paths] == names and all(path.is_file() for path in paths)


def test_people_as_detections_of_supervision(monkeypatch):
    """What its class is given; the package itself is not installed for the tests."""
    stand_in = types.SimpleNamespace(Detections=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    scores = {"calm": 0.2, "angry": 0.7}
    one = Subject((1.0, 2.0, 3.0, 4.0), scores, ("angry",), 0.5, 0.9)
    other = FollowedSubject(**vars(one) | {"confidence": 0.4, "labels": ()}, person=7)
    found = subjects_to_supervision([one, other])
    assert found["xyxy"].tolist() == [[1, 2, 3, 4]] * 2 and found["tracker_id"].tolist() == [-1, 7]
    assert found["class_id"].tolist() == [1, 1] and found["data"]["labels"].tolist() == [
        "angry",
        "",
    ]
    np.testing.assert_allclose(found["confidence"], [0.9, 0.4])
    assert subjects_to_supervision([])["xyxy"].shape == (0, 4)
