"""NCAER-S folders -> records: `images/<split>/<Class>/<name>.jpg` and
`crop/<split>/<Class>/<name>.txt`, a line `x1,y1,x2,y2` for each face.

A box of four zeros says that no face was found; an image without any face is no record, and is
counted. data/tools/build_ncaer_s.py writes these folders.
"""

from pathlib import Path

from data.config import DataConfig
from data.readers.records import ReadReport, Record, RecordBuilder
from dsct_jax.errors import UserError
from dsct_jax.preprocess import image_suffixes


def read_ncaer_s(config: DataConfig, split: str) -> tuple[list[Record], ReadReport]:
    """The records of one split, by class and name. Raises UserError naming the file or folder."""
    root = config.root
    top = root / "images" / config.annotation_file(split)
    if not top.is_dir():
        remedy = f"config.data.{split} to the split's folder below images/ and crop/"
        raise UserError(f"{top}: no such folder; set config.data.data_dir, and {remedy}")
    builder = RecordBuilder([top], config, protocol="ncaer_s")
    for folder in sorted(path for path in top.iterdir() if path.is_dir()):
        label = builder.class_index(folder.name, f"{folder}: class")
        for image in sorted(
            path for path in folder.iterdir() if path.suffix.lower() in image_suffixes()
        ):
            boxes = _read_crop(root / "crop" / image.relative_to(root / "images"))
            builder.report.without_people += not boxes
            if boxes:
                builder.add(image, str(image.relative_to(root)), boxes, [[label]] * len(boxes))
    return builder.finish()


def _read_crop(image: Path) -> list[tuple[float, ...]]:
    path = image.with_suffix(".txt")
    needs = "needs x1,y1,x2,y2 of the face in pixels, or 0,0,0,0"
    try:
        lines = path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; each image {needs}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not lines:
        raise UserError(f"{path}: is empty; it {needs}")
    boxes: list[tuple[float, ...]] = []
    for number, line in enumerate(lines, 1):
        try:
            x1, y1, x2, y2 = map(float, line.split(","))
        except ValueError:
            raise UserError(f"{path}:{number}: {needs} and not {line!r}") from None
        if (x1, y1, x2, y2) != (0, 0, 0, 0):
            boxes.append((x1, y1, x2, y2))
    return boxes
