"""Policies that `eval_ood.py --policy` names: baselines, a file's function or class, a server."""

import atexit
import hashlib
import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path

import numpy as np

from common.run.files import check, naming
from demonstrations.expert import Expert

BASELINES = ("random", "zero", "expert")
KINDS = f"{', '.join(BASELINES)}, FILE.py:NAME or ws://HOST:PORT, with a name: pi0=ws://..."
TIMEOUT_S = 60  # of a server's answer
AGAIN = "repeat the command, finished tasks are kept"


def is_server(policy):
    return policy.startswith(("ws://", "wss://"))


def name_policies(policies, taken):
    """dict name in reports and folders -> policy: my_policy-act, 127.0.0.1-8000, or as given.

    policies: of --policy; "model" is --checkpoint's. ValueError: two of one name, or one of taken.
    """
    names = {}
    for policy in policies:
        given, policy = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", policy).groups()
        tail = policy.split("//")[1] if is_server(policy) else Path(policy).name
        name = given or re.sub(r"[^\w.]+", "-", tail.replace(".py:", "-"))
        check(name not in {*names, *taken}, f"policy = {policy}: two are called {name}; rename one")
        if policy != "model":
            names[name] = policy
    return names


def identify(policy):
    """dict of what tells a policy from another one of its name: sha256 of its file or metadata.

    Nothing of a file runs. ValueError, FileNotFoundError, ConnectionError: it is no policy.
    """
    if policy == "model" or policy in BASELINES:
        return {}
    if is_server(policy):
        server = ServerPolicy(policy)
        server.connection.close()
        return {"sha256": server.sha256}
    return {"sha256": FilePolicy(policy).sha256}


def load_policy(settings):
    """What plays `settings["policy"]`: reset(places) and act(images, instructions, places)."""
    policy = settings["policy"]
    if policy in BASELINES:
        return None
    loaded = ServerPolicy(policy) if is_server(policy) else FilePolicy(policy)
    check(loaded.sha256 == settings["sha256"], f"{policy} changed after the start; {AGAIN}")
    loaded.load()
    return loaded


def begin(policy, loaded, envs, seeds, places):
    """New episodes: act(obs (M, H, W, 3) uint8, instructions, rows (M,)) -> actions (M, 7).

    loaded: of `load_policy`; seeds, places (N,): of these episodes, and where the rows point to.
    """
    if policy in BASELINES:
        return baseline(policy, envs, seeds)
    loaded.reset(places)
    return lambda obs, instructions, rows: loaded.act(obs, instructions, places[rows])


def baseline(policy, envs, seeds):
    """As `begin`: stands still, moves at random, or looks at the simulator's state."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    expert = Expert(envs.num_envs)
    still = np.array([0] * 6 + [1])  # the gripper is open
    most = np.array([0.02, 0.02, 0.02, 0.1, 0.1, 0.1, 1.0])  # m, rad, gripper

    def act(obs, instructions, rows):
        if policy == "zero":
            return np.tile(still, (len(rows), 1))
        if policy == "random":
            return np.stack([rngs[row].uniform(-most, most) for row in rows])
        return expert.act(envs.privileged_state())[rows]

    return act


def check_actions(who, actions, shapes, right):
    """Actions as float32. ValueError: they are no numbers, not finite, or `right(shape)` is not."""
    try:
        numbers = np.asarray(actions, np.float32)
    except (RuntimeError, TypeError, ValueError) as error:  # RuntimeError: of torch
        raise ValueError(f"{who} gave {actions!r:.300}, no array of numbers: {error}") from error
    fix = f"it must be {shapes}: metres, radians, gripper"
    check(right(numbers.shape), f"{who} gave actions of shape {numbers.shape}; {fix}")
    bad = numbers[~np.isfinite(numbers)]
    check(bad.size == 0, f"{who} gave {bad[:3]}; actions must be finite: check its normalisation")
    return numbers


# --- a file ---
class FilePolicy:
    """NAME of FILE.py. It is run from the text that was hashed, never from a cached bytecode."""

    def __init__(self, policy):
        path, _, self.name = policy.rpartition(":")
        right = path.endswith(".py") and self.name.isidentifier()
        check(right, f"policy = {policy!r} is not known; use {KINDS}")
        self.policy, self.path = policy, Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"policy = {policy!r}: {self.path.resolve()} is no file")
        text = self.path.read_bytes()
        self.sha256 = hashlib.sha256(text).hexdigest()
        try:
            self.code = compile(text, str(self.path), "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"policy = {policy!r}: {self.path} is not Python: {error}") from error

    def load(self):
        module = types.ModuleType(f"policy_{self.path.stem}")
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module  # dataclasses and pickle look there
        exec(self.code, module.__dict__)
        found = getattr(module, self.name, None)
        has = [name for name, value in vars(module).items() if callable(value)]
        check(callable(found), f"policy = {self.policy!r}: no such function or class; use of {has}")
        if inspect.isclass(found):
            with naming(self.path, "a class is made without arguments", (TypeError, ValueError)):
                inspect.signature(found).bind()
        self.function = found() if inspect.isclass(found) else found
        right = callable(self.function)
        check(right, f"policy = {self.policy!r} needs __call__(self, images, instructions, rows)")
        try:
            inspect.signature(self.function).bind("images", "instructions", "rows")
        except TypeError as error:
            why = f"policy = {self.policy!r} must take images, instructions, rows"
            raise TypeError(f"{why}: {error}") from error
        except ValueError:
            pass  # written in C: it has no signature

    def reset(self, places):
        """These episodes (N,) begin; earlier ones are over."""
        if hasattr(self.function, "reset"):
            self.function.reset(places)

    def act(self, images, instructions, places):
        """images (N, H, W, 3) uint8, N strings, places (N,) int -> actions (N, 7) float32."""
        actions = self.function(images, instructions, places)
        expected = (len(places), 7)
        return check_actions(self.policy, actions, expected, lambda shape: shape == expected)


# --- a server ---
class ServerPolicy:
    """A policy in a process of its own, by openpi's protocol: it first sends its metadata, then
    answers each observation (of one environment) with a chunk of actions. All is msgpack."""

    def __init__(self, address):
        for package in ("msgpack", "websockets"):
            found = importlib.util.find_spec(package)
            check(found, f"policy = {address} needs {package}: pip install -e '.[server]'")
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        self.address = address
        # Pictures do not compress in time, and a server that computes answers no pings
        options = dict(compression=None, max_size=None, ping_interval=None, proxy=None)
        try:
            # It is open as long as the process runs; servers log a traceback if it is not closed
            self.connection = connect(address, open_timeout=TIMEOUT_S, **options).__enter__()
            atexit.register(self.connection.close)
        except (OSError, OverflowError, ValueError, WebSocketException) as error:
            why = f"policy = {address} does not open: {error or type(error).__name__}"
            raise ConnectionError(f"{why}; start the server, or correct the address") from error
        self.sha256 = hashlib.sha256(self._receive("its metadata")).hexdigest()

    def load(self):
        self.reset(np.arange(0))

    def reset(self, places):
        """These episodes (N,) begin; what is left of earlier chunks is dropped."""
        self.chunks = {place: [] for place in places.tolist()}
        self.steps = dict.fromkeys(self.chunks, 0)

    def act(self, images, instructions, places):
        """images (N, H, W, 3) uint8, N strings, places (N,) int -> actions (N, 7) float32."""
        actions = []
        for image, prompt, place in zip(images, instructions, places.tolist(), strict=True):
            if not self.chunks[place]:
                seen = {"observation/image": image, "prompt": prompt}
                seen.update(episode=place, step=self.steps[place])
                self.chunks[place] = self._ask(seen)
            actions.append(self.chunks[place].pop(0))
            self.steps[place] += 1
        return np.stack(actions)

    def _ask(self, observation):
        """List of the actions (7,) of an answer, in the order in which they are played."""
        from websockets.exceptions import ConnectionClosed

        try:
            self.connection.send(pack(observation))
        except ConnectionClosed:
            pass  # what the server said last is still to be read
        answer = self._receive("actions")
        try:
            answer = unpack(answer)
        except (KeyError, TypeError, ValueError) as error:
            why = f"{self.address} gave {answer[:40]!r}, which is not openpi's msgpack: {error}"
            raise ValueError(f"{why}; correct the server") from error
        keys = list(answer) if isinstance(answer, dict) else type(answer).__name__
        check("actions" in keys, f"{self.address} gave {keys}; it must be a dict with actions")
        right = lambda shape: 0 not in shape and shape[-1:] == (7,) and len(shape) < 3  # noqa: E731
        chunk = check_actions(self.address, answer["actions"], "(7,) or (H, 7)", right)
        return list(chunk.reshape(-1, 7))

    def _receive(self, what):
        """The next message, bytes. ConnectionError, TimeoutError, RuntimeError: there is none."""
        from websockets.exceptions import ConnectionClosed

        try:
            message = self.connection.recv(timeout=TIMEOUT_S)
        except TimeoutError:
            why = f"{self.address} sent no {what} in {TIMEOUT_S} s; a first answer may compile"
            raise TimeoutError(f"{why}: {AGAIN}") from None
        except ConnectionClosed as error:
            why = f"{self.address} is gone before it sent {what}: {error}"
            raise ConnectionError(f"{why}; read its log, start it again and {AGAIN}") from None
        if isinstance(message, str):
            raise RuntimeError(f"{self.address} failed: {message}\ncorrect it, then {AGAIN}")
        return message


def pack(message):
    """msgpack of dicts, lists, strings, numbers and arrays, with openpi's encoding of arrays."""
    import msgpack

    def encode(value):
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{type(value).__name__} is neither plain nor an array")
        shape = {b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__ndarray__": True, b"data": value.tobytes(), **shape}

    return msgpack.packb(message, default=encode)


def unpack(message):
    """The reverse of `pack`. Arrays of Python objects are refused: nothing received is run."""
    import msgpack

    def decode(value):
        if b"__ndarray__" in value:
            array = np.frombuffer(value[b"data"], np.dtype(value[b"dtype"]))
            return array.reshape(value[b"shape"])
        if b"__npgeneric__" in value:
            return np.dtype(value[b"dtype"]).type(value[b"data"])
        return value

    return msgpack.unpackb(message, object_hook=decode)
