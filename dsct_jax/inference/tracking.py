"""People through a video: who in one frame is who in the next, by where they are and how they move
(in two rounds, the certain first: Zhang et al., ByteTrack, 2022). A number means nothing beyond its
video: nobody is recognized.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from dsct_jax.boxes import pairwise_iou
from dsct_jax.postprocess import Subject

DOUBTFUL = 0.1  # confidence from which somebody may go on, if not begin
SIGHTINGS = 3  # before somebody gets a number
SECONDS_LOST = 1.0  # after which somebody unseen is gone
_LEAST_IOU = (0.15, 0.3)  # of the two rounds: detections jitter, and people are small
_CUT = 0.16  # mean change of brightness (0..1) from frame to frame that is a cut
_FOLLOW, _TURN = 0.6, 0.15  # how far position and velocity go with what is seen


@dataclasses.dataclass(frozen=True)
class FollowedSubject(Subject):
    """One person in one frame of a video."""

    person: int | None = None  # the same number through the video; None: seen too seldom yet
    track: int = 0  # the same from the first sighting on; Tracker.numbers knows whose it became


@dataclasses.dataclass
class _Track:
    key: int
    box: np.ndarray  # (x1, y1, x2, y2), where they are at `seconds`
    seconds: float
    velocity: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(4))
    sightings: int = 1

    def expected(self, seconds: float) -> np.ndarray:
        return self.box + self.velocity * (seconds - self.seconds)

    def see(self, box: np.ndarray, seconds: float) -> None:
        passed = max(seconds - self.seconds, 1e-3)
        error = box - self.expected(seconds)
        self.box = self.expected(seconds) + _FOLLOW * error
        self.velocity = self.velocity + _TURN * error / passed
        self.seconds, self.sightings = seconds, self.sightings + 1


class Tracker:
    """Gives the people of one frame after another their numbers. `certain`: the confidence that
    begins a person. `numbers`: of the tracks that have one.
    """

    def __init__(self, certain: float):
        self.numbers: dict[int, int] = {}
        self._certain, self._tracks, self._begun = certain, list[_Track](), 0
        self._last: np.ndarray | None = None

    def cut_at(self, image: Image.Image) -> bool:
        """Whether the picture changes so much that these are others; everybody ends there."""
        small = np.asarray(image.convert("L").resize((32, 32)), np.float32) / 255
        before, self._last = self._last, small
        is_cut = before is not None and float(np.abs(small - before).mean()) > _CUT
        if is_cut:
            self._tracks = []
        return is_cut

    def update(self, subjects: Sequence[Subject], seconds: float) -> list[FollowedSubject]:
        """The people of the frame at that time, numbered; without the doubtful whom nobody was."""
        self._tracks = [t for t in self._tracks if seconds - t.seconds <= SECONDS_LOST]
        boxes = np.array([one.box for one in subjects], np.float64).reshape(-1, 4)
        certain = np.array([one.confidence >= self._certain for one in subjects], bool)
        owners: dict[int, _Track] = {}
        free = list(self._tracks)
        for chosen, least in zip((certain, ~certain), _LEAST_IOU, strict=True):
            places = np.flatnonzero(chosen)
            if not len(places) or not free:
                continue
            expected = np.stack([track.expected(seconds) for track in free])
            overlap = pairwise_iou(expected, boxes[places])
            pairs = zip(*linear_sum_assignment(-overlap), strict=True)
            matched = [(i, j) for i, j in pairs if overlap[i, j] >= least]
            owners |= {int(places[j]): free[i] for i, j in matched}
            taken = {i for i, _ in matched}
            free = [one for i, one in enumerate(free) if i not in taken]
        for place, track in owners.items():
            track.see(boxes[place], seconds)
        for new in [int(place) for place in np.flatnonzero(certain) if int(place) not in owners]:
            self._begun += 1
            owners[new] = _Track(self._begun, boxes[new], seconds)
            self._tracks.append(owners[new])
        owned = sorted(owners.items(), key=lambda pair: pair[0])
        for _, track in owned:
            if track.sightings >= SIGHTINGS:
                self.numbers.setdefault(track.key, len(self.numbers) + 1)
        return [
            FollowedSubject(**vars(subjects[place]), person=self.numbers.get(key), track=key)
            for place, key in ((place, track.key) for place, track in owned)
        ]


def smoothed(
    seconds: np.ndarray, probabilities: np.ndarray, confidence: np.ndarray, *, window: float = 1.0
) -> np.ndarray:
    """[n k] probabilities of one person, in the order of `seconds`, as the mean of those within
    `window` seconds around each, weighted by confidence.
    """
    half = window / 2 + 1e-9
    first = np.searchsorted(seconds, seconds - half)
    last = np.searchsorted(seconds, seconds + half, side="right")
    weighted = np.hstack([confidence[:, None], confidence[:, None] * probabilities])
    sums = np.vstack([np.zeros_like(weighted[:1]), weighted.cumsum(0)])
    near = sums[last] - sums[first]
    return near[:, 1:] / near[:, :1]


def subjects_to_supervision(subjects: Sequence[Subject]):
    """The people as `supervision.Detections`, for its annotators and counters (needs the package
    supervision): xyxy, confidence, class_id of the likeliest class, tracker_id.
    """
    import supervision

    people = list(subjects)
    scores = np.array([list(one.probabilities.values()) for one in people], np.float32)
    numbers = [getattr(one, "person", None) for one in people]
    return supervision.Detections(
        xyxy=np.array([one.box for one in people], np.float32).reshape(-1, 4),
        confidence=np.array([one.confidence for one in people], np.float32),
        class_id=scores.argmax(-1) if people else np.zeros(0, int),
        tracker_id=np.array([-1 if number is None else number for number in numbers], int),
        data={"labels": np.array([", ".join(one.labels) for one in people])},
    )
