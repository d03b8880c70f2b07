"""How the dashboard runs: from command-line flags and the environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.errors import LayerShapError
from core.models import BUNDLED
from core.text import BUNDLED as BUNDLED_TEXT
from core.text import SHORTHANDS, WIKITEXT

DEFAULT_PORT = 7860
YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class AppSettings:
    """Where the dashboard listens and what its visitors may do.

    Attributes:
        allowed_models: model sources visitors may load; None allows any, local folders included.
        allowed_data_sets: data sets visitors may name where `allowed_models` is set.
        max_evaluations: the largest budget one analysis may ask for.
        max_upload_mb: the largest file a visitor may send.
        queue_size: jobs that may wait at once, None for any number; who comes later is told so.
        quick_jobs: jobs of one kind that run at once, where they do not use the whole machine.
        read_only: visitors save nothing on this machine and push nothing.
        mcp: the stateless endpoints are offered as tools over the Model Context Protocol too.
        zero_gpu: evaluations borrow a GPU from Hugging Face ZeroGPU.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    share: bool = False
    allowed_models: tuple[str, ...] | None = None
    allowed_data_sets: tuple[str, ...] = (WIKITEXT,)
    max_evaluations: int = 20_000
    max_upload_mb: int = 64
    queue_size: int | None = None
    quick_jobs: int = 8
    read_only: bool = False
    mcp: bool = False
    zero_gpu: bool = False

    @classmethod
    def read(
        cls, arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
    ) -> AppSettings:
        """Settings from flags, then LAYERSHAP_* variables, then defaults.

        On a Hugging Face Space only the bundled model may be loaded unless its owner lists others.

        Raises:
            LayerShapError: a variable that should be a number or a switch is not.
        """
        on_space = "SPACE_ID" in environment
        parser = argparse.ArgumentParser(
            prog="app.py", description="LayerShap: see what each layer of a language model is worth"
        )
        parser.add_argument(
            "--host",
            default=environment.get(
                "LAYERSHAP_HOST",
                environment.get("GRADIO_SERVER_NAME", "0.0.0.0" if on_space else "127.0.0.1"),
            ),
            help="address to listen on (127.0.0.1: this machine only)",
        )
        parser.add_argument(
            "--port",
            type=int,
            default=_whole(
                environment,
                "LAYERSHAP_PORT",
                _whole(environment, "GRADIO_SERVER_PORT", DEFAULT_PORT),
            ),
        )
        parser.add_argument(
            "--share", action="store_true", help="make a public link through Gradio"
        )
        parser.add_argument(
            "--mcp",
            action="store_true",
            default=_switch(environment, "LAYERSHAP_MCP"),
            help="offer the API as tools over the Model Context Protocol (needs the mcp package)",
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
            queue_size=_whole(environment, "LAYERSHAP_QUEUE_SIZE", cls.queue_size, least=1),
            quick_jobs=_whole(environment, "LAYERSHAP_QUICK_JOBS", cls.quick_jobs, least=1),
            read_only=_switch(environment, "LAYERSHAP_READ_ONLY"),
            mcp=options.mcp,
            zero_gpu=_switch(environment, "SPACES_ZERO_GPU"),
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
        if name == BUNDLED_TEXT or self.local_files:
            return
        if SHORTHANDS.get(name.lower(), name) not in {
            SHORTHANDS.get(allowed.lower(), allowed) for allowed in self.allowed_data_sets
        }:
            raise LayerShapError(
                "This dashboard's owner allows only these data sets: "
                f"{', '.join(self.allowed_data_sets)}."
            )

    @property
    def may_write(self) -> bool:
        """Whether visitors may leave anything on this machine, or take anything away from it."""
        return self.local_files and not self.read_only

    def check_may_write(self) -> None:
        """Raises LayerShapError where visitors may not."""
        if self.read_only:
            raise LayerShapError(
                "This dashboard is read-only: nothing is saved, pushed or cleared here. Run "
                "LayerShap on your own machine to keep a model."
            )
        if not self.may_write:
            raise LayerShapError(
                "This is possible only where LayerShap runs on your own machine: this dashboard is "
                "shared with others. Download the study, or take the mergekit recipe."
            )

    def check_evaluations(self, count: int) -> None:
        """Raises LayerShapError where one analysis may not ask for so many."""
        if count > self.max_evaluations:
            raise LayerShapError(
                f"Evaluations is {count}; this dashboard allows at most {self.max_evaluations}."
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


def _whole(
    environment: Mapping[str, str], name: str, default: int | None, least: int = 0
) -> int | None:
    value = environment.get(name)
    if value is None:
        return default
    if not value.strip().isdigit() or int(value) < least:
        above = f" of {least} or more" if least else ""
        raise LayerShapError(f"{name} is {value!r}; it must be a whole number{above}.")
    return int(value)


def _switch(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "").strip().lower()
    if value not in YES + NO:
        raise LayerShapError(f"{name} is {environment[name]!r}; it must be 1 or 0.")
    return value in YES
