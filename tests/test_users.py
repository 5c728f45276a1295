"""A model of the user's: what is wrong with the function that makes it is one line that names the line of its file."""

from pathlib import Path

import pytest
from torch import nn

from foveate.models.adapters import named
from foveate.models.dense import dense_network
from foveate.models.named_captioners import named_captioner
from foveate.models.users import made_by
from foveate.types import InputError

FILE = """
import torch

def linear(size):
    return torch.nn.Linear(size, 2)

def raises():
    return torch.zeros(2) + torch.zeros(3)

def without_weights(*arguments):
    raise FileNotFoundError(2, "No such file", "/models/best.pt")

def without_a_field():
    return torch.nn.Linear(2, 2).nonsense

seven = 7
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"mine_{tmp_path.name}"  # another each time: what is imported stays
    (tmp_path / f"{name}.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_function_is_given_its_arguments(mine: str) -> None:
    assert isinstance(made_by(f"{mine}:linear", "words", 3), nn.Linear)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            "linear",
            r"called as linear\(\), raises TypeError: .*missing 1 required positional argument: 'size'; correct",
        ),
        ("raises", r"raises RuntimeError: The size of .*\.py, line 8\); correct it"),
        ("without_weights", r"raises FileNotFoundError: .*/models/best\.pt.*\.py, line 11\)"),
        ("without_a_field", r"raises AttributeError: .*nonsense.*\.py, line 14\)"),
        ("seven", r"raises TypeError: 'int' object is not callable; correct it"),
        ("nothing", r"is not found .*; expected words; is it on PYTHONPATH\?"),
    ],
)
def test_what_it_raises_is_told_with_its_line(mine: str, function: str, said: str) -> None:
    with pytest.raises(InputError, match=f"^model: .*{function}.*{said}") as found:
        made_by(f"{mine}:{function}", "words")
    assert "\n" not in str(found.value)


def test_a_module_that_cannot_be_read_is_told_with_its_line(mine: str, tmp_path: Path) -> None:
    (tmp_path / f"{mine}_cut.py").write_text("def build(:\n")
    with pytest.raises(InputError, match=rf"as {mine}_cut raises SyntaxError: .*{mine}_cut\.py, line 1\); correct it$"):
        made_by(f"{mine}_cut:build", "words")
    (tmp_path / f"{mine}_odd.py").write_text("\nsize = widht\n")
    with pytest.raises(InputError, match=rf"NameError: .*widht.* \(.*{mine}_odd\.py, line 2\)"):
        made_by(f"{mine}_odd:build", "words")


def test_detectors_segmenters_and_captioners_say_so(mine: str) -> None:
    sizes = {"side": 8, "patch": 4, "vocabulary": 8, "width": 8, "depth": 1, "heads": 1}
    for make in (
        lambda name: named(name, 3),
        lambda name: dense_network(name, 1),
        lambda name: named_captioner(name, None, "", **sizes),
    ):
        with pytest.raises(InputError, match=r"^model: .*without_weights.*, line 11"):
            make(f"{mine}:without_weights")
