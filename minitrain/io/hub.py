"""Whether the hub of Hugging Face answers: asked once, since its libraries would try for most of a minute."""

import functools
import os
from pathlib import Path

from minitrain.errors import UnreachableError


@functools.cache
def hub_answers() -> bool:
    """Asks the hub, for HF_HUB_ETAG_TIMEOUT seconds (10) at most.

    When it is silent, its libraries are told to be offline: they find what they have kept, and fail at once for the
    rest.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception:  # whatever the reason and the HTTP library of the day: it cannot be reached
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def ask_for(name: str) -> None:
    """To be called before a name is looked up on the hub: asks whether that answers, unless it is a folder here."""
    if not Path(name).exists():
        hub_answers()


def unreachable(name: str, error: Exception, kind: str = "model") -> UnreachableError | None:
    """What to raise for an error in loading a model (or `kind`), if it is that the hub does not answer."""
    if Path(name).exists() or hub_answers() or not isinstance(error, OSError):
        return None
    from huggingface_hub import constants

    where = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else constants.ENDPOINT
    of_kind = "" if kind == "model" else f" --repo-type {kind}"
    return UnreachableError(
        f"{name}: it is not here, the hub does not answer ({where}), and its cache does not hold it. "
        f"Where there is a network: hf download {name}{of_kind} --local-dir DIR; then name DIR in its place."
    )
