"""Zero-shot accuracy: the real lm-eval on small local tasks, against brute force."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from gradio_client import Client

from conftest import TINY_LAYERS, WORDS
from core import accuracy
from core.__main__ import main
from core.accuracy import OFFERED, compare_accuracy, parse_tasks
from core.errors import LayerShapError
from core.loading import load_model
from core.masks import leave_out
from core.saving import save_pruned
from test_ui import address, load, said, visitor  # noqa: F401
from ui.accuracy_view import chosen_tasks
from ui.settings import AppSettings

QUESTIONS, DROPPED = 24, (2, 5)
LOCAL, SPACE = AppSettings.read([], {}), AppSettings.read([], {"SPACE_ID": "x"})


@pytest.fixture(scope="module")
def questions():
    rng = np.random.default_rng(0)
    return [
        {
            "question": " ".join(rng.choice(WORDS, rng.integers(3, 9))),
            "choices": [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(3)],
            "answer": int(rng.integers(3)),
        }
        for _ in range(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def tasks_folder(questions, tmp_path_factory):
    """Two task files that lm-eval reads, with their questions beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)))
    config = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    for name, metrics in (("tiny_norm", ("acc", "acc_norm")), ("tiny_plain", ("acc",))):
        task = {"task": name, **config, "metric_list": [{"metric": each} for each in metrics]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    wordy = {**config, "task": "tiny_ppl", "output_type": "loglikelihood_rolling"}
    wordy["metric_list"] = [{"metric": "word_perplexity"}]
    (folder / "tiny_ppl.yaml").write_text(yaml.safe_dump(wordy))
    missing = {**config, "task": "tiny_missing"}
    missing["dataset_kwargs"] = {"data_files": {"test": str(folder / "none.jsonl")}}
    (folder / "tiny_missing.yaml").write_text(yaml.safe_dump(missing))
    return folder


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), device="cpu", dtype="float32")


def measure(model, tasks, folder, **changes):
    *_, last = compare_accuracy(
        model, leave_out(TINY_LAYERS, DROPPED), tasks, tasks_folder=folder, **changes
    )
    assert last.stage == "Done"
    assert last.done == last.total
    return last.results


@torch.inference_mode()
def by_hand(module, tokenizer, question, normalised):
    """Whether the likeliest choice is the answer, one sequence at a time."""
    scores = []
    for choice in question["choices"]:
        ids = tokenizer(f"{question['question']} {choice}", return_tensors="pt")["input_ids"]
        start = len(tokenizer(question["question"])["input_ids"])
        logs = module(ids).logits[0].log_softmax(-1)
        loglikelihood = sum(logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
        scores.append(loglikelihood / (len(choice) if normalised else 1))
    return float(np.argmax(scores) == question["answer"])


@pytest.mark.parametrize("task", ["tiny_norm", "tiny_plain"])
def test_accuracy_is_that_of_choices_scored_by_hand_on_a_model_really_cut(
    model, questions, tasks_folder, tmp_path, task
):
    from transformers import AutoModelForCausalLM

    cut = save_pruned(model, leave_out(TINY_LAYERS, DROPPED), tmp_path / "cut")
    normalised = task == "tiny_norm"
    full, pruned = (
        np.array([by_hand(module.eval(), model.tokenizer, q, normalised) for q in questions])
        for module in (model.module, AutoModelForCausalLM.from_pretrained(cut))
    )
    assert (full != pruned).any()
    [result] = measure(model, [task], tasks_folder)
    assert result.metric == ("acc_norm" if normalised else "acc")
    assert result.questions == QUESTIONS
    assert result.chance == pytest.approx(1 / 3)
    assert result.full == pytest.approx(full.mean())
    assert result.pruned == pytest.approx(pruned.mean())
    root = np.sqrt(QUESTIONS)
    assert result.full_error == pytest.approx(full.std(ddof=1) / root)
    assert result.pruned_error == pytest.approx(pruned.std(ddof=1) / root)
    assert result.change_error == pytest.approx((pruned - full).std(ddof=1) / root)
    assert result.change == pytest.approx(pruned.mean() - full.mean())


def test_the_limit_asks_the_first_questions_and_results_repeat(model, questions, tasks_folder):
    first, again = (measure(model, ["tiny_plain"], tasks_folder, limit=5) for _ in range(2))
    assert first == again
    assert first[0].questions == 5
    right = [by_hand(model.module, model.tokenizer, q, False) for q in questions[:5]]
    assert first[0].full == pytest.approx(np.mean(right))


def test_with_nothing_dropped_both_models_agree_on_every_question(model, tasks_folder):
    *_, last = compare_accuracy(
        model, leave_out(TINY_LAYERS, ()), ["tiny_plain"], tasks_folder=tasks_folder
    )
    assert (last.results[0].change, last.results[0].change_error) == (0, 0)


def test_the_shared_model_and_tokenizer_stay_as_they_were(model, tasks_folder):
    before = model.tokenizer.pad_token, model.n_layers, len(model.module.model.layers)
    measure(model, ["tiny_plain"], tasks_folder)
    assert before == (model.tokenizer.pad_token, model.n_layers, len(model.module.model.layers))


def test_progress_counts_questions_and_says_how_long(model, tasks_folder):
    steps = list(
        compare_accuracy(
            model, leave_out(TINY_LAYERS, (1,)), ["tiny_plain"], tasks_folder=tasks_folder
        )
    )
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert {step.total for step in steps} == {0, 2 * QUESTIONS}
    assert any(step.seconds_left for step in steps)
    assert {"tiny_plain, full model", "tiny_plain, pruned model"} <= {s.stage for s in steps}


def test_stop_ends_within_a_batch_and_keeps_the_finished_tasks(model, tasks_folder):
    finished = []
    for step in compare_accuracy(
        model,
        leave_out(TINY_LAYERS, (1,)),
        ["tiny_plain", "tiny_norm"],
        tasks_folder=tasks_folder,
        stop=lambda: len(finished) > 0,
    ):
        finished.extend(step.results)
    assert step.stage == "Stopped"
    assert [result.task for result in step.results] == ["tiny_plain"]
    assert step.done < step.total


def test_leaving_early_leaves_no_thread_behind(model, tasks_folder):
    import threading

    before = threading.active_count()
    steps = compare_accuracy(
        model, leave_out(TINY_LAYERS, (1,)), ["tiny_plain"], tasks_folder=tasks_folder
    )
    while not next(steps).total:
        pass
    steps.close()
    assert threading.active_count() <= before


def test_full_answers_are_remembered_for_tasks_of_the_library(model, tasks_folder, monkeypatch):
    scored = []

    def counting(model, *rest):
        scored.append(model.n_layers)
        return real(model, *rest)

    real = accuracy._score
    monkeypatch.setattr(accuracy, "_offered_tasks", lambda: accuracy._own_tasks(tasks_folder))
    monkeypatch.setattr(accuracy, "_score", counting)
    monkeypatch.setattr(accuracy, "_memory", accuracy._Memory())
    for dropped in ((1,), (3,), (1,)):
        *_, last = compare_accuracy(model, leave_out(TINY_LAYERS, dropped), ["tiny_plain"])
        assert last.done == last.total
    assert scored == [8, 7, 7]


@pytest.mark.parametrize(
    ("tasks", "changes", "words"),
    [
        (["no_such_task"], {}, "no task 'no_such_task'"),
        (["/etc/passwd"], {}, "no task '/etc/passwd'"),
        (["tiny_ppl"], {}, "does not measure accuracy but word_perplexity"),
        (["tiny_missing"], {}, "The questions of tiny_missing could not be read"),
        ([], {}, "No task chosen"),
        (["tiny_plain"], {"limit": 0}, "must be at least 1"),
        (["tiny_plain"], {"tasks_folder": "/no/such/folder"}, "no folder /no/such/folder"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(model, tasks_folder, tasks, changes, words):
    settings = {"tasks_folder": tasks_folder, **changes}
    with pytest.raises(LayerShapError) as caught:
        list(compare_accuracy(model, leave_out(TINY_LAYERS, (1,)), tasks, **settings))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_library_one_sentence_says_how_to_install_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LayerShapError, match="pip install lm-eval"):
        next(compare_accuracy(model, leave_out(TINY_LAYERS, (1,)), ["piqa"]))


def test_every_offered_task_exists_and_measures_accuracy():
    index = accuracy._offered_tasks().task_index
    for name in OFFERED:
        assert {"acc", "acc_norm"} & {m["metric"] for m in index[name].cfg["metric_list"]}


def test_a_public_dashboard_measures_only_what_it_offers():
    assert chosen_tasks(SPACE, ["piqa", "boolq"], "", "") == (("piqa", "boolq"), None)
    for tasks, others, folder in (
        (["piqa"], "sciq", ""),
        (["mmlu"], "", ""),
        (["piqa"], "", "/tmp"),
        ([], "/etc/task.yaml", ""),
    ):
        with pytest.raises(LayerShapError, match="measures only these tasks: PIQA"):
            chosen_tasks(SPACE, tasks, others, folder)
    names, folder = chosen_tasks(LOCAL, ["piqa"], "sciq, piqa", " /tmp ")
    assert names == ("piqa", "sciq")
    assert folder == Path("/tmp")


def test_names_are_separated_by_commas_or_spaces():
    assert parse_tasks(" piqa, arc_easy boolq,") == ("piqa", "arc_easy", "boolq")


def test_the_command_line_prints_a_table_and_writes_a_file(
    tiny_folder, tasks_folder, tmp_path, capsys
):
    out = tmp_path / "accuracy.json"
    arguments = ["accuracy", "--model", str(tiny_folder), "--drop", "2,5", "--limit", "6"]
    arguments += ["--tasks", "tiny_plain,tiny_norm", "--tasks-folder", str(tasks_folder)]
    assert main([*arguments, "--out", str(out)]) == 0
    head, first, second, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "metric", "full", "pruned", "change", "questions"]
    assert first.startswith("tiny_plain")
    assert "±" in second
    document = json.loads(out.read_text())
    assert document["dropped"] == "2, 5"
    assert document["versions"]["lm_eval"]
    assert [r["metric"] for r in document["results"]] == ["acc", "acc_norm"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tasks", "piqa", "--out", "/no/such/folder/x.json"], "no folder /no/such/folder"),
        (["--tasks", "piqa", "--limit", "-1"], "must be at least 1"),
        (["--tasks", "piqa", "--drop", "8"], "no layer 8"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(tiny_folder, options, sentence):
    done = subprocess.run(
        [sys.executable, "-m", "core", "accuracy", "--model", str(tiny_folder), *options],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert sentence in done.stderr.splitlines()[-1]


@pytest.fixture
def loaded(visitor, tiny_folder, text_file):  # noqa: F811
    assert "Ready" in said(load(visitor, tiny_folder, text_file))
    return visitor


def test_the_dashboard_measures_the_selected_cut(loaded, tasks_folder):
    loaded.predict(text="2, 5", api_name="/select")
    asked = {"tasks": [], "others": "tiny_norm", "folder": str(tasks_folder)}
    status, figure, table = loaded.predict(questions=7, **asked, api_name="/accuracy")
    assert said(status) == "Done: 1 task measured; layers dropped: 2, 5."
    assert json.loads(figure)["data"][2]["name"] == "pruned model"
    [row] = table["value"]["data"]
    assert row[:2] == ["tiny_norm", "acc_norm"]
    assert row[-1] == "7"
    assert "±" in row[4]


def test_stop_ends_it_in_the_dashboard(loaded, tasks_folder):
    loaded.predict(text="1", api_name="/select")
    job = loaded.submit(
        tasks=[],
        questions=20,
        others="tiny_norm, tiny_plain",
        folder=str(tasks_folder),
        api_name="/accuracy",
    )
    while not job.outputs():
        pass
    loaded.predict(api_name="/stop")
    assert said(job.result()).startswith(("Stopped", "Done"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"others": "no_such_task"}, "no task 'no_such_task'"),
        ({"tasks": []}, "No task chosen"),
        ({"questions": 0}, "must be at least 1"),
        ({"questions": None}, "must be a whole number"),
        ({"folder": "/no/such/folder"}, "There is no folder"),
    ],
)
def test_wrong_input_is_one_sentence_in_the_dashboard(loaded, changes, words):
    asked = {"tasks": ["piqa"], "questions": 5, "others": "", "folder": "", **changes}
    assert words in said(loaded.predict(**asked, api_name="/accuracy"))


def test_nothing_is_measured_before_a_model_is_loaded(address):  # noqa: F811
    visitor = Client(address, verbose=False)  # noqa: F811
    answer = visitor.predict(
        tasks=["piqa"], questions=5, others="", folder="", api_name="/accuracy"
    )
    assert "needs the model itself" in said(answer)
