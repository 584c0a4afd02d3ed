"""The suite runs from any folder, with Triton's interpreter where there is no GPU, on two threads: of several workers
(-n) each takes its share of the cores, and so do the programs that it starts."""
import os
import sys
from pathlib import Path

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
threads = 2 if workers == 1 else max(1, (os.cpu_count() or 2) // workers)
os.environ.setdefault("OMP_NUM_THREADS", str(threads))              # of the programs; read when torch is imported

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")          # read once, when triton is first imported
torch.set_num_threads(threads)
