"""What ``kubectl kustomize`` makes of a folder, as far as deploy/kubernetes uses it.

Known are resources, components, JSON patches by kind and name, and tags of images; anything else
in a ``kustomization.yaml`` is an error, so that nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
_OPTIONAL = {("Deployment", "lorax-ingress")}
_KNOWN = {"apiVersion", "kind", "resources", "components", "patches", "images"}


def render(folder: Path, *components: Path) -> list[Manifest]:
    """Return the manifests of a folder, with components as if the folder named them last."""
    manifests = _of_folder(folder, [])
    for component in components:
        manifests = _of_folder(component, manifests)
    return manifests


def _of_folder(folder: Path, manifests: list[Manifest]) -> list[Manifest]:
    document = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := sorted(set(document) - _KNOWN):
        raise ValueError(f"{folder}: this renderer does not know {', '.join(unknown)}")
    for name in document.get("resources", ()):
        path = folder / name
        own = _of_folder(path, []) if path.is_dir() else yaml.safe_load_all(path.read_text())
        manifests = [*manifests, *own]
    for name in document.get("components", ()):
        manifests = _of_folder(folder / name, manifests)
    for patch in document.get("patches", ()):
        for manifest in _targets(manifests, patch["target"]):
            for operation in yaml.safe_load(patch["patch"]):
                _apply(manifest, operation)
    for image in document.get("images", ()):
        _retag(manifests, image["name"], image["newTag"])
    return manifests


def _targets(manifests: Sequence[Manifest], target: dict[str, str]) -> list[Manifest]:
    kind, name = target["kind"], target["name"]
    found = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    # Kustomize passes over all that is not there; here that is right of what only some have.
    if not found and (kind, name) not in _OPTIONAL:
        raise ValueError(f"there is no {kind} {name} to patch")
    return found


def _apply(manifest: Manifest, operation: dict[str, Any]) -> None:
    """Apply one operation of a JSON patch; what it removes or replaces must be there."""
    *path, last = operation["path"].strip("/").replace("~1", "/").split("/")
    place: Any = manifest
    for step in path:
        place = place[int(step) if isinstance(place, list) else step]
    what, value = operation["op"], operation.get("value")
    if what == "add" and isinstance(place, list):
        place.insert(len(place) if last == "-" else int(last), value)
    elif what == "add":
        place[last] = value
    else:
        key: Any = int(last) if isinstance(place, list) else last
        del place[key]
        if what == "replace" and isinstance(place, list):
            place.insert(key, value)
        elif what == "replace":
            place[key] = value
        elif what != "remove":
            raise ValueError(f"this renderer does not know the operation {what}")


def _retag(manifests: Sequence[Manifest], image: str, tag: str) -> None:
    for manifest in manifests:
        template = manifest.get("spec", {}).get("template", {})
        for container in template.get("spec", {}).get("containers", ()):
            if container["image"].partition(":")[0] == image:
                container["image"] = f"{image}:{tag}"
