"""Start the dashboard: `python app.py`, then open the address it prints."""

import os
import sys

# Before Gradio is imported: nothing is sent anywhere.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Gradio sums up all events it remembers after each one; by default that is ten thousand.
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "200")
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "100")
# Before PyTorch is: requests run in many threads, each with its own OpenMP team, and idle teams
# that spin take the cores from the one that works.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before PyTorch is, too: on ZeroGPU this package takes CUDA over.
if "SPACES_ZERO_GPU" in os.environ:
    import spaces  # noqa: F401

from core.allocator import keep_freed_memory
from core.errors import LayerShapError
from ui import launch
from ui.settings import AppSettings

if __name__ == "__main__":
    keep_freed_memory()
    try:
        launch(AppSettings.read())
    except LayerShapError as error:
        sys.exit(f"layershap: {error}")
