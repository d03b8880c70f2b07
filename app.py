"""Start the dashboard: `python app.py`, then open the address it prints."""

import os
import sys

# Before Gradio is imported: nothing is sent anywhere.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from core.errors import LayerShapError
from ui import launch
from ui.settings import AppSettings

if __name__ == "__main__":
    try:
        launch(AppSettings.read())
    except LayerShapError as error:
        sys.exit(f"layershap: {error}")
