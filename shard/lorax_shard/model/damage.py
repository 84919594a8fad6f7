"""What is said of files that are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode


def refuse_corrupt(path: Path, error: Exception) -> NoReturn:
    """Raise the StartupError of a damaged file or folder."""
    raise StartupError(
        f"{path} is damaged or cut short ({error}); fetch the model again",
        ExitCode.MODEL_CORRUPT,
    ) from error
