"""What the linter cannot look for, since the shapes in signatures look like names to it."""

from __future__ import annotations

import builtins
import dis
import importlib
import pkgutil
from collections.abc import Iterator
from types import CodeType

import pytest

import foveate


def names(code: CodeType, *operations: str) -> Iterator[str]:
    """What these operations name in the code of a module, or of what is defined in it."""
    for step in dis.get_instructions(code):
        if step.opname in operations:
            yield str(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names(constant, *operations)


def missing(source: str, there: set[str]) -> set[str]:
    """Names that are read when the code runs and that nothing defines; names of class bodies count as defined."""
    code = compile(source, "module", "exec", dont_inherit=True)
    read, bound = names(code, "LOAD_GLOBAL", "LOAD_NAME"), names(code, "STORE_NAME", "STORE_GLOBAL")
    return set(read) - there - set(dir(builtins)) - set(bound)


@pytest.mark.parametrize("name", [one.name for one in pkgutil.walk_packages(foveate.__path__, "foveate.")])
def test_every_name_that_is_looked_up_is_there(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    source = spec.loader.get_source(name)  # type: ignore[attr-defined]
    assert missing(source, {"__annotations__", "__file__", "__path__", "__name__", "__doc__"}) == set()


def test_a_missing_import_is_found() -> None:
    source = """
from __future__ import annotations
def one(x: Float[Tensor, "batch"]) -> int:
    return map_tree(len, x)
"""
    assert missing(source, set()) == {"map_tree"}
