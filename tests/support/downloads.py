"""Packages that tests read, and that no extra installs."""

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@contextlib.contextmanager
def downloaded(requirement, *options):
    """The archive that pip downloads for a requirement, while the block runs. The test is skipped if it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, *options, "--dest", folder, requirement], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip()[-500:]}")
        yield next(Path(folder).iterdir())
