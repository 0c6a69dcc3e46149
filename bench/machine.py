"""The machine as far as a reader of the numbers needs it; no host name."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import theseus_ext


def facts() -> dict:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    info = Path("/proc/cpuinfo")
    models = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    return dict(
        cpu=models[0] if models else platform.processor(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],  # above `threads`, other work shared the machine and the numbers are noisy
        torch=torch.__version__,
        commit=git("rev-parse", "--short", "HEAD") or "none",
        dirty=bool(git("status", "--porcelain", "--untracked-files=no")),
        date=datetime.date.today().isoformat(),
        build=theseus_ext.build_info(),
    )
