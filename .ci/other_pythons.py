"""Print the oldest and the newest Python on this machine, from 3.10 on, besides this one."""

import os
import re
import subprocess
import sys
from pathlib import Path

folders = [Path(folder) for folder in os.get_exec_path()]
folders += Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*/bin")
found: dict[int, str] = {}
for folder in folders:
    for minor in range(10, 30):
        python = folder / f"python3.{minor}"
        if minor in found or minor == sys.version_info.minor or not os.access(python, os.X_OK):
            continue
        version = subprocess.run([python, "--version"], capture_output=True, text=True)
        if re.match(rf"Python 3\.{minor}\.\d+\s", version.stdout):  # not just a name, nor a beta
            found[minor] = str(python)
if found:
    print(*{found[min(found)]: None, found[max(found)]: None})
