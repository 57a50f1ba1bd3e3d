"""One thread per test process, reasons for what is skipped, and `train` for short runs."""

import os

# Before torch and numpy are imported; a test never waits for the network
for setting in """OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 LP_NUM_THREADS=0 OMP_WAIT_POLICY=passive
    HF_HUB_OFFLINE=1 MPLBACKEND=agg""".split():
    os.environ.setdefault(*setting.split("="))
if hasattr(os, "sched_setaffinity"):
    # Scripts use all cores: two of them beside each other would wait for each other's threads
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})

import pytest  # noqa: E402


def pytest_collection_modifyitems(config, items):
    import torch

    skips = {}
    if "long" not in config.getoption("markexpr"):
        skips["long"] = "takes long: make test-long"
    if "MS_ASSET_DIR" not in os.environ:
        skips["bridge"] = "MS_ASSET_DIR is not set: no published assets"
    if not torch.cuda.is_available():
        skips["gpu"] = "no CUDA device"
    elif config.getoption("markexpr") != "gpu":
        skips["gpu"] = "PhysX takes a GPU only where no CPU simulation has run: pytest -m gpu"
    for item in items:
        for name, reason in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def simulators():
    """`make_envs` that starts each simulator once for all tests of a file."""
    from common.simulation import vec_env

    running, closes = {}, []

    def make_envs(num_envs, reset_after_success=0, state=False, **settings):
        key = (num_envs, *sorted(settings.items()))
        if key not in running or (state and not running[key].with_state):
            running[key] = vec_env.make_envs(num_envs, state=state, **settings)
            closes.append(running[key].close)
            running[key].close = lambda: None  # what a script calls at its end
        running[key].reset_after_success = reset_after_success
        return running[key]

    yield make_envs
    for close in closes:
        close()


@pytest.fixture
def train(simulators, tmp_path, monkeypatch):
    """train(script, flags, success) -> run directory, of episodes of two steps: see running.py."""
    import running

    from common.run import experiment

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "stop_on_signals", lambda _: None)

    def run(script, flags="", success=None):
        module, args = running.parse(script, flags)
        monkeypatch.setattr(module, "make_envs", simulators)
        with running.short_episodes(success):
            module.main(args)
        return tmp_path / (args.run.resume or f"runs/{args.run.name}")

    return run
