"""The dashboard: views over the engine, one module each, wired together here."""

from ui.page import build, launch

__all__ = ["build", "launch"]
