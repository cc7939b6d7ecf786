"""Choose which clips a run trains on and which it is validated on.

`shapes` and caches of it come with validation clips of their own; see `stdit_train.data.datasets.build_datasets`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip
from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.datasets.videos import VideoDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.format import is_cache
from stdit_data.manifests.split import split
from stdit_train.config.schema import DataConfig
from stdit_train.data.videos import open_clips
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError

VALIDATION_CLIPS = 64  # that the validation loss is the mean of

log = logging.getLogger(__name__)

Clips = TypeVar("Clips", VideoDataset, LatentDataset)


class ValidationClips:
    """The first 64 clips of a data set, as a `ClipDataset`.

    The next 64 stand in for clips that cannot be read, so that a broken file does not end the run and the loss is the
    same on every machine where the same files are broken.

    Args:
        dataset: clips of one shape, without random transforms.
    """

    def __init__(self, dataset: VideoDataset | LatentDataset) -> None:
        self.dataset, self.moments = dataset, getattr(dataset, "moments", False)
        self.own = range(len(dataset))[:VALIDATION_CLIPS]
        self.spare = range(len(dataset))[VALIDATION_CLIPS : 2 * VALIDATION_CLIPS]
        self.identity: int | None = getattr(dataset, "identity", None)
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self.own)

    def bucket(self, index: int) -> Bucket:
        """Return the clips' shape."""
        return self.dataset.bucket(index)

    @property
    def captions(self) -> list[str]:
        """Return the captions of all clips that may be read, substitutes included."""
        return [self.dataset.caption(index) for index in (*self.own, *self.spare)]

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """Load a clip, or its substitute; seed and epoch make no difference.

        Raises:
            DataError: no clip can be read.
        """
        failed: ClipError | None = None
        for candidate in (index, *self.spare[index : index + 1], *self.own, *self.spare):
            try:
                return self.dataset.load(candidate, seed=0, epoch=0)
            except ClipError as error:
                failed = error
                if candidate not in self._reported:
                    self._reported.add(candidate)
                    log.warning("validation: %s is replaced by another clip", error)
        raise DataError(f"none of the {len(self)} validation clips can be read, the last: {failed}")


def train_val_split(
    dataset: Clips, data: DataConfig, world: World | None = None
) -> tuple[Clips, ValidationClips | None]:
    """Split clips into those to train on and those to validate on: a share of them, another source, or none.

    Validation clips have the run's own shape (`data.frames`, `height` and `width`), also where there are buckets. Of a
    video they are the middle, in time and in the picture, and never mirrored.

    Args:
        dataset: clips of `data.source`.
        data: settings.
        world: processes of the run, see `open_clips`. [default: this one]

    Raises:
        ConfigError: the share leaves one side empty, or no clip has that shape.
        DataError: `data.validation_source` does not exist or has no usable clip.
    """
    if data.validation_source is not None:
        others = _open(data.validation_source, dataset, data, world)
        return dataset, _validation(others, range(len(others)), data)
    if not data.validation:
        return dataset, None
    try:
        kept, held = split(dataset.paths(), data.validation, dataset.groups())
    except DataError as error:
        raise ConfigError(f"data.validation: {error}; set another, or name a data.validation_source") from None
    return dataset.subset(kept), _validation(dataset, held, data)


def validation_captions(validation: ShapesDataset | ValidationClips | None) -> list[str]:
    """Return the captions of the clips that the validation loss is measured on."""
    if validation is None:
        return []
    if isinstance(validation, ValidationClips):
        return validation.captions
    return [validation.caption(index) for index in range(min(VALIDATION_CLIPS, len(validation)))]


def _open(
    source: str, dataset: VideoDataset | LatentDataset, data: DataConfig, world: World | None
) -> VideoDataset | LatentDataset:
    if not is_cache(source):
        return open_clips(replace(data, source=source, buckets=(), tokens=None), world, uint8=True)
    if isinstance(dataset, VideoDataset):
        raise ConfigError(f"data.validation_source {source} is a cache, {data.source} is not: name videos for both")
    return LatentDataset(source)


def _validation(dataset: VideoDataset | LatentDataset, indices: Sequence[int], data: DataConfig) -> ValidationClips:
    shape = Bucket(data.frames, data.height, data.width)
    fitting = [index for index in indices if dataset.bucket(index) == shape]
    if not fitting:
        raise ConfigError(
            f"data.validation: none of the {len(indices)} clips is of {shape}; set data.frames, data.height and "
            "data.width to the shape to validate in, or hold more out"
        )
    if isinstance(dataset, LatentDataset):
        return ValidationClips(dataset.subset(fitting, ahead=False))
    return ValidationClips(dataset.subset(fitting, plain=True))
