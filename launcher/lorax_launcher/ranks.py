"""How many ranks serve the model, on which devices, and where they meet. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_contract.config import Device
from lorax_launcher.facts import DeviceFacts
from lorax_launcher.options import LauncherOptions, UsageError

# Where torch.distributed's programs meet unless told otherwise.
_DEFAULT_HOST, _DEFAULT_PORT = "localhost", 29500


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of one group; they share this host."""

    count: int
    # tcp://host:port or file:///path; "" where there is one rank only.
    rendezvous: str
    # How many of them share a device's memory.
    per_device: int
    # Variables of each rank's process.
    environments: tuple[tuple[tuple[str, str], ...], ...]
    notes: tuple[str, ...] = ()


def choose_ranks(
    options: LauncherOptions, facts: DeviceFacts, device: Device, run_dir: str
) -> Ranks:
    """Return the ranks that the options ask for; by default one, or one for each visible GPU.

    Raises UsageError.
    """
    num_gpus = len(facts.gpus) if device == "cuda" else 0
    count = _count(options, num_gpus)
    if count == 1:
        return Ranks(1, "", 1, (_visible(facts, 0) if num_gpus > 1 else (),), _unused(num_gpus))
    notes = [f"{count} ranks share the model (tensor parallelism)"]
    shared: tuple[tuple[str, str], ...] = ()
    if device == "cpu":
        per_device = count
    else:
        per_device = -(-count // num_gpus)
        if per_device > 1:
            notes.append(f"{per_device} ranks share a GPU: this is for tests, it gains nothing")
    if device == "cpu" or per_device > 1:
        shared = _gloo_variables(options, facts)
    environments = tuple(
        (*shared, *(_visible(facts, rank % num_gpus) if num_gpus else ())) for rank in range(count)
    )
    return Ranks(count, _rendezvous(options, run_dir), per_device, environments, tuple(notes))


def _count(options: LauncherOptions, num_gpus: int) -> int:
    asked = options.num_shard
    if asked is not None and asked < 1:
        raise UsageError(f"--num-shard {asked} is too small, the least is 1.")
    if options.sharded is False and (asked or 1) > 1:
        raise UsageError(f"--sharded false and --num-shard {asked} contradict each other.")
    if asked is not None:
        if options.sharded and asked == 1:
            raise UsageError("--sharded true needs --num-shard above 1, or none for all GPUs.")
        return asked
    if options.sharded and num_gpus < 2:
        raise UsageError(
            f"--sharded true spreads the model over all GPUs, and {num_gpus or 'none'} can be "
            "used; say how many shards with --num-shard."
        )
    return 1 if options.sharded is False else max(1, num_gpus)


def _unused(num_gpus: int) -> tuple[str, ...]:
    if num_gpus < 2:
        return ()
    return (f"{num_gpus} GPUs are visible and one is used, as one shard was asked for",)


def _rendezvous(options: LauncherOptions, run_dir: str) -> str:
    """Return a file of this run, which no other run can have, unless an address is asked for."""
    if options.master_addr is None and options.master_port is None:
        return f"file://{run_dir}/rendezvous"
    host = options.master_addr or _DEFAULT_HOST
    host = f"[{host}]" if ":" in host else host
    return f"tcp://{host}:{options.master_port or _DEFAULT_PORT}"


def _gloo_variables(options: LauncherOptions, facts: DeviceFacts) -> tuple[tuple[str, str], ...]:
    """Keep the ranks of one host on its loopback: its name may lead nowhere, as in containers."""
    if options.master_addr is not None or facts.gloo_preset:
        return ()
    return (("GLOO_SOCKET_IFNAME", "lo"),)


def _visible(facts: DeviceFacts, number: int) -> tuple[tuple[str, str], ...]:
    return (("CUDA_VISIBLE_DEVICES", facts.gpus[number].handle),)
