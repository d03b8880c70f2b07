"""What one visitor has on screen; every browser tab has its own."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from core.analysis import Analysis
from core.errors import LayerShapError
from core.masks import leave_out
from core.methods import MethodsComparison
from core.models import BUNDLED, ModelInfo
from core.players import Players
from core.study import Comparison, Study, TextInfo
from ui.workspace import Workspace


@dataclass(frozen=True)
class Session:
    """A visitor's model, results and selection; `workspace` is None for an opened study.

    `origin` is the study that the analysis was read from, if it was; it says what measured it.
    `study_id` names the study in the page's address.

    On the page the selection, the sets tried and the methods compared are states of their own,
    because clicks and measurements go on while an analysis writes its results; handlers put them
    together.
    """

    workspace: Workspace | None = None
    model: ModelInfo | None = None
    text: TextInfo | None = None
    analysis: Analysis | None = None
    comparisons: tuple[Comparison, ...] = ()
    methods: MethodsComparison | None = None
    dropped: tuple[int, ...] = ()
    origin: Study | None = None
    study_id: str | None = None

    def __deepcopy__(self, memo: dict) -> Session:
        """Gradio gives every visitor a copy of a state; nothing here ever changes."""
        return self

    @classmethod
    def of_workspace(cls, workspace: Workspace) -> Session:
        return cls(workspace=workspace, model=workspace.model.info, text=workspace.text_info)

    @classmethod
    def of_study(cls, study: Study, study_id: str | None = None) -> Session:
        return cls(
            model=study.model,
            text=study.text,
            analysis=study.analysis,
            comparisons=study.comparisons,
            methods=study.methods,
            origin=study,
            study_id=study_id,
        )

    def fits(self, workspace: Workspace) -> bool:
        """Whether the analysis is of this model, text and kind of players."""
        return (
            self.analysis is not None
            and self.model is not None
            and self.text is not None
            and _same_weights(self.model, workspace.model.info)
            and self.text == workspace.text_info
            and self.players == workspace.calibration.players
        )

    def analysed(self, analysis: Analysis) -> Session:
        """The same session with results of its own."""
        return replace(self, analysis=analysis, origin=None, study_id=None)

    @property
    def n_layers(self) -> int:
        return self.model.n_layers if self.model else 0

    @property
    def players(self) -> Players:
        """What can be dropped: layers, or parts of them."""
        if self.workspace is not None:
            return self.workspace.calibration.players
        return self.analysis.players if self.analysis else Players("blocks", self.n_layers)

    @property
    def keep(self) -> NDArray[np.bool_]:
        """The selection as a mask, bool [players]."""
        return leave_out(self.players.count, self.dropped)

    def dropping(self, players: tuple[int, ...]) -> Session:
        """The same session with another selection.

        Raises:
            LayerShapError: a layer that this model does not have.
        """
        leave_out(self.players.count, players)
        return replace(self, dropped=tuple(sorted(set(players))))

    def with_findings(
        self, comparisons: tuple[Comparison, ...], methods: MethodsComparison | None
    ) -> Session:
        """The same session with these sets tried and methods compared."""
        return replace(self, comparisons=comparisons, methods=methods)

    def need_workspace(self) -> Workspace:
        if self.workspace is None:
            raise LayerShapError(
                "This needs the model itself: load it in Set-up (a study opened from a file shows "
                "charts and predictions only)."
                if self.model
                else "Load a model first, in Set-up."
            )
        return self.workspace

    def need_analysis(self) -> Analysis:
        if self.analysis is None:
            raise LayerShapError("Run the analysis first, or open a saved study.")
        return self.analysis

    def study(self) -> Study:
        analysis = self.need_analysis()
        assert self.model is not None
        assert self.text is not None
        if self.origin is not None:
            return replace(self.origin, comparisons=self.comparisons, methods=self.methods)
        parameters = self.need_workspace().model.player_parameters(self.players.kind)
        return Study(analysis, self.model, self.text, self.comparisons, parameters, self.methods)


def _same_weights(measured: ModelInfo, loaded: ModelInfo) -> bool:
    """The bundled weights are known by their checksum, whatever number format they run in."""
    return measured.fingerprint == loaded.fingerprint or measured.source == loaded.source == BUNDLED


class StopSignals:
    """One stop signal per browser tab."""

    def __init__(self) -> None:
        # Forgotten with the work that listens to it.
        self._events: WeakValueDictionary[str, threading.Event] = WeakValueDictionary()
        self._lock = threading.Lock()

    def begin(self, session_hash: str | None) -> threading.Event:
        """A fresh signal for work that starts now."""
        event = threading.Event()
        with self._lock:
            self._events[session_hash or ""] = event
        return event

    def stop(self, session_hash: str | None) -> bool:
        """Stop that tab's work; False if it has none."""
        with self._lock:
            event = self._events.pop(session_hash or "", None)
        if event is None:
            return False
        event.set()
        return True
