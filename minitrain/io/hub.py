"""Check once whether the Hugging Face Hub is reachable, since its libraries retry for most of a minute."""

import functools
import os
from pathlib import Path

from minitrain.errors import UnreachableError


@functools.cache
def is_hub_reachable() -> bool:
    """Return whether the Hub responds within HF_HUB_ETAG_TIMEOUT seconds (default: 10).

    If it does not, switch its libraries to offline mode: they use their cache, and fail at once for anything else.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception:  # the errors differ between HTTP libraries; all mean that it is unreachable
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def check_hub(name: str) -> None:
    """Switch to offline mode if a name has to be looked up on the Hub, and the Hub is unreachable."""
    if not Path(name).exists():
        is_hub_reachable()


def unreachable_error(name: str, error: Exception, repo_type: str = "model") -> UnreachableError | None:
    """Return the error to raise if loading failed because the Hub is unreachable, or None.

    Args:
        name: A folder, or a name on the Hub.
        error: The error in loading it.
        repo_type: `model` or `dataset`.
    """
    if Path(name).exists() or is_hub_reachable() or not isinstance(error, OSError):
        return None
    from huggingface_hub import constants

    where = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else constants.ENDPOINT
    option = "" if repo_type == "model" else f" --repo-type {repo_type}"
    return UnreachableError(
        f"{name}: not found locally or in the cache, and the Hub is unreachable ({where}). "
        f"Run `hf download {name}{option} --local-dir DIR` on a machine with network access, and set DIR instead."
    )
