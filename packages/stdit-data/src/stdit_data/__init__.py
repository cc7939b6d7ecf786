"""Video for training: manifests, decoding, buckets, data sets, latent caches and a resumable loader.

Names are imported when they are first used, so that `import stdit_data` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stdit_data.buckets import Bucket
    from stdit_data.clip import Clip, ClipDataset
    from stdit_data.datasets.shapes import ShapesDataset
    from stdit_data.datasets.videos import VideoDataset, open_videos
    from stdit_data.errors import DataError
    from stdit_data.latents.dataset import LatentDataset
    from stdit_data.loading.loader import ClipLoader
    from stdit_data.loading.prefetch import Batch
    from stdit_data.manifests.format import read_manifest, write_manifest
    from stdit_data.video.write import export_video

__all__ = [
    "Batch",
    "Bucket",
    "Clip",
    "ClipDataset",
    "ClipLoader",
    "DataError",
    "LatentDataset",
    "ShapesDataset",
    "VideoDataset",
    "export_video",
    "open_videos",
    "read_manifest",
    "write_manifest",
]

_MODULES = {
    "Batch": "stdit_data.loading.prefetch",
    "Bucket": "stdit_data.buckets",
    "Clip": "stdit_data.clip",
    "ClipDataset": "stdit_data.clip",
    "ClipLoader": "stdit_data.loading.loader",
    "DataError": "stdit_data.errors",
    "LatentDataset": "stdit_data.latents.dataset",
    "ShapesDataset": "stdit_data.datasets.shapes",
    "VideoDataset": "stdit_data.datasets.videos",
    "export_video": "stdit_data.video.write",
    "open_videos": "stdit_data.datasets.videos",
    "read_manifest": "stdit_data.manifests.format",
    "write_manifest": "stdit_data.manifests.format",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
