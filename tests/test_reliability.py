"""What users' machines do to runs: damaged files, two processes, a full disk, missing programs."""

import os
import shlex
import shutil
import signal
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_checkpoints import refused
from test_run import ROOT, begin  # noqa: F401

import eval_ood
from common.run import experiment, ranks
from common.run.args import Model, Run
from common.run.files import naming
from scripts.provenance import machine, short_names

STATE, ARGS, LOG = "checkpoint-000001/training_state.pt", "args.json", "metrics.jsonl"
DAMAGE = [  # file, what the error says, new content or what is lost
    (STATE, "Ran out|EOF", b""), (STATE, "", b"PK"), (ARGS, "Expecting", b""), (ARGS, "", b"[]"),
    (ARGS, "git-lfs pointer", b"version https://git-lfs"), (LOG, "remove the line", b"garbage\n"),
    (STATE, "policy", ["policy"]), (STATE, "evaluations", ["evaluations"]), (LOG, "", b"[]\n"),
    (STATE, "critic.*weight", ["critic", "weight"]), (STATE, "policy.*state", ["policy", "state"]),
]  # fmt: skip


@pytest.mark.parametrize("file, named, damage", DAMAGE)
def test_a_damaged_run_is_not_resumed(begin, file, named, damage):  # noqa: F811
    """Stops a new critic or optimizer in the place of a lost one, and errors without a file."""
    begin().finish(1, {}, step=1)
    path = Path("runs/x", file)
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        saved = torch.load(path, weights_only=True)
        del reduce(dict.get, damage[:-1], saved)[damage[-1]]
        torch.save(saved, path)
    refused(f"(?s){file}.*({named})", begin, "--resume runs/x")


def test_one_process_writes_a_run(begin, monkeypatch):  # noqa: F811
    """Stops two runs in one directory, a lock that a kill leaves, and finding out after a load."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)
        os.write(write, str(experiment.hold(Run(name="x"))).encode())
        signal.pause()
    assert os.read(read, 100) == b"runs/x"
    monkeypatch.setattr(experiment, "load_vla", lambda *_, **__: pytest.fail("too late"))
    for run in (Run(name="x"), Run(resume="runs/x")):
        refused("runs/x.*another process", experiment.load_start, run, Model(), "cpu")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert experiment.hold(Run(name="x")) == Path("runs/x")
    refused("x/.lock", experiment.load_start, Run(name="x/.lock/y"), Model(), "cpu")


def test_what_a_machine_lacks(begin, monkeypatch, capsys, tmp_path):  # noqa: F811
    """Stops late or unclear errors, two runs with one id, commands that cannot be pasted."""
    ids = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda id, **_: ids.append(id)))
    begin("--track")
    begin("--track --resume runs/x")
    shutil.rmtree("runs")
    run = begin("--track")
    assert ids[0] == ids[1] != ids[2]
    run.run_dir = Path("runs/x").rename("runs/x y")
    run.close()
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == "runs/x y"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, free=0))
    monkeypatch.setattr(torch, "save", lambda *_: torch.zeros(2).view(3))
    refused("checkpoint-000000.*disk is full", run._save, "checkpoint")
    with pytest.raises(IndexError), naming(Path("x")):  # a mistake in the code is no file's
        [][0]
    # Neither GPU nor git; an output that is no folder; a name for `.`
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("device = cuda", ranks.setup_ranks, "cuda")
    monkeypatch.setattr(eval_ood, "make_envs", lambda *_, **__: pytest.fail("too late"))
    nothing = eval_ood.Args(policy=("zero",), output="runs/x y/.lock")
    refused(".lock/results", eval_ood.main, nothing)
    monkeypatch.setenv("PATH", "")
    assert machine()["commit"] == "unknown" and short_names(["."]) == [tmp_path.name]
