"""Test set-up that must precede every import: Triton's interpreter, the folder on the path, a cache, a name clash."""
import getpass
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; Triton reads it when it is first imported

# torch.compile takes from its cache what was compiled for another instruction set; here that would be wrong numbers and crashes.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "_".join(
    ["torchinductor", getpass.getuser(), torch.backends.cpu.get_cpu_capability().replace(" ", "_")])))

found = importlib.util.find_spec("kernels")
if found is None or Path(found.origin).parent != ROOT / "kernels":
    raise RuntimeError("another package named `kernels` hides this project's (transformers offers it as an extra); "
                       "pip uninstall kernels, then run the tests again")
