"""What a process does when another one of its run has failed or is gone."""

GRACE = 10.0  # seconds that a process waits after another one failed, so that the launcher sees that one end first


class PeerFailed(SystemExit):
    """Another process failed and reports why; this one ends without a message."""


def is_connection_lost(error: BaseException) -> bool:
    """Return whether an error of torch.distributed says that another process has ended or cannot be reached."""
    from torch.distributed import DistNetworkError

    lost = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return lost or isinstance(error, DistNetworkError)
