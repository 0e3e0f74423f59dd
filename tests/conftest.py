import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")        # for what tests start, too: tiny networks gain nothing from more
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
