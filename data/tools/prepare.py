"""Brings a data set into the prepared form (data/readers/prepared.py): once, in parallel, and after
an interruption from where it stood.

    python -m data prepare --config=configs/caer_s_r50.py --config.data.data_dir=DIR --output=PREPARED
    python train.py --config=configs/caer_s_r50.py --config.data.source=prepared --config.data.data_dir=PREPARED ...

Images keep their bytes, so training sees the same pixels; --short_side=N makes those whose short
side is longer smaller (JPEG, quality 95), and their boxes with them. `--verify` compares every file
of a finished data set with its checksum.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from data.augment import scale_boxes
from data.command import config_parser, parse, progress
from data.config import SPLITS, DataConfig
from data.readers.prepared import (
    NAME,
    SHARD_TEMPLATE,
    SUMMARY,
    features,
    folder,
    read_summary,
    sha256,
    write_index,
)
from data.readers.records import Record
from data.readers.registry import read_split
from dsct_jax.cli import run_command
from dsct_jax.errors import UserError
from dsct_jax.preprocess import Size, decode_image, resize

_PLAN = "plan.json"  # what an unfinished preparation is of
_QUALITY = 95  # JPEG, of images that are made smaller


@dataclasses.dataclass(frozen=True)
class Shard:
    """A run of images of one split that become one file."""

    path: Path
    split: str
    records: tuple[Record, ...]

    @property
    def mark(self) -> Path:
        """Written when the shard is complete: its size and checksum."""
        return self.path.with_name(self.path.name + ".done")


def prepare(
    config: DataConfig,
    output: Path,
    *,
    splits: Sequence[str] = SPLITS,
    shard_images: int = 256,
    short_side: int | None = None,
    workers: int = 1,
) -> Path:
    """Writes the prepared form of `splits` and returns its folder. A second call goes on where the
    first stopped, or does nothing.

    Args:
        config: the raw data.
        output: what `config.data.data_dir` will be when the prepared form is read.
        splits: of train, val, test.
        shard_images: images a file.
        short_side: longest short side in pixels of a stored image; None keeps every image as it is.
        workers: threads; decoding and encoding, which is most of the work, run beside each other.

    Raises:
        UserError: the raw data cannot be used, the folder holds another preparation, or the disk is
            full (what is written stays for the next call).
    """
    if config.source == "prepared":
        raise UserError(
            "config.data.source='prepared' cannot be prepared again: name the source of the raw "
            "files"
        )
    directory = folder(output)
    splits = [split for split in SPLITS if split in splits]
    read = {split: read_split(config, split) for split in splits}
    records = {
        split: [_smaller(record, short_side) for record in found]
        for split, (found, _) in read.items()
    }
    fingerprint = _fingerprint(config, records, shard_images, short_side)
    try:
        if (directory / SUMMARY).exists():
            if read_summary(directory)["fingerprint"] != fingerprint:
                raise UserError(
                    f"{directory}: holds the prepared form of other data or other options; choose "
                    "another --output, or remove the folder"
                )
            return directory
        _begin(directory, fingerprint)
        shards = [
            shard
            for split in splits
            for shard in _shards(directory, split, records[split], shard_images)
        ]
        _write_shards(shards, len(config.class_names), short_side, config.skip_corrupt, workers)
        left_out = {split: _left_out(shards, split) for split in splits}
        reports = {split: dataclasses.asdict(read[split][1]) for split in splits}
        for split, names in left_out.items():
            records[split] = [record for record in records[split] if record.name not in names]
            write_index(directory / f"index_{split}.npz", records[split])
            reports[split] |= {
                "images": len(records[split]),
                "people": sum(len(record.boxes) for record in records[split]),
                "unreadable": reports[split]["unreadable"] + len(names),
                "unreadable_images": reports[split]["unreadable_images"] + list(names.values()),
            }
        _write_metadata(directory, config, shards, splits)
        _finish(directory, config, reports, fingerprint)
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be written ({error.strerror or error}); make room and run the "
            "same command again"
        ) from None
    return directory


def _smaller(record: Record, short_side: int | None) -> Record:
    """The record with the size and boxes that its image will be stored with."""
    size = _stored_size((record.height, record.width), short_side)
    if size == (record.height, record.width):
        return record
    return dataclasses.replace(
        record,
        height=size[0],
        width=size[1],
        boxes=scale_boxes(record.boxes, (record.height, record.width), size),
    )


def _stored_size(size: Size, short_side: int | None) -> Size:
    if short_side is None or min(size) <= short_side:
        return size
    return round(size[0] * short_side / min(size)), round(size[1] * short_side / min(size))


def _fingerprint(
    config: DataConfig, records: dict[str, list[Record]], shard_images: int, short_side: int | None
) -> str:
    """Of everything that the prepared files depend on, the images by the size and time of their
    files.
    """
    digest = hashlib.sha256(
        repr(
            (config.class_names, config.multi_label, config.protocol, shard_images, short_side)
        ).encode()
    )
    for split, found in records.items():
        digest.update(split.encode())
        for record in found:
            stat = record.image.stat() if isinstance(record.image, Path) else None
            state = (stat.st_size, stat.st_mtime_ns) if stat else record.image
            digest.update(
                repr((record.name, record.height, record.width, state, record.cues)).encode()
            )
            digest.update(record.boxes.tobytes() + record.labels.tobytes())
    return digest.hexdigest()


def _begin(directory: Path, fingerprint: str) -> None:
    """Notes what is being prepared; an interrupted preparation of something else is not mixed with
    it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plan = directory / _PLAN
    if plan.exists() and plan.read_text(encoding="utf-8") != fingerprint:
        raise UserError(
            f"{directory}: holds an unfinished preparation of other data or other options; choose "
            "another --output, or remove the folder"
        )
    _replace(plan, fingerprint)


def _replace(path: Path, text: str) -> None:
    """Writes a file so that it is there in full or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _shards(directory: Path, split: str, records: list[Record], shard_images: int) -> list[Shard]:
    starts = range(0, len(records), shard_images)
    return [
        Shard(
            directory / f"{NAME}-{split}.array_record-{number:05d}-of-{len(starts):05d}",
            split,
            tuple(records[start : start + shard_images]),
        )
        for number, start in enumerate(starts)
    ]


def _write_shards(
    shards: Sequence[Shard],
    num_classes: int,
    short_side: int | None,
    skip_corrupt: bool,
    workers: int,
) -> None:
    """Those that are not complete yet."""
    missing = [shard for shard in shards if not shard.mark.exists()]
    bar = iter(
        progress(
            range(total := sum(len(shard.records) for shard in missing)),
            total=total,
            what="preparing",
        )
    )
    with ThreadPoolExecutor(workers) as pool:
        jobs = {
            pool.submit(_write_shard, shard, num_classes, short_side, skip_corrupt): shard
            for shard in missing
        }
        try:
            for job in as_completed(jobs):
                job.result()
                for _ in jobs[job].records:
                    next(bar)
        finally:
            pool.shutdown(cancel_futures=True)
    next(bar, None)


def _write_shard(
    shard: Shard, num_classes: int, short_side: int | None, skip_corrupt: bool
) -> None:
    temporary = shard.path.with_name(shard.path.name + ".tmp")
    layout = features(num_classes)
    left_out: dict[str, str] = {}
    writer = ArrayRecordWriter(
        str(temporary), "group_size:1"
    )  # one image a group: images are read in random order
    try:
        for record in shard.records:
            try:
                image = _encoded(record, short_side)
            except UserError as error:
                if not skip_corrupt:
                    raise UserError(
                        f"{error}; repair or remove it, or set config.data.skip_corrupt=True"
                    ) from None
                left_out[record.name] = str(error)
                continue
            example = {
                "image": image,
                "name": record.name,
                "boxes": record.boxes,
                "labels": record.labels,
                "cues": list(record.cues),
            }
            writer.write(layout.serialize_example(layout.encode_example(example)))
        writer.close()
    except RuntimeError as error:  # array_record's only word for a disk that is full
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{temporary}: cannot be written ({reason}); make room and run the same command again"
        ) from None
    done = {
        "bytes": temporary.stat().st_size,
        "sha256": sha256(temporary),
        "images": len(shard.records) - len(left_out),
        "left_out": left_out,
    }
    os.replace(temporary, shard.path)
    _replace(shard.mark, json.dumps(done))


def _encoded(record: Record, short_side: int | None) -> bytes:
    """The bytes of an image file that decodes to what the record will say. Raises UserError when
    the raw image cannot be decoded.
    """
    if not isinstance(record.image, Path):
        return _save(record.image(), "PNG")
    try:
        raw = record.image.read_bytes()
    except OSError as error:
        raise UserError(f"{record.image}: cannot be read ({error.strerror})") from None
    image = decode_image(record.image, raw)
    size = _stored_size((image.height, image.width), short_side)
    if size != (record.height, record.width):
        raise UserError(f"{record.image}: its size changed while it was being prepared")
    return (
        raw
        if size == (image.height, image.width)
        else _save(resize(image, size), "JPEG", quality=_QUALITY)
    )


def _save(image: Any, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _done(shard: Shard) -> dict[str, Any]:
    return json.loads(shard.mark.read_text(encoding="utf-8"))


def _left_out(shards: Sequence[Shard], split: str) -> dict[str, str]:
    """name -> error line of the images that could not be decoded."""
    return {
        name: line
        for shard in shards
        if shard.split == split
        for name, line in _done(shard)["left_out"].items()
    }


def _write_metadata(
    directory: Path, config: DataConfig, shards: Sequence[Shard], splits: Sequence[str]
) -> None:
    """What tensorflow-datasets reads first. Its own builder would write the shards in one process,
    and all of them again after a kill.
    """
    infos = []
    for split in splits:
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory,
            dataset_name=NAME,
            split=split,
            filetype_suffix="array_record",
            template=SHARD_TEMPLATE,
        )
        done = [_done(shard) for shard in shards if shard.split == split]
        lengths, size = [one["images"] for one in done], sum(one["bytes"] for one in done)
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
            )
        )
    layout = features(len(config.class_names))
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=layout,
        split_infos=infos,
        description="DSCT, prepared",
        check_data=False,
    )


def _finish(directory: Path, config: DataConfig, reports: dict[str, Any], fingerprint: str) -> None:
    """The summary, and then away with the marks of work in progress."""
    marks = list(directory.glob("*.done"))
    written = sorted(
        path
        for path in directory.iterdir()
        if path.name.startswith((f"{NAME}-", "index_")) and path.suffix not in (".done", ".tmp")
    )
    summary: dict[str, Any] = {
        "class_names": list(config.class_names),
        "multi_label": config.multi_label,
        "source": config.source,
        "splits": reports,
        "fingerprint": fingerprint,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in written
        },
    }
    for mark in marks:
        name, done = mark.name.removesuffix(".done"), json.loads(mark.read_text(encoding="utf-8"))
        if summary["files"][name]["sha256"] != done["sha256"]:
            raise UserError(
                f"{directory / name}: changed after it was written; remove it and {mark.name}, "
                "and run the same command again"
            )
    _replace(directory / SUMMARY, json.dumps(summary, indent=1))
    for path in (*marks, directory / _PLAN):
        path.unlink()


def verify(output: Path) -> int:
    """Compares every file with its checksum and returns how many there are. Raises UserError naming
    the first that differs.
    """
    directory = folder(output)
    files = read_summary(directory)["files"]
    for name, file in progress(files.items(), total=len(files), what="verifying", unit="file"):
        if sha256(directory / name) != file["sha256"]:
            raise UserError(
                f"{directory / name}: differs from its checksum; remove the folder and run "
                "data.tools.prepare again"
            )
    return len(files)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = config_parser("python -m data prepare", __doc__)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder of the prepared data: later config.data.data_dir",
    )
    parser.add_argument(
        "--split", action="append", choices=SPLITS, help="only this one; may be given several times"
    )
    parser.add_argument(
        "--short_side",
        type=int,
        help="make images smaller whose short side is longer than this many pixels",
    )
    parser.add_argument("--shard_images", type=int, default=256, help="images a file (default 256)")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="threads (default: one for each core)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="only compare the files that are there with their checksums",
    )

    def run() -> None:
        config, arguments = parse(parser, argv)
        for name in ("short_side", "shard_images", "workers"):
            if (value := getattr(arguments, name)) is not None and value < 1:
                raise UserError(f"--{name}={value} cannot be used: must be at least 1")
        if arguments.verify:
            print(f"{verify(arguments.output)} files are as they were written")
            return
        options = {
            name: getattr(arguments, name) for name in ("short_side", "shard_images", "workers")
        }
        directory = prepare(config, arguments.output, splits=arguments.split or SPLITS, **options)
        summary = read_summary(directory)
        for split, report in summary["splits"].items():
            print(f"{split}: {report['images']} images, {report['people']} people")
        print(
            f"{sum(file['bytes'] for file in summary['files'].values()) / 1e6:.1f} MB in "
            f"{directory}"
        )
        print(
            f"use it with --config.data.source=prepared --config.data.data_dir={arguments.output}"
        )

    return run_command(run)
