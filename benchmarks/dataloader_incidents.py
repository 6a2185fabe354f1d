"""What reading in processes comes to when a worker is killed, on Ctrl-C, and without a main guard.

Each in a training-like process of its own, our processes and torch's DataLoader; see dataloader.py.

python benchmarks/dataloader_incidents.py [--cache DIR] [--workers 1] [--batch 2]
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dataloader import Work, family
from geometry import made_cache

WAYS = ("our processes", "DataLoader, memory that stays", "DataLoader, batches, forked")
INCIDENTS = ("a worker is killed", "Ctrl-C", "a script without a main guard")
SCRIPT = """import sys; sys.path.insert(0, {folder!r})
from pathlib import Path
from dataloader import Work
from dataloader_incidents import consume_all
consume_all(Work(Path({path!r}), {batch}, {workers}), {name!r}, 2)
"""


def print_incidents(path: Path, batch: int, workers: int) -> None:
    for name in WAYS:
        for what in INCIDENTS:
            command = [sys.executable, __file__, "--consume", name, "--cache", str(path)]
            command += ["--batch", str(batch), "--workers", str(workers)]
            with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
                if "script" in what:
                    folder = str(Path(__file__).parent)
                    settings = {"path": str(path), "batch": batch, "workers": workers}
                    script.write(SCRIPT.format(folder=folder, name=name, **settings))
                    script.flush()
                    command = [sys.executable, script.name]
                print(f"{name}, {what}: {ending_of(command, what)}", flush=True)


def ending_of(command: list[str], what: str) -> str:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()  # it has its first step
    members = family(process.pid)
    readers = [pid for pid in members[1:] if b"resource_tracker" not in command_of(pid)]
    if what == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif "killed" in what:
        os.kill(readers[-1], signal.SIGKILL)
    started = time.perf_counter()
    try:
        _, errors = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    took = time.perf_counter() - started
    until = time.monotonic() + 5
    while left := [pid for pid in members if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    lines = errors.strip().splitlines() or [""]
    return (
        f"ends after {took:.1f} s with exit code {process.returncode}, {len(lines)} lines of "
        f"errors, {len(left)} processes left; {lines[-1][:200]}"
    )


def command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def consume_all(work: Work, name: str, steps: int) -> None:
    for number, _images in enumerate(work.ways[name](range(steps))):
        if not number:
            print("first", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--consume", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = options.cache or made_cache(Path(scratch) / "a.zarr", "int8", images=4)
        if options.consume:
            consume_all(Work(path, options.batch, options.workers), options.consume, 10**4)
        else:
            print_incidents(path, options.batch, options.workers)


if __name__ == "__main__":
    main()
