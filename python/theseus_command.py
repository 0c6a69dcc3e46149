"""Where the command starts: it answers Ctrl-C, SIGTERM and SIGHUP while all the rest is imported, which takes seconds.

It lies outside the package, because the package itself imports torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Entry point of the command."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _leave)
    from theseus_transport.cli import main

    main()


def _leave(number: int, frame: object) -> None:
    """End at once: nothing has begun, and what is half imported is in no state to be told."""
    message, code = "interrupted; nothing was written", 128 + number
    if "--json" in sys.argv:
        _write(1, json.dumps({"error": message, "exit_code": code}))
    _write(2, f"error {message}")
    os._exit(code)


def _write(descriptor: int, line: str) -> None:
    with suppress(OSError):  # nobody reads
        os.write(descriptor, f"{line}\n".encode())


if __name__ == "__main__":
    main()
