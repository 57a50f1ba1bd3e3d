"""Files that are read and written: what is wrong with one is an error with its name and the fix."""

import json
import os
import shutil
from contextlib import contextmanager
from pickle import PickleError
from typing import get_args

from safetensors import SafetensorError

# Of a file and its content (SyntaxError: XML, PNG); what else is raised is a mistake in the code
FILE_ERRORS = (OSError, ValueError, EOFError, KeyError, SyntaxError, RuntimeError, PickleError,
               SafetensorError)  # fmt: skip


def check(condition, message):
    """ValueError with a message that names the value, the rule and the fix."""
    if not condition:
        raise ValueError(message)


@contextmanager
def naming(path, fix="is it whole?", kinds=FILE_ERRORS):
    """Errors of these kinds become a ValueError (FileNotFoundError) with file, reason and fix."""
    try:
        yield
    except kinds as error:
        why = str(error) or repr(error)
        folder = next(folder for folder in path.parents if folder.is_dir())
        if path.is_file() and path.stat().st_size < 1000 and b"git-lfs" in path.read_bytes():
            why = "it is a git-lfs pointer, which `git lfs pull` would replace"
        if isinstance(error, BlockingIOError):
            fix = "another process has it open: wait for its end, or choose another name"
        if (disk := shutil.disk_usage(folder)).total and disk.free < 2**20:
            fix = "the disk is full"
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{path}: {why}; {fix}") from error


def read_json(path, fix="is it whole?", like=dict):
    with naming(path, fix):
        content = json.loads(path.read_text(encoding="utf-8"))
        check_types(content, like)
        return content


def check_types(value, like, name="its content"):
    """ValueError unless JSON's value is like a class, a union, a Literal, [of all in a list], or
    {key: of its value}, where the key `str` stands for all."""
    kinds = (type(like),) if isinstance(like, (dict, list)) else get_args(like) or (like,)
    right = type(value) in kinds or value in kinds or (type(value) is int and float in kinds)
    check(right, f"{name} = {value!r:.60} must be {like}")
    if isinstance(like, list):
        for part in value:
            check_types(part, like[0], name)
    elif isinstance(like, dict):
        for key in value if str in like else like:
            check(key in value, f"{name} has no {key}")
            check_types(value[key], like.get(key, like.get(str)), key)


def write_atomic(path, text):
    """Write a temporary file and rename it: a reader never meets half a file."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with naming(path, "can it be written?"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
