"""Divides images into train, val and test, by chance or so that nothing alike is in two of
them; writes COCO-style json, copies no image."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from data.command import require_at_least
from data.config import SPLITS, DataConfig
from data.readers.coco import to_coco
from data.readers.records import Record, read_rows
from data.readers.registry import read_split
from data.tools.duplicates import Fingerprint, fingerprints, near_groups
from dsct_jax.errors import UserError


def assign(
    strata: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    *,
    shares: Sequence[int | float],
    seed: int,
) -> Int[np.ndarray, " n"]:
    """The split of each image, 0 to len(shares) - 1: groups stay whole, and every stratum (class)
    is divided as `shares` say, as far as groups allow.

    Large groups are placed first, each where its classes are missed most; groups of one size are in
    an order drawn from `seed`. Without groups (each image its own) the number of a class in a split
    is off by less than one from its share; with one class, by less than the largest group.
    """
    strata, groups = (np.unique(one, return_inverse=True)[1] for one in (strata, groups))
    counts = np.zeros((groups.max(initial=-1) + 1, strata.max(initial=-1) + 1), int)
    np.add.at(counts, (groups, strata), 1)
    largest = counts.sum(1).max(initial=1)
    # Groups may be larger than what a small class has for a split: then all classes together count
    # too.
    counts = np.column_stack([counts, counts.sum(1) * (1 - 1 / largest)])
    missed = np.outer(np.array(shares, float) / sum(shares), counts.sum(0))
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    chosen = np.zeros(len(counts), int)
    for group in shuffled[np.argsort(-counts[shuffled, :-1].sum(1), kind="stable")]:
        chosen[group] = np.argmax(missed @ counts[group])
        missed[chosen[group]] -= counts[group]
    return chosen[groups]


def fill_empty(
    chosen: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"], shares: Sequence[int | float]
) -> Int[np.ndarray, " n"]:
    """The answer of `assign`, but a split that has a share and no image gets the smallest group of
    the largest split, unless that has only one.
    """
    for split in np.flatnonzero(np.array(shares) > 0):
        donor = np.flatnonzero(chosen == np.bincount(chosen).argmax())
        names, sizes = np.unique(groups[donor], return_counts=True)
        if split not in chosen and len(names) > 1:
            chosen = np.where(groups == names[sizes.argmin()], split, chosen)
    return chosen


def pool(config: DataConfig, splits: Sequence[str]) -> tuple[list[Record], int]:
    """All images of these splits, each file once, and how many were repeated. Raises UserError."""
    found: dict[Path, Record] = {}
    listed = 0
    for split in splits:
        for record in read_split(config, split)[0]:
            if not isinstance(record.image, Path):
                reason = "has no image files to divide"
                raise UserError(f"config.data.source={config.source!r} {reason}")
            found.setdefault(record.image, record)
            listed += 1
    return list(found.values()), listed - len(found)


def clip_groups(records: Sequence[Record], path: Path) -> Int[np.ndarray, " n"]:
    """A number for the clip of each image, by a file of lines `path,clip`. Raises UserError."""
    if not path.is_file():
        raise UserError(f"--clips={path}: no such file")
    clips: dict[str, str] = {}
    for number, row in read_rows(path, "lines path,clip"):
        if len(row) != 2:
            raise UserError(f"{path}:{number}: needs path,clip and not {','.join(row)!r}")
        clips[row[0]] = row[1]
    if missing := next((record.name for record in records if record.name not in clips), None):
        raise UserError(f"--clips={path}: has no line for {missing}")
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(clips[one.name], len(numbers)) for one in records], int)


def content_groups(records: Sequence[Record], *, near: int, workers: int) -> Int[np.ndarray, " n"]:
    """A number for each image, the same for those that look alike. Raises UserError."""
    prints = []
    for one in fingerprints(records, workers=workers, what="decoding"):
        if not isinstance(one, Fingerprint):
            raise one
        prints.append(one)
    return near_groups(prints, near=near)


def strata_of(records: Sequence[Record]) -> Int[np.ndarray, " n"]:
    """The class of the first person with a label on each image; -1 = there is none."""
    labeled = ((int(row.argmax()) for row in record.labels if row.any()) for record in records)
    return np.array([next(classes, -1) for classes in labeled], int)


def run(arguments: argparse.Namespace) -> None:
    """Divides and writes the three files."""
    config, by, near = arguments.data, arguments.by, arguments.near
    require_at_least(arguments, 1, "workers")
    if (by == "clip") != (arguments.clips is not None):
        only = "a file of lines path,clip, and nothing else does"
        raise UserError(f"--by=clip needs --clips=FILE, {only}")
    records, num_repeated = pool(config, arguments.source)
    groups = np.arange(len(records))
    if by == "clip":
        groups = clip_groups(records, arguments.clips)
    elif by == "content":
        groups = content_groups(records, near=near, workers=arguments.workers)
    largest = int(np.bincount(groups).max())
    print(
        f"{len(records)} images ({num_repeated} listed more than once) in {groups.max() + 1} "
        f"groups, the largest of {largest}"
    )
    if largest > 0.5 * len(records) and len(records) > 1:
        raise UserError(
            f"--by={by}: {largest} of {len(records)} images form one group, which cannot be "
            f"divided; lower --near={near}"
        )
    seed, shares = arguments.seed, arguments.shares
    chosen = assign(strata_of(records), groups, shares=shares, seed=seed)
    chosen = fill_empty(chosen, groups, shares)
    info = {"by": by, "seed": seed, "shares": shares, "near": near, "from": arguments.source}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(SPLITS):
        part = [record for record, place in zip(records, chosen, strict=True) if place == number]
        names = [below(record.image, config.root) for record in part]
        path = arguments.output / f"{split}.json"
        document = to_coco(part, names, config, info=info | {"split": split})
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")
        print(f"{path}: {len(part)} images, {len(part) / len(records):.1%}")
        if not part:
            print(f"- {path} is empty: too few images or groups for --shares")


def below(image: Any, folder: str | Path) -> str:
    """The path of an image file, from the folder on."""
    return Path(os.path.relpath(image, folder)).as_posix()
