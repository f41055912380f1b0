"""What the figures are made of is where it is in the image, and the command draws every figure or
says in one line why not.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.fusion_weights import weight_measures
from configs import debug
from data.__main__ import main as data_main
from dsct_jax import __main__
from dsct_jax.commands import visualize
from dsct_jax.commands.visualize import read_ground_truth
from dsct_jax.config import to_builtins
from dsct_jax.errors import UserError
from dsct_jax.inference import introspection as inside
from dsct_jax.inference.introspection import introspect, principal_components
from dsct_jax.inference.load import Model, load, model_config
from dsct_jax.inference.predict import predict
from dsct_jax.model.build import Network
from dsct_jax.postprocess import Selection, Subject
from dsct_jax.visualization.figures import (
    NOBODY,
    activation_figure,
    contextual_samples,
    embedding_figure,
    loss_figure,
    sampling_figure,
)


def main(arguments):
    """`python -m dsct_jax visualize` in this process."""
    return __main__.main(["visualize", *arguments])


EVERYBODY = Selection(min_confidence=0.0, nms=1.0)


def make_checkpoint(path, seed=0, **changes):
    config = to_builtins(debug.get_config())
    config["model"] |= changes
    functions = Network(model_config(config))
    params, norm_stats = functions.init(seed)
    # The initial offsets and weights are the same for every query; noise makes the queries differ,
    # so that a mix-up shows.
    rng = np.random.default_rng(seed)
    params = {
        name: value + 0.05 * rng.standard_normal(value.shape).astype(np.float32)
        for name, value in params.items()
    }
    Model(functions, params, norm_stats, config).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("weights") / "debug.safetensors")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Three built-in scenes as files, with truth.json."""
    folder = tmp_path_factory.mktemp("samples")
    arguments = ["--config=configs/debug.py", "-n", "3", "--config.data.test=3"]
    assert data_main(["samples", *arguments, f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def scene(checkpoint, samples):
    """(model, image, what it looked at) of one scene, everybody kept."""
    model = load(checkpoint)
    image = Image.open(samples / "test_00000.png")
    return model, image, introspect(model, image, selection=EVERYBODY)


def test_a_look_agrees_with_prediction(scene):
    model, image, seen = scene
    people = predict(model, image, **dataclasses.asdict(EVERYBODY))
    assert len(people) == len(seen.subjects) == 4
    np.testing.assert_allclose(
        [one.box for one in seen.subjects], [one.box for one in people], atol=1e-2
    )
    assert sorted(seen.queries.tolist()) == [0, 1, 2, 3]


def test_points_are_in_pixels_of_the_image_without_its_padding(scene):
    """The box head predicts relative to the reference point: with an untouched canvas both must be
    in the same coordinates.
    """
    model, image, seen = scene
    queries = np.concatenate(
        [np.asarray(model.params["context_queries"]), np.asarray(model.params["subject_queries"])]
    )
    kernel, bias = (
        np.asarray(model.params[f"reference_points/{name}"]) for name in ("kernel", "bias")
    )
    points = jax.nn.sigmoid(queries[:, : queries.shape[1] // 2] @ kernel + bias) * np.array(
        [image.width, image.height]
    )
    np.testing.assert_allclose(seen.context_points, points[:6], rtol=1e-4)
    np.testing.assert_allclose(seen.layers[0].subject_points, points[6:], rtol=1e-4)


def test_samples_surround_their_reference_point_in_pixels(checkpoint, samples):
    """With offsets of one pixel of a level, a sample lies one cell of that level from the reference
    point, on every canvas.
    """
    model = load(checkpoint)
    for name in model.params:
        if name.endswith("sampling_offsets/kernel"):
            model.params[name] = model.params[name] * 0
        if name.endswith("sampling_offsets/bias"):
            model.params[name] = model.params[name] * 0 + np.tile(
                np.array([1.0, 0.0], np.float32), model.params[name].size // 2
            )
    image = Image.open(samples / "test_00000.png")
    seen = introspect(model, image, selection=EVERYBODY)
    layer = seen.layers[-1]
    pixels, size = inside.prepare_image(image, model.preprocessing)
    offsets = layer.subject_samples - layer.subject_points[:, None]
    np.testing.assert_allclose(offsets[..., 1], 0, atol=1e-2)
    heads, levels, points = 2, 4, 2
    cells = [-(-pixels.shape[1] // 2 ** (3 + level)) for level in range(levels)]
    step = np.array([pixels.shape[1] / cell for cell in cells]) * image.width / size[1]
    ratios = (
        np.array([round(size[1] * cell / pixels.shape[1] + 0.499) / cell for cell in cells])
        * pixels.shape[1]
        / size[1]
    )
    expected = np.broadcast_to((step / ratios)[None, :, None], (heads, levels, points)).reshape(-1)
    np.testing.assert_allclose(offsets[0, :, 0], expected, rtol=0.15)


def test_selections_and_weights_are_those_of_the_fusion(scene):
    _, _, seen = scene
    for layer in seen.layers:
        assert (layer.spatial.sum(1) == 2).all()
        distance = np.linalg.norm(
            (layer.subject_points[:, None] - seen.context_points)
            / [seen.image.width, seen.image.height],
            axis=-1,
        )
        assert layer.spatial.shape == distance.shape == (4, 6)
        np.testing.assert_allclose(layer.context_weights.sum(1), 1, atol=1e-5)
        assert (layer.context_weights[~(layer.spatial | layer.semantic)] == 0).all()
        np.testing.assert_allclose(layer.subject_weights.sum(1), 1, atol=1e-5)
        points, weights = contextual_samples(layer, 0)
        chosen = (layer.context_weights[0] > 0).sum()
        assert len(points) == len(weights) == (1 + chosen) * layer.subject_samples.shape[1]
        np.testing.assert_allclose(
            weights.sum(), 2, atol=1e-5
        )  # the subject itself, and its context


def test_the_columns_have_their_headings_once(scene):
    _, _, seen = scene
    for figure, headings in (
        (
            sampling_figure([seen, seen], layer=0),
            ["people found", "subject queries alone", "with their context queries"],
        ),
        (activation_figure([seen, seen], stage="encoder"), ["image"]),
    ):
        titles = [axes.get_title() for axes in figure.axes]
        assert [titles.count(heading) for heading in headings] == [1] * len(headings)
        assert titles[: len(headings)] == headings


def test_nobody_is_the_last_entry_of_the_legend(scene):
    _, _, seen = scene
    figure = embedding_figure([seen], ["Sad", NOBODY, "Fear", "Sad"], source="annotated emotion")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Fear (1)",
        "Sad (2)",
        "nobody (1)",
    ]


def test_activation_leaves_the_padding_out():
    x = np.zeros((4, 6, 3), np.float32)
    x[:3, :4] = [3, 4, 0]
    np.testing.assert_allclose(inside._activation(x, (48, 64), (64, 96)), np.full((3, 4), 5))


def test_principal_components_are_numpys():
    x = np.random.default_rng(0).standard_normal((20, 5)) * [5, 3, 1, 1, 1]
    scores, shares = principal_components(x)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    expected = (x - x.mean(0)) @ vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(scores), np.abs(expected), rtol=1e-6)
    np.testing.assert_allclose(shares, values[[-1, -2]] / values.sum(), rtol=1e-6)
    assert principal_components(np.ones((3, 2)))[1].tolist() == [0, 0]


def test_samples_and_their_truth_belong_together(samples):
    truth = read_ground_truth(samples / "truth.json", debug.CLASS_NAMES)
    assert sorted(truth) == ["test_00000.png", "test_00001.png", "test_00002.png"]
    content = json.loads((samples / "truth.json").read_text())
    assert sum(map(len, truth.values())) == len(content["annotations"])
    with Image.open(samples / "test_00000.png") as image:
        width = image.width
    for person in truth["test_00000.png"]:
        assert len(person.labels) == 1
        assert 0 <= person.box[0] < person.box[2] <= width


def test_annotated_classes_are_read_by_name(tmp_path):
    """Ids are free: 1 is Anger and 2 is Happy here, whatever places these have in the model."""
    document = {
        "images": [{"id": 7, "file_name": "images/a.jpg"}],
        "categories": [
            {"id": 1, "name": "anger"},
            {"id": 2, "name": "Happy"},
            {"id": 9, "name": "person"},
        ],
        "annotations": [
            {"image_id": 7, "bbox": [0, 0, 5, 5], "category_id": [1, 2]},
            {"image_id": 7, "bbox": [5, 0, 5, 5], "category_id": 2},
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(document))
    truth = read_ground_truth(tmp_path / "truth.json", ("Anger", "Fear", "Happy", "Sad"))
    assert [person.labels for person in truth["a.jpg"]] == [("Anger", "Happy"), ("Happy",)]
    document["annotations"][0]["category_id"] = 9
    (tmp_path / "truth.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="not COCO-style annotations for 4 classes"):
        read_ground_truth(tmp_path / "truth.json", ("Anger", "Fear", "Happy", "Sad"))


def test_only_the_right_person_with_the_right_emotion_is_right():
    truth = Subject(box=(0.0, 0.0, 10.0, 10.0), probabilities={}, labels=("Sad",), paper_score=1.0)
    near = Subject(box=(1.0, 0.0, 10.0, 10.0), probabilities={}, labels=("Sad",), paper_score=0.9)
    far = Subject(box=(6.0, 0.0, 16.0, 10.0), probabilities={}, labels=("Sad",), paper_score=0.9)
    wrong = Subject(box=(0.0, 0.0, 10.0, 10.0), probabilities={}, labels=("Fear",), paper_score=0.9)
    assert visualize._is_right(truth, [far, near])
    assert not visualize._is_right(truth, [far])
    assert not visualize._is_right(truth, [wrong, near])
    assert not visualize._is_right(truth, [])


@pytest.mark.parametrize(
    "figure", ["predictions", "activation", "sampling", "context", "embeddings", "compare"]
)
def test_every_figure_is_drawn(figure, checkpoint, samples, tmp_path, capsys):
    paths = [str(samples / "test_00000.png")] if figure == "context" else [str(samples)]
    extra = ["--min-confidence=0", "--nms=1"]
    if figure in ("predictions", "embeddings", "compare"):
        extra.append(f"--ground-truth={samples / 'truth.json'}")
    if figure == "compare":
        extra += [f"--compare-with={checkpoint}", "--names=one,two"]
    if figure == "activation":
        extra.append("--stage=encoder")
    output = tmp_path / "new folder/figure.png"
    assert (
        main([figure, *paths, f"--checkpoint={checkpoint}", f"--output={output}", *extra]) == 0
    ), capsys.readouterr().err
    picture = np.asarray(Image.open(output).convert("L"))
    assert min(picture.shape) > 300
    assert picture.std() > 20  # something is drawn on it


def test_losses_are_those_of_the_log(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {
            "step": 10 * i,
            "train/loss_class": 3.0 - i,
            "train/loss_bbox": 0.2,
            "train/loss_giou": 0.1 * i,
        }
        for i in range(3)
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["losses", str(run), f"--output={tmp_path / 'losses.png'}"]) == 0
    figure = loss_figure({"run": visualize.read_metrics(run / "metrics.jsonl")})
    assert isinstance(figure, Figure)
    classification, localisation = (axes.lines[0].get_xydata() for axes in figure.axes)
    np.testing.assert_allclose(classification, [[0, 3], [10, 2], [20, 1]])
    np.testing.assert_allclose(localisation, [[0, 0.2], [10, 0.3], [20, 0.4]])
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "val/mAP": 0.1}))
    assert main(["losses", str(run), f"--output={tmp_path / 'losses.png'}"]) == 2
    assert "has no training loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["context", "{text}"], "{text}: "),
        (["context", "{video}"], "{video}: is a video"),
        (["context", "{nowhere}"], "{nowhere}: no such file or folder"),
        (["context", "{empty}"], "{empty}: the folder holds no image or video"),
        (["sampling", "{image}", "--checkpoint={nowhere}"], "{nowhere}: no such file or directory"),
        (["sampling", "{image}", "--config=configs/demo.py"], "{checkpoint}: "),
        (
            ["predictions", "{image}", "--ground-truth={nowhere}"],
            "--ground-truth={nowhere}: no such file",
        ),
        (
            ["predictions", "{image}", "--ground-truth={text}"],
            "--ground-truth={text}: not COCO-style annotations for 4 classes",
        ),
        (["compare", "{image}"], "--compare-with is missing"),
        (
            ["compare", "{image}", "--compare-with={checkpoint}", "--names=one"],
            "--names=one: must be two names",
        ),
        (
            [
                "compare",
                "{image}",
                "--compare-with={checkpoint}",
                "--compare-config=configs/demo.py",
            ],
            "{checkpoint}: a checkpoint of another model (config.",
        ),
        (["sampling", "{image}", "--layer=3"], "--layer=3: the decoder has layers 1 to 2"),
        (["sampling", "{image}", "--min-confidence=1"], "{image}: nobody was found in it"),
        (["context", "{image}", "--person=9", "--min-confidence=0"], "--person=9: "),
        (["embeddings", "{image}", "--min-confidence=1"], "embeddings: 0 people were found"),
        (["losses", "{nowhere}"], "{nowhere}/metrics.jsonl: no such file"),
        (
            ["context", "{image}", "--output=figure.jpg"],
            "--output=figure.jpg: must be the name of a .png file",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, checkpoint, samples, tmp_path, capsys):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty").mkdir()
    places = {
        "text": tmp_path / "text.png",
        "nowhere": tmp_path / "nowhere",
        "empty": tmp_path / "empty",
    }
    (tmp_path / "video.mp4").touch()
    places |= {
        "video": tmp_path / "video.mp4",
        "image": samples / "test_00000.png",
        "checkpoint": checkpoint,
    }
    given = [
        f"--checkpoint={checkpoint}",
        f"--output={tmp_path / 'figure.png'}",
        *(argument.format(**places) for argument in arguments[1:]),
    ]
    assert main([arguments[0], *given]) == 2
    error = capsys.readouterr().err.split("\r")[
        -1
    ]  # on a slow machine it comes after a progress bar
    assert error.startswith(f"error: {message.format(**places)}")
    assert error.count("\n") == 1


def test_a_model_without_context_has_no_context_figure(tmp_path, samples, capsys):
    checkpoint = make_checkpoint(tmp_path / "plain.safetensors", num_context_queries=0)
    arguments = [
        f"--checkpoint={checkpoint}",
        f"--output={tmp_path / 'x.png'}",
        "--min-confidence=0",
    ]
    assert main(["context", str(samples / "test_00000.png"), *arguments]) == 2
    assert "has no context queries" in capsys.readouterr().err
    assert main(["sampling", str(samples / "test_00000.png"), *arguments]) == 0


def test_a_split_that_is_too_small_is_one_line(tmp_path, capsys):
    samples = ["samples", "--config=configs/debug.py", f"--output={tmp_path}"]
    assert data_main([*samples, "-n", "9", "--config.data.test=3"]) == 2
    assert "built-in scenes test has 3 images" in capsys.readouterr().err
    assert data_main([*samples, "--split=holdout"]) == 2
    assert "invalid choice: 'holdout'" in capsys.readouterr().err


def test_the_weight_of_the_fusion_is_split_between_its_selections(scene):
    """By hand: the shares of what both, one or the other selected, weighted by distance."""
    _, _, seen = scene
    measured = np.array(list(weight_measures([seen], 1)))
    layer = seen.layers[1]
    expected = []
    for query in seen.queries:
        offsets = (seen.context_points - layer.subject_points[query]) / [
            seen.image.width,
            seen.image.height,
        ]
        total = sum(
            w * np.hypot(*o) for w, o in zip(layer.context_weights[query], offsets, strict=True)
        )
        alone = sum(
            w
            for w, near, alike in zip(
                layer.context_weights[query],
                layer.spatial[query],
                layer.semantic[query],
                strict=True,
            )
            if alike > near
        )
        expected.append([max(layer.context_weights[query]), alone, total])
    np.testing.assert_allclose(measured, expected, rtol=1e-5, atol=1e-7)
