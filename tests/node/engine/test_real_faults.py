"""The engine on disks that really fail: a kernel that loses a write and says so once, and file systems that are full.

The scenarios are in `real_faults.py`; each runs in a process with mounts of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.node.engine.real_faults import CANNOT_MOUNT, FAULTS


@pytest.mark.parametrize("fault", FAULTS)
def test_writes_that_cannot_be_kept_are_refused_and_the_rest_is_served(fault: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    missing = [name for name in ("unshare", "mount", "umount", "mkfs.ext4") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.node.engine.real_faults"]
    done = subprocess.run([*command, fault, str(tmp_path)], capture_output=True, text=True, timeout=60)
    if done.returncode == CANNOT_MOUNT or done.stderr.startswith("unshare:"):
        pytest.skip(f"cannot mount here: {(done.stdout or done.stderr).strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
