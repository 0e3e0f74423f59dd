"""What all tests share: a CPU, one thread, and one finished run of the tiny preset."""
import os
import sys
from pathlib import Path

import pytest

# For this process and all that it starts, before torch is imported. Tiny networks gain nothing from
# more threads, and sums over another number of threads are rounded otherwise. A launch of four
# processes would ask for four GPUs, and what a GPU computes is not what a CPU does, to the bit.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import data  # noqa: E402
import stages  # noqa: E402


@pytest.fixture(autouse=True)
def gpus_where_asked(request, monkeypatch):
    """What a test that is marked gpu starts sees the GPUs; this process never does."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        if GPUS is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPUS)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Decoded videos of tests do not stay."""
    data.CACHE = tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run with all stages of both forms, trained without interruption. Not to be written to."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    for folder in stages.FOLDERS:
        stages.trained(run, folder, "--log-every", "1")
    return run
