"""A training run on disk: its directory, log, evaluations and checkpoints.
runs/NAME holds args.json, metrics.jsonl, machines.jsonl of every start, TensorBoard's file,
checkpoint-000012, best-000010, videos/, curve.png. A checkpoint appears whole or not at all."""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import uuid
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch

from common.model.checkpoints import load_vla, save_vla
from common.run.evaluate import evaluate
from common.run.files import check, check_types, naming, write_atomic
from common.run.metrics import peak_memory
from common.run.ranks import gather_over_ranks, rank_and_world_size
from scripts.pictures import draw_curves
from scripts.provenance import NUMBER, machine

PROGRESS = ("iteration", "seconds", "evaluations")  # in a checkpoint's training state
DAMAGED = "a part is missing or damaged; use a copy, or start anew"
STATUS = """train/success_at_end train/return losses/cross_entropy val/cross_entropy
    losses/approx_kl losses/frac_groups_dropped train/num_pairs rewards/margins
    eval/success_at_end charts/SPS system/peak_gpu_gb""".split()  # metrics in the status line


def find_checkpoint(run_dir, kind="checkpoint"):
    """The complete one with the highest number; ValueError: there is none."""
    found = sorted(Path(run_dir).glob(f"{kind}-{NUMBER}"))
    check(found, f"{run_dir} holds no {kind}-NNNNNN; start a new run")
    return found[-1]


def read_state(run_dir):
    """Path and content of the latest checkpoint's training state; the rows of metrics.jsonl."""
    path, log = find_checkpoint(run_dir) / "training_state.pt", Path(run_dir, "metrics.jsonl")
    with naming(path, DAMAGED, Exception):  # of torch's reader
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check_types(saved, {"iteration": int, "seconds": float, "evaluations": [float]})
    with naming(log, "remove the line that is not JSON"):
        lines = log.read_text(encoding="utf-8").splitlines(True) if log.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        check_types(rows, [{"iteration": int}])
    return path, saved, rows


def hold(run):
    """The run's directory, which rank 0 makes and locks until this process ends.
    ValueError: another process has it, or it cannot be written."""
    run_dir = Path(gather_over_ranks(run.resume or f"runs/{run.name}")[0])
    if rank_and_world_size()[0] == 0:
        path = run_dir / ".lock"
        with naming(path, "another --name, or a folder that can be written"):
            run_dir.mkdir(parents=True, exist_ok=True)
            import fcntl  # here, since Windows has none: `check_renderer` says so first

            fcntl.lockf(os.open(path, os.O_CREAT | os.O_WRONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in run_dir.glob(f".*-{NUMBER}.*"):  # of a save that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    return run_dir


def load_start(run, model, device, **options):
    """The model that training starts from or, on --resume, continues. run, model: their flags."""
    hold(run)
    if run.resume:
        read_state(run.resume)  # before what takes long
    settings = dict(asdict(model), **options, seed=run.seed, device=device)
    start = settings.pop("model")
    return load_vla(find_checkpoint(run.resume) if run.resume else start, **settings)


class Experiment:
    """Evaluates the start of a new run, or restores a run that is resumed.
    envs: None = no evaluation; state: dict name -> module or optimizer, whose states checkpoints
    hold beside the model's weights."""

    def __init__(self, args, model, envs, state):
        self.args, self.run, self.model, self.envs, self.state = args, args.run, model, envs, state
        self.iteration, self.seconds, self.evaluations = 0, 0.0, []
        self.enabled = rank_and_world_size()[0] == 0
        self.run_dir, log = hold(self.run), []
        if self.run.resume:
            path, saved, log = read_state(self.run_dir)
            with naming(path, DAMAGED, Exception):
                for key in PROGRESS:
                    setattr(self, key, saved[key])
                for name, part in self.state.items():
                    wrong = sorted(saved[name].keys() ^ state_of(part).keys())
                    check(not wrong, f"weights of {name}: {wrong[:3]}")
                    part.load_state_dict({**part.state_dict(), **saved[name]})
        if self.enabled:
            self._open(log)
        if not self.run.resume:
            self._log(self._evaluate() if self.run.eval_every else {}, step=0)
            self._save("checkpoint")
        self.started = time.monotonic()

    def _open(self, log):
        from torch.utils.tensorboard import SummaryWriter

        config = asdict(self.args)
        config["run"]["resume"] = ""
        write_atomic(self.run_dir / "args.json", json.dumps(config, indent=1, allow_nan=False))
        with (self.run_dir / "machines.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": self.iteration, **machine()}) + "\n")
        # A resumed run drops what it logged after its checkpoint; a new run begins with nothing
        path = self.run_dir / "metrics.jsonl"
        kept = [json.dumps(row) + "\n" for row in log if row["iteration"] <= self.iteration]
        write_atomic(path, "".join(kept))
        self.file = path.open("a", buffering=1, encoding="utf-8")
        self.tensorboard = SummaryWriter(str(self.run_dir))
        self.wandb = None
        if self.run.track:
            import wandb

            path = self.run_dir / "wandb-id.txt"  # names repeat, in other folders and after an rm
            if not path.is_file():
                write_atomic(path, uuid.uuid4().hex)
            name = {"name": self.run_dir.name, "id": path.read_text(encoding="utf-8")}
            self.wandb = wandb.init(project="cleanvla", resume="allow", config=config, **name)
        stop_on_signals(self.run_dir)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6
        print(f"{self.run_dir} | {self.args.model.model} on {self.model.device}; {self.args.scene}")
        print(f"trains {trained:.2f} M weights; matmuls in {self.args.model.dtype}", flush=True)

    def due(self, iteration):  # for an evaluation at its end
        last = iteration == self.args.num_iterations
        return self.run.eval_every > 0 and (last or iteration % self.run.eval_every == 0)

    def finish(self, iteration, metrics, step):
        """After an iteration: evaluate if it is due, log, print the status line, checkpoint.
        metrics: dict name -> number; step: environment (or optimizer) steps so far."""
        self.iteration = iteration
        if self.due(iteration):
            metrics.update(self._evaluate())
        metrics.update(peak_memory())
        self.seconds += time.monotonic() - self.started
        self.started = time.monotonic()
        self._log(metrics, step)
        self._save("checkpoint")
        if self.enabled:
            parts = [f"{key} {metrics[key]:.4g}" for key in STATUS if key in metrics]
            left = (self.args.num_iterations - iteration) * self.seconds // iteration
            begin = f"iter {iteration:03d}/{self.args.num_iterations}"
            print(" | ".join([begin, *parts, f"eta {timedelta(seconds=left)}"]), flush=True)

    def _evaluate(self):  # the best checkpoint is chosen here and on nothing else
        out = self.run_dir / "videos" / f"{self.iteration:06d}"
        metrics = evaluate(self.model, self.envs, self.args.scene.task, self.run.eval_episodes, out)
        self.evaluations.append(metrics["eval/success_at_end"])
        if self.evaluations[-1] >= max(self.evaluations):
            self._save("best")
        return metrics

    def _log(self, metrics, step):
        if not self.enabled:
            return
        line = {"iteration": self.iteration, "step": step}
        for key, value in metrics.items():
            line[key] = float(value) if math.isfinite(value) else None
            self.tensorboard.add_scalar(key, float(value), step)
        self.file.write(json.dumps(line) + "\n")
        if self.wandb:
            self.wandb.log(line, step=step)

    def _save(self, kind):
        """Write <kind>-<iteration>, then remove the others of this kind that need not be kept."""
        if not self.enabled:
            return
        final = self.run_dir / f"{kind}-{self.iteration:06d}"

        def add(folder):
            saved = {name: state_of(part) for name, part in self.state.items()}
            saved |= {key: getattr(self, key) for key in PROGRESS}
            torch.save(saved, folder / "training_state.pt")
            shutil.copy(self.run_dir / "args.json", folder)

        with naming(final, "it cannot be saved"):
            save_vla(self.model, final, add)
        every = self.run.keep_every if kind == "checkpoint" else 0
        for other in self.run_dir.glob(f"{kind}-{NUMBER}"):
            if other != final and not (every and int(other.name[-6:]) % every == 0):
                shutil.rmtree(other)

    def close(self, curves=("train/success_at_end", "eval/success_at_end")):
        """Draw curve.png and say where everything is."""
        if self.envs:
            self.envs.close()
        if not self.enabled:
            return
        self.file.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        draw_curves(self.run_dir, *curves)
        successes = " -> ".join(f"{value:.3f}" for value in self.evaluations) or "not evaluated"
        print(f"success at end: {successes}; time: {timedelta(seconds=self.seconds // 1)}")
        print(f"{self.run_dir} has curve.png, videos/, metrics.jsonl and checkpoints; next:")
        script = Path(sys.argv[0]).with_name("eval_ood.py")
        print(shlex.join(["python", str(script), "--checkpoint", str(self.run_dir)]))


def state_of(part):
    """Of an optimizer all, of a module the trained weights: a frozen base is the model's own."""
    if isinstance(part, torch.nn.Module):
        return {name: p for name, p in part.named_parameters() if p.requires_grad}
    return part.state_dict()


def stop_on_signals(run_dir):
    """SIGINT and SIGTERM say how to continue and leave with exit code 128 + their number."""

    def stop(number, frame):
        again = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
        how = f"continue with: {again}" if any(run_dir.glob("checkpoint-*")) else "nothing is saved"
        print(f"\n{signal.Signals(number).name}: {how}", flush=True)
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
