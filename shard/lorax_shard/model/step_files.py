"""The JSON files of sentence-transformers' steps, and what is said of those that cannot be served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode


def document_of(path: Path) -> Mapping[str, Any]:
    """Return the object that a file holds, empty if there is none; StartupError (MODEL_CORRUPT)."""
    document = read_json(path)
    if not isinstance(document, dict | None):
        raise corrupt(path, "it must hold one JSON object")
    return document or {}


def read_json(path: Path) -> Any:
    """Return what a file holds; None: there is none. Raises StartupError (MODEL_CORRUPT)."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise corrupt(path, str(error)) from error


def corrupt(path: Path, reason: str) -> StartupError:
    """Return the error for a file that is damaged."""
    return StartupError(f"{path} cannot be read: {reason}", ExitCode.MODEL_CORRUPT)


def unsupported(folder: Path, reason: str) -> StartupError:
    """Return the error for vectors that are made in another way than any here."""
    return StartupError(
        f"vectors of {folder} cannot be made: {reason}, which this server does not compute",
        ExitCode.MODEL_UNSUPPORTED,
    )
