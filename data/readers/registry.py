"""The readers by their name in `config.data.source`: files on disk -> one record per image."""

from collections.abc import Callable

from data.config import DataConfig
from data.readers.caer_s import read_caer_s
from data.readers.coco import read_coco
from data.readers.emotic import read_emotic
from data.readers.ncaer_s import read_ncaer_s
from data.readers.prepared import read_prepared
from data.readers.records import ReadReport, Record
from data.readers.scenes import read_scenes

Reader = Callable[[DataConfig, str], tuple[list[Record], ReadReport]]

READERS: dict[str, Reader] = {
    "coco": read_coco,
    "caer_s": read_caer_s,
    "ncaer_s": read_ncaer_s,
    "emotic": read_emotic,
    "scenes": read_scenes,
    "prepared": read_prepared,
}


def read_split(config: DataConfig, split: str) -> tuple[list[Record], ReadReport]:
    """Every image of `split` in a fixed order, and what was counted. Raises UserError."""
    return READERS[config.source](config, split)
