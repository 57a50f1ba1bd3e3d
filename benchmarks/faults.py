"""Killed and starved runs: a part of benchmarks/reliability.py.

The runs are those of tests/running.py: the real simulator, episodes of two steps, planted success.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v2 as imageio
import running
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
WARMUP = "checkpoints/tiny-warmup"
CHILD = """import os, sys
import running
from common.simulation import vec_env

fault, steps = os.environ.get("FAULT"), []

def hurt(envs, actions):
    simulate(envs, actions)
    steps.append(0)
    if fault == "nan" and len(steps) == 7:
        envs.scalars["reward"][0] = float("nan")
    if fault == "stop":
        vec_env.TIMEOUT_S = 20

if __name__ == "__main__":
    with running.short_episodes():
        simulate, vec_env.CpuEnvs._simulate = vec_env.CpuEnvs._simulate, hurt
        if sys.argv[1] == "eval_ood":
            import eval_ood, tyro
            eval_ood.main(tyro.cli(eval_ood.Args, args=sys.argv[2:]))
        else:
            module, args = running.parse(sys.argv[1], " ".join(sys.argv[2:]))
            module.main(args)
"""
LONGER = "--num-iterations 6"
FLAGS = {"ppo": LONGER, "grpo": LONGER, "dpo": LONGER, "sft": f"{LONGER} --demos demos/ok"}
FLAGS["eval_ood"] = f"--checkpoint {WARMUP} --num-episodes 2 --tasks id,semantics"


class Child:
    """A short run whose processes can be counted."""

    def __init__(self, script, run, ranks=1, **environment):
        self.script, self.run = script, Path(run)
        self.output = self.run.parent / f"{self.run.name}.log"
        self.output.parent.mkdir(exist_ok=True)
        saved = any(self.run.glob("checkpoint-*"))
        where = ["--resume", str(run)] if saved else ["--name", self.run.name]
        where = ["--output", str(run)] if script == "eval_ood" else where
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2" if ranks > 1 else ""
        words = f"{torchrun} child.py {script} {FLAGS[script]}".split() + where
        self.mark = f"{os.getpid()}-{time.monotonic()}"
        path = {"MARK": self.mark, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        with self.output.open("w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [sys.executable, *words], stdout=out, stderr=subprocess.STDOUT,
                env=os.environ | path | environment, start_new_session=True)  # fmt: skip

    def wait_for(self, *names, seconds=300):
        """Until one of these patterns is in the run's directory: seconds, None if it ended."""
        start = time.monotonic()
        while not any(any(self.run.glob(name)) for name in names):
            if self.process.poll() is not None or time.monotonic() - start > seconds:
                return None
            time.sleep(0.02)
        return time.monotonic() - start

    def end(self, seconds=300):
        """Exit status; hangs are killed and count as None."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None

    def members(self, of=b""):
        """Ids of the living processes of this run, whatever their session; of: that run this."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = f"MARK={self.mark}\0".encode() in (path / "environ").read_bytes()
                if ours and of in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
        return found

    def orphans(self, seconds=15):
        """How many processes outlive the run by this time; they are killed then."""
        until = time.monotonic() + seconds
        while self.members() and time.monotonic() < until:
            time.sleep(0.1)
        left = self.members()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return len(left)

    def text(self):
        return self.output.read_text(encoding="utf-8", errors="replace")


def outcome(script, run):
    """What must be equal: metrics and weights, or the episodes' successes."""
    if script == "eval_ood":
        policies = json.loads((run / "results.json").read_text(encoding="utf-8"))["policies"]
        return [(name, row["success"], row["episode_ids"], row["return"])
                for entry in policies.values() for name, row in entry["rows"].items()]  # fmt: skip
    weights = {name: w.tolist() for name, w in running.weights_of(run).items()}
    return running.metrics_of(run), weights


def half_files(run):
    """How many files with a final name are not whole; hidden ones are temporary."""
    bad = 0
    for path in run.rglob("*"):
        if any(part.startswith(".") for part in path.parts):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".mp4":
                imageio.mimread(path)
            elif path.suffix == ".png":
                Image.open(path).verify()
        except FileNotFoundError:
            pass
        except Exception as error:
            print(f"{path}: {error!r}")
            bad += 1
    return bad


def differences(right, found):
    """Of two outcomes of training: rows, what differs in them, names of weights that differ."""
    (rows, weights), (rows_found, weights_found) = right, found
    yield f"{len(rows)} rows, {len(rows_found)} found"
    for row, other in zip(rows, rows_found, strict=False):
        for key in row.keys() | other.keys():
            if row.get(key) != other.get(key):
                yield f"{row['iteration']} {key}: {row.get(key)}, {other.get(key)} found"
    yield f"weights {[name for name in weights if weights[name] != weights_found.get(name)]}"


def progress(child):
    """Iterations that the run called finished, and those of its newest checkpoint."""
    said = [int(n) for n in re.findall(r"^iter (\d+)/", child.text(), re.M)]
    saved = [int(path.name[-6:]) for path in child.run.glob("checkpoint-*")]
    return max(said, default=0), max(saved, default=0)


def kills(script, repeats, rng):
    """Kill runs at random moments and go on: a row of counts."""
    reference = Child(script, f"runs/{script}-whole")
    first = ".lock" if script != "eval_ood" else "results.json"
    reference.wait_for(first)
    start = time.monotonic()
    row = {"script": script, "SIGKILL": 0, "SIGINT": 0, "iterations lost": 0, "half files": 0}
    row |= {"orphans": 0, "failed": int(reference.end() != 0), "unequal": 0}
    length, right = time.monotonic() - start, outcome(script, reference.run)
    run, number = Path(f"runs/{script}-0"), 0

    def whole():
        """The run is resumed to its end and compared; the next one is new."""
        nonlocal run, number
        row["failed"] += Child(script, run).end() != 0
        found = outcome(script, run)
        row["unequal"] += found != right
        if found != right:
            where = differences(right, found) if isinstance(right, tuple) else (right, found)
            print(f"{run} ended otherwise:", *where, sep="\n", flush=True)
        number += 1
        run = Path(f"runs/{script}-{number}")

    for name in ("SIGKILL", "SIGINT") * repeats:
        child = Child(script, run)
        child.wait_for(first)
        time.sleep(rng.uniform(0, length))
        if child.process.poll() is None:
            row[name] += 1
        # Ctrl-C reaches all processes of the terminal, kill -9 one
        kill = os.killpg if name == "SIGINT" else os.kill
        with contextlib.suppress(ProcessLookupError):
            kill(child.process.pid, signal.Signals[name])
        row["failed"] += child.end(60) is None
        row["orphans"] += child.orphans()
        row["half files"] += half_files(run)
        said, saved = progress(child)
        row["iterations lost"] += max(0, said - saved)
        if saved == 6 or (run / "report.md").exists():
            whole()
    whole()
    print(row, flush=True)
    return row


def single_faults():
    """One fault each in a PPO run, then a resume: what it said, and whether the end is equal."""
    right = outcome("ppo", Path("runs/ppo-whole"))
    rows = []

    def fault(name, says, hurt=None, ranks=1, reference=right, mend=None, **environment):
        run = Path("runs", name)
        child = Child("ppo", run, ranks, **environment)
        if hurt:
            child.wait_for("checkpoint-00000[1-9]")
            hurt(child)
        status = child.end(200)
        row = {"fault": name, "status": status, "orphans": child.orphans()}
        row["says"] = bool(re.search(says, child.text()))
        row["message"] = child.text()[-400:]
        row["half files"] = half_files(run)
        if mend:
            mend(run)
        again = Child("ppo", run, ranks)
        row["resumed"] = again.end() == 0
        row["equal"] = row["resumed"] and outcome("ppo", run) == reference
        if not row["resumed"]:
            row["message"] += again.text()[-600:]
        row["refused"] = status not in (0, None) and row["says"]
        if row["equal"] and row["refused"]:
            del row["message"]
        rows.append(row)
        print(row, flush=True)

    def worker(number):
        return lambda child: os.kill(child.members(b"spawn_main")[-1], number)

    fault("worker-killed", "worker 0 .*died, exit code -9", worker(signal.SIGKILL))
    fault("worker-stopped", "gave no answer in 20 s", worker(signal.SIGSTOP), FAULT="stop")
    fault("nan-reward", "not finite", FAULT="nan")
    fault("no-ffmpeg", "ffmpeg", IMAGEIO_FFMPEG_EXE="/nonexistent")
    two = Child("ppo", "runs/two", 2)
    two.end()
    right_of_two = outcome("ppo", two.run)

    def rank(child):
        os.kill(child.members(b"-u\0child.py")[-1], signal.SIGKILL)

    fault("rank-killed", "exitcode.*-9|Signal 9", rank, 2, right_of_two)
    if os.geteuid():
        return rows  # the disk's faults need a file system of their own
    for name, says, options, hurt, mend in (
        ("disk-full", "disk is full", "size=100m", fill, lambda run: (run / "filler").unlink()),
        ("read-only", "Read-only", "ro", None, lambda run: mount(run, "remount,rw")),
    ):
        mount(Path("runs", name), options)
        try:
            fault(name, says, hurt, mend=mend)
        finally:
            subprocess.run(["umount", Path("runs", name)], check=True)
    return rows


def mount(folder, options):
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def fill(child):
    """Leave nothing, while the run may be writing too."""
    with contextlib.suppress(OSError), (child.run / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**14))
