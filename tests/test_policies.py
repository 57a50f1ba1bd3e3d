"""Other people's policies and code: a file's function or class, a server's answers, gymnasium."""

import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from scripts import policies

DOCS = Path(__file__).parent.parent / "docs"
PLACES = np.array([3, 5])
TWO = (np.zeros((2, 4, 4, 3), np.uint8), ["put a", "put b"], PLACES)


def server(*answers):
    """A `ServerPolicy` and the requests it makes. A number: silent so many seconds, then gone."""
    requests, serve = [], pytest.importorskip("websockets.sync.server").serve

    def answer(connection):
        connection.send(policies.pack({"model": 1}))
        for reply in answers:
            requests.append(policies.unpack(connection.recv()))
            if isinstance(reply, float):
                return time.sleep(reply)
            connection.send(reply if isinstance(reply, (str, bytes)) else policies.pack(reply))

    started = serve(answer, "127.0.0.1", 0)
    threading.Thread(target=started.serve_forever, daemon=True).start()
    return policies.ServerPolicy(f"ws://127.0.0.1:{started.socket.getsockname()[1]}"), requests


def test_chunks_are_played_to_their_end():
    """Stops another wire format, one queue for all episodes, and chunks of the episode before."""
    chunk = np.arange(14.0).reshape(2, 7)
    answers = [chunk, chunk[0], 100 + chunk, chunk[1].tolist(), -chunk, -chunk]
    policy, requests = server(*({"actions": actions} for actions in answers))
    policy.reset(PLACES)
    played = [policy.act(*TWO)[:, 0].tolist() for _ in range(3)]
    policy.reset(PLACES)
    assert [*played, policy.act(*TWO)[:, 6].tolist()] == [[0, 0], [7, 100], [7, 107], [-6, -6]]
    asked = [(request["prompt"][-1], request["episode"], request["step"]) for request in requests]
    assert asked == [*(first := [("a", 3, 0), ("b", 5, 0)]), ("b", 5, 1), ("a", 3, 2), *first]
    np.testing.assert_array_equal(requests[0]["observation/image"], TWO[0][0])
    known = b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x01\x05\xc4\x05dtype\xa3|u1"
    known += b"\xc4\x05shape\x91\x01"  # of openpi-client 0.1.2
    assert policies.pack(np.array([5], np.uint8)) == known


@pytest.mark.parametrize("gives, error, says", [
    ("def act(: pass", ValueError, "Python"), ("class act: pass", ValueError, "__call__"),
    ("actt = len", ValueError, "actt"), ("act = lambda *_: [0] * 7", ValueError, r"\(7,\)"),
    ("class act:\n  def __init__(self, a): 0", ValueError, "without arguments"),
    ("import torch as t\nact = lambda *_: t.ones(2, 7, requires_grad=True)", ValueError, "detach"),
    ("act = lambda *_: [[0] * 7]", ValueError, r"\(1, 7\)"),
    ("act = lambda *_: [[0] * 6] * 2", ValueError, r"\(2, 6\)"),
    ("act = lambda *_: [[float('nan')] * 7] * 2", ValueError, "nan"),
    ("act = lambda *_: [[0], 'x']", ValueError, "no array"),
    (["Traceback: no CUDA"], RuntimeError, "no CUDA"), ([b"\xc1"], ValueError, "msgpack"),
    ([[1]], ValueError, "list"), ([{"action": [0] * 7}], ValueError, "'action'"),
    ([{"actions": np.zeros((2, 32))}], ValueError, r"\(2, 32\)"), ([0.5], TimeoutError, "0.2 s"),
    ([{"actions": np.zeros((0, 7))}], ValueError, r"\(0, 7\)"), ([0.0], ConnectionError, "gone"),
    ([{"actions": np.full(7, np.nan)}], ValueError, "nan"), ([{"actions": "x"}], ValueError, "'x'"),
])  # fmt: skip
def test_files_and_servers_that_fail(gives, error, says, monkeypatch, tmp_path):
    """Stops one action for all episodes, hanging, nonsense, and an end without file and reason."""
    with pytest.raises(error, match=f"(?s)(mine.py|ws://127).*{says}"):
        if isinstance(gives, str):
            (tmp_path / "mine.py").write_text(gives)
            policy = policies.FilePolicy(f"{tmp_path}/mine.py:act")
            policy.load()
        else:
            policy, _ = server(*gives)
        policy.reset(PLACES)
        monkeypatch.setattr(policies, "TIMEOUT_S", 0.2)
        policy.act(*TWO)


def test_gymnasium(capsys):
    """Stops an environment that other code cannot make, seed or tell the end of an episode of."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "benchmark.md").read_text(), re.S)
    exec(code, shared := {})
    assert len(capsys.readouterr().out.splitlines()) == 2 and shared["info"]["elapsed_steps"] == 40
    env, make = shared["env"], shared["gymnasium"].make
    assert (env.unwrapped.task, env.unwrapped.split) == ("plate", "test")
    with pytest.warns(UserWarning, match="unwrapped"):
        check_env(make(env.spec.id), skip_render_check=True)
    with pytest.raises(ValueError, match="medium"):
        make(env.spec.id, scene="medium")
