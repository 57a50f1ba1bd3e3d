"""Ten expert demonstrations on the real simulator, recorded once per test session."""

import functools
import tempfile
from pathlib import Path

from demonstrations.record import Args, main

_directory = tempfile.TemporaryDirectory(prefix="cleanvla-demos-")
ARGS = dict(num_demos=10, num_envs=5, max_episode_steps=32)


def record(path, **changes):
    main(Args(output=str(path), **{**ARGS, **changes}))
    return path


@functools.cache
def recorded_demos():
    """Path of the directory."""
    return record(Path(_directory.name) / "main")
