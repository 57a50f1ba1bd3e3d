"""What a reader is promised, checked: density, documented commands and metrics, imports."""

import ast
import dataclasses
import difflib
import importlib
import io
import re
import shlex
import subprocess
import sys
import tokenize
import typing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tyro

ROOT = Path(__file__).parent.parent
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py"))]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
# lines, flags of its own, tokens per code line, tokens and branches of the loop and updates
LIMITS = {
    "ppo_vla": (340, 22, 11.5, 1350, 10),
    "grpo_vla": (320, 20, 11.5, 1250, 10),
    "dpo_vla": (300, 16, 11.5, 1250, 10),
    "sft_vla": (260, 20, 11.5, 1250, 10),
    "eval_ood": (220, 14, 12.0, 1250, 10),
}
MOST_SHARED_FLAGS, MOST_TOKENS_IN_COMMON, MOST_DIFFERING_LINES = 18, 12.5, 140
TOTALS = {"common/**/*.py": 2700, "tests/*.py": 4200, "README.md": 150}
NOT_COUNTED = {"Args", "PRESETS", "PAPER"}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
METRIC = r"""["']((?:charts|losses|train|val|eval|time|system)/[a-z]\w*)["']"""


def lines(path):
    return path.read_text().splitlines()


def code_tokens(text):
    """Counter line -> tokens, without comments, docstrings, imports and NOT_COUNTED."""
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        names = {getattr(node, "name", ""), *map(ast.unparse, getattr(node, "targets", ()))}
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        imported = isinstance(node, (ast.Import, ast.ImportFrom))
        if docstring or imported or names & NOT_COUNTED:
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    places = [token.start[0] for token in tokens if token.type not in NO_CODE and token.string]
    return Counter(line for line in places if line not in left_out)


def loop_of(text):
    """The loops of main and the functions update*: tokens and branches."""
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    parts = [node for node in functions if node.name.startswith("update")]
    (main,) = [node for node in functions if node.name == "main"]
    parts += [node for node in main.body if isinstance(node, (ast.For, ast.While))]
    counts, tokens, branches = code_tokens(text), 0, 0
    for part in parts:
        tokens += sum(counts[line] for line in range(part.lineno, part.end_lineno + 1))
        for node in ast.walk(part):
            branches += isinstance(node, (ast.If, ast.IfExp)) or len(getattr(node, "ifs", ()))
    return tokens, branches


@pytest.mark.parametrize("script", LIMITS)
def test_a_script_is_as_dense_as_its_models(script):
    """Stops a script from growing past what a reader takes in at one sitting."""
    text = (ROOT / f"{script}.py").read_text()
    types = typing.get_type_hints(importlib.import_module(script).Args)
    groups = [kind for kind in types.values() if dataclasses.is_dataclass(kind)]
    density = np.mean(list(code_tokens(text).values()))
    found = (len(text.splitlines()), len(types) - len(groups), density, *loop_of(text))
    assert (np.array(found) <= LIMITS[script]).all(), (found, LIMITS[script])
    assert sum(len(dataclasses.fields(kind)) for kind in groups) <= MOST_SHARED_FLAGS


def test_all_together():
    """Stops code from piling up elsewhere, and a `diff` of two scripts that hides the algorithm."""
    totals = {glob: sum(len(lines(path)) for path in ROOT.glob(glob)) for glob in TOTALS}
    assert not {glob: total for glob, total in totals.items() if total > TOTALS[glob]}
    counts = [code_tokens(path.read_text()).values() for path in ROOT.glob("common/**/*.py")]
    assert np.mean([n for of_file in counts for n in of_file]) <= MOST_TOKENS_IN_COMMON
    diff = difflib.ndiff(lines(ROOT / "ppo_vla.py"), lines(ROOT / "grpo_vla.py"))
    signs = Counter(line[0] for line in diff)
    assert max(signs["-"], signs["+"]) <= MOST_DIFFERING_LINES


def test_scripts_import_without_side_effects(tmp_path):
    """Stops work at import, as of notebooks, and an evaluator that changes with a script."""
    code = f"""import multiprocessing, sys, torch, eval_ood
assert not [name for name in sys.modules if name.endswith("_vla")]
import {", ".join(SCRIPTS)}
assert not torch.cuda.is_initialized() and not multiprocessing.active_children()"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    said = subprocess.check_output(command, cwd=tmp_path, env=environment, timeout=240)
    assert said == b"" and not list(tmp_path.iterdir())


def commands():
    """(page, words) of each `python` and `torchrun` line in code blocks and scripts' docstrings."""
    blocks = {path: re.findall(r"```\w*\n(.*?)```", path.read_text(), re.DOTALL) for path in PAGES}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]:
        blocks[path] = [ast.get_docstring(ast.parse(path.read_text())) or ""]
    for path, texts in blocks.items():
        for line in "\n".join(texts).replace("\\\n", " ").splitlines():
            line = re.sub(r"^\s*(\$ )?([A-Z_]+=\S+ +)*", "", line)
            if re.match(r"(\S*/)?(python3?|torchrun) ", line):
                yield path.name, shlex.split(line, comments=True)


def problem(words):
    """Why a command cannot work, or None: its script exists and its Args accept the flags."""
    if "-c" in words[:2] or "pytest" in words:
        return None
    places = [i for i in range(1, len(words)) if words[i].endswith(".py") or words[i - 1] == "-m"]
    if not places:
        return "no script"
    name = words[places[0]].removesuffix(".py").replace("/", ".")
    if not (ROOT / f"{name.replace('.', '/')}.py").is_file():
        return f"no script {name}"
    if name.startswith(("tests.", "benchmarks.")):
        return None  # they parse their own flags
    module = importlib.import_module(name)
    try:
        if hasattr(module, "Args"):
            tyro.cli(tyro.conf.OmitArgPrefixes[module.Args], args=words[places[0] + 1 :])
    except SystemExit as error:
        return "its flags do not parse" if error.code else None


def test_documented_commands_parse(capsys):
    """Stops documentation with flags or scripts that no longer exist."""
    found = [(page, shlex.join(words), problem(words)) for page, words in commands()]
    assert len(found) > 20, "the search for commands is broken"
    assert not [row for row in found if row[2]]
    for wrong in ("python ppo_vla.py --no-such-flag 1", "python gone.py", "python -m gone.gone"):
        assert problem(wrong.split())


def test_every_logged_key_is_documented():
    """Stops metrics that nobody can interpret: each key stands in docs/metrics.md."""
    texts = [path.read_text() for glob in ("*.py", "common/**/*.py") for path in ROOT.glob(glob)]
    pattern = rf"""{METRIC}|(?:stats|means)\.add\(["'](\w+)["']"""
    keys = {a or b for text in texts for a, b in re.findall(pattern, text, re.I)}
    assert {"charts/SPS", "losses/first_ratio_gap", "policy_loss", "cross_entropy"} <= keys
    documented = set()
    for name in re.findall(r"`([^`\s]+)`", (ROOT / "docs/metrics.md").read_text()):
        prefix, _, rest = name.partition("/")
        for part in rest.strip("{}").split(","):
            documented |= {f"{prefix}/{part}", part}
    assert not keys - documented
