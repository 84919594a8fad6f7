"""A program that sees the machine as a container with a read-only root does.

Only its volume, ``/tmp`` and shared memory can be written, it has no rights beyond its user's and
gets none. Mounts are those of a namespace of its own and end with it. Without the rights of root
a user namespace gives the mounts where the system allows that.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# The user of the image, who is nobody that this machine knows.
USER = 10001
HERE = Path("/mnt")
DATA = HERE / "data"
_SCRIPT = f"""
set -e
folder=$1
shift
mount --make-rprivate /
mount --bind "$folder" {HERE}
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount --bind {DATA} {DATA}
while read -r _ _ _ _ place _; do
    case $place in
        /proc*|/sys*|/dev*|/tmp|{DATA}) ;;
        *) mount -o remount,bind,ro "$place" 2>/dev/null || true ;;
    esac
done < /proc/self/mountinfo
for place in / /usr /var/tmp {HERE} "$HOME"; do
    if [ -d "$place" ] && touch "$place/.written" 2>/dev/null; then
        echo "$place can be written" >&2
        exit 97
    fi
done
exec unshare --user --map-user={USER} --map-group={USER} -- \\
    setpriv --inh-caps=-all --bounding-set=-all --no-new-privs -- "$@"
"""


def read_only(folder: Path) -> list[str]:
    """Return the words before a command that sees ``folder`` at ``HERE`` and writes ``DATA``.

    The folder gets a place for the data. The command sees itself run as ``USER``.
    """
    (folder / DATA.name).mkdir(exist_ok=True)
    return [*_unshare(), "sh", "-c", _SCRIPT, "sh", str(folder)]


def refusal() -> str:
    """Return why this machine gives no such view; "" where it does."""
    inner = f"mount -t tmpfs tmpfs /tmp && unshare --user --map-user={USER} setpriv -V"
    tried = [*_unshare(), "sh", "-c", inner]
    try:
        done = subprocess.run(tried, capture_output=True, text=True, check=False, timeout=30)
    except OSError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


def _unshare() -> list[str]:
    mine = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    return ["unshare", *mine, "--mount"]
