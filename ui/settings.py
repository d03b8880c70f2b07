"""How the dashboard runs: from command-line flags and the environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.errors import LayerShapError
from core.models import BUNDLED
from core.text import SHORTHANDS, WIKITEXT

DEFAULT_PORT = 7860


@dataclass(frozen=True)
class AppSettings:
    """Where the dashboard listens and what its visitors may do.

    Attributes:
        allowed_models: model sources visitors may load; None allows any, local folders included.
        allowed_data_sets: data sets visitors may name where `allowed_models` is set.
        max_evaluations: the largest budget one analysis may ask for.
        max_upload_mb: the largest file a visitor may send.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    share: bool = False
    allowed_models: tuple[str, ...] | None = None
    allowed_data_sets: tuple[str, ...] = (WIKITEXT,)
    max_evaluations: int = 20_000
    max_upload_mb: int = 64

    @classmethod
    def read(
        cls, arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
    ) -> AppSettings:
        """Settings from flags, then LAYERSHAP_* variables, then defaults.

        On a Hugging Face Space only the bundled model may be loaded unless its owner lists others.

        Raises:
            LayerShapError: a variable that should be a number is not.
        """
        on_space = "SPACE_ID" in environment
        parser = argparse.ArgumentParser(
            prog="app.py", description="LayerShap: see what each layer of a language model is worth"
        )
        parser.add_argument(
            "--host",
            default=environment.get("LAYERSHAP_HOST", "0.0.0.0" if on_space else "127.0.0.1"),
            help="address to listen on (127.0.0.1: this machine only)",
        )
        parser.add_argument(
            "--port", type=int, default=_whole(environment, "LAYERSHAP_PORT", DEFAULT_PORT)
        )
        parser.add_argument(
            "--share", action="store_true", help="make a public link through Gradio"
        )
        options = parser.parse_args(arguments)
        closed = on_space or options.share
        return cls(
            host=options.host,
            port=options.port,
            share=options.share,
            allowed_models=_listed(
                environment, "LAYERSHAP_ALLOWED_MODELS", (BUNDLED,) if closed else None
            ),
            allowed_data_sets=_listed(
                environment, "LAYERSHAP_ALLOWED_DATA_SETS", cls.allowed_data_sets
            ),
            max_evaluations=_whole(environment, "LAYERSHAP_MAX_EVALUATIONS", cls.max_evaluations),
            max_upload_mb=_whole(environment, "LAYERSHAP_MAX_UPLOAD_MB", cls.max_upload_mb),
        )

    def allows(self, source: str) -> bool:
        """Whether visitors may load this model."""
        return self.allowed_models is None or source in self.allowed_models

    def check_model(self, source: str) -> None:
        """Raises LayerShapError where visitors may not load this model."""
        if not self.allows(source):
            raise LayerShapError(
                "This dashboard's owner allows only these models: "
                f"{', '.join(self.allowed_models or ())}."
            )

    def check_data_set(self, name: str) -> None:
        """Raises LayerShapError where visitors may not read this data set: it would be fetched
        under the owner's login and onto the owner's disk."""
        if not self.local_files and SHORTHANDS.get(name.lower(), name) not in {
            SHORTHANDS.get(allowed.lower(), allowed) for allowed in self.allowed_data_sets
        }:
            raise LayerShapError(
                "This dashboard's owner allows only these data sets: "
                f"{', '.join(self.allowed_data_sets)}."
            )

    def check_may_change_machine(self) -> None:
        """Raises LayerShapError where visitors may not leave anything on this machine, or take
        anything away from it."""
        if not self.local_files:
            raise LayerShapError(
                "This is possible only where LayerShap runs on your own machine: this dashboard is "
                "shared with others. Download the study, or take the mergekit recipe."
            )

    @property
    def local_files(self) -> bool:
        """Whether visitors may name folders and files of this machine."""
        return self.allowed_models is None


def _listed(
    environment: Mapping[str, str], name: str, default: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    value = environment.get(name)
    if value is None:
        return default
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _whole(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name)
    if value is None:
        return default
    if not value.strip().isdigit():
        raise LayerShapError(f"{name} is {value!r}; it must be a whole number.")
    return int(value)
