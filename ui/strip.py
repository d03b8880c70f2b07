"""The layer strip: a button per player, in depth order, that says what it is worth and toggles it.

Of attention and MLP apart, those of one layer stand together. A click changes the button at once,
in the browser; the server is told what is dropped now.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np

from ui.figures.style import number
from ui.session import Session

TEMPLATE = """
<div class="ls-strip" role="group" aria-label="Layers: press to drop or keep">
${value.layers.map((parts) => '<div class="ls-layer">' + parts.map((p) =>
  '<button type="button" class="ls-player' + (dropped.includes(p.player) ? ' ls-dropped' : '') + '"'
  + ' data-player="' + p.player + '"'
  + ' aria-pressed="' + dropped.includes(p.player) + '"'
  + ' aria-label="' + p.name
  + (dropped.includes(p.player) ? ', dropped' : ', kept') + p.about + '"'
  + ' title="' + p.name + p.about + '"'
  + ' tabindex="' + (p.player === 0 ? 0 : -1) + '"'
  + ' style="--level:' + p.level + '">' + p.label + '</button>').join('') + '</div>').join('')}
</div>
<p class="ls-strip-empty">${value.layers.length ? '' : 'Load a model to see its layers here.'}</p>
"""

# Roving tabindex: one stop for Tab, arrow keys inside (WAI-ARIA toolbar pattern).
SCRIPT = """
let focused = 0;
let held = false;
const buttons = () => Array.from(element.querySelectorAll('.ls-player'));
const numberOf = (button) => Number(button.dataset.player);
const focusOn = (index) => {
  const all = buttons();
  if (!all.length) return;
  focused = Math.max(0, Math.min(all.length - 1, index));
  all.forEach((b, i) => { b.tabIndex = i === focused ? 0 : -1; });
  all[focused].focus();
};
const choose = (after) => {
  props.dropped = [...after].sort((a, b) => a - b);
  LayerShap.useDropped(props.dropped);
  remember();
  trigger('select');
};
const toggle = (player) => choose(
  props.dropped.includes(player)
    ? props.dropped.filter((other) => other !== player)
    : [...props.dropped, player]
);
const remember = () => {
  const labels = {};
  for (const part of props.value.layers.flat()) labels[part.player] = part.label;
  LayerShap.remember({
    study: props.value.study,
    drop: props.dropped.map((player) => labels[player]).join(','),
  });
};
const mark = (players) => buttons().forEach(
  (b) => b.classList.toggle('ls-marked', players.includes(numberOf(b)))
);
LayerShap.useStrip({ choose, toggle, mark });
element.addEventListener('click', (event) => {
  const button = event.target.closest('.ls-player');
  if (!button) return;
  held = true;
  focused = buttons().indexOf(button);
  toggle(numberOf(button));
  requestAnimationFrame(() => focusOn(focused));
});
element.addEventListener('keydown', (event) => {
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  if (event.key in steps) focusOn(focused + steps[event.key]);
  else if (event.key === 'Home') focusOn(0);
  else if (event.key === 'End') focusOn(buttons().length - 1);
  else return;
  event.preventDefault();
});
const markAt = (event) => {
  const button = event.target.closest('.ls-player');
  LayerShap.mark(button ? [numberOf(button)] : []);
};
element.addEventListener('pointerover', markAt);
element.addEventListener('pointerleave', () => LayerShap.mark([]));
element.addEventListener('focusin', (event) => { held = true; markAt(event); });
element.addEventListener('focusout', (event) => {
  LayerShap.mark([]);
  if (event.relatedTarget) held = false;
});
watch(['value', 'dropped'], () => {
  LayerShap.useDropped(props.dropped);
  remember();
  if (held) focusOn(focused);
});
LayerShap.useDropped(props.dropped);
"""


class Strip(gr.HTML):
    """The strip's own component."""

    # An update of a property sends along the attribute of its name, for which Gradio's component
    # would answer with the function of an event.
    dropped: tuple[int, ...] = ()

    def get_block_name(self) -> str:
        return "html"


def layer_strip(session: Session) -> gr.HTML:
    return Strip(
        strip_value(session),
        html_template=TEMPLATE,
        js_on_load=SCRIPT,
        apply_default_css=False,
        elem_id="layer-strip",
        dropped=[],
    )


def strip_value(session: Session) -> dict[str, Any]:
    """What the strip shows: per layer its players, each with its contribution once it is known.

    Which are dropped is not part of it: see `strip_selection`.
    """
    players = session.players
    n = players.count
    if session.analysis is None:
        levels, about = np.zeros(n), [""] * n
    else:
        values = session.analysis.contributions
        largest = float(np.max(np.abs(values), initial=0.0)) or 1.0
        levels = np.sqrt(np.clip(values, 0, None) / largest)
        about = [f", contribution {number(value)}" for value in values]
    shown = [
        {
            "player": player,
            "label": players.label(player),
            "name": players.name(player).replace("layer", "Layer"),
            "level": round(float(levels[player]), 3),
            "about": about[player],
        }
        for player in range(n)
    ]
    size = players.per_layer
    return {
        "layers": [shown[first : first + size] for first in range(0, n, size)],
        "study": session.study_id or "",
    }


def strip_selection(session: Session) -> dict[str, Any]:
    """Update of the strip's dropped players, leaving the rest of it as it is."""
    return gr.update(dropped=list(session.dropped))
