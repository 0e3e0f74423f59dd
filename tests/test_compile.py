"""torch.compile of blocks whose sizes vary: chunk counts differ from update to update."""
import shutil

import pytest

import updates
from config import parse_config
from distributed import generator
from stages import flags_of, linked, rows, trained

COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ("--seed", "1", "--steps", "2", "--guidance", "1", "--batch-size", "2", "--log-every", "1")


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("stage", ["causal-flowmap"])
def test_chunk_counts_may_vary(finished, tmp_path, stage):
    """Compiled with symbolic sizes this ended in an InductorError; with static ones the losses are
    those of eager."""
    run = linked(finished, tmp_path / "plain", stage)
    c = parse_config(flags_of(run, stage, *FLAGS))
    draws = [generator(c.seed, 10**7 + step, "chunks") for step in range(2)]
    counts = {len(updates.draw_chunks(c, 4, draw)[0]) for draw in draws}
    assert len(counts) == 2
    plain = trained(run, stage, *FLAGS)
    compiled = trained(linked(finished, tmp_path / "compiled", stage), stage, *FLAGS, "--compile")
    for a, b in zip(rows(compiled), rows(plain), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
