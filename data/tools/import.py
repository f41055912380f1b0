"""Makes a data set of what an annotation tool exports: COCO json (of Roboflow, CVAT and others),
the XML of CVAT for images, Label Studio's JSON or JSON-MIN, json or csv of VIA.
"""

import argparse
import dataclasses
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.command import require_at_least
from data.config import SPLITS, AnnotationFile, DataConfig
from data.readers.coco import category_ids, classes_of, load_document, read_documents, to_coco
from data.readers.exports import Document, attribute_names, box_polygons
from data.readers.records import Record
from data.tools.duplicates import Fingerprint, fingerprints, near_groups
from data.tools.parsers import CONFIGS
from data.tools.split import assign, below, fill_empty, strata_of
from dsct_jax.cli import whole_file
from dsct_jax.config import read_config
from dsct_jax.errors import UserError

SUFFIXES = (".json", ".xml", ".csv")
Source = tuple[Path, Document]
_LOOKED_FOR = 20  # images of a document, to see where they lie
_SHARES = {"train": 70, "val": 10, "test": 20}
_SPELLINGS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPELLINGS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
_CONFIG = '''"""{name}: made by python -m data import of {export}.

    python train.py --config={output}/config.py --workdir=runs/{name}
"""

from configs import {like}


def get_config():
    config = {like}.get_config()
    config.name = {name!r}
    config.class_names = {class_names!r}
    config.multi_label = {multi_label}
    config.data.update(source="coco", label_format="ids", data_dir={output!r})
    config.data.update(train="train.json", val="val.json", test="test.json")
{more}    return config
'''


def find_files(export: Path, output: Path, attribute: str) -> dict[str, list[Source]]:
    """The annotation files of an export and their documents by split, "" where a path names none.
    Raises UserError.
    """
    if not export.exists():
        raise UserError(f"{export}: no such file or folder")
    found: dict[str, list[Source]] = defaultdict(list)
    top = export if export.is_dir() else export.parent
    unusable = []
    for file in sorted(export.rglob("*")) if export.is_dir() else [export]:
        if file.suffix.lower() not in SUFFIXES or output in file.parents or not file.is_file():
            continue
        try:
            document = box_polygons(load_document(file, attribute))
        except UserError as error:
            unusable.append(str(error))
            continue
        words = re.split(r"[\W_]+", file.relative_to(top).with_suffix("").as_posix().lower())
        split = next((_SPELLINGS[word] for word in reversed(words) if word in _SPELLINGS), "")
        found[split].append((file, document))
    if not found:
        kinds = f"{export}: holds no annotations ({', '.join(SUFFIXES)}; archives must be unpacked)"
        raise UserError(unusable[0] if unusable else kinds)
    for line in unusable:
        print(f"- left out: {line}")
    return found


def merge_people(document: Document) -> tuple[Document, int]:
    """The document with one person, and all its categories, for several with the same box in an
    image, as some tools write several labels; and how many were taken in.
    """
    people: dict[str, Document] = {}
    for person in document["annotations"]:
        place = json.dumps([person.get("image_id"), person.get("bbox")])
        ids = [*category_ids(people.get(place, {"category_id": []})), *category_ids(person)]
        ids = list(dict.fromkeys(ids))
        category = ids[0] if len(ids) == 1 else ids
        people[place] = {**person, **people.get(place, {}), "category_id": category}
    merged = len(document["annotations"]) - len(people)
    return {**document, "annotations": list(people.values())}, merged


def find_root(file: Path, document: Document, folders: Sequence[Path]) -> Path:
    """The folder that most image names of a document start from."""
    nearby = [file.parent, *folders, file.parent.parent]
    candidates = [place for folder in nearby for place in (folder, folder / "images")]
    names = [str(one.get("file_name")) for one in document["images"][:_LOOKED_FOR]]
    return max(candidates, key=lambda place: sum((place / name).is_file() for name in names))


def read_export(
    found: Mapping[str, Sequence[Source]], images: Path
) -> tuple[dict[str, list[Record]], DataConfig, list[str]]:
    """The records of each split, the classes, and lines about them (! before what is wrong).
    Raises UserError.
    """
    lines, documents = [], {}
    for sources in found.values():
        for file, document in sources:
            document, merged = merge_people(document)
            counts = {"people with the box of another joined to it": merged}
            counts["images left out, nobody is marked on them"] = document.get("unmarked", 0)
            lines += [f"- {file}: {count} {text}" for text, count in counts.items() if count]
            documents[file] = document
    people = (one for document in documents.values() for one in document["annotations"])
    multi_label = any(len(category_ids(one)) > 1 for one in people)
    if not multi_label:  # one without a class teaches nothing
        for file, document in documents.items():
            labeled = [one for one in document["annotations"] if category_ids(one)]
            if without := len(document["annotations"]) - len(labeled):
                lines.append(f"- {file}: {without} people without a class left out")
            documents[file] = {**document, "annotations": labeled}
    names = classes_of(list(documents.values()))
    if not names:
        raise UserError(f"{next(iter(documents))}: nobody has a class; see --label-attribute")
    _require_classes(documents, names)
    config = DataConfig(names, multi_label, data_dir=str(images), max_targets=10**6)
    config = dataclasses.replace(config, skip_corrupt=True)
    records: dict[str, list[Record]] = {}
    for split, sources in found.items():
        files = [
            (AnnotationFile(file, find_root(file, documents[file], [images]), ""), documents[file])
            for file, _ in sources
        ]
        records[split], report = read_documents(files, config)
        serious = report.suspicions()
        missing = f"{report.unreadable} images skipped"
        for line in report.lines()[1:]:
            lines.append(f"{'!' if line in serious or line.startswith(missing) else '-'} {line}")
    return records, config, lines


def _require_classes(documents: Mapping[Path, Document], names: tuple[str, ...]) -> None:
    """Raises UserError where all have the same class, and attributes that may be meant instead."""
    attributes = {one: None for document in documents.values() for one in attribute_names(document)}
    if len(names) == 1 and attributes:
        raise UserError(
            f"{next(iter(documents))}: all people have the class {names[0]!r} and attributes: name "
            f"the one that is the class with --label-attribute: {', '.join(attributes)}"
        )


def make_splits(
    records: Mapping[str, Sequence[Record]], *, workers: int, seed: int
) -> tuple[dict[str, list[Record]], list[str]]:
    """The records as train, val and test, each image once and none that cannot be decoded, divided
    where train or val is missing; and lines about it. Raises UserError.
    """
    lines: list[str] = []
    seen: set[Any] = set()
    kept: dict[str, list[tuple[Record, Fingerprint]]] = {split: [] for split in SPLITS}
    for split in ("test", "val", "train", ""):
        found = records.get(split, ())
        prints = fingerprints(found, workers=workers, what="decoding")
        for record, one in zip(found, prints, strict=True):
            if isinstance(one, UserError):
                lines.append(f"! left out: {one}")
            elif record.image in seen:
                lines.append(f"- {record.name}: in several files or splits, kept in one")
            else:
                seen.add(record.image)
                kept[split or "train"].append((record, one))
    if not kept["train"]:
        kept = {"train": kept["val"] + kept["test"], "val": [], "test": []}
    if not kept["val"]:
        parts = [split for split in SPLITS if split == "train" or not kept[split]]
        whole = kept["train"]
        groups = near_groups([one for _, one in whole])
        if 2 * np.bincount(groups, minlength=1).max() > len(whole):
            lines.append("- more than half of the images look alike: they are divided all the same")
            groups = np.arange(len(whole))
        shares = [_SHARES[split] for split in parts]
        strata = strata_of([record for record, _ in whole])
        chosen = assign(strata, groups, shares=shares, seed=seed)
        chosen = fill_empty(chosen, groups, shares)
        for number, split in enumerate(parts):
            kept[split] = [whole[place] for place in np.flatnonzero(chosen == number)]
        how = "images that look alike in one of them"
        lines.append(f"- divided into {', '.join(parts)} ({', '.join(map(str, shares))}), {how}")
    if not kept["train"] or not kept["val"]:
        raise UserError(f"{len(seen)} usable images are too few for train and val: bring more")
    return {split: [record for record, _ in kept[split]] for split in SPLITS}, lines


def configuration(
    like: str, splits: Mapping[str, Sequence[Record]], config: DataConfig, **texts: Any
) -> str:
    """The file config.py: `like`, with what differs."""
    base = read_config(CONFIGS / f"{like}.py")
    most = max(len(record.boxes) for found in splits.values() for record in found)
    limits = [("data", "max_targets"), ("model", "num_subject_queries"), ("model", "num_queries")]
    raised = [
        f"    config.{section}.{field} = {most}  # people in an image\n"
        for section, field in limits
        if base[section].get(field, most) < most
    ]
    if config.multi_label and base["loss"]["class_loss"] != "focal":
        focal = 'class_loss="focal", logit_adjustment=0.0'
        raised.append(f"    config.loss.update({focal})  # several labels per person\n")
    about = {"class_names": config.class_names, "multi_label": config.multi_label}
    return _CONFIG.format(like=like, more="".join(raised), **about, **texts)


def run(arguments: argparse.Namespace) -> int:
    """Writes the data set and says how to train; status 1 where something is wrong with it."""
    require_at_least(arguments, 0, "seed")
    export, output, like = arguments.export, arguments.output.absolute(), arguments.like
    images = arguments.images or (export if export.is_dir() else export.parent)
    if not images.is_dir():
        raise UserError(f"--images={images}: no such folder")
    found = find_files(export, output, arguments.label_attribute)
    records, config, lines = read_export(found, images)
    workers = os.cpu_count() or 1
    splits, more = make_splits(records, workers=workers, seed=arguments.seed)
    name = re.sub(r"\W+", "_", output.name) or "mine"
    texts = {"name": name, "output": output.as_posix(), "export": export.name}
    text = configuration(like, splits, config, **texts)
    output.mkdir(parents=True, exist_ok=True)
    for split, part in splits.items():
        if part:
            names = [below(record.image, output) for record in part]
            with whole_file(output / f"{split}.json") as file:
                json.dump(to_coco(part, names, config), file)
        people = sum(record.labels.sum(0) for record in part)
        counts = dict(zip(config.class_names, np.ravel(people).astype(int).tolist(), strict=False))
        print(
            f"{split}: {len(part)} images, {sum(len(one.boxes) for one in part)} people; {counts}"
        )
    with whole_file(output / "config.py") as file:
        file.write(text)
    print("\n".join([*lines, *more]))
    if read_config(CONFIGS / f"{like}.py")["model"]["norm"] == "frozen_batch":
        text = "starts from published weights, --config.init_from=FILE (docs/weights.md), on a GPU"
        print(f"- {like} {text}; from scratch, small, on a CPU: --like=faces_single")
    print(f"look:  python -m data show --config={output}/config.py")
    print(f"train: python train.py --config={output}/config.py --workdir=runs/{name}")
    return int(any(line.startswith("!") for line in [*lines, *more]))
