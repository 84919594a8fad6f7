"""Base models from S3: what LoRAX's ``--source s3`` names, safetensors only.

A place is spelled as LoRAX spells it: ``s3://bucket/prefix``; or, where the environment names a
bucket for models, the prefix in it; or ``bucket/prefix``.
"""

from __future__ import annotations

import fnmatch
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lorax_contract.adapters import AdapterUnavailableError, Reason, key_of
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.fetching.sources.interface import FetchContext, FetchLimits, RemoteFile
from lorax_shard.fetching.sources.objects import SCHEME, S3Objects, split_place
from lorax_shard.fetching.sources.stream import download, retried
from lorax_shard.prepare.files import (
    MARKER,
    Progress,
    ProgressEvent,
    disk_errors,
    files_below,
    publish_folder,
    require_space,
)
from lorax_shard.prepare.hub import UNWANTED_FILES, WANTED_FILES

logger = logging.getLogger(__name__)

BUCKET_VARIABLES = ("PREDIBASE_MODEL_BUCKET", "HF_MODEL_BUCKET")
_FOLDER_VARIABLE = "PREDIBASE_MODEL_FOLDER"
# Names sentence-transformers' steps; those with files of their own have a folder each, as 1_Pooling.
_STEPS, _STEP_FOLDER = "modules.json", "[0-9]_*"
# No object of S3 is larger than 5 TB.
_LIMITS = FetchLimits(max_file_bytes=5 << 40, max_small_file_bytes=5 << 40)
_EXIT_CODES = {Reason.STORE_FULL: ExitCode.DISK_FULL, Reason.CORRUPT: ExitCode.MODEL_CORRUPT}


def place_of(model_id: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return bucket and prefix of a model; raises StartupError if it names none."""
    bucket = next(filter(None, (environment.get(name) for name in BUCKET_VARIABLES)), None)
    if model_id.startswith(SCHEME) or bucket is None:
        place = split_place(model_id)
    else:
        folder = environment.get(_FOLDER_VARIABLE, "")
        place = split_place(
            "/".join(part.strip("/") for part in (bucket, folder, model_id) if part)
        )
    if not all(place) or ".." in place[1].split("/"):
        raise StartupError(
            f"--model-id {model_id} is no place in S3. Name it like s3://bucket/prefix, or set "
            f"{BUCKET_VARIABLES[0]} to the bucket.",
            ExitCode.MODEL_NOT_FOUND,
        )
    return place


def fetch_model(
    model_id: str,
    endpoint: str | None,
    cache_dir: Path,
    with_code: bool,
    progress: Progress,
    context: FetchContext | None = None,
) -> Path:
    """Return a model's folder in the cache, downloading what it lacks.

    The folder is named for the objects' entity tags, so that a replaced model is fetched anew. A
    transfer that breaks goes on where it stopped, also in another process. Raises StartupError.
    """
    bucket, prefix = place_of(model_id, os.environ)
    what = f"--model-id {SCHEME}{bucket}/{prefix}"
    context = context or FetchContext(limits=_LIMITS, deadline=math.inf)
    objects = S3Objects(endpoint)
    try:
        found = retried(what, lambda: _found(what, objects, bucket, prefix, context), context)
        files = _wanted(what, found, with_code)
        version = key_of(bucket, prefix, *(f"{f.name} {f.size} {f.locator}" for f in files))

        def build(folder: Path) -> None:
            _fetch(what, (objects, bucket, prefix), files, folder, context, progress)

        def on_wait() -> None:
            logger.info("another process fetches %s; waiting for it", what)

        with disk_errors(cache_dir):
            return publish_folder(
                cache_dir / "models" / f"s3-{version[:24]}",
                build,
                {"source": f"{SCHEME}{bucket}/{prefix}"},
                on_wait,
                resumes=True,
            )
    except AdapterUnavailableError as error:
        raise StartupError(
            f"{error.text}.", _EXIT_CODES.get(error.reason, ExitCode.MODEL_NOT_FOUND)
        ) from error


def _found(
    what: str, objects: S3Objects, bucket: str, prefix: str, context: FetchContext
) -> dict[str, RemoteFile]:
    """Return the objects of a model by name; those of sentence-transformers' steps lie in folders."""
    found = objects.below(what, bucket, prefix, context.limits)
    if _STEPS not in found:
        return found
    for folder in objects.folders(what, bucket, prefix, context.limits):
        if fnmatch.fnmatch(folder, _STEP_FOLDER):
            below = objects.below(what, bucket, f"{prefix}/{folder}", context.limits)
            inside = (replace(file, name=f"{folder}/{file.name}") for file in below.values())
            found |= {file.name: file for file in inside}
    return found


def _wanted(what: str, found: Mapping[str, RemoteFile], with_code: bool) -> tuple[RemoteFile, ...]:
    """Return the files of a model among those below its prefix; raises StartupError without."""
    patterns = [*WANTED_FILES, *(["*.py"] if with_code else [])]
    names = sorted(
        name
        for name in found
        if name != MARKER
        and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        and not any(fnmatch.fnmatch(name, pattern) for pattern in UNWANTED_FILES)
    )
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        if not found:
            reason = "there is nothing below this prefix; check bucket and prefix"
        else:
            reason = (
                f"there are no safetensors directly below this prefix, but "
                f"{', '.join(sorted(found)[:4])}; save the model with save_pretrained of "
                "transformers"
            )
        raise StartupError(f"{what}: {reason}.", ExitCode.MODEL_NOT_FOUND)
    return tuple(found[name] for name in names)


def _fetch(
    what: str,
    place: tuple[S3Objects, str, str],
    files: tuple[RemoteFile, ...],
    folder: Path,
    context: FetchContext,
    progress: Progress,
) -> None:
    """Bring all files into ``folder``, going on with what lies there."""
    objects, bucket, prefix = place
    total = sum(file.size or 0 for file in files)
    for file in files:
        (folder / file.name).parent.mkdir(exist_ok=True)
    done = sum(path.stat().st_size for path in files_below(folder))
    require_space(folder, max(total - done, 0), what)

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(ProgressEvent(f"download {SCHEME}{bucket}/{prefix}", min(done, total), total, "B"))

    context.on_bytes = report
    for file in files:
        opener = objects.opener(what, bucket, f"{prefix}/{file.name}", file, context.limits)
        download(what, file, folder, opener, context)
