"""Where the blocks of a GGUF file lie that a model was converted from."""

from __future__ import annotations

from pathlib import Path

BLOCKS_FILE = "blocks.safetensors"
# Raise it when blocks are kept in another way: folders made by an older one are then made again.
_VERSION = 1


def blocks_folder(folder: Path) -> Path:
    """Return where the blocks of a converted model lie."""
    return folder.with_name(f"{folder.name}-blocks{_VERSION}")
