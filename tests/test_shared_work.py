"""What several visitors ask for at once is computed once."""

import threading

import numpy as np
import pytest
import torch

from core.cache import EvaluationCache
from core.game import LayerGame
from core.models import describe


@pytest.fixture
def games(tiny_llama, tmp_path):
    """Two visitors' games on the same model, text and cache, and the masks that were evaluated."""
    model = describe(tiny_llama(), name="tiny")
    tokens = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = EvaluationCache(tmp_path / "cache")
    pair = [LayerGame(model, tokens, cache) for _ in range(2)]
    evaluated = []
    for game in pair:
        counted(game, evaluated)
    return pair, evaluated


def counted(game, evaluated, before=lambda: None):
    losses = game.evaluator.losses

    def record(masks):
        before()
        evaluated.extend(map(tuple, masks.tolist()))
        return losses(masks)

    game.evaluator.losses = record


def test_two_who_measure_the_same_cut_at_once_evaluate_it_once(games):
    (first, second), evaluated = games
    masks = np.array([[True, True, True, True], [True, False, True, True]])
    at_work, may_finish, found = threading.Event(), threading.Event(), {}

    def hold_up():
        at_work.set()
        assert may_finish.wait(30)

    counted(first, [], hold_up)

    def ask(game, name):
        found[name] = game.perplexity(masks).tolist()

    threads = [threading.Thread(target=ask, args=(first, "first"))]
    threads[0].start()
    assert at_work.wait(30)
    threads.append(threading.Thread(target=ask, args=(second, "second")))
    threads[1].start()
    # The second waits for the first instead of evaluating: it cannot be done before.
    threads[1].join(0.3)
    assert threads[1].is_alive()
    may_finish.set()
    for thread in threads:
        thread.join(30)
    assert found["first"] == found["second"]
    assert sorted(evaluated) == sorted(map(tuple, masks.tolist()))


def test_what_somebody_gave_up_is_evaluated_by_who_waits(games):
    (first, second), _ = games
    mask = np.array([[True, False, True, True]])
    abandoned = first.measure(np.vstack([mask, ~mask]))
    next(abandoned)
    waiting = threading.Thread(target=lambda: second.losses(~mask))
    waiting.start()
    abandoned.close()
    waiting.join(30)
    assert not waiting.is_alive()
    assert second.cache.claims._held == {}
    assert np.isfinite(second.losses(np.vstack([mask, ~mask]))).all()
