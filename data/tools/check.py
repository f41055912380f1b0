"""Reads all data of a configuration and says what they are: counts, labels, boxes, damaged files,
and images that are in two splits.

    python -m data check --config=configs/caer_s_r50.py --config.data.data_dir=DIR

Ends with status 0 when nothing matters, 1 when something does (lines that begin with !), 2 when the
annotations cannot be used at all.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.command import config_parser, parse
from data.config import PROTOCOLS, SPLITS, DataConfig
from data.readers.records import ReadReport, Record
from data.readers.registry import read_split
from data.tools.duplicates import (
    NEAR,
    Fingerprint,
    duplicate_groups,
    exact_groups,
    fingerprints,
    near_groups,
)
from dsct_jax.cli import run_command
from dsct_jax.errors import UserError

_SHOWN = 5  # examples of each finding

# (images, people) of each split as published, and of all together; None = not known.
# docs/datasets.md has the sources.
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
# Released files of which no other count is right. The other numbers were published after filters of
# their own, or are rounded.
EXACT = ("emotic_head_dsct",)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was not as it should be."""

    is_error: bool  # makes the status 1
    text: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = "".join(f"\n    {example}" for example in self.examples[:_SHOWN])
        more = (
            f"\n    ... and {len(self.examples) - _SHOWN} more (--report=FILE lists all)"
            if len(self.examples) > _SHOWN
            else ""
        )
        return f"{'!' if self.is_error else '-'} {self.text}{shown}{more}"


@dataclasses.dataclass(frozen=True)
class SplitCheck:
    """What was found in one split."""

    report: ReadReport
    readable: list[tuple[Record, Fingerprint]]
    damaged: list[str]  # the error lines of images whose pixels cannot be decoded
    label_counts: np.ndarray  # int [k], people by class


def check_split(config: DataConfig, split: str, *, workers: int) -> SplitCheck:
    """Reads the annotations of a split and decodes every image; images that cannot be read are
    collected. Raises UserError for annotations.
    """
    records, report = read_split(dataclasses.replace(config, skip_corrupt=True), split)
    prints = fingerprints(records, workers=workers, what=f"{split}: decoding")
    readable = [
        (record, one)
        for record, one in zip(records, prints, strict=True)
        if isinstance(one, Fingerprint)
    ]
    damaged = [str(one) for one in prints if isinstance(one, UserError)]
    counts = np.sum([record.labels.sum(0) for record in records], axis=0).astype(int)
    return SplitCheck(report, readable, damaged, counts)


def find_problems(
    checks: dict[str, SplitCheck], class_names: Sequence[str], *, near: int
) -> list[Finding]:
    """Everything that a user should know of the splits, what matters first."""
    findings: list[Finding] = []
    for split, check in checks.items():
        report = check.report
        if report.unreadable:
            missing = (
                f"{report.missing} missing, {report.unreadable - report.missing} that are no images"
            )
            findings.append(
                Finding(
                    True,
                    f"{split}: {report.unreadable} files cannot be opened: {missing}",
                    tuple(report.unreadable_images),
                )
            )
        if check.damaged:
            findings.append(
                Finding(
                    True,
                    f"{split}: {len(check.damaged)} images cannot be decoded",
                    tuple(check.damaged),
                )
            )
        if not report.people:
            findings.append(Finding(True, f"{split}: shows no person"))
        findings += [Finding(False, f"{split}: {line}") for line in _notes(report)]
        empty = [
            name for name, count in zip(class_names, check.label_counts, strict=True) if not count
        ]
        if empty:
            findings.append(Finding(False, f"{split}: nobody has the label {', '.join(empty)}"))
    findings += _count_problems(checks)
    findings += _duplicate_problems(checks, near=near)
    return sorted(findings, key=lambda finding: not finding.is_error)


def _notes(report: ReadReport) -> list[str]:
    """What a reader met and dealt with; the totals and the unreadable files are told elsewhere."""
    return dataclasses.replace(report, unreadable=0).lines()[1:]


def _expected(protocol: str, split: str) -> tuple[int | None, int | None]:
    return EXPECTED.get(protocol, {}).get(split, (None, None))


def _count_problems(checks: dict[str, SplitCheck]) -> list[Finding]:
    findings = []
    protocols = {check.report.protocol for check in checks.values()}
    if len(protocols) > 1:
        findings.append(
            Finding(
                True, f"the splits belong to different protocols: {', '.join(sorted(protocols))}"
            )
        )
    for split, check in checks.items():
        protocol = check.report.protocol
        found = (check.report.images, check.report.people)
        for what, expected, counted in zip(
            ("images", "people"), _expected(protocol, split), found, strict=True
        ):
            if expected is not None and expected != counted:
                findings.append(
                    Finding(
                        protocol in EXACT,
                        f"{split}: {counted} {what}, where {protocol} has {expected}",
                    )
                )
    return findings


def _duplicate_problems(checks: dict[str, SplitCheck], *, near: int) -> list[Finding]:
    """Images that occur twice, or nearly so: across splits they matter, because a model is then
    tested on what it has seen.
    """
    places = [
        (split, record.name) for split, check in checks.items() for record, _ in check.readable
    ]
    prints = [one for check in checks.values() for _, one in check.readable]
    exact = exact_groups(prints)
    findings = []
    for what, groups in (
        ("the same image", duplicate_groups(exact)),
        (
            f"images that look alike (of 256 bits at most {near} differ)",
            duplicate_groups(near_groups(prints, near=near)),
        ),
    ):
        alike = what != "the same image"
        across: dict[tuple[str, ...], list[str]] = {}
        for group in groups:
            if alike and len({exact[place] for place in group}) == 1:
                continue  # told as the same image
            splits = tuple(
                split for split in checks if any(places[place][0] == split for place in group)
            )
            across.setdefault(splits, []).append(
                " = ".join(": ".join(places[place]) for place in group[:_SHOWN])
                + (" ..." if len(group) > _SHOWN else "")
            )
        for splits, examples in across.items():
            where = " and ".join(splits) if len(splits) > 1 else f"{splits[0]}, within it"
            remedy = (
                "; data.tools.split --by=content keeps them together" if len(splits) > 1 else ""
            )
            findings.append(
                Finding(
                    len(splits) > 1,
                    f"{where}: {len(examples)} groups of {what}{remedy}",
                    tuple(examples),
                )
            )
    return findings


def count_table(checks: dict[str, SplitCheck]) -> str:
    """Images and people by split, beside the published numbers."""
    lines = [
        f"{'split':<8}{'images':>9}{'expected':>10}{'people':>9}{'expected':>10}{'people/image':>14}{'labels/person':>15}"
    ]
    totals = [
        sum(getattr(check.report, what) for check in checks.values())
        for what in ("images", "people")
    ]
    labels = sum(int(check.label_counts.sum()) for check in checks.values())
    rows = [
        (split, check.report.images, check.report.people, int(check.label_counts.sum()))
        for split, check in checks.items()
    ]
    protocol = next(iter(checks.values())).report.protocol
    about = "" if protocol in EXACT else "~"
    for split, images, people, given in [*rows, ("all", *totals, labels)]:
        known = (
            _expected(protocol, split)
            if split != "all" or len(checks) == len(SPLITS)
            else (None, None)
        )
        expected = ["-" if number is None else f"{about}{number}" for number in known]
        density = f"{people / max(images, 1):>14.2f}{given / max(people, 1):>15.2f}"
        lines.append(f"{split:<8}{images:>9}{expected[0]:>10}{people:>9}{expected[1]:>10}{density}")
    return "\n".join(lines)


def label_table(checks: dict[str, SplitCheck], config: DataConfig) -> str:
    """People by label and split, with their share, and what guessing reaches."""
    width = max(len(name) for name in (*config.class_names, "guessing: mAP")) + 2
    lines = ["label".ljust(width) + "".join(f"{split:>20}" for split in checks)]
    shares = {
        split: check.label_counts / max(check.report.people, 1) for split, check in checks.items()
    }
    for index, name in enumerate(config.class_names):
        cells = [
            f"{check.label_counts[index]:>11} {shares[split][index]:>7.1%}"
            for split, check in checks.items()
        ]
        lines.append(name.ljust(width) + "".join(f"{cell:>20}" for cell in cells))
    guessing = [
        f"{share.mean() if config.multi_label else share.max():.1%}" for share in shares.values()
    ]
    lines.append(
        ("guessing: mAP" if config.multi_label else "commonest").ljust(width)
        + "".join(f"{cell:>20}" for cell in guessing)
    )
    return "\n".join(lines)


def as_json(
    checks: dict[str, SplitCheck], findings: Sequence[Finding], config: DataConfig
) -> dict[str, Any]:
    """The same for programs, with every example."""
    splits = {
        split: dataclasses.asdict(check.report)
        | {
            "labels": dict(zip(config.class_names, check.label_counts.tolist(), strict=True)),
            "damaged": check.damaged,
        }
        for split, check in checks.items()
    }
    return {
        "protocol": next(iter(checks.values())).report.protocol,
        "splits": splits,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def run(config: DataConfig, arguments: argparse.Namespace) -> int:
    """The command with its arguments parsed."""
    for split in arguments.split:
        if split not in SPLITS:
            raise UserError(f"--split={split}: use one or more of {', '.join(SPLITS)}, with commas")
    if not 0 <= arguments.near < 128 or arguments.workers < 1:
        raise UserError(
            f"--near={arguments.near} must be 0 to 127, --workers={arguments.workers} at least 1"
        )
    checks = {
        split: check_split(config, split, workers=arguments.workers)
        for split in dict.fromkeys(arguments.split)
    }
    findings = find_problems(checks, config.class_names, near=arguments.near)
    for split, check in checks.items():
        print(f"{split}: {check.report.source}")
    protocol = next(iter(checks.values())).report.protocol
    print(
        f"protocol {protocol}: "
        f"{PROTOCOLS[protocol]}\n\n{count_table(checks)}\n\n{label_table(checks, config)}\n"
    )
    print("\n".join(map(str, findings)) or "nothing found amiss")
    if arguments.report:
        arguments.report.write_text(json.dumps(as_json(checks, findings, config), indent=1) + "\n")
        print(f"everything: {arguments.report}")
    serious = sum(finding.is_error for finding in findings)
    print(f"{serious} finding(s) that matter, {len(findings) - serious} to know of")
    return 1 if serious else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one line on stderr and exit status 2."""
    parser = config_parser("python -m data check", __doc__)
    parser.add_argument(
        "--split",
        type=lambda text: text.split(","),
        default=SPLITS,
        help="splits to check, with commas; default: all three",
    )
    parser.add_argument(
        "--near",
        type=int,
        default=NEAR,
        help="bits of 256 that images looking alike differ in at most",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="images decoded at once"
    )
    parser.add_argument(
        "--report", type=Path, help="write everything that was found to this json file"
    )
    return run_command(lambda: run(*parse(parser, argv)))
