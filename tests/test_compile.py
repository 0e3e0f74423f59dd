"""torch.compile of blocks whose sizes vary: chunk counts differ from update to update."""
import shutil

import pytest

import updates
from config import STAGES, parse_config
from distributed import generator
from stages import flags_of, linked, rows, trained

COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ("--steps", "2", "--guidance", "1", "--batch-size", "2", "--log-every", "1")


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("stage, seed", [("pretrain", 0), ("causal-flowmap", 1),
                                         ("causal-distill", 0)])
def test_chunk_counts_may_vary(finished, tmp_path, stage, seed):
    """Compiled with symbolic sizes this ended in an InductorError; with static ones the losses are
    those of eager. Not DMD's, which at the start is a difference of rounded equals."""
    flags, run = (*FLAGS, "--seed", str(seed)), linked(finished, tmp_path / "plain", stage)
    c = parse_config(flags_of(run, stage, *flags))
    first = 10**7 * STAGES.index(c.stage)
    draws = [generator(c.seed, first + step, "chunks") for step in range(2)]
    assert len({len(updates.draw_chunks(c, 4, draw)[0]) for draw in draws}) == 1 + c.causal
    plain = trained(run, stage, *flags)
    compiled = trained(linked(finished, tmp_path / "compiled", stage), stage, *flags, "--compile")
    for a, b in zip(rows(compiled), rows(plain), strict=True):
        for name in {"loss", "fake"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4)
