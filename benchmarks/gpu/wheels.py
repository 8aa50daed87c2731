"""The wheels that a bare machine with torch needs beside it, downloaded where there is a network."""

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.worker import Worker

_SECONDS = 300.0


def gather_wheels(folder: Path) -> int:
    """Print the list and download it into `folder`; the exit code: 1 where something of it could not be had."""
    with Worker({}) as worker:
        answer = worker.ask("benchmarks.gpu.imported:needed", {}, _SECONDS)
    if answer.problem is not None:
        print(answer.problem)
        return 1
    print("| package | version | MB installed |\n|---|---|---|")
    for one in answer.value:
        print(f"| {one['name']} | {one['version']} | {one['bytes'] / 1e6:.1f} |")
    print("\nBeside them: torch, and the torchvision that was built for it.\n", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    pins = [f"{one['name']}=={one['version']}" for one in answer.value]
    ended = subprocess.run([*command, "--dest", str(folder), *pins], capture_output=True, text=True, check=False)
    if ended.returncode:
        print(f"not downloaded: {(ended.stderr.strip().splitlines() or ['pip failed'])[-1]}")
        return 1
    print(f"downloaded to {folder}; on the other machine, in the root of this repository:")
    print(f"    for wheel in {folder}/*.whl; do python -m zipfile -e $wheel site; done")
    print("    PYTHONPATH=site python -P -m benchmarks.gpu")
    return 0
