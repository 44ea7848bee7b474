"""What all test files share: the repository's root on the path, the mark `slow`, where third-party files may lie."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"             # real data and checkpoints, when present beside the checkout
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs when CI is set in the environment, or with -m slow")


def pytest_collection_modifyitems(config, items):
    if os.environ.get("CI") or "slow" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: set CI=1 or give -m slow"))


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED
