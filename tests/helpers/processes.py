"""Two processes that train one model, started afresh; each writes what it found into a file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_processes(
    script: str, folder: Path, *, size: int = 2, timeout: float = 200, **arguments: Any
) -> list[Any]:
    """Run a module's ``main(rank, folder, **arguments)`` in every process; what each returned, by rank.

    Raises:
        AssertionError: a process failed, or did not end in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import importlib, json, sys; from pathlib import Path\n"
        f"module = importlib.import_module({script!r})\n"
        "rank, folder, arguments = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])\n"
        "found = module.main(rank, folder, **arguments)\n"
        "(folder / f'found_{rank}.json').write_text(json.dumps(found))\n"
    )
    root = Path(__file__).resolve().parent.parent.parent
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "NODE_RANK": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder), json.dumps(arguments)],
            cwd=root,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout)[0])
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"expected the processes to end within {timeout} s: one hangs") from error
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"process {rank}:\n{output[-4000:]}"
    return [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(size)]
