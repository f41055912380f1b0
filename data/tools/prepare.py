"""Brings a data set into the prepared form (data/readers/prepared.py): once, in parallel, and after
an interruption from where it stood."""

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
from data.command import require_at_least
from data.config import SPLITS, DataConfig
from data.readers.frames import UPRIGHT
from data.readers.prepared import AGAIN, NAME, SUMMARY, features, folder, read_summary, write_index
from data.readers.records import REMEDY, Record, one_line
from data.readers.registry import read_split
from dsct_jax.cli import progress, whole_file
from dsct_jax.errors import UserError
from dsct_jax.preprocess import Size, decode_image, resize

_PLAN = "plan.json"  # what an unfinished preparation is of
_QUALITY = 95  # JPEG, of images that are made smaller
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
        output: what `config.data.data_dir` will be when the prepared form is read.
        shard_images: images per file.
        short_side: longest short side in pixels of a stored image; None keeps every image as it is.
        workers: threads that decode and encode.

    Raises UserError when the raw data cannot be used, the folder holds another preparation, or the
    disk is full (what is written stays for the next call).
    """
    if config.source == "prepared":
        remedy = "name the source of the raw files"
        raise UserError(f"config.data.source='prepared' cannot be prepared again: {remedy}")
    directory, reports, records = folder(output), {}, {}
    for split in [split for split in SPLITS if split in splits]:
        found, report = read_split(config, split)
        records[split] = [_smaller(record, short_side) for record in found]
        reports[split] = dataclasses.asdict(report)
    fingerprint = _fingerprint(config, records, shard_images, short_side)
    try:
        if (directory / SUMMARY).exists():
            if read_summary(directory)["fingerprint"] != fingerprint:
                reason = "holds the prepared form of other data or options"
                raise UserError(f"{directory}: {reason}; {_ANOTHER}")
            return directory
        _begin(directory, fingerprint)
        shards = _shards(directory, records, shard_images)
        _write_shards(shards, config, short_side, workers)
        _finish(directory, config, shards, reports, fingerprint)
    except OSError as error:
        raise _unwritable(directory, error.strerror or str(error)) from None
    return directory


def _unwritable(path: Path, reason: str) -> UserError:
    remedy = "make room and run the same command again"
    return UserError(f"{path}: cannot be written ({reason}); {remedy}")


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
    """Of everything the prepared files depend on; of images, the size and time of the file."""
    options = (config.class_names, config.multi_label, config.protocol, shard_images, short_side)
    digest = hashlib.sha256(repr(options).encode())
    for split, found in records.items():
        digest.update(split.encode())
        for record in found:
            stat = record.image.stat() if isinstance(record.image, Path) else None
            state = (stat.st_size, stat.st_mtime_ns) if stat else record.image
            parts = (record.name, record.height, record.width, state, record.cues, record.exif)
            digest.update(repr(parts).encode() + record.boxes.tobytes() + record.labels.tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_and_sum(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _template(directory: Path, split: str) -> Any:
    """The names of a split's shards. (The builder of tensorflow-datasets would write them in one
    process, and all of them again after a kill.)
    """
    return tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=NAME, split=split, filetype_suffix="array_record"
    )


def _begin(directory: Path, fingerprint: str) -> None:
    """Notes what is being prepared, so that nothing else is mixed with what is left of it."""
    plan = directory / _PLAN
    if plan.exists() and plan.read_text(encoding="utf-8") != fingerprint:
        reason = "holds an unfinished preparation of other data or options"
        raise UserError(f"{directory}: {reason}; {_ANOTHER}")
    with whole_file(plan) as file:
        file.write(fingerprint)


def _shards(directory: Path, records: dict[str, list[Record]], shard_images: int) -> list[Shard]:
    shards = []
    for split, found in records.items():
        starts = range(0, len(found), shard_images)
        parts = [tuple(found[start : start + shard_images]) for start in starts]
        paths = _template(directory, split).sharded_filepaths(len(parts))
        for path, part in zip(paths, parts, strict=True):
            shards.append(Shard(Path(path), split, part))
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
                    raise UserError(f"{error}; {REMEDY}") from None
                skipped[record.name] = str(error)
                continue
            example = {field: getattr(record, field) for field in ("name", "boxes", "labels")}
            example |= {"image": image, "cues": list(record.cues)}
            writer.write(layout.serialize_example(layout.encode_example(example)))
        writer.close()
    except RuntimeError as error:  # array_record's only word for a disk that is full
        raise _unwritable(temporary, one_line(error)[:200]) from None
    done = _size_and_sum(temporary) | {"skipped": skipped}
    temporary.replace(shard.path)
    with whole_file(shard.mark) as file:
        json.dump(done, file)


def _encoded(record: Record, short_side: int | None) -> bytes:
    """An image file that decodes to what the record says. Raises UserError."""
    if not isinstance(record.image, Path):
        return _save(record.image(), "PNG")
    try:
        raw = record.image.read_bytes()
    except OSError as error:
        raise UserError(f"{record.image}: cannot be read ({error.strerror})") from None
    turned = record.exif == UPRIGHT
    image = decode_image(record.image, raw, upright=turned)
    before = image.height, image.width
    size = _stored_size(before, short_side)
    if size != (record.height, record.width):
        raise UserError(f"{record.image}: its size changed while it was being prepared")
    if size != before:
        return _save(resize(image, size), "JPEG", quality=_QUALITY)
    return _save(image, "PNG") if turned else raw


def _save(image: Any, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _finish(
    directory: Path, config: DataConfig, shards: Sequence[Shard], reports: dict, fingerprint: str
) -> None:
    """Writes the index, metadata of tensorflow-datasets and the summary; removes the marks."""
    files, infos = {}, []
    for split, report in reports.items():
        lengths, kept, size = [], [], 0
        for shard in [shard for shard in shards if shard.split == split]:
            files[shard.path.name] = done = json.loads(shard.mark.read_text(encoding="utf-8"))
            skipped = done.pop("skipped")
            report["unreadable_images"] += skipped.values()
            report["unreadable"] += len(skipped)
            left = [record for record in shard.records if record.name not in skipped]
            lengths.append(len(left))
            kept += left
            size += done["bytes"]
        report["images"], report["people"] = len(kept), sum(len(one.boxes) for one in kept)
        index = directory / f"index_{split}.npz"
        write_index(index, kept)
        files[index.name] = _size_and_sum(index)
        infos.append(tfds.core.SplitInfo(split, lengths, size, _template(directory, split)))
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=features(len(config.class_names)),
        split_infos=infos,
        description="DSCT, prepared",
        check_data=False,
    )
    summary = {field: getattr(config, field) for field in ("class_names", "multi_label", "source")}
    summary |= {"splits": reports, "fingerprint": fingerprint, "files": files}
    with whole_file(directory / SUMMARY) as file:
        json.dump(summary, file, indent=1)
    for path in (*(shard.mark for shard in shards), directory / _PLAN):
        path.unlink()


def verify(output: Path) -> int:
    """Compares every file with its checksum; returns their number. Raises UserError naming one."""
    directory = folder(output)
    files = read_summary(directory)["files"]
    for name, file in progress(files.items(), total=len(files), what="verifying", unit="file"):
        if sha256(directory / name) != file["sha256"]:
            raise UserError(f"{directory / name}: differs from its checksum; {AGAIN}")
    return len(files)


def run(arguments: argparse.Namespace) -> None:
    """Prepares, or verifies."""
    require_at_least(arguments, 1, "short_side", "shard_images", "workers")
    output = arguments.output
    if arguments.verify:
        print(f"{verify(output)} files are as they were written")
        return
    names = ("shard_images", "short_side", "workers")
    options = {name: getattr(arguments, name) for name in names}
    directory = prepare(arguments.data, output, splits=arguments.split or SPLITS, **options)
    summary = read_summary(directory)
    for split, report in summary["splits"].items():
        print(f"{split}: {report['images']} images, {report['people']} people")
    size = sum(file["bytes"] for file in summary["files"].values())
    print(f"{size / 1e6:.1f} MB in {directory}")
    print(f"use it with --config.data.source=prepared --config.data.data_dir={output}")
