"""The same command in several processes of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def launch(processes: int, words: list[str]) -> int:
    """Run the same command once a process, with the variables that torch.distributed reads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    threads = max(1, (os.cpu_count() or 1) // processes)
    shared.setdefault("OMP_NUM_THREADS", str(threads))
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "foveate", *words], env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(processes)
    ]
    try:
        codes = _wait(children)
    except KeyboardInterrupt:  # the terminal has told the children too; they save and leave
        codes = [child.wait() for child in children]
    return next((abs(code) for code in codes if code), 0)


def _wait(children: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all; when one fails, end the others, which would wait for it for ever."""
    while any(child.poll() is None for child in children):
        for child in children:
            if _code(child, 0.2):
                for other in children:
                    if _code(other, 3) is None:  # it may fail for the same reason; the first says why
                        other.terminate()
    return [child.wait() for child in children]


def _code(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit code, if it has one by then."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
