"""Shapes and types of every public signature are checked at run time in the tests, and only there."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("foveate", "beartype.beartype")

import torch  # noqa: E402

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it skip where it is not."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _same_global_generator() -> None:
    torch.manual_seed(0)
