"""The page: the strip above six tabs, and what each control sets off."""

from __future__ import annotations

from typing import Any

import gradio as gr

from core.analysis import AnalysisSettings
from core.masks import default_strata
from core.study import Comparison
from ui.accuracy_view import accuracy_handler, accuracy_view
from ui.api import add_api, offer_tools, prepare_mcp
from ui.chart import page_head
from ui.contributions_view import contributions_view
from ui.guide import guide, guide_value
from ui.heal_view import KEPT_SECONDS, HealHandlers, heal_view
from ui.interactions_view import chosen_pair, interactions_view, pair_handler, pressed_pair
from ui.methods_view import cost_line, methods_handler, methods_view
from ui.opening import LOADING as LOADING_MODEL
from ui.opening import first_session, link_handler, model_handler
from ui.prune_view import PruneHandlers, prune_view
from ui.session import Session, StopSignals
from ui.settings import AppSettings
from ui.setup_view import (
    PUBLISHED,
    analyse_handler,
    describe,
    load_handler,
    setup_view,
)
from ui.status import progress_bar
from ui.strip import layer_strip, strip_value
from ui.study_view import clear_handler, open_handler, study_view
from ui.theme import STYLESHEET, theme
from ui.workspace import Workspaces

TITLE = "LayerShap"
HEAD = (
    '<div class="ls-head"><h1>LayerShap</h1>'
    "<p>What is each layer of a language model worth, and what does it cost to drop it?</p></div>"
)
# Jobs of one kind run one at a time and queue among themselves: each uses the whole machine, and
# quick ones never wait behind an analysis.
LOADING, ANALYSING, MEASURING, OPENING = "loading", "analysing", "measuring", "opening"

# Uploads and downloads older than this are deleted, as often as that.
FILES_KEPT_SECONDS, FILES_CHECKED_SECONDS = 24 * 3600, 600
# Visitors remembered at once; the least recently active is forgotten first.
MAX_SESSIONS = 256


CLIENT = {"show_progress": "hidden", "api_visibility": "private", "queue": False}


def build(settings: AppSettings) -> gr.Blocks:
    """The whole dashboard, ready to launch."""
    workspaces, stops = Workspaces(settings.zero_gpu), StopSignals()
    with gr.Blocks(
        title=TITLE,
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(FILES_CHECKED_SECONDS, FILES_KEPT_SECONDS),
    ) as page:
        initial = first_session(settings)
        session = gr.State(initial)
        selection = gr.State(())
        tried, compared = gr.State(initial.comparisons), gr.State(initial.methods)
        healed = gr.State(None, time_to_live=KEPT_SECONDS)
        address, pressed = gr.Textbox(visible=False), gr.JSON(visible=False)
        gr.HTML(HEAD)
        steps = guide(initial)
        model_line = gr.HTML(describe(initial, loading=True), elem_id="model-line")
        with gr.Accordion(
            "Set-up: model, text and analysis settings", open=False, elem_id="set-up"
        ):
            setup = setup_view(settings)
        with gr.Row(equal_height=True, elem_id="run-bar"):
            evaluations = gr.Number(
                AnalysisSettings().evaluations,
                label="Evaluations",
                precision=0,
                scale=0,
                min_width=130,
                elem_id="evaluations",
            )
            start = gr.Button(
                "Analyse", variant="primary", scale=0, min_width=130, elem_id="analyse"
            )
            stop = gr.Button("Stop", scale=0, min_width=90, elem_id="stop")
            status = gr.HTML(
                progress_bar(LOADING_MODEL, None), elem_id="status", elem_classes="ls-status"
            )
        strip = layer_strip(initial)
        with gr.Tabs(overflow_behavior="wrap", elem_id="views"):
            with _tab("Layer contributions"):
                contributions = contributions_view()
            with _tab("Interactions"):
                interactions = interactions_view()
            with _tab("Methods") as methods_tab:
                methods = methods_view()
            with _tab("Prune and compare"):
                pruning = prune_view(settings.local_files)
            with _tab("Accuracy"):
                accuracy = accuracy_view(settings)
            with _tab("Heal and share"):
                healing = heal_view(settings)
            with _tab("Study") as study_tab:
                study = study_view(study_tab)

        values = [contributions.value, contributions.order]
        shown = [session, selection, *values]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        # The status line shows the place in the queue, and for how long work has gone on.
        heavy = {"show_progress": "minimal", "show_progress_on": status}

        def draw(current: Session, value: str, order: str) -> dict[Any, Any]:
            """Updates of all charts that follow from an analysis."""
            return {
                **contributions.draw(current, value, order),
                **interactions.draw(current),
                pruning.count: gr.update(maximum=max(2, current.players.count - 1)),
            }

        def draw_results(
            current: Session, dropped: tuple[int, ...], value: str, order: str
        ) -> dict[Any, Any]:
            """The charts and the prediction, for the selection as it is now."""
            chosen = current.dropping(dropped)
            return {
                **draw(chosen, value, order),
                pruning.predicted: pruning.draw_selection(chosen)[pruning.predicted],
            }

        def draw_all(
            current: Session, dropped: tuple[int, ...], value: str, order: str
        ) -> dict[Any, Any]:
            chosen = current.dropping(dropped)
            return {**draw(chosen, value, order), **pruning.draw_selection(chosen)}

        charts = list(draw(Session(), "", "").keys())
        chosen_views = [pruning.dropped, pruning.predicted, pruning.recipe]
        results = [*charts, pruning.predicted]
        everything = [*charts, *chosen_views]
        tried_views = [pruning.chart, pruning.tried]
        accuracy_views = list(accuracy.draw().keys())
        methods_views = list(methods.draw(None).keys())
        methods_choices = list(methods.draw_choices(Session()).keys())
        healing_views = list(healing.draw_nothing().keys())
        handlers = PruneHandlers(pruning, settings, stops, selection, tried, status, strip)

        def fresh(opened: Session) -> dict[Any, Any]:
            """What another model or study resets."""
            return {
                selection: (),
                tried: opened.comparisons,
                compared: opened.methods,
                healed: None,
                **pruning.draw_tried(opened.comparisons, opened.players),
                **methods.draw(opened.methods),
                **accuracy.draw(),
                **healing.draw_nothing(),
            }

        # Set-up
        load = load_handler(
            settings,
            workspaces,
            session,
            status,
            model_line,
            strip,
            setup.strata,
            fresh,
        )
        loaded = [
            session,
            status,
            model_line,
            strip,
            setup.strata,
            selection,
            tried,
            compared,
            healed,
            *tried_views,
            *methods_views,
            *accuracy_views,
            *healing_views,
        ]

        def draw_steps(current: Session, sets: tuple[Comparison, ...]) -> list[dict[str, Any]]:
            return guide_value(current, sets != current.comparisons)

        def show_steps(event: Any) -> None:
            event.then(draw_steps, [session, tried], steps, **quiet)

        show_steps(
            setup.load.click(
                load,
                setup.load_inputs,
                loaded,
                concurrency_id=LOADING,
                concurrency_limit=1,
                api_name="load",
                **heavy,
            )
            .then(draw_all, shown, everything, **quiet)
            .then(methods.draw_choices, session, methods_choices, **quiet)
        )
        setup.preset.change(
            _preset, [setup.preset, session], [evaluations, setup.strata, setup.surrogate], **quiet
        )

        # Analysis
        show_steps(
            start.click(
                analyse_handler(settings, stops, session, status, model_line, strip, draw),
                [session, evaluations, *setup.run_inputs, *values],
                [session, status, model_line, strip, *charts],
                concurrency_id=ANALYSING,
                concurrency_limit=1,
                api_name="analyze",
                **heavy,
            ).then(draw_results, shown, results, **quiet)
        )

        def stop_work(request: gr.Request) -> None:
            stops.stop(request.session_hash)

        stop.click(stop_work, None, None, queue=False, api_name="stop", show_progress="hidden")
        for control in values:
            control.change(draw_results, shown, results, **quiet)

        # Interactions
        pair = {
            "fn": pair_handler(interactions, status),
            "inputs": [session, interactions.first, interactions.second],
            "outputs": [interactions.utilities, status],
            "concurrency_id": MEASURING,
            "concurrency_limit": 1,
            **heavy,
        }
        interactions.pairs.select(
            chosen_pair, interactions.pairs, [interactions.first, interactions.second], **quiet
        ).then(**pair, api_visibility="private")
        interactions.picker.select(
            pressed_pair(interactions, status),
            session,
            [interactions.first, interactions.second, status],
            **quiet,
        ).then(**pair, api_visibility="private")
        interactions.measure.click(**pair, api_name="pair")

        # Methods
        methods.compare.click(
            methods_handler(methods, stops, compared, status),
            [session, methods.methods, methods.deepest, methods.axis],
            [compared, status, *methods_views],
            concurrency_id=ANALYSING,
            concurrency_limit=1,
            api_name="methods",
            **heavy,
        )
        methods.shown.change(
            methods.draw_depth,
            [compared, methods.shown],
            [methods.spent, methods.map, methods.agreement],
            **quiet,
        )
        methods.axis.change(methods.draw_axis, [compared, methods.axis], methods.chart, **quiet)
        priced = [session, methods.methods, methods.deepest]
        for control in (methods.methods, methods.deepest):
            control.change(cost_line, priced, methods.price, **quiet)
        methods_tab.select(cost_line, priced, methods.price, **quiet)

        # Prune and compare
        chosen = [selection, *chosen_views, status]
        # Each click tells the whole selection. Of quick ones the last must not be lost, and Gradio
        # repeats the first one's event for it: the selection is read when the server is told.
        strip.select(
            handlers.clicked,
            [session, pressed],
            chosen,
            js="(session) => [session, LayerShap.dropped()]",
            queue=False,
            trigger_mode="always_last",
            **quiet,
        )
        pruning.dropped.submit(
            handlers.typed,
            [session, pruning.dropped],
            [*chosen, strip],
            api_name="select",
            **heavy,
        )
        pruning.drop_least.click(
            handlers.drop_least,
            [session, pruning.count],
            [*chosen, strip],
            api_name="drop_least",
            **heavy,
        )
        pruning.keep_all.click(handlers.keep_all, session, [*chosen, strip], **quiet)
        pruning.target.find.click(
            handlers.find,
            [session, *pruning.target.inputs],
            [*chosen, strip],
            concurrency_id=ANALYSING,
            concurrency_limit=1,
            api_name="find",
            **heavy,
        )
        methods.take.click(
            handlers.take,
            [session, compared, methods.method, methods.shown],
            [*chosen, strip],
            api_name="take_set",
            **heavy,
        )
        show_steps(
            pruning.measure.click(
                handlers.measure,
                [session, pruning.dropped, tried],
                [tried, status, pruning.figures, *tried_views],
                concurrency_id=MEASURING,
                concurrency_limit=1,
                api_name="compare",
                **heavy,
            )
        )
        pruning.go_on.click(
            handlers.go_on,
            [session, selection, pruning.prompt, pruning.new_tokens],
            [pruning.full_text, pruning.pruned_text, status],
            concurrency_id=MEASURING,
            concurrency_limit=1,
            api_name="continue_prompt",
            **heavy,
        )
        pruning.save.click(
            handlers.save,
            [session, selection, pruning.name, tried],
            status,
            concurrency_id=MEASURING,
            concurrency_limit=1,
            api_name="save",
            **heavy,
        )

        # Accuracy
        accuracy.measure.click(
            accuracy_handler(settings, accuracy, stops, status),
            [session, selection, *accuracy.inputs],
            [status, *accuracy_views],
            concurrency_id=ANALYSING,
            concurrency_limit=1,
            api_name="accuracy",
            **heavy,
        )

        # Heal and share
        heal_handlers = HealHandlers(healing, settings, stops, healed, status)
        healing.heal.click(
            heal_handlers.heal,
            [session, selection, healing.steps, healing.rank, healing.learning_rate],
            [healed, status, *healing_views],
            concurrency_id=ANALYSING,
            concurrency_limit=1,
            api_name="heal",
            **heavy,
        )
        for button, handler, inputs, name in (
            (healing.save, heal_handlers.save, [healed, healing.name], "save_healed"),
            (
                healing.push,
                heal_handlers.push,
                [healing.name, healing.repo, healing.private],
                "push",
            ),
        ):
            button.click(
                handler,
                inputs,
                status,
                concurrency_id=MEASURING,
                concurrency_limit=1,
                api_name=name,
                **heavy,
            )

        # Study
        study_files = [study.cache, study.about, *study.downloads]
        study_tab.select(
            study.draw,
            [session, tried, compared],
            study_files,
            api_name="export",
            show_progress="hidden",
        )

        def show(opened: Session, loading: bool = False) -> dict[Any, Any]:
            """The whole page for a study that was opened."""
            return {
                **fresh(opened),
                **methods.draw_choices(opened),
                model_line: describe(opened, loading),
                strip: gr.update(value=strip_value(opened), dropped=[]),
                **draw(opened, contributions.value.value, contributions.order.value),
                **pruning.draw_selection(opened),
                **study.draw(opened, opened.comparisons, opened.methods),
            }

        def show_link(opened: Session, dropped: tuple[int, ...]) -> dict[Any, Any]:
            chosen = opened.dropping(dropped)
            return {
                **show(chosen, loading=True),
                selection: chosen.dropped,
                strip: gr.update(value=strip_value(chosen), dropped=list(chosen.dropped)),
            }

        opened = [
            session,
            selection,
            tried,
            compared,
            healed,
            status,
            model_line,
            strip,
            *everything,
            *methods_views,
            *methods_choices,
            *healing_views,
            *tried_views,
            *accuracy_views,
            *study_files,
        ]
        show_steps(
            page.load(
                link_handler(session, status, show_link),
                [session, address],
                opened,
                js="(session) => [session, window.location.search]",
                queue=False,
                **quiet,
            )
            .then(
                model_handler(settings, workspaces, session, status, model_line),
                session,
                [session, status, model_line],
                concurrency_id=LOADING,
                concurrency_limit=1,
                **quiet,
            )
            .then(methods.draw_choices, session, methods_choices, **quiet)
        )
        show_steps(
            study.upload.upload(
                open_handler(session, status, show),
                study.upload,
                opened,
                concurrency_id=OPENING,
                concurrency_limit=1,
                api_name="open_study",
                **heavy,
            )
        )
        study.clear.click(
            clear_handler(settings, study, status), None, [study.cache, status], **quiet
        )
        _start_with(
            {
                **draw(initial, contributions.value.value, contributions.order.value),
                **pruning.draw_selection(initial),
                **pruning.draw_tried(initial.comparisons, initial.players),
                **methods.draw(initial.methods),
            }
        )
        for button in (pruning.save, healing.save, healing.push, study.clear):
            button.interactive = settings.may_write
        add_api(page, settings, workspaces, analysing=ANALYSING, measuring=MEASURING)
    page.queue(default_concurrency_limit=settings.quick_jobs, max_size=settings.queue_size)
    return page


def launch(settings: AppSettings, *, wait: bool = True) -> gr.Blocks:
    """Build the dashboard and serve it; `wait` until it is interrupted, or return at once.

    Raises:
        LayerShapError: what `settings` ask for is not installed.
    """
    if settings.mcp:
        prepare_mcp()
    page = build(settings)
    page.launch(
        server_name=settings.host,
        server_port=settings.port,
        share=settings.share,
        theme=theme(),
        css_paths=STYLESHEET,
        head=page_head(),
        max_file_size=f"{settings.max_upload_mb}mb",
        footer_links=["api", "settings"],
        show_error=True,
        state_session_capacity=MAX_SESSIONS,
        # The strip and the charts are drawn by the browser.
        ssr_mode=False,
        mcp_server=settings.mcp,
        prevent_thread_lock=True,
    )
    if settings.mcp:
        offer_tools(page)
    if wait:
        page.block_thread()
    return page


def _tab(name: str) -> gr.Tab:
    """A tab that the page's address knows."""
    view = name.lower().replace(" ", "-")
    tab = gr.Tab(name, id=view)
    tab.select(None, None, None, js=f"() => LayerShap.remember({{view: '{view}'}})", **CLIENT)
    return tab


def _start_with(updates: dict[Any, Any]) -> None:
    """Make updates part of the page itself, so that it opens with them."""
    for component, update in updates.items():
        changes = update if isinstance(update, dict) and "__type__" in update else {"value": update}
        for name, value in changes.items():
            if name == "value":
                drawn = component.postprocess(value)
                component.value = drawn.model_dump() if hasattr(drawn, "model_dump") else drawn
            elif name == "choices":
                component.choices = [(choice, choice) for choice in value]
            elif name != "__type__":
                setattr(component, name, value)


def _preset(chosen: str, session: Session) -> tuple[int, str, str]:
    """Evaluations, strata and surrogate of a preset."""
    if chosen == PUBLISHED:
        settings = AnalysisSettings.published(session.players.count or 32)
        strata: tuple[int, ...] = settings.strata or ()
    else:
        settings = AnalysisSettings()
        strata = default_strata(session.players.count) if session.n_layers else ()
    return settings.evaluations, ", ".join(map(str, strata)), settings.surrogate
