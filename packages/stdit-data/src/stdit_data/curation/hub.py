"""Load a user's model from a folder or the Hugging Face Hub, on the device that belongs to this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stdit_data.errors import DataError


@contextmanager
def loading(model: str, kind: str) -> Iterator[None]:
    """Make one line of the errors of loading a model.

    Args:
        model: folder or Hub id.
        kind: of model that is expected, for the message.

    Raises:
        DataError: not there, or not such a model.
    """
    try:
        yield
    except ImportError as error:
        raise DataError(f"{model}: {_line(error)}; install stdit-data[caption]") from None
    except (OSError, ValueError, KeyError) as error:  # a Hub id that cannot be one is a ValueError
        if isinstance(error, DataError):
            raise
        if not Path(model).exists() and (Path(model).is_absolute() or model.startswith((".", "~"))):
            raise DataError(f"{model}: no such folder, so no {kind}") from None
        if not Path(model).exists() and _offline():
            why = "no such folder, not in the Hub's cache, and HF_HUB_OFFLINE is set"
            raise DataError(f"{model}: {why}; unset it, or give the folder of a copy") from None
        raise DataError(f"{model}: no {kind} ({_line(error)})") from None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
