"""Checkpoints: what a run knows, on disk, in safetensors and JSON. Nothing is ever pickled.

    checkpoints/
      0-00000120/                 phase 0 after 120 steps
        policy.safetensors        one file a part: its tensors, and the rest of its state as JSON in the header
        optimizer.safetensors
        state.json                where the run stood, and the SHA-256 of every file, itself included

A checkpoint is written into a hidden folder, forced to disk and renamed, so that a kill, a crash or a full disk at any
moment leaves the earlier ones as they were. What is read is verified first; a damaged checkpoint is passed over for
the one before it. The last two are kept.

A part's state is any nesting of dicts (keys str or int), lists and tuples over tensors, None, bool, int, float and str;
it comes back exactly: same types, same bits, dimensions and dtypes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from foveate.types import InputError

KEEP = 2
PARTIAL = ".partial-"


class Damaged(Exception):
    """A checkpoint that does not verify: half-written, cut or altered."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified.

    Attributes:
        path: its folder.
        position: where the run stood, as given to `finish`.
        parts: the names of what it holds.
    """

    path: Path
    position: dict[str, Any]
    parts: frozenset[str]

    def read(self, name: str) -> Any:
        """The state of one part, its tensors on the CPU.

        Raises:
            KeyError: the checkpoint has no such part.
        """
        if name not in self.parts:
            raise KeyError(name)
        return read_part(self.path, name)


def begin(partial: Path) -> None:
    """Make the hidden folder, named `PARTIAL` and the checkpoint's name, in which one is put together."""
    partial.parent.mkdir(exist_ok=True)
    for left in partial.parent.glob(f"{PARTIAL}*"):  # by a kill
        shutil.rmtree(left)
    partial.mkdir()


def write_part(partial: Path, name: str, state: Any) -> None:
    """Write one part's state into a checkpoint that was begun.

    Raises:
        TypeError: the state holds something that is neither a tensor nor plain data.
        OSError: the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(state, "", tensors)
    _write(partial / f"{name}.safetensors", save(tensors, {"structure": json.dumps(structure)}))


def read_part(path: Path, name: str) -> Any:
    """Read one part's state from a checkpoint's folder, its tensors on the CPU."""
    with safe_open(path / f"{name}.safetensors", framework="pt") as file:
        return _decode(json.loads(file.metadata()["structure"]), file)


def finish(partial: Path, position: dict[str, Any]) -> Path:
    """Seal a checkpoint whose parts are all written, give it its name and drop all but the last `KEEP`."""
    files = {file.name: _digest(file) for file in sorted(partial.iterdir())}
    body = {"position": position, "files": files}
    _write(partial / "state.json", json.dumps({**body, "sha256": _seal(body)}, indent=1).encode())
    _sync(partial)
    name = partial.name.removeprefix(PARTIAL)
    path, times = partial.with_name(name), 1
    while path.exists():  # the same step saved again: a folder cannot be replaced in one stroke, so both stay a while
        times += 1
        path = partial.with_name(f"{name}-{times}")
    partial.rename(path)
    _sync(path.parent)
    for old in listed(path.parent)[:-KEEP]:
        shutil.rmtree(old)
    return path


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, verified or not, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and path.name.replace("-", "").isdecimal()]
    return sorted(found, key=lambda path: [int(number) for number in path.name.split("-") if number])


def newest(folder: Path, passed_over: Callable[[Path, Damaged], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; `passed_over` is called with each newer one that does not."""
    for path in reversed(listed(folder)):
        try:
            return verify(path)
        except Damaged as damage:
            passed_over(path, damage)
    return None


def drop_after(folder: Path, good: Checkpoint | None) -> None:
    """Delete the checkpoints that were passed over for this one."""
    paths = listed(folder)
    for path in paths[paths.index(good.path) + 1 :] if good else paths:
        shutil.rmtree(path)


def verify(path: Path) -> Checkpoint:
    """Open a checkpoint if every byte of it is as it was written.

    Raises:
        Damaged: it is not.
    """
    try:
        record = json.loads((path / "state.json").read_bytes())
        body = {"position": record["position"], "files": record["files"]}
        if record["sha256"] != _seal(body):
            raise Damaged("state.json was altered")
        for name, digest in body["files"].items():
            if _digest(path / name) != digest:
                raise Damaged(f"{name} is cut or altered")
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged("state.json is cut or unreadable") from error
    parts = frozenset(name.removesuffix(".safetensors") for name in body["files"])
    return Checkpoint(path, body["position"], parts)


def restore(checkpoint: Checkpoint, name: str, part: Any) -> None:
    """Give a part the state it has in a checkpoint.

    Raises:
        InputError: the state does not fit the part.
    """
    try:
        part.load_state_dict(checkpoint.read(name))
    except (RuntimeError, ValueError, KeyError) as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise InputError(f"{checkpoint.path}: its {name} does not fit this one (another config?): {lines}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one stroke: readers see the old content or the new, never half."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    _write(partial, content)
    partial.replace(path)
    _sync(path.parent)


def _encode(state: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, Tensor):
        name = path.removeprefix("/") or "tensor"
        while name in tensors:  # {"a/b": ...} beside {"a": {"b": ...}}
            name += "'"
        tensors[name] = state.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(state, dict):
        for key in state:
            if type(key) not in (str, int):
                raise TypeError(f"a checkpoint's keys are str or int; {path or 'the state'} has {key!r}")
        return {"dict": [[key, _encode(value, f"{path}/{key}", tensors)] for key, value in state.items()]}
    if type(state) in (list, tuple):
        items = [_encode(value, f"{path}/{index}", tensors) for index, value in enumerate(state)]
        return items if type(state) is list else {"tuple": items}
    if type(state) is float and not math.isfinite(state):
        return {"float": repr(state)}
    if state is None or type(state) in (bool, int, float, str):
        return state
    raise TypeError(f"a checkpoint holds tensors and plain data; {path or 'the state'} is a {type(state).__name__}")


def _decode(structure: Any, file: Any) -> Any:
    if isinstance(structure, list):
        return [_decode(item, file) for item in structure]
    if not isinstance(structure, dict):
        return structure
    (kind, content), *_ = structure.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "dict":
        return {key: _decode(value, file) for key, value in content}
    return float(content) if kind == "float" else tuple(_decode(item, file) for item in content)


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)  # a rename lasts only once its folder is on disk
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
