"""The suite runs from any folder, on two threads, with Triton's interpreter where there is no GPU."""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")          # read once, when triton is first imported
torch.set_num_threads(2)
