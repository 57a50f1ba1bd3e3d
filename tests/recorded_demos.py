"""Ten expert demonstrations on the real simulator, recorded once per test session."""

import functools
import tempfile
from pathlib import Path

from common.simulation.demos import Args, record

_directory = tempfile.TemporaryDirectory(prefix="cleanvla-demos-")
ARGS = dict(num_demos=10, num_envs=5, num_workers=1, max_episode_steps=32)


@functools.cache
def recorded_demos():
    """Path of the directory."""
    path = Path(_directory.name) / "main"
    record(Args(output=str(path), **ARGS))
    return path
