"""Shared by all tests: one thread per process (test machines have two cores), and reasons for what is skipped."""

import os

for variable, threads in (("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1"), ("LP_NUM_THREADS", "0")):
    os.environ.setdefault(variable, threads)  # before torch and numpy are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for the network
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402


def pytest_collection_modifyitems(config, items):
    import torch

    skips = {}
    if "MS_ASSET_DIR" not in os.environ:
        skips["bridge"] = "MS_ASSET_DIR is not set: the real benchmark assets (python -m common.simulation.assets fetch --dir DIR)"
    if not torch.cuda.is_available():
        skips["gpu"] = "no CUDA device"
    elif config.getoption("markexpr") != "gpu":
        skips["gpu"] = "PhysX takes a GPU only in a process that has no CPU simulation: pytest -m gpu"
    for item in items:
        for name, reason in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
