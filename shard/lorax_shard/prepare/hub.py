"""Models from the Hugging Face hub: safetensors, configuration and tokenizer, nothing else."""

from __future__ import annotations

import io
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.prepare.files import Progress, ProgressEvent, disk_errors

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN")
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
# What of a model is fetched. Subfolders hold other formats (onnx, original, …), but for those of
# sentence-transformers' steps, such as 1_Pooling; Mistral's consolidated files repeat the weights.
UNWANTED_FILES = ["[!0-9]*/*", "[0-9][!_]*/*", "*/*/*", "consolidated*.safetensors"]
_ATTEMPTS = 3
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def split_revision(model_id: str, revision: str | None) -> tuple[str, str | None]:
    """Split ``name@revision``; raises StartupError (USAGE) if a revision is given twice."""
    name, at, inline = model_id.partition("@")
    if at and revision is not None:
        raise StartupError(
            f"--model-id {model_id} names a revision and --revision {revision} another. Give one.",
            ExitCode.USAGE,
        )
    if not _HUB_ID.fullmatch(name) or (at and not inline):
        raise StartupError(
            f"--model-id {model_id!r} is neither a folder or file that exists here nor a hub id "
            "(name, org/name or org/name@revision). Check the spelling.",
            ExitCode.MODEL_NOT_FOUND,
        )
    return name, inline or revision


def hub_token() -> str | None:
    """Return the hub token of the environment; None leaves the choice to a stored login."""
    for name in TOKEN_VARIABLES:
        if value := os.environ.get(name, "").strip():
            return value
    return None


def fetch_snapshot(
    name: str,
    revision: str | None,
    *,
    with_code: bool,
    progress: Progress,
    pause: Callable[[float], None] = time.sleep,
) -> tuple[Path, str]:
    """Return a hub model's folder and commit, downloading what the hub's own cache lacks.

    A transfer that breaks goes on where it stopped, and lost connections are tried again
    after ``pause``. Raises StartupError.
    """
    from huggingface_hub import constants

    with disk_errors(Path(constants.HF_HUB_CACHE)):
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                folder = _download(name, revision, with_code, progress)
                return folder, folder.name
            except Exception as error:  # noqa: BLE001 — named one by one in _raise_in_words
                if attempt == _ATTEMPTS or not _worth_retrying(error):
                    _raise_in_words(error, name, revision)
                logger.warning("fetching %s broke off (%s); trying again", name, _brief(error))
                pause(0.5 * 2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _adopt_logs() -> None:
    """Make the client's log lines ours: it would print them on standard error by itself."""
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.get_logger().handlers.clear()
    hub_logging.enable_propagation()


def _download(name: str, revision: str | None, with_code: bool, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    _adopt_logs()
    return Path(
        snapshot_download(
            name,
            revision=revision,
            token=hub_token(),
            allow_patterns=[*WANTED_FILES, *(["*.py"] if with_code else [])],
            ignore_patterns=UNWANTED_FILES,
            tqdm_class=_progress_bar(f"download {name}", progress),
        )
    )


def _progress_bar(task: str, progress: Progress) -> Any:
    """Return a tqdm class that reports bytes to ``progress`` and prints nothing."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        """Counts like tqdm; the hub's client makes one for bytes and others for files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            # The client's second byte bar counts the same bytes on their way to the disk.
            self._reports = kwargs.get("unit") == "B" and "Downloading" in kwargs.get("desc", "")
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> bool:
            """Print nothing."""
            return True

        def update(self, n: float | None = 1) -> bool | None:
            """Count ``n`` more and report."""
            moved: bool | None = super().update(n)
            if self._reports:
                progress(ProgressEvent(task, int(self.n), int(self.total or 0) or None, "B"))
            return moved

    return Bar


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _worth_retrying(error: BaseException) -> bool:
    """Tell a lost connection or a hub in trouble from an answer that will stay the same."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return False
    if isinstance(error, HfHubHTTPError):
        return (_status(error) or 0) >= 500 or _status(error) in (408, 429)
    # A LocalEntryNotFoundError that is online hides what went wrong with the network.
    return isinstance(error, LocalEntryNotFoundError) or _is_network_error(error)


def _is_network_error(error: BaseException) -> bool:
    # huggingface_hub 1 uses httpx and 2 uses httpx2, so the class is known by name only.
    names = {cls.__name__ for cls in type(error).__mro__}
    broken_off = "Consistency check failed" in str(error)
    return broken_off or bool(names & {"TransportError", "ConnectionError", "TimeoutError"})


def _brief(error: BaseException) -> str:
    """Return an error's first line, without the query of URLs: it may hold a signature."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", lines[0] if lines else "no details")
    if token := hub_token():
        text = text.replace(token, "***")
    return f"{type(error).__name__}: {text[:300]}"


def _raise_in_words(error: Exception, name: str, revision: str | None) -> None:
    """Raise the StartupError that says what the hub's answer means; disk errors pass through."""
    from huggingface_hub import constants, errors

    what = f"{name}@{revision}" if revision else name
    if isinstance(error, errors.HfHubHTTPError):
        message = _http_words(error, what, name)
    elif constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError):
        message = (
            f"{what} is not in the hub's cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is "
            "set. Unset it once to fetch the model, or name a local folder."
        )
    elif isinstance(error, errors.HFValidationError):
        message = f"{what} is not a hub id: {_brief(error)}. It is named like org/name."
    elif isinstance(error, errors.LocalEntryNotFoundError) or _is_network_error(error):
        cause = error.__cause__ or error
        message = (
            f"{what} could not be fetched from {constants.ENDPOINT}: {_brief(cause)}. Check the "
            "network (and HF_ENDPOINT or the proxy, if one is set), or name a local folder."
        )
    else:
        raise error
    raise StartupError(message, ExitCode.MODEL_NOT_FOUND) from error


def _http_words(error: HfHubHTTPError, what: str, name: str) -> str:
    from huggingface_hub import constants, errors

    token = "the given token" if hub_token() else "no token in HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{what} is gated and was asked for with {token}. Accept its terms at "
            f"{constants.ENDPOINT}/{name} and set HF_TOKEN to a token of that account."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what} has no such revision. Check --revision: a branch, a tag or a commit."
    if isinstance(error, errors.RepositoryNotFoundError) or _status(error) in (401, 403):
        return (
            f"{what} is not on {constants.ENDPOINT}, or it is private and was asked for with "
            f"{token}. Check the spelling and the access."
        )
    return (
        f"{what} could not be fetched: {constants.ENDPOINT} answered with status {_status(error)}. "
        "Try again later, or name a local folder."
    )
