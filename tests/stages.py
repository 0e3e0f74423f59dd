"""All three stages in one launch, for tests on several processes: torchrun ... tests/stages.py FLAGS"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import distributed  # noqa: E402
import train  # noqa: E402

for stage in train.STAGES:
    train.main(["--stage", stage, *sys.argv[1:]])
distributed.stop()
