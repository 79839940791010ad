"""Packages that tests read, and that no extra installs."""

import contextlib
import os
import shutil
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


@contextlib.contextmanager
def filled_once(folder):
    """A new folder to be filled, which becomes `folder` when the block has run; None where `folder` is there already.
    Several processes may do so at the same time: nobody sees a folder that is half full."""
    if folder.exists():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        yield new
        try:
            os.rename(new, folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
