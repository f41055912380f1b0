"""Reads all data of a configuration and reports what they are: counts, labels, boxes, damaged
files, and images that are in two splits."""

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data.command import require_at_least
from data.config import PROTOCOLS, SPLITS, DataConfig
from data.readers.records import ReadReport, Record, crowded
from data.readers.registry import read_split
from data.tools.duplicates import (
    Fingerprint,
    duplicate_groups,
    exact_groups,
    fingerprints,
    near_groups,
)
from dsct_jax.cli import whole_file
from dsct_jax.errors import UserError

_SHOWN = 5  # examples of each finding

# (images, people) of each split as published, and of all together; None = not known
EXPECTED: dict[str, dict[str, tuple[int | None, int | None]]] = {
    "emotic_head_dsct": {"val": (1705, 2397), "test": (3682, 5369)},
    "emotic_body_pami": {
        "train": (None, 23266),
        "val": (None, 3315),
        "test": (None, 7203),
        "all": (23571, 34320),
    },
    "emotic_body_cvpr17": {"all": (18300, 23788)},
    "caer_s": {"all": (69982, 69982)},
}
# released files; the other numbers were published after filters of their own, or are rounded
EXACT = ("emotic_head_dsct",)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was not as it should be."""

    is_error: bool  # makes the status 1
    text: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{'!' if self.is_error else '-'} {self.text}"]
        lines += [f"    {example}" for example in self.examples[:_SHOWN]]
        if (more := len(self.examples) - _SHOWN) > 0:
            lines.append(f"    ... and {more} more (--report=FILE lists all)")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class SplitCheck:
    """What was found in one split."""

    report: ReadReport
    readable: list[tuple[Record, Fingerprint]]
    damaged: list[str]  # the error lines of images whose pixels cannot be decoded
    label_counts: np.ndarray  # int [k], people by class


def check_split(config: DataConfig, split: str, *, workers: int) -> SplitCheck:
    """Reads the annotations of a split and decodes every image. Raises UserError."""
    records, report = read_split(dataclasses.replace(config, skip_corrupt=True), split)
    prints = fingerprints(records, workers=workers, what=f"{split}: decoding")
    pairs = zip(records, prints, strict=True)
    readable = [(record, one) for record, one in pairs if isinstance(one, Fingerprint)]
    damaged = [str(one) for one in prints if isinstance(one, UserError)]
    counts = np.sum([record.labels.sum(0) for record in records], axis=0).astype(int)
    return SplitCheck(report, readable, damaged, counts)


def find_problems(
    checks: dict[str, SplitCheck],
    class_names: Sequence[str],
    *,
    near: int,
    model: Mapping[str, Any],
) -> list[Finding]:
    """Everything that a user should know of the splits, errors first. `model`: the section."""
    findings = [
        *(one for split, check in checks.items() for one in _split_problems(split, check)),
        *(one for split, check in checks.items() for one in _notes(split, check, class_names)),
        *(one for split, check in checks.items() for one in _crowds(split, check, model)),
        *_count_problems(checks),
        *_duplicate_problems(checks, near=near),
    ]
    return sorted(findings, key=lambda finding: not finding.is_error)


def _split_problems(split: str, check: SplitCheck) -> Iterator[Finding]:
    report = check.report
    if report.unreadable:
        misshapen = f", {report.misshapen} of another shape than annotated" * (report.misshapen > 0)
        no_images = report.unreadable - report.missing - report.misshapen
        yield Finding(
            True,
            f"{split}: {report.unreadable} files cannot be opened: {report.missing} missing, "
            f"{no_images} that are no images{misshapen}",
            tuple(report.unreadable_images),
        )
    if check.damaged:
        text = f"{split}: {len(check.damaged)} images cannot be decoded"
        yield Finding(True, text, tuple(check.damaged))
    if not report.people:
        yield Finding(True, f"{split}: shows no person")
    for line in report.suspicions():
        yield Finding(True, f"{split}: {line}")


def _notes(split: str, check: SplitCheck, class_names: Sequence[str]) -> Iterator[Finding]:
    """What a reader met and dealt with, apart from what is an error."""
    suspicions = check.report.suspicions()
    for line in dataclasses.replace(check.report, unreadable=0, misshapen=0).lines()[1:]:
        if line not in suspicions:
            yield Finding(False, f"{split}: {line}")
    counts = zip(class_names, check.label_counts, strict=True)
    if empty := [name for name, count in counts if not count]:
        remedy = "remove them from config.class_names, or see how the annotations spell them"
        yield Finding(False, f"{split}: nobody has the label {', '.join(empty)}; {remedy}")


def _crowds(split: str, check: SplitCheck, model: Mapping[str, Any]) -> Iterator[Finding]:
    many, line = crowded([record for record, _ in check.readable], model)
    if line:
        yield Finding(many, f"{split}: {line}")


def _expected(protocol: str, split: str) -> tuple[int | None, int | None]:
    return EXPECTED.get(protocol, {}).get(split, (None, None))


def _count_problems(checks: dict[str, SplitCheck]) -> Iterator[Finding]:
    protocols = {check.report.protocol for check in checks.values()}
    if len(protocols) > 1:
        names = ", ".join(sorted(protocols))
        yield Finding(True, f"the splits belong to different protocols: {names}")
    for split, check in checks.items():
        protocol = check.report.protocol
        for what, expected in zip(("images", "people"), _expected(protocol, split), strict=True):
            counted = getattr(check.report, what)
            if expected not in (None, counted):
                text = f"{split}: {counted} {what}, where {protocol} has {expected}"
                yield Finding(protocol in EXACT, text)


def _duplicate_problems(checks: dict[str, SplitCheck], *, near: int) -> Iterator[Finding]:
    """Images that occur twice, or nearly so: across splits an error (test must be unseen)."""
    readable = [(split, *pair) for split, check in checks.items() for pair in check.readable]
    images = [(split, record.name) for split, record, _ in readable]
    prints = [one for *_, one in readable]
    exact = exact_groups(prints)
    similar = [  # apart from those that are the same image
        group
        for group in duplicate_groups(near_groups(prints, near=near))
        if len({exact[place] for place in group}) > 1
    ]
    alike = f"images that look alike (of 256 bits at most {near} differ)"
    for what, groups in (("the same image", duplicate_groups(exact)), (alike, similar)):
        examples: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for group in groups:
            among = {images[place][0] for place in group}
            names = " = ".join(": ".join(images[place]) for place in group[:_SHOWN])
            splits = tuple(split for split in checks if split in among)
            examples[splits].append(names + " ..." * (len(group) > _SHOWN))
        for splits, lines in examples.items():
            is_error = len(splits) > 1
            where = " and ".join(splits) if is_error else f"{splits[0]}, within it"
            remedy = "; python -m data split --by=content keeps them together" * is_error
            text = f"{where}: {len(lines)} groups of {what}{remedy}"
            yield Finding(is_error, text, tuple(lines))


def count_table(checks: dict[str, SplitCheck]) -> str:
    """Images and people by split, beside the published numbers."""
    head = ("images", "expected", "people", "expected", "people/image", "labels/person")
    widths = (9, 10, 9, 10, 14, 15)
    rows = [
        (split, check.report.images, check.report.people, int(check.label_counts.sum()))
        for split, check in checks.items()
    ]
    _, *columns = zip(*rows, strict=True)
    protocol = next(iter(checks.values())).report.protocol
    about = "" if protocol in EXACT else "~"
    lines: list[tuple[str, ...]] = [("split", *head)]
    rows.append(("all", *(sum(column) for column in columns)))
    for split, images, people, labels in rows:
        known = _expected(protocol, split)
        if split == "all" and len(checks) < len(SPLITS):
            known = (None, None)
        expected = ["-" if number is None else f"{about}{number}" for number in known]
        density = f"{people / max(images, 1):.2f}", f"{labels / max(people, 1):.2f}"
        lines.append((split, str(images), expected[0], str(people), expected[1], *density))
    row = "{:<8}" + "".join(f"{{:>{width}}}" for width in widths)
    return "\n".join(row.format(*cells) for cells in lines)


def label_table(checks: dict[str, SplitCheck], config: DataConfig) -> str:
    """People by label and split, with their share, and what guessing reaches."""
    counts = [check.label_counts for check in checks.values()]
    shares = [check.label_counts / max(check.report.people, 1) for check in checks.values()]
    rows = [("label", list(checks))]
    for index, name in enumerate(config.class_names):
        pairs = zip(counts, shares, strict=True)
        rows.append((name, [f"{count[index]:>11} {share[index]:>7.1%}" for count, share in pairs]))
    guesses = [share.mean() if config.multi_label else share.max() for share in shares]
    name = "guessing: mAP" if config.multi_label else "majority"
    rows.append((name, [f"{guess:.1%}" for guess in guesses]))
    width = max(len(name) for name in (*config.class_names, "guessing: mAP")) + 2
    return "\n".join(
        name.ljust(width) + "".join(f"{cell:>20}" for cell in cells) for name, cells in rows
    )


def as_json(
    checks: dict[str, SplitCheck], findings: Sequence[Finding], config: DataConfig
) -> dict[str, Any]:
    """The same for programs, with every example."""
    splits = {}
    for split, check in checks.items():
        labels = dict(zip(config.class_names, check.label_counts.tolist(), strict=True))
        report = dataclasses.asdict(check.report)
        splits[split] = {**report, "labels": labels, "damaged": check.damaged}
    return {
        "protocol": next(iter(checks.values())).report.protocol,
        "splits": splits,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def run(arguments: argparse.Namespace) -> int:
    """Prints the tables and the findings."""
    config = arguments.data
    require_at_least(arguments, 1, "workers")
    if not 0 <= arguments.near < 128:
        raise UserError(f"--near={arguments.near} cannot be used: must be 0 to 127")
    checks = {
        split: check_split(config, split, workers=arguments.workers) for split in arguments.split
    }
    findings = find_problems(checks, config.class_names, near=arguments.near, model=arguments.model)
    for split, check in checks.items():
        print(f"{split}: {check.report.source}")
    protocol = next(iter(checks.values())).report.protocol
    print(f"protocol {protocol}: {PROTOCOLS[protocol]}\n")
    print(f"{count_table(checks)}\n\n{label_table(checks, config)}\n")
    print("\n".join(map(str, findings)) or "no problems found")
    if arguments.report:
        with whole_file(arguments.report) as file:
            file.write(json.dumps(as_json(checks, findings, config), indent=1) + "\n")
        print(f"everything: {arguments.report}")
    errors = sum(finding.is_error for finding in findings)
    print(f"{errors} errors, {len(findings) - errors} warnings")
    return 1 if errors else 0
