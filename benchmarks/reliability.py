"""Careless users, damaged files and killed processes, counted: docs/reliability.md has the table.

    python benchmarks/reliability.py
    python benchmarks/reliability.py --parts faults --repeats 10    # an hour; other parts are kept
    python benchmarks/reliability.py --parts faults --scripts sft --repeats 10

1. bad-input: each command of benchmarks/bad_input.py must be refused: exit status not 0, the words
   beside it in the message, within 5 s of processor time beyond the imports, before the simulator
   starts. The imports are made once; each command is a fork.
2. fuzz (benchmarks/fuzz.py): mutated files are accepted, or refused by an error that names them.
3. faults (benchmarks/faults.py): short runs that are killed, starved and resumed end as others do.
"""

import contextlib
import importlib
import json
import multiprocessing.process
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import h5py  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from tabulate import tabulate  # noqa: E402

from benchmarks import faults, fuzz  # noqa: E402
from benchmarks.bad_input import CASES, FILES, LATE  # noqa: E402
from scripts.provenance import machine  # noqa: E402

RUNNING = ROOT / "tests/running.py"
MODULES = "ppo_vla grpo_vla dpo_vla sft_vla eval_ood demonstrations.record scripts.plan".split()
MOST_CPU_S = 5.0


@dataclass
class Args:
    parts: tuple[Literal["bad-input", "fuzz", "faults"], ...] = ("bad-input", "fuzz", "faults")
    repeats: int = 3  # of each signal and script
    scripts: tuple[str, ...] = ("ppo", "grpo", "dpo", "sft", "eval_ood")  # to kill
    fuzz_share: float = 1.0  # of the 120,000 mutations
    seed: int = 0  # of the moments of the kills
    output: str = "results/reliability.json"


# --- a place for mistakes ---
def make_world():
    """In the current directory: demonstrations, a finished run, and bad_input.FILES."""
    Path("checkpoints").symlink_to(ROOT / "checkpoints")
    record = "-m demonstrations.record --num-demos 4 --num-envs 4 --max-episode-steps 32"
    for command in (f"{record} --output demos/ok", f"{RUNNING} ppo --name done"):
        call([sys.executable, *command.split()], check=True)
    make_files()


def make_files():
    Path("file").write_text("text", encoding="utf-8")
    Path("empty").mkdir()
    for folder, start, name, content in FILES:
        if start:
            shutil.copytree(start, folder)
        path = Path(folder, name)
        if callable(content):
            with h5py.File(path, "r+") as file:
                content(file)
        elif content is None:
            path.unlink()
        elif isinstance(content, dict):
            values = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(values | content), encoding="utf-8")
        else:
            whole = path.read_bytes() if path.is_file() else b""
            share = int(content * len(whole)) if isinstance(content, float) else None
            path.write_bytes(content if share is None else whole[:share])


def call(command, **options):
    """subprocess.run of a command that finds the project and says all in stdout."""
    options.setdefault("stdout", subprocess.DEVNULL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run(command, stderr=subprocess.STDOUT, text=True, env=environment, **options)


# --- bad input ---
def forked(words):
    """A command in a fork of this process: exit status, output, processor seconds."""
    with tempfile.TemporaryFile() as out:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            resource.setrlimit(
                resource.RLIMIT_AS, (2**34, 2**34)
            )  # what asks for more must not get it
            signal.alarm(120)
            sys.modules.pop("demonstrations.record")  # else runpy warns
            os._exit(run_here(words))
        _, status, usage = os.wait4(child, 0)
        out.seek(0)
        output = out.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(status), output, usage.ru_utime + usage.ru_stime


def run_here(words):
    """The exit status that `python WORDS` would have. The simulator does not start."""
    from common.model.openvla import OpenVLA

    def too_late(process):
        print("THE SIMULATOR STARTS", flush=True)
        os._exit(0)

    def loads(*arguments, **options):
        print("THE MODEL STARTS")
        return load(*arguments, **options)

    load, OpenVLA.from_pretrained = OpenVLA.from_pretrained, loads
    multiprocessing.process.BaseProcess.start = too_late
    module = words[0] == "python"
    sys.argv = words[2:] if module else [str(ROOT / words[0]), *words[1:]]
    try:
        run = runpy.run_module if module else runpy.run_path
        run(sys.argv[0], run_name="__main__", **(dict(alter_sys=True) if module else {}))
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


def bad_input():
    """Runs CASES and LATE. Returns: list of dicts."""
    for name in MODULES:
        importlib.import_module(name)
    print(f"imports: {time.process_time():.1f} s of processor time")
    rows = []
    with bad_server() as address:
        for line in [*CASES.split("\n"), *LATE.split("\n")]:
            if not line:
                continue
            command, wanted = (part.strip() for part in line.split(" | "))
            words = shlex.split(command.replace("LONG", 300 * "x").replace("SERVER", address))
            late = line in LATE
            if late:
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                done = call([sys.executable, ROOT / words[0], *words[1:]], stdout=subprocess.PIPE)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                status, output = done.returncode, done.stdout
                cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            else:
                status, output, cpu_s = forked(words)
            message = re.split(r"\n  .*\n(?! )", output)[-1].strip()  # without the traceback
            message = message.replace(f"{ROOT}/", "").replace(os.getcwd(), "TEMP")
            plain = re.sub(r"[\s│─╭╮╰╯]+", " ", message)
            missing = [word for word in wanted.split("; ") if word.lower() not in plain.lower()]
            row = {"command": command, "status": status, "cpu_s": round(cpu_s, 2)}
            row.update(late=late, model="THE MODEL STARTS" in output, missing=missing)
            row["refused"] = status not in (0, -signal.SIGALRM) and (late or cpu_s < MOST_CPU_S)
            row["message"] = plain[-300:]
            rows.append(row)
            if missing or not row["refused"]:
                print(f"{command}: status {status}, {cpu_s:.1f} s, no {missing}: {plain[-300:]}")
    return rows


@contextlib.contextmanager
def bad_server():
    """Address of a policy server: /nan and /shape choose what is wrong with its actions."""
    from websockets.exceptions import ConnectionClosedError
    from websockets.sync.server import serve

    from scripts.policies import pack

    def answer(connection):
        wrong = np.full(7, np.nan) if connection.request.path == "/nan" else np.zeros((2, 32))
        connection.send(pack({}))
        with contextlib.suppress(ConnectionClosedError):  # the command has ended
            for _ in connection:
                connection.send(pack({"actions": wrong}))

    read, write = os.pipe()
    child = os.fork()  # a thread would not survive the forks of the cases
    if not child:
        with serve(answer, "127.0.0.1", 0) as server:
            os.write(write, str(server.socket.getsockname()[1]).encode())
            server.serve_forever()
    yield f"ws://127.0.0.1:{os.read(read, 10).decode()}"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# --- all parts ---
def tables(report):
    """What docs/reliability.md shows: list of tables."""
    found = []
    if "bad-input" in report:
        rows = report["bad-input"]
        counts = Counter(row["command"].removeprefix("python -m ").split()[0] for row in rows)
        lines = []
        for script, number in counts.items():
            mine = [row for row in rows if script in row["command"].split()[:3]]
            right = [row for row in mine if row["refused"] and not row["missing"]]
            cpu_s = max([row["cpu_s"] for row in mine if not row["late"]], default=0)
            lines.append({"script": script, "commands": number, "refused clearly": len(right)})
            lines[-1]["most CPU s"] = cpu_s
        found.append(lines)
    for part in ("fuzz", "kills", "faults"):
        rows = report.get(part, [])
        hidden = ["examples", "message", "commit", "hardware", "software"]
        hidden += ["script"] if part == "faults" else []
        found.append([{k: v for k, v in row.items() if k not in hidden} for row in rows])
    return [lines for lines in found if lines]


def main(args):
    output = ROOT / args.output
    report = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        os.chdir(folder)
        make_world()
        if "bad-input" in args.parts:
            report["bad-input"] = bad_input()
        if "fuzz" in args.parts:
            report["fuzz"] = fuzz.fuzz(args.fuzz_share)
        if "faults" in args.parts:
            rng = random.Random(args.seed)
            Path("child.py").write_text(faults.CHILD, encoding="utf-8")
            kept = [row for row in report.get("kills", []) if row["script"] not in args.scripts]
            found = [faults.kills(name, args.repeats, rng) for name in args.scripts]
            report["kills"] = kept + [machine() | row for row in found]
            if "ppo" in args.scripts:
                report["faults"] = [machine() | row for row in faults.single_faults()]
        os.chdir(ROOT)
    for part in {*args.parts} - {"faults"}:  # whose rows say it themselves
        report[f"how {part}"] = asdict(args) | machine()
    for lines in tables(report):
        print(tabulate(lines, "keys", "github"), end="\n\n")
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
