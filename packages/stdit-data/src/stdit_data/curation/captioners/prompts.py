"""The questions that captioners are asked, and the answers as they give them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stdit_data.curation.sampling import Array
from stdit_data.video.segments import Segment

# After the report of Open-Sora 1.0: frames in order, content and style, under six sentences, no frame-by-frame account.
VIDEO = (
    "These {count} images are frames of one video, in chronological order. Describe the video in fewer than six "
    "sentences: the subjects and what they look like, what they do and how it changes, the setting, the camera and the "
    "visual style. Describe it as a whole and only what can be seen; do not go through the frames one by one."
)
IMAGE = (
    "Describe this image in fewer than six sentences: the subjects and what they look like, what they do, the setting "
    "and the visual style. Describe only what can be seen."
)


@dataclass(frozen=True)
class Question:
    """What a captioner is asked about one clip.

    Attributes:
        images: [H, W, 3] uint8 RGB each, in chronological order.
        prompt: the text after the images.
        seed: of the answer, 32 bits.
    """

    images: Sequence[Array]
    prompt: str
    seed: int


@dataclass(frozen=True)
class Answer:
    """What a captioner says about one clip.

    Attributes:
        text: as it is.
        finished: False if it was cut off at the limit of tokens.
        failure: why there is no answer; "" if there is one.
    """

    text: str
    finished: bool = True
    failure: str = ""


Captioner = Callable[[Sequence[Question]], list[Answer]]


def ask(images: Sequence[Array], path: str, segment: Segment, seed: int, prompt: str | None) -> Question:
    """Make the question for a clip.

    Args:
        images: its frames.
        path, segment: of the clip; the file's name and the segment determine its own seed.
        seed: of the whole run.
        prompt: in place of `VIDEO` and `IMAGE`; "{count}" stands for the number of images.
    """
    text = prompt or (VIDEO if len(images) > 1 else IMAGE)
    place = f"{seed} {path.rpartition('/')[2]} {segment}"
    digest = hashlib.sha256(place.encode(errors="surrogateescape")).digest()
    return Question(images, text.replace("{count}", str(len(images))), int.from_bytes(digest[:4]))
