"""Checkpoints come back bit by bit, or are passed over."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from foveate.run import checkpoints
from foveate.types import InputError

STATE = {
    "none": None,
    "flags": [True, False],
    "ints": (0, -1, 2**63, 10**30),
    "floats": [0.1, -0.0, 1e-310, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
    "text": "ünïcode \n\0",
    "by number": {0: {"step": torch.tensor(3.0)}, 17: {}},
    "a/b": torch.arange(3),
    "a": {"b": torch.tensor([True, False])},
    "empty": [(), [], {}, torch.zeros(0, 4), ""],
    "halves": torch.randn(5, 3).bfloat16(),
    "doubles": torch.randn(3, dtype=torch.float64),
    "not finite": torch.tensor([math.nan, math.inf, -0.0]),
    "strided": torch.randn(4, 6).t()[1:, ::2],
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "bytes": torch.randint(0, 256, (7,), dtype=torch.uint8),
}


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and torch.equal(_bytes(one), _bytes(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(
            type(a) is type(b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write(folder: Path, name: str, **parts: Any) -> Path:
    partial = folder / f"{checkpoints.PARTIAL}{name}"
    checkpoints.begin(partial)
    for part, state in parts.items():
        checkpoints.write_part(partial, part, state)
    return checkpoints.finish(partial, {"name": name, "seconds": 0.1})


def test_any_state_comes_back_exactly(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", "0-00000001", part=STATE, scalar=torch.tensor(2), plain=7)
    found = checkpoints.newest(tmp_path / "checkpoints", pytest.fail)
    assert found is not None
    assert found.position == {"name": "0-00000001", "seconds": 0.1}
    assert found.parts == {"part", "scalar", "plain"}
    assert same(found.read("part"), STATE)
    assert same(found.read("scalar"), torch.tensor(2))
    assert found.read("plain") == 7
    with pytest.raises(KeyError):
        found.read("state")


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_comes_back_exactly(tmp_path: Path, make: Any) -> None:
    net = nn.Linear(3, 2)
    optimizer = make(net.parameters(), lr=torch.pi / 1000)
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    write(tmp_path / "c", "0-1", optimizer=optimizer.state_dict())
    found = checkpoints.newest(tmp_path / "c", pytest.fail)
    assert found is not None
    other = make(net.parameters(), lr=1.0)
    checkpoints.restore(found, "optimizer", other)
    assert same(other.state_dict(), optimizer.state_dict())


def test_others_can_read_a_module(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight = nn.Parameter(torch.randn(4, 4))  # tied
    path = write(tmp_path / "c", "0-1", net=net.state_dict())
    read = load_file(path / "net.safetensors")
    assert same(dict(sorted(read.items())), dict(sorted(net.state_dict().items())))


def test_a_saved_state_is_a_copy(tmp_path: Path) -> None:
    path = write(tmp_path / "c", "0-1", part={"a": (tensor := torch.zeros(2))})
    tensor += 1
    assert checkpoints.read_part(path, "part")["a"].sum() == 0


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"deep": [1, {"er": object()}]}, "/deep/1/er is a object"),
        ({"set": {1}}, "/set is a set"),
        ({"shape": torch.Size([1])}, "/shape is a Size"),
        ({1.5: 2}, "1.5"),
        ({"x": {True: 2}}, "/x has True"),
    ],
)
def test_what_would_need_pickle_is_refused(tmp_path: Path, state: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        write(tmp_path / "c", "0-1", part=state)
    assert checkpoints.newest(tmp_path / "c", pytest.fail) is None


def test_a_state_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "c", "0-1", net=nn.Linear(3, 2).state_dict())
    found = checkpoints.newest(tmp_path / "c", pytest.fail)
    assert found is not None
    with pytest.raises(InputError, match=r"net does not fit this one .* size mismatch") as caught:
        checkpoints.restore(found, "net", nn.Linear(3, 4))
    assert "\n" not in str(caught.value)


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_halve, _empty, _flip, Path.unlink])
@pytest.mark.parametrize("file", ["part.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: Any, file: str) -> None:
    folder = tmp_path / "checkpoints"
    first, second = (write(folder, f"0-{step:08d}", part={"step": step}) for step in (9, 10))
    damage(second / file)
    passed: list[Path] = []
    found = checkpoints.newest(folder, lambda path, error: passed.append(path))
    assert found is not None
    assert (found.path, found.read("part"), passed) == (first, {"step": 9}, [second])
    checkpoints.drop_after(folder, found)
    assert checkpoints.listed(folder) == [first]


def test_a_number_that_was_edited_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "c", "0-1", part=1)
    record = json.loads((path / "state.json").read_text())
    record["position"]["seconds"] = 0.2
    (path / "state.json").write_text(json.dumps(record))
    with pytest.raises(checkpoints.Damaged, match="altered"):
        checkpoints.verify(path)


def test_the_last_two_are_kept_in_the_order_of_phases_and_steps(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    for name in ("0-00000005", "0-00000010", "0-100000000", "1-00000000", "1-00000000", "10-00000003"):
        latest = write(folder, name, part=name)
        assert checkpoints.listed(folder)[-1] == latest
    assert [path.name for path in checkpoints.listed(folder)] == ["1-00000000-2", "10-00000003"]


def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "c"
    first = write(folder, "0-1", part=1)
    for failing in range(5):  # two files, the folder, the folder above: wherever it strikes
        calls = iter(range(100))

        def full(handle: int, failing: int = failing, calls: Any = calls) -> None:
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            if failing < 4:
                with pytest.raises(OSError, match="No space"):
                    write(folder, f"0-{failing + 2}", part=failing)
        found = checkpoints.newest(folder, pytest.fail)
        assert found is not None
        assert found.path == first or failing >= 3  # sealed and renamed before the last call
    write(folder, "0-9", part=1)
    assert not list(folder.glob(f"{checkpoints.PARTIAL}*"))


def test_a_half_written_one_is_never_listed(tmp_path: Path) -> None:
    partial = tmp_path / "c" / f"{checkpoints.PARTIAL}0-1"
    (tmp_path / "c").mkdir()
    checkpoints.begin(partial)
    checkpoints.write_part(partial, "part", STATE)
    assert checkpoints.listed(tmp_path / "c") == []
    assert checkpoints.newest(tmp_path / "c", pytest.fail) is None
