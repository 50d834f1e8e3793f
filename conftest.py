"""Test set-up that must precede every import: the project's folder on the path, and one sentence about a name clash."""
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

found = importlib.util.find_spec("kernels")
if found is None or Path(found.origin).parent != ROOT / "kernels":
    raise RuntimeError("another package named `kernels` hides this project's (transformers offers it as an extra); "
                       "pip uninstall kernels, then run the tests again")
