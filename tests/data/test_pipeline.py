"""The pipeline: every image once an epoch, the same batches whatever the workers, hosts or starting
step, and clear words about bad files.
"""

import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import base
from data import pipeline
from data.batch_plan import FILLER, BatchPlan
from data.config import DataConfig
from data.pipeline import Dataset, make_dataset
from dsct_jax.batch import Batch
from dsct_jax.boxes import cxcywh_to_xyxy
from dsct_jax.errors import UserError

SMALL = {
    "class_names": ("Anger", "Fear", "Happy", "Sad"),
    "multi_label": False,
    "short_sides": (48, 56, 64),
    "max_long_side": 96,
    "crop_resize": (64, 80),
    "crop_size": (40, 72),
    "eval_short_side": 64,
    "buckets": ((64, 96), (96, 64), (80, 80)),
    "num_workers": 0,
}
NUM_IMAGES = 37


def make_config(**changes: Any) -> DataConfig:
    values = base.get_config().data.to_dict() | {
        "source": "scenes",
        "train": str(NUM_IMAGES),
        "test": str(NUM_IMAGES),
    }
    return DataConfig(**(values | SMALL | changes))


def train_set(config: DataConfig | None = None, **changes: Any) -> Dataset:
    return make_dataset(
        config or make_config(),
        "train",
        **({"batch_size": 8, "seed": 3, "training": True} | changes),
    )


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    targets = batch.targets
    return {
        "images": batch.images,
        "sizes": batch.sizes,
        "boxes": targets.boxes,
        "labels": targets.labels,
        "valid": targets.valid,
        "image_ids": batch.image_ids,
        "original_sizes": batch.original_sizes,
        "real": batch.real,
    }


def assert_same(one: Batch, other: Batch) -> None:
    for name, array in arrays(one).items():
        np.testing.assert_array_equal(array, arrays(other)[name], err_msg=name)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six one-colour images with one person each, as a COCO-style train.json."""
    images, annotations = [], []
    for number in range(6):
        width, height = (60, 40) if number % 2 else (40, 60)
        Image.new("RGB", (width, height), (10 * number, 100, 200)).save(tmp_path / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        )
        annotations.append(
            {"id": number, "image_id": number, "category_id": number % 4, "bbox": [5, 5, 20, 20]}
        )
    (tmp_path / "train.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": []})
    )
    return tmp_path


def test_training_epochs_show_every_image_once_in_another_order():
    dataset = train_set()
    assert dataset.num_examples == NUM_IMAGES and dataset.steps_per_epoch == 5
    orders = []
    batches = list(dataset.iterator(0, 15))
    for epoch in range(3):
        part = batches[5 * epoch : 5 * epoch + 5]
        order = [
            int(index)
            for batch in part
            for index, real in zip(batch.image_ids, batch.real, strict=True)
            if real
        ]
        assert sorted(order) == list(range(NUM_IMAGES))
        assert sum((~batch.real).sum() for batch in part) == 3
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]


def test_batches_keep_the_contract():
    config = make_config()
    for batch in train_set(config).iterator(0, 5):
        assert batch.images.dtype == np.uint8 and batch.images.shape[1:3] in config.buckets
        assert (
            batch.sizes.dtype == np.int32
            and batch.targets.boxes.dtype == np.float32
            and batch.real.dtype == bool
        )
        boxes = batch.targets.boxes[batch.targets.valid]
        assert (
            (boxes[:, 2:] > 0).all()
            and (cxcywh_to_xyxy(boxes) > -1e-6).all()
            and (cxcywh_to_xyxy(boxes) < 1 + 1e-6).all()
        )
        assert (batch.targets.labels.sum(-1) == batch.targets.valid).all()
        assert (
            not batch.targets.boxes[~batch.targets.valid].any()
            and not batch.targets.valid[~batch.real].any()
        )
        for image, (height, width) in zip(batch.images, batch.sizes, strict=True):
            assert not image[height:].any() and not image[:, width:].any()


def test_evaluation_is_one_unaugmented_pass_whose_last_batches_are_padded():
    dataset = make_dataset(make_config(), "test", batch_size=8, seed=0, training=False)
    batches = list(dataset.iterator())
    assert len(batches) == dataset.steps_per_epoch == len(list(dataset.iterator()))
    seen = [int(index) for batch in batches for index in batch.image_ids[batch.real]]
    assert sorted(seen) == list(range(NUM_IMAGES))
    for batch in batches:
        assert (batch.image_ids[~batch.real] == FILLER).all()
        for place in np.flatnonzero(batch.real):
            record = dataset.records[batch.image_ids[place]]
            height, width = batch.sizes[place]
            assert min(height, width) == 64 or max(height, width) in (95, 96)
            assert tuple(batch.original_sizes[place]) == (record.height, record.width)
            count = batch.targets.valid[place].sum()
            boxes = cxcywh_to_xyxy(batch.targets.boxes[place, :count]) * np.array(
                [record.width, record.height] * 2
            )
            np.testing.assert_allclose(boxes, record.boxes, atol=1e-3)
            np.testing.assert_array_equal(batch.targets.labels[place, :count], record.labels)


@pytest.mark.parametrize("start", [1, 4, 5, 13])
def test_a_stream_resumes_at_any_step_bit_for_bit(start):
    whole = list(train_set().iterator(0, 16))
    for one, other in zip(train_set().iterator(start, 16 - start), whole[start:], strict=True):
        assert_same(one, other)


def test_another_seed_is_another_stream():
    one, other = (next(train_set(seed=seed).iterator(0, 1)) for seed in (3, 4))
    assert one.image_ids.tolist() != other.image_ids.tolist()


@pytest.mark.parametrize("hosts", [2, 8])
def test_hosts_share_every_global_batch_contiguously(hosts):
    whole = list(train_set().iterator(0, 6))
    shares = [
        list(train_set(host_index=host, host_count=hosts).iterator(0, 6)) for host in range(hosts)
    ]
    for step, batch in enumerate(whole):
        for name, array in arrays(batch).items():
            np.testing.assert_array_equal(
                np.concatenate([arrays(share[step])[name] for share in shares]), array, err_msg=name
            )


def test_a_batch_that_hosts_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"batch size 8 .* 3 hosts.*train\.batch_size"):
        train_set(host_count=3)


def test_workers_and_threads_yield_the_same_batches_in_the_same_order(monkeypatch):
    single = list(train_set().iterator(2, 7))
    others = [
        list(train_set(make_config(num_workers=workers)).iterator(2, 7)) for workers in (1, 2, 4)
    ]
    monkeypatch.setattr(pipeline, "grain", None)
    others += [
        list(train_set(make_config(num_workers=workers)).iterator(2, 7)) for workers in (1, 3)
    ]
    assert len(single) == 7
    for other in others:
        for one, two in zip(single, other, strict=True):
            assert_same(one, two)


def test_a_signal_to_the_whole_group_is_no_concern_of_the_workers():
    """Ctrl-C and schedulers reach every process of a run; a worker that ended by it would end the
    run before it has saved.
    """
    expected = list(train_set().iterator(0, 20))
    batches = train_set(make_config(num_workers=2)).iterator(0, 20)
    found = [next(batches)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
    found += list(batches)
    assert [worker.exitcode for worker in workers] == [0, 0]
    for one, two in zip(expected, found, strict=True):
        assert_same(one, two)


def test_a_cache_changes_nothing():
    for one, other in zip(
        train_set(make_config(cache=True)).iterator(0, 10), train_set().iterator(0, 10), strict=True
    ):
        assert_same(one, other)


def test_an_abandoned_iterator_stops_its_threads():
    dataset = train_set()
    calls: Counter[int] = Counter()
    load = dataset._loader

    def counting(step: int) -> pipeline.Loaded:
        calls[step] += 1
        return load(step)

    dataset._loader = counting
    batches = dataset.iterator(0)
    next(batches)
    batches.close()
    assert max(calls.values()) == 1 and len(calls) <= 4  # made ahead, but not without end


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_stops_the_run_with_one_line(images, workers):
    dataset = train_set(
        make_config(source="coco", data_dir=str(images), train="train.json", num_workers=workers),
        batch_size=2,
    )
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:60])
    with pytest.raises(
        UserError, match=r"3\.png: cannot be read as an image .*skip_corrupt=True"
    ) as error:
        list(dataset.iterator(0, 3))
    assert "\n" not in str(error.value)


def test_a_damaged_image_can_be_left_out_and_counted(images):
    dataset = train_set(
        make_config(source="coco", data_dir=str(images), train="train.json", skip_corrupt=True),
        batch_size=2,
    )
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:60])
    batches = list(dataset.iterator(0, 6))  # two epochs
    assert dataset.skipped == {"3.png": 2}
    left_out = [
        (batch, place) for batch in batches for place in range(2) if batch.image_ids[place] == 3
    ]
    assert len(left_out) == 2
    for batch, place in left_out:
        assert (
            not batch.real[place]
            and not batch.images[place].any()
            and not batch.targets.valid[place].any()
            and batch.sizes[place].min() > 0
        )
    assert sum(batch.real.sum() for batch in batches) == 10


def test_an_image_that_changed_on_disk_is_refused(images):
    dataset = train_set(
        make_config(source="coco", data_dir=str(images), train="train.json"), batch_size=2
    )
    Image.new("RGB", (90, 40)).save(images / "3.png")
    with pytest.raises(UserError, match=r"3\.png: its size changed from 60x40"):
        list(dataset.iterator(0, 3))


def test_an_image_can_end_without_people(images):
    config = make_config(
        source="coco",
        data_dir=str(images),
        train="train.json",
        crop_probability=1.0,
        crop_resize=(200,),
        crop_size=(20, 40),
    )
    batches = list(train_set(config, batch_size=6).iterator(0, 4))
    counts = np.concatenate([batch.targets.valid.sum(1) for batch in batches])
    assert 0 in counts and 1 in counts and all(batch.real.all() for batch in batches)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(20, 300), st.integers(20, 300)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.sampled_from([((64, 96),), ((64, 96), (96, 64)), ((64, 96), (96, 64), (96, 96))]),
    st.integers(0, 3),
)
def test_any_plan_is_exact(sizes, batch_size, buckets, seed):
    config = make_config(buckets=buckets)
    plan = BatchPlan(config, sizes, batch_size=batch_size, seed=seed, training=True)
    assert plan.steps_per_epoch == -(-len(sizes) // batch_size)
    evaluation = BatchPlan(config, sizes, batch_size=batch_size, seed=seed, training=False)
    for one, epochs in ((plan, 2), (evaluation, 1)):
        for epoch in range(epochs):
            batches = [
                one[epoch * one.steps_per_epoch + step] for step in range(one.steps_per_epoch)
            ]
            indices = [index for batch in batches for index in batch.indices if index != FILLER]
            assert sorted(indices) == list(range(len(sizes)))
            for batch in batches:
                assert (
                    batch.bucket in buckets
                    and len(batch.indices) == len(batch.transforms) == batch_size
                )
                assert all(
                    t.size[0] <= batch.bucket[0] and t.size[1] <= batch.bucket[1]
                    for t in batch.transforms
                )
