"""What attackers send, and a watch over what the app does with it."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from core.errors import LayerShapError
from ui import status

MARKUP = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(2)</script>",
    '"><svg onload=alert(3)>',
    "<a href='javascript:alert(4)'>a</a>",
    "[x](javascript:alert(5))",
)
RAW = ("<img src=x", "<script>alert", "<svg onload", "<a href='javascript")
PATHS = (
    "/etc/passwd",
    "/etc",
    "../../etc",
    "../../../../../../etc/passwd",
    "a/b/../..",
    "owner/../../etc",
    "file:///etc/passwd",
    "~",
    "~root/.ssh/id_rsa",
    "~nobody-there",
    "core",
    "bundled/..",
    "./bundled",
    "..",
    "C:\\Windows",
    "a\0b",
    "x" * 5000,
)
ODD = (
    "",
    " ",
    "\ud800",
    "\u202e",
    "9" * 5000,
    "-1",
    "1e999",
    "nan",
    "{{7*7}}",
    "${7*7}",
    "'; DROP TABLE Cache; --",
    "\n",
    "1, 2\n3",
    "1a",
    "٣",
)
HOSTILE_TEXTS = st.one_of(
    st.sampled_from((*MARKUP, *PATHS, *ODD)),
    st.text(max_size=40),
    st.text("0123456789,am- ", max_size=8),
)
HOSTILE_NUMBERS = st.one_of(
    st.sampled_from(
        (None, -1, 0, 0.5, float("nan"), float("inf"), -float("inf"), 1e308, 10**30, -(2**63))
    ),
    st.integers(1, 9),
)

# Every run tries the same cases.
CASES = settings(
    derandomize=True,
    # A failure is shown as it was found: making it smaller would take minutes.
    phases=(Phase.explicit, Phase.generate),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

HOME = Path(__file__).resolve().parent.parent
# What Python and the libraries read for themselves.
READABLE = (
    *{str(HOME), sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)},
    "/proc",
    "/sys",
    "/dev",
    "/usr",
    "/lib",
)
WRITING = ("w", "a", "x", "+")


class Watch:
    """Files opened outside the app's folders, pickles loaded, programs started, and failures that
    no handler foresaw; `seen` is empty where all is well."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.writable: tuple[str, ...] = ()
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in ("pickle.find_class", "subprocess.Popen", "os.system"):
            self.seen.append((event, repr(arguments)[:200]))
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, mode, flags = arguments
            path = str(Path(path.decode() if isinstance(path, bytes) else path).absolute())
            writes = any(letter in (mode or "") for letter in WRITING) or bool((flags or 0) & 3)
            allowed = self.writable if writes else (*self.writable, *READABLE)
            if path != "/dev/null" and not path.startswith(allowed):
                self.seen.append(("writes" if writes else "reads", path))

    @contextmanager
    def watching(self, *folders: Path) -> Iterator[list[tuple[str, str]]]:
        """Watch what happens inside; the app's own folders are `folders` and Gradio's cache."""
        self.writable = (str(Path(tempfile.gettempdir()) / "gradio"), *map(str, folders))
        log = status.logger.exception
        status.logger.exception = self._unforeseen
        self.seen, self.on = [], True
        try:
            yield self.seen
        finally:
            self.on = False
            status.logger.exception = log

    def _unforeseen(self, *_: Any) -> None:
        self.seen.append(("not foreseen", repr(sys.exception())[:500]))


WATCH = Watch()


class Refused(Exception):
    """Gradio itself does not take a value."""


def handlers(page: gr.Blocks) -> dict[str, Any]:
    """Everything that the page can be asked, whether or not its API shows it, by name."""
    distinct = {
        (function.fn, *function.inputs): function
        for function in page.fns.values()
        if function.fn is not None
    }
    return {
        f"{function.api_name or function.name}-{number}": function
        for number, function in enumerate(distinct.values())
    }


def ask(function: Any, payloads: dict[Any, Any]) -> list[dict]:
    """Call a handler as Gradio does: values through each component, then what it answers.

    `payloads` holds a value per input component; files and states are given as they are.

    Raises:
        Refused: a component does not take its value.
    """
    values = []
    for component in function.inputs:
        value = payloads[component]
        if not isinstance(component, gr.State | gr.File):
            try:
                value = component.preprocess(value)
            except Exception as error:
                raise Refused from error
        values.append(value)
    parameters = inspect.signature(function.fn).parameters
    if "request" in parameters:
        asked = {"view": "<script>", "study": "../../etc/passwd", "drop": "13, <b>"}
        values.append(SimpleNamespace(session_hash="siege", query_params=asked))
    if "event" in parameters:
        values.append(SimpleNamespace(_data=payloads["event"], index=payloads["event"]))
    answer = function.fn(*values)
    try:
        steps = list(answer) if inspect.isgenerator(answer) else [answer]
    except gr.Error as error:
        # Programs are told what is wrong by the error that their call ends with.
        if not isinstance(error.__cause__, LayerShapError):
            raise
        return []
    return [_by_component(step, function.outputs) for step in steps]


def _by_component(step: Any, outputs: list) -> dict:
    if isinstance(step, dict) and all(not isinstance(key, str) for key in step):
        return step
    return dict(zip(outputs, step if len(outputs) > 1 else [step], strict=False))


def shown(step: dict) -> str:
    """All that a step would put on the page as markup: HTML, Markdown and what Plotly renders."""
    parts = []
    for component, value in step.items():
        if isinstance(value, dict) and value.get("__type__") == "update":
            value = value.get("value")
        if isinstance(component, gr.HTML | gr.Markdown):
            parts.append(str(value))
        elif isinstance(component, gr.Plot) and hasattr(value, "to_json"):
            parts.append(value.to_json())
    return "\n".join(parts)


def payload(component: Any) -> st.SearchStrategy:
    """Values that an attacker may send for a component, with some that it takes."""
    if isinstance(component, gr.Radio | gr.Dropdown):
        choices = [value for _, value in component.choices]
        usual = st.sampled_from(choices) if choices else st.none()
        return st.integers(0, 19).flatmap(
            lambda chance: {0: HOSTILE_TEXTS, 1: st.none()}.get(chance, usual)
        )
    if isinstance(component, gr.CheckboxGroup):
        return st.lists(st.sampled_from([value for _, value in component.choices]), max_size=2)
    if isinstance(component, gr.Checkbox):
        return st.booleans()
    if isinstance(component, gr.Slider):
        return st.integers(0, 9).flatmap(
            lambda chance: HOSTILE_NUMBERS if not chance else st.just(component.minimum)
        )
    if isinstance(component, gr.Number):
        return HOSTILE_NUMBERS
    if isinstance(component, gr.JSON):
        return st.lists(st.integers(0, 9)) | st.lists(HOSTILE_NUMBERS | HOSTILE_TEXTS) | st.none()
    return st.one_of(st.none(), HOSTILE_TEXTS)
