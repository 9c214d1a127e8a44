"""Recall counts what greedy decoding would say, and draws the same episodes every time."""

import random

import pytest
import torch

from eval.niah import Cell, episodes_of, generated, recall, recall_grid
from replace.episodes import Episode

CELL = Cell(96, 0.5, "passkey", "test", "filler")


def episode(ids: list[int], answer: int) -> Episode:
    """An episode whose last `answer` tokens are the answer; the rest of it does not matter to recall."""
    place = slice(len(ids) - answer, len(ids))
    start = slice(0, 1)
    return Episode(
        input_ids=torch.tensor(ids),
        answer=place,
        needle=start,
        question=start,
        depth=0.5,
        kind="passkey",
        haystack="filler",
        phrasing=0,
        answer_text="",
        split="test",
        answers=[place],
        needles=[start],
    )


@pytest.fixture(scope="module")
def mixed(tiny):
    """Episodes of which half end in what the model would say, half in that with one token changed."""
    rng = random.Random(1)
    made = []
    for index in range(8):
        answer, ids = 3 + index % 3, []
        while len(ids) != 30 + index % 2 + answer:  # a continuation that ends early is no answer
            prompt = torch.tensor([[rng.randrange(3, 300) for _ in range(30 + index % 2)]])
            with torch.inference_mode():
                output = tiny.model.generate(prompt, max_new_tokens=answer, do_sample=False, pad_token_id=0)
            ids = [token for token in output[0].tolist() if token != 2]
        if index % 2:
            place = len(ids) - 1 - rng.randrange(answer)
            ids[place] = (ids[place] + 1) % 300
        made.append(episode(ids, answer))
    return made


def test_a_hit_is_what_greedy_decoding_says(tiny, mixed):
    found = recall(tiny.model, mixed)
    assert found["hits"] == [1, 0] * 4
    assert found["exact"] == 0.5
    really = generated(tiny.model, tiny.tokenizer, mixed)
    assert really["agrees"] == 1.0
    assert really["exact"] == 0.5
    assert 0.5 < found["digit_accuracy"] < 1
    assert found["interval"][0] < 0.5 < found["interval"][1]


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_batches_of_answers_of_different_lengths_change_nothing(tiny, mixed, batch):
    one, many = recall(tiny.model, mixed), recall(tiny.model, mixed, batch=batch)
    assert many["hits"] == one["hits"]
    assert many["digit_accuracy"] == one["digit_accuracy"]
    assert many["answer_loss"] == pytest.approx(one["answer_loss"], rel=1e-4)


def test_the_answer_itself_is_not_read(tiny, mixed):
    """The last token is only predicted: changing it changes no other token's score."""
    ids = mixed[0].input_ids.tolist()
    other = episode([*ids[:-1], (ids[-1] + 1) % 300], mixed[0].answer.stop - mixed[0].answer.start)
    assert recall(tiny.model, [other])["hits"] == [0]
    count = mixed[0].answer.stop - mixed[0].answer.start
    assert recall(tiny.model, [other])["digit_accuracy"] == pytest.approx((count - 1) / count)


def test_an_answer_that_is_not_at_the_end_is_refused(tiny, mixed):
    wrong = episode(mixed[0].input_ids.tolist(), 3)
    wrong.answer = slice(5, 8)
    with pytest.raises(ValueError, match="last tokens"):
        recall(tiny.model, [wrong])


def test_a_grid_draws_the_same_episodes_and_fewer_are_the_first_ones():
    def make(cell, rng):
        return rng.random(), cell

    assert episodes_of(CELL, make, 5, 0)[:3] == episodes_of(CELL, make, 3, 0)
    assert episodes_of(CELL, make, 3, 0) != episodes_of(CELL, make, 3, 1)


def test_means_pool_the_depths(tiny, mixed):
    cells = [Cell(32, depth, "passkey", "test", "filler") for depth in (0.1, 0.9)]

    def make(cell, rng):
        return mixed[0] if cell.depth < 0.5 else mixed[1]

    found = recall_grid(tiny.model, cells, make, episodes=3)
    assert [cell["exact"] for cell in found["cells"]] == [1.0, 0.0]
    assert len(found["means"]) == 1
    assert found["means"][0]["exact"] == 0.5
    assert found["means"][0]["episodes"] == 6
    assert "depth" not in found["means"][0]
