"""What the machine offers, found without importing torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from lorax_contract.cache import default_cache_dir

_CGROUP = Path("/sys/fs/cgroup")
# What opens buckets, as boto3 reads it.
S3_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One visible GPU."""

    name: str
    memory_bytes: int
    # What CUDA_VISIBLE_DEVICES calls it.
    handle: str = "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """The parts of the machine that decide how the children are configured."""

    # Physical cores this process may use, CPU quota of the container included.
    num_cores: int
    # Memory this process may use, limit of the container included.
    memory_bytes: int
    gpus: tuple[GpuFacts, ...] = ()
    # Whether the installed torch was built for CUDA.
    torch_has_cuda: bool = False
    # Where this user's caches lie.
    cache_dir: str = ""
    # Where S3 is, if not at Amazon's.
    s3_endpoint: str | None = None
    # The user limits the threads of the numeric libraries already.
    threads_preset: bool = False
    # The user chose the network interface over which CPU ranks meet.
    gloo_preset: bool = False


def gather_facts() -> DeviceFacts:
    """Look at this machine."""
    return DeviceFacts(
        num_cores=count_cores(),
        memory_bytes=total_memory(),
        gpus=visible_gpus(),
        torch_has_cuda=torch_has_cuda(),
        cache_dir=str(default_cache_dir()),
        s3_endpoint=s3_endpoint(),
        threads_preset="OMP_NUM_THREADS" in os.environ,
        gloo_preset="GLOO_SOCKET_IFNAME" in os.environ,
    )


def s3_endpoint() -> str | None:
    """Return LoRAX's way to name another S3 than Amazon's: an endpoint, or an R2 account."""
    if endpoint := os.environ.get("S3_ENDPOINT_URL"):
        return endpoint
    account = os.environ.get("R2_ACCOUNT_ID")
    return f"https://{account}.r2.cloudflarestorage.com" if account else None


def count_cores(cgroup: Path = _CGROUP) -> int:
    """Return the physical cores of this process's CPU set, at most its container's quota."""
    cpus = os.sched_getaffinity(0)
    siblings = {_read(_topology(cpu)) or str(cpu) for cpu in cpus}
    return max(1, min(len(siblings), cpu_quota(cgroup) or len(cpus)))


def cpu_quota(cgroup: Path = _CGROUP) -> int | None:
    """Return the whole CPUs that the container's quota allows; None without a quota."""
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if not quota.isdigit() or not period.isdigit():
        return None
    return max(1, int(quota) // max(1, int(period)))


def total_memory(cgroup: Path = _CGROUP) -> int:
    """Return the bytes of memory this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read(cgroup / "memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def visible_gpus() -> tuple[GpuFacts, ...]:
    """Return the GPUs that nvidia-smi lists, those hidden by CUDA_VISIBLE_DEVICES left out."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = parse_gpus(answer.stdout)
    return select_visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(listing: str) -> tuple[GpuFacts, ...]:
    """Read lines of ``name, mebibytes``; lines of another form are skipped."""
    gpus: list[GpuFacts] = []
    for line in listing.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name and mebibytes.strip().isdigit():
            gpus.append(GpuFacts(name.strip(), int(mebibytes) * 2**20, str(len(gpus))))
    return tuple(gpus)


def select_visible(gpus: tuple[GpuFacts, ...], visible: str | None) -> tuple[GpuFacts, ...]:
    """Apply CUDA_VISIBLE_DEVICES: numbers up to the first invalid one; names keep their count."""
    if visible is None:
        return gpus
    chosen: list[GpuFacts] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        named = entry.startswith(("GPU-", "MIG-"))
        number = min(len(chosen), len(gpus) - 1) if named else _number(entry)
        if not 0 <= number < len(gpus):
            break
        chosen.append(replace(gpus[number], handle=entry))
    return tuple(chosen)


def torch_has_cuda() -> bool:
    """Whether the installed torch ships its CUDA library."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def _number(text: str) -> int:
    return int(text) if text.isdigit() else -1


def _topology(cpu: int) -> Path:
    return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
