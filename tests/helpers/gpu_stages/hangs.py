"""A stage that adds a row, starts a child of its own, and never ends."""

import os
import subprocess
import sys
import threading
from pathlib import Path


def run(report, *, small):
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1)
    Path(os.environ["CHILD_FILE"]).write_text(str(child.pid))
    report.table("Done so far", ("what",))
    report.row("first")
    threading.Event().wait()
