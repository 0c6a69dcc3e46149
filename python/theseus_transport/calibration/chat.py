"""Chat templates, which are programs that came with a model: run in a process of their own, time and memory bounded."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputRefused

SECONDS = 5  # of CPU time for one conversation
MEMORY = 256 << 20  # bytes
START = "import json, runpy, sys; sys.path = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"


class ChatTemplate:
    """A template, called with messages and tools (JSON), returns their text; its process starts with the first call.

    A template that takes longer or more memory than it may refuses the whole calibration: it would every time.
    """

    def __init__(self, template: str, tokens: Mapping[str, Any], name: str) -> None:
        """``tokens``: the special tokens it may name, JSON; ``name``: of the model, for messages."""
        self._name = name
        self._job = {"template": template, "tokens": dict(tokens), "seconds": SECONDS, "bytes": MEMORY}
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, messages: list[Any], tools: Any = None, *, asking: bool = False) -> str:
        """The text.

        Args:
            asking: it ends where the model is to answer.

        Raises:
            ValueError: the template refuses these messages.
            InputRefused: it takes too long, or too much memory.
        """
        process = self._process = self._process or self._started()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps({"messages": messages, "tools": tools or None, "asking": asking}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise InputRefused(
                f"the chat template of {self._name} does not end within {SECONDS} s and {MEMORY >> 20} MiB for one "
                "conversation; mend it, or give --calibration plain text"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"the chat template refuses the messages: {answer['error']}")
        return str(answer["text"])

    def _started(self) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-I",
            "-c",
            START,
            json.dumps(sys.path),
            str(Path(__file__).with_name("chat_process.py")),
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        weakref.finalize(self, _ended, process)
        assert process.stdin
        process.stdin.write(json.dumps(self._job) + "\n")
        return process


def _ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
