"""Brings a data set into the prepared form (data/readers/prepared.py): once, in parallel, and after
an interruption from where it stood.

    python -m data prepare --config=configs/caer_s_r50.py --config.data.data_dir=DIR \\
        --output=PREPARED
    python train.py --config=configs/caer_s_r50.py --config.data.source=prepared \\
        --config.data.data_dir=PREPARED ...

Images keep their bytes, so training sees the same pixels; --short_side=N makes those whose short
side is longer smaller (JPEG, quality 95), and their boxes with them. `--verify` compares every file
of a finished data set with its checksum.
"""

import argparse
import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from data.augment import scale_boxes
from data.command import ConfigParser, require_at_least
from data.config import SPLITS, DataConfig
from data.readers.prepared import (
    AGAIN,
    NAME,
    SHARD_TEMPLATE,
    SUMMARY,
    features,
    folder,
    read_summary,
    write_index,
)
from data.readers.records import Record
from data.readers.registry import read_split
from dsct_jax.cli import progress, whole_file
from dsct_jax.errors import UserError
from dsct_jax.preprocess import Size, decode_image, resize

_PLAN = "plan.json"  # what an unfinished preparation is of
_QUALITY = 95  # JPEG, of images that are made smaller
_MAKE_ROOM = "make room and run the same command again"
_ANOTHER = "choose another --output, or remove the folder"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A run of images of one split that become one file."""

    path: Path
    split: str
    records: tuple[Record, ...]

    @property
    def mark(self) -> Path:
        """Written when the shard is complete: its size, checksum and skipped images."""
        return self.path.with_name(self.path.name + ".done")

    def done(self) -> dict[str, Any]:
        """What the mark says."""
        return json.loads(self.mark.read_text(encoding="utf-8"))


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
        shard_images: images per file.
        short_side: longest short side in pixels of a stored image; None keeps every image as it is.
        workers: threads that decode and encode.

    Raises:
        UserError: the raw data cannot be used, the folder holds another preparation, or the disk is
            full (what is written stays for the next call).
    """
    if config.source == "prepared":
        raise UserError(
            "config.data.source='prepared' cannot be prepared again: name the source of the raw "
            "files"
        )
    directory, reports, records = folder(output), {}, {}
    for split in [split for split in SPLITS if split in splits]:
        found, report = read_split(config, split)
        records[split] = [_smaller(record, short_side) for record in found]
        reports[split] = dataclasses.asdict(report)
    fingerprint = _fingerprint(config, records, shard_images, short_side)
    try:
        if (directory / SUMMARY).exists():
            if read_summary(directory)["fingerprint"] != fingerprint:
                raise UserError(
                    f"{directory}: holds the prepared form of other data or options; {_ANOTHER}"
                )
            return directory
        _begin(directory, fingerprint)
        shards = _shards(directory, records, shard_images)
        _write_shards(shards, config, short_side, workers)
        _finish(directory, config, shards, reports, fingerprint)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{directory}: cannot be written ({reason}); {_MAKE_ROOM}") from None
    return directory


def _smaller(record: Record, short_side: int | None) -> Record:
    """The record with the size and boxes that its image will be stored with."""
    before = record.height, record.width
    height, width = size = _stored_size(before, short_side)
    if size == before:
        return record
    boxes = scale_boxes(record.boxes, before, size)
    return dataclasses.replace(record, height=height, width=width, boxes=boxes)


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
    options = (config.class_names, config.multi_label, config.protocol, shard_images, short_side)
    digest = hashlib.sha256(repr(options).encode())
    for split, found in records.items():
        digest.update(split.encode())
        for record in found:
            stat = record.image.stat() if isinstance(record.image, Path) else None
            state = (stat.st_size, stat.st_mtime_ns) if stat else record.image
            parts = (record.name, record.height, record.width, state, record.cues)
            digest.update(repr(parts).encode() + record.boxes.tobytes() + record.labels.tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _begin(directory: Path, fingerprint: str) -> None:
    """Notes what is being prepared, so that nothing else is mixed with what an interrupted call has
    left.
    """
    plan = directory / _PLAN
    if plan.exists() and plan.read_text(encoding="utf-8") != fingerprint:
        raise UserError(
            f"{directory}: holds an unfinished preparation of other data or options; {_ANOTHER}"
        )
    with whole_file(plan) as file:
        file.write(fingerprint)


def _shards(directory: Path, records: dict[str, list[Record]], shard_images: int) -> list[Shard]:
    shards = []
    for split, found in records.items():
        starts = range(0, len(found), shard_images)
        for number, start in enumerate(starts):
            name = f"{NAME}-{split}.array_record-{number:05d}-of-{len(starts):05d}"
            part = tuple(found[start : start + shard_images])
            shards.append(Shard(directory / name, split, part))
    return shards


def _write_shards(
    shards: Sequence[Shard], config: DataConfig, short_side: int | None, workers: int
) -> None:
    """Those that are not complete yet."""
    missing = [shard for shard in shards if not shard.mark.exists()]
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_write_shard, shard, config, short_side) for shard in missing]
        try:
            for job in progress(as_completed(jobs), total=len(jobs), what="preparing", unit="file"):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_shard(shard: Shard, config: DataConfig, short_side: int | None) -> None:
    temporary = shard.path.with_name(shard.path.name + ".tmp")
    layout = features(len(config.class_names))
    skipped: dict[str, str] = {}
    # one image per group: images are read in random order
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    try:
        for record in shard.records:
            try:
                image = _encoded(record, short_side)
            except UserError as error:
                if not config.skip_corrupt:
                    remedy = "repair or remove it, or set config.data.skip_corrupt=True"
                    raise UserError(f"{error}; {remedy}") from None
                skipped[record.name] = str(error)
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
        raise UserError(f"{temporary}: cannot be written ({reason}); {_MAKE_ROOM}") from None
    done = {"bytes": temporary.stat().st_size, "sha256": sha256(temporary), "skipped": skipped}
    temporary.replace(shard.path)
    with whole_file(shard.mark) as file:
        json.dump(done, file)


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
    before = image.height, image.width
    size = _stored_size(before, short_side)
    if size != (record.height, record.width):
        raise UserError(f"{record.image}: its size changed while it was being prepared")
    return raw if size == before else _save(resize(image, size), "JPEG", quality=_QUALITY)


def _save(image: Any, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _finish(
    directory: Path,
    config: DataConfig,
    shards: Sequence[Shard],
    reports: dict[str, dict[str, Any]],
    fingerprint: str,
) -> None:
    """Index, metadata of tensorflow-datasets and the summary, and then away with the marks of work
    in progress.
    """
    files, infos = {}, []
    for split, report in reports.items():
        lengths, kept, size = [], [], 0
        for shard in [shard for shard in shards if shard.split == split]:
            done = shard.done()
            skipped = done["skipped"]
            left = [record for record in shard.records if record.name not in skipped]
            report["unreadable_images"] += skipped.values()
            report["unreadable"] += len(skipped)
            files[shard.path.name] = {name: done[name] for name in ("bytes", "sha256")}
            lengths.append(len(left))
            kept += left
            size += done["bytes"]
        report["images"], report["people"] = len(kept), sum(len(one.boxes) for one in kept)
        index = directory / f"index_{split}.npz"
        write_index(index, kept)
        files[index.name] = {"bytes": index.stat().st_size, "sha256": sha256(index)}
        infos.append(_split_info(directory, split, lengths, size))
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=features(len(config.class_names)),
        split_infos=infos,
        description="DSCT, prepared",
        check_data=False,
    )
    summary = {
        "class_names": list(config.class_names),
        "multi_label": config.multi_label,
        "source": config.source,
        "splits": reports,
        "fingerprint": fingerprint,
        "files": files,
    }
    with whole_file(directory / SUMMARY) as file:
        json.dump(summary, file, indent=1)
    for path in (*(shard.mark for shard in shards), directory / _PLAN):
        path.unlink()


def _split_info(directory: Path, split: str, lengths: list[int], size: int) -> Any:
    """What tensorflow-datasets reads first of a split. Its own builder would write the shards in
    one process, and all of them again after a kill.
    """
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory,
        dataset_name=NAME,
        split=split,
        filetype_suffix="array_record",
        template=SHARD_TEMPLATE,
    )
    return tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
    )


def verify(output: Path) -> int:
    """Compares every file with its checksum and returns how many there are. Raises UserError naming
    the first that differs.
    """
    directory = folder(output)
    files = read_summary(directory)["files"]
    for name, file in progress(files.items(), total=len(files), what="verifying", unit="file"):
        if sha256(directory / name) != file["sha256"]:
            raise UserError(f"{directory / name}: differs from its checksum; {AGAIN}")
    return len(files)


def make_parser() -> ConfigParser:
    """The command line."""
    parser = ConfigParser(__doc__)
    parser.add_output(
        "--output",
        folder=True,
        required=True,
        help="folder of the prepared data: later config.data.data_dir",
    )
    parser.add_argument(
        "--split", action="append", choices=SPLITS, help="only this one; may be given several times"
    )
    parser.add_argument(
        "--short_side", type=int, help="reduce images whose short side has more pixels than this"
    )
    parser.add_argument("--shard_images", type=int, default=256, help="images per file")
    parser.add_workers("threads")
    parser.add_argument(
        "--verify", action="store_true", help="only compare the files there with their checksums"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prepares, or verifies."""
    require_at_least(arguments, 1, "short_side", "shard_images", "workers")
    output = arguments.output
    if arguments.verify:
        print(f"{verify(output)} files are as they were written")
        return
    directory = prepare(
        arguments.data,
        output,
        splits=arguments.split or SPLITS,
        shard_images=arguments.shard_images,
        short_side=arguments.short_side,
        workers=arguments.workers,
    )
    summary = read_summary(directory)
    for split, report in summary["splits"].items():
        print(f"{split}: {report['images']} images, {report['people']} people")
    size = sum(file["bytes"] for file in summary["files"].values())
    print(f"{size / 1e6:.1f} MB in {directory}")
    print(f"use it with --config.data.source=prepared --config.data.data_dir={output}")
