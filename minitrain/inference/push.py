"""Upload a model to the Hugging Face Hub."""

import os
from pathlib import Path

from minitrain.errors import ConfigError, UnreachableError
from minitrain.io.hub import is_hub_reachable


def prepare_push(name: str) -> None:
    """Create a private model repository on the Hub, unless it exists, so that `push_folder` does not fail after work.

    Raises:
        ConfigError: No token is set, the name is invalid, or the Hub refuses them.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError

    if not get_token():
        raise ConfigError("--push: no token of the Hub is set. Run `hf auth login`, or set HF_TOKEN.", "missing-option")
    if not is_hub_reachable():
        where = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else constants.ENDPOINT
        raise UnreachableError(f"--push: the Hub is unreachable ({where}). Remove --push, or connect.")
    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
    except HFValidationError as error:
        raise ConfigError(f"--push: {error} Write OWNER/NAME.", "invalid-value") from None
    except Exception as error:  # the errors differ between HTTP libraries
        raise _refused(name, error) from None


def push_folder(name: str, folder: Path) -> str:
    """Upload the files of a folder to a model repository on the Hub, and return its address. Raises ConfigError."""
    from huggingface_hub import HfApi, constants

    try:
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by minitrain")
    except Exception as error:  # as above
        failed = _refused(name, error)
        message = f"{failed.message} The model is complete in {folder}; upload it with `hf upload {name} {folder}`."
        raise ConfigError(message, failed.code) from None
    return f"{constants.ENDPOINT}/{name}"


def _refused(name: str, error: Exception) -> ConfigError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    advice = "Use a token with permission to write." if status in (401, 403, 404) else "Try again."
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ConfigError(f"--push: the Hub refuses {name}: {lines[-1].rstrip('.')}. {advice}", "process-failed")
