"""Where an ingress finds replicas."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from lorax_contract.errors import StartupError
from lorax_ingress.finding import Located, ReplicaPlaces


def write(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def test_a_file_of_places_is_followed(tmp_path: Path) -> None:
    """What cannot be read changes nothing."""
    path = tmp_path / "places"

    async def scene() -> None:
        places = ReplicaPlaces([f"file:{path}", "fixed=h:1"]).follow()
        fixed = Located("fixed", "h:1")
        assert await anext(places) == {fixed}
        write(path, "# two\na=h:2\n\nunix:/run/b\n")
        two = {fixed, Located("a", "h:2"), Located("unix:/run/b", "unix:/run/b")}
        assert await anext(places) == two
        write(path, "nowhere\n")
        waiting = asyncio.ensure_future(anext(places))
        await asyncio.sleep(0.6)
        assert not waiting.done()
        write(path, "a=h:3\n")
        assert await waiting == {fixed, Located("a", "h:3")}

    asyncio.run(asyncio.wait_for(scene(), 30))


def test_a_name_and_a_file_are_followed_together(tmp_path: Path) -> None:
    path = tmp_path / "places"
    path.write_text("a=h:2\n")

    async def scene() -> None:
        places = ReplicaPlaces(["dns:127.0.0.1:7", f"file:{path}"]).follow()
        assert await anext(places) == {
            Located("127.0.0.1:7", "127.0.0.1:7", "127.0.0.1"),
            Located("a", "h:2"),
        }

    asyncio.run(asyncio.wait_for(scene(), 30))


def test_what_is_no_place_names_the_forms() -> None:
    with pytest.raises(StartupError, match="file:PATH"):
        ReplicaPlaces(["nowhere"])
