"""The most certain mistakes, in order, with what was said and what was annotated."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.mistakes import main
from configs import demo
from data.command import data_config
from data.readers.registry import read_split
from dsct_jax.boxes import xyxy_to_cxcywh
from dsct_jax.config import to_builtins
from dsct_jax.evaluation.results import ImageResult, ResultsInfo, stack_results
from dsct_jax.postprocess import Decoder


@pytest.fixture
def run(tmp_path):
    config = demo.get_config()
    config.data.update(train="8", val="8", test="6")
    (tmp_path / "config.json").write_text(json.dumps(to_builtins(config)))
    return tmp_path


def test_the_most_certain_come_first(run, capsys):
    records, _ = read_split(data_config(run / "config.json"), "test")
    names = demo.get_config().class_names
    results, wrong = [], []
    for record in records:
        boxes = np.zeros((4, 4), np.float32) + np.float32([0.9, 0.9, 0.01, 0.01])
        logits = np.zeros((4, 5), np.float32)
        size = np.float32([record.width, record.height] * 2)
        for person, box in enumerate(record.boxes):
            label = int(record.labels[person].argmax())
            boxes[person] = xyxy_to_cxcywh(box / size)
            said = (label + (record.image_id in (1, 3) and person == 0)) % 4
            strength = 3.0 + record.image_id
            logits[person, said] = strength
            if said != label:
                sure = np.exp(strength) / (np.exp(strength) + 3)
                wrong.append((sure, f"{names[said]} {sure:.2f}, annotated {names[label]}"))
        shape = record.height, record.width
        results.append(
            ImageResult(record.image_id, logits, boxes, shape, record.boxes, record.labels)
        )
    decoder = Decoder.unfitted(names, multi_label=False, class_loss="softmax")
    stack_results(results, ResultsInfo(decoder)).save(run / "predictions_test.npz")
    assert main([str(run), f"--output={run / 'sheet.png'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [caption for _, caption in sorted(wrong, reverse=True)]
    with Image.open(run / "sheet.png") as sheet:
        assert len(lines) == 3 and sheet.width > 300


def test_a_run_of_several_labels_is_refused(run, capsys):
    config = json.loads((run / "config.json").read_text()) | {"multi_label": True}
    (run / "config.json").write_text(json.dumps(config))
    assert main([str(run), f"--output={run / 'sheet.png'}"]) == 2
    assert "one label per person" in capsys.readouterr().err
