"""The long measurements on tiny models: constant state, needles that prove nothing, and what is refused."""

import copy
import random

import pytest
import torch

from eval.answers import generates, rank, read_prompt
from eval.measure import measure, yardstick
from eval.measurements import MEASUREMENTS
from eval.measurements.niah import means as niah_means
from eval.measurements.streaming import read_book, teacher_window, window_of
from eval.perplexity import token_losses, tokenise
from eval.stream import Reach, Stream, cache_bytes, pieces, reach_of
from kernels.peak import peak_bytes
from replace.compose import compose
from replace.config import AttentionConfig, Config, EvalConfig, ModelConfig
from replace.convert import SwapSpec, swap
from replace.corpora import Document
from replace.errors import UserError
from replace.loading import load_model
from replace.validation import check_eval

OPTIONS = AttentionConfig(block=16, window=16, pairs=8, sinks=2, distance_cap=64)
WORDS = ("the", "old", "house", "stood", "near", "a", "river", "nobody", "knew", "who", "lived", "there")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    def text(seed: int) -> str:
        rng = random.Random(seed)
        return " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(200))

    splits = ["train", "dev", "test", "test"]
    return [Document(f"book {i}", text(i), "x", split) for i, split in enumerate(splits)]


@pytest.fixture(scope="module")
def student():
    """A tiny model with every layer replaced."""
    model = load_model(ModelConfig(kind="tiny")).model
    swap(model, SwapSpec(dict.fromkeys(range(4), OPTIONS)))
    return model


@pytest.fixture(scope="module")
def config() -> Config:
    made = Config(model=ModelConfig(kind="tiny"), attention=OPTIONS, precision="fp32")
    made.eval = EvalConfig(
        base="none",
        stream_tokens=1500,
        niah_lengths=[256],
        niah_depths=[0, 50, 100],
        niah_forms=["sentence"],
        passkey_lengths=[300, 5000],
        speed_lengths=[40, 5000],
    )
    return made


def ids_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (1, count), generator=torch.Generator().manual_seed(seed))


# Streams


def test_a_stream_is_one_forward_and_its_state_never_grows(student):
    """Every cut gives the logits of one forward; the bytes are the same after every piece."""
    row = ids_of(150)
    with torch.inference_mode():
        whole = student(input_ids=row, use_cache=False).logits
    stream, held, logits = Stream(student), [], []
    for piece in pieces(row, size=37):
        logits.append(stream.feed(piece, keep=0))
        held.append(stream.bytes())
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=2e-4, rtol=1e-4)
    assert len(set(held)) == 1
    assert stream.tokens == 150


def test_masks_stay_as_small_as_the_pieces(student, monkeypatch):
    """What a layer is given as a mask has no column for the text before."""
    widths = []
    forward = type(student.model.layers[0].self_attn).forward

    def noted(self, *arguments, **keywords):
        mask = keywords.get("attention_mask")
        widths.append(0 if mask is None else mask.shape[-1])
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(type(student.model.layers[0].self_attn), "forward", noted)
    stream = Stream(student)
    for piece in pieces(ids_of(200), size=40):
        stream.feed(piece)
    assert max(widths) == 40


def test_an_unreplaced_model_streams_as_it_decodes(tiny):
    row = ids_of(90)
    with torch.inference_mode():
        whole = tiny.model(input_ids=row, use_cache=False).logits
    stream = Stream(tiny.model)
    logits = [stream.feed(piece, keep=0) for piece in pieces(row, size=32)]
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=2e-4, rtol=1e-4)


def test_the_reach_of_models(tiny, student):
    assert reach_of(student) == Reach(limit=None, replaced=(OPTIONS,) * 4)
    assert reach_of(tiny.model).full == 4
    assert reach_of(tiny.model).limit == 4096
    mixed = load_model(ModelConfig(kind="tiny")).model
    swap(mixed, SwapSpec({0: OPTIONS, 2: OPTIONS}))
    assert reach_of(mixed).full == 2
    assert reach_of(mixed).limit == 4096
    assert reach_of(mixed).proves_nothing(slice(0, 1), 4000) == "2 layers keep full attention"


def test_a_model_with_a_table_of_positions_has_a_limit():
    model = load_model(ModelConfig(kind="tiny", family="gpt2")).model
    swap(model, SwapSpec(dict.fromkeys(range(4), OPTIONS)))
    reach = reach_of(model)
    assert reach.full == 0
    assert reach.limit == model.config.n_positions


@pytest.mark.parametrize("local", ["sliding_window", "segment"])
def test_the_exact_part_is_what_attention_reaches(local):
    """Of one layer without memory: a token moves the output from `exact_from` on, or among the sinks."""
    options = AttentionConfig(
        name="sliding_window", block=8, window=16 if local == "sliding_window" else 0, local=local, sinks=2,
        pairs=0, distance_cap=64, write_gate="none",
    )  # fmt: skip
    model = load_model(ModelConfig(kind="tiny")).model
    swap(model, SwapSpec({0: options, 1: options, 2: options, 3: options}))
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(1, 61, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    position = torch.arange(61)[None]
    out, _ = layer(hidden, position_embeddings=model.model.rotary_emb(hidden, position), attention_mask=None)
    reach = reach_of(model)
    for query in (0, 7, 8, 23, 39, 40, 47, 60):
        (gradient,) = torch.autograd.grad(out[0, query].sum(), hidden, retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        start = reach.exact_from(query)
        expected = torch.zeros(61, dtype=torch.bool)
        expected[start : query + 1] = True
        expected[: min(reach.sinks, query + 1)] = True
        assert seen.tolist() == expected.tolist(), query


# Streaming perplexity


def test_streaming_scores_what_one_forward_scores(student, tiny, documents):
    ids, sizes = tokenise(tiny.tokenizer, documents[2].text, 1300)
    found = read_book(student, reach_of(student), ids, sizes, "x")
    with torch.inference_mode():
        losses = token_losses(student, torch.tensor([ids]))[0].double()
    assert found["tokens"] == 1299
    assert found["ppl"] == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    assert [(b["from"], b["to"]) for b in found["by_position"]][-2:] == [(512, 1024), (1024, 1300)]
    bucket = found["by_position"][3]
    assert (bucket["from"], bucket["to"]) == (256, 512)
    assert bucket["ppl"] == pytest.approx(float(losses[255:511].mean().exp()), rel=1e-4)
    assert sum(b["tokens"] for b in found["by_position"]) == 1299
    assert found["constant"]
    total = float(losses.sum()) / 0.6931471805599453
    assert found["bits_per_byte"] == pytest.approx(total / sizes[1:].sum(), rel=1e-4)


def test_streaming_stands_beside_the_teacher_s_window_of_the_same_bytes(student, tiny, config, documents):
    using = yardstick(tiny.tokenizer, config, documents)
    found = MEASUREMENTS.get("streaming")(student, tiny.tokenizer, config, using)["streaming"]
    beside = found["teacher_window"]
    assert found["bytes"] <= beside["bytes"] <= 1.2 * found["bytes"]
    assert beside["constant"]
    assert "4096 positions" in beside["protocol"]
    low, high = found["against_teacher"]["interval"]
    assert low <= found["against_teacher"]["ratio"] <= high
    assert found["against_teacher"]["ratio"] == pytest.approx(found["ppl"] / beside["ppl"], rel=1e-6)
    assert found["off"]["against_on"]["ratio"] == pytest.approx(found["off"]["ppl"] / found["ppl"], rel=1e-6)
    assert found["off"]["ppl"] != found["ppl"]


def test_the_teacher_s_window_has_the_student_s_bytes(tiny):
    for size in (5_000, 60_000, 400_000):
        options = window_of(tiny.model, size)
        model = copy.deepcopy(tiny.model)
        swap(model, SwapSpec(dict.fromkeys(range(4), options)))
        stream = Stream(model)
        stream.feed(ids_of(10))
        assert size <= stream.bytes() <= size + 2 * options.block * 1024 + 1024
        with torch.autocast("cpu", dtype=torch.bfloat16):  # where an ordinary cache is wider than a window
            half = window_of(tiny.model, size)
            swap(model := copy.deepcopy(tiny.model), SwapSpec(dict.fromkeys(range(4), half)))
            stream = Stream(model)
            stream.feed(ids_of(10))
        assert size <= stream.bytes() <= size + 2 * half.block * 1024 + 1024
    assert window_of(tiny.model, 10**9).window + 32 == 4096


def test_a_model_whose_state_grows_is_not_streamed(tiny, config, documents):
    using = yardstick(tiny.tokenizer, config, documents)
    found = MEASUREMENTS.get("streaming")(tiny.model, tiny.tokenizer, config, using)["streaming"]
    assert found["ppl"] is None
    assert "4 layers with full attention" in found["why"]


def test_a_student_without_a_teacher_says_so(student, tiny, config, monkeypatch):
    monkeypatch.setattr(
        "eval.measurements.streaming.load_model", lambda _: type(tiny)(copy.deepcopy(student), None, {})
    )
    beside = teacher_window(config, student, tiny.tokenizer, [1, 2, 3], None, 1000)
    assert beside["ppl"] is None
    assert "no teacher" in beside["why"]


# Answers


def test_generated_answers_and_ranks(tiny):
    """What the model would say next ranks first and is generated; one character off is not."""
    row = ids_of(40, seed=4)
    stream = Stream(tiny.model)
    logits = stream.feed(row)[0, -1]
    best = int(logits.argmax())
    ranked = rank(stream, logits, _OneToken(best), ["true", "0", "1"])
    assert ranked == 1
    assert rank(stream, logits, _OneToken(best), ["0", "true", "1"]) > 1
    assert stream.tokens == 40
    before = cache_bytes(stream.cache)
    rank(stream, logits, tiny.tokenizer, ["house", "river"])
    assert cache_bytes(stream.cache) == before


class _OneToken:
    """A tokenizer for which `true` is one token and a digit that token plus one."""

    def __init__(self, best: int) -> None:
        self.best = best

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [self.best] if "true" in text else [(self.best + 1 + int(text)) % 300]}

    def decode(self, ids):
        return "x"


class _Says:
    """A stream that goes on with the given ids, whatever it is fed."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = iter(ids)

    def next(self) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(next(self.ids, 0)), 512).float()

    def feed(self, row):
        return self.next()[None, None]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (" 12345.", True),
        ("12345 and", True),
        (" 123456", False),
        (" 12346", False),
        (" 1234", False),
        ("\n12345\n", True),
        (" the 12345", False),
    ],
)
def test_an_answer_is_a_whole_word_at_the_beginning(tiny, said, expected):
    ids = tiny.tokenizer(said, add_special_tokens=False)["input_ids"]
    stream = _Says(ids)
    assert generates(stream, stream.next(), tiny.tokenizer, "12345") is expected


def test_the_rank_is_that_of_whole_forwards(student, tiny):
    """Likelihoods after a stream are those of one forward of text and value."""
    row = ids_of(50, seed=2)
    values = ["house", "river number", "known", "1234567"]
    stream = Stream(student)
    found = rank(stream, stream.prefill(row)[0, -1], tiny.tokenizer, values)
    scores = []
    for value in values:
        ids = torch.tensor([tiny.tokenizer(" " + value)["input_ids"]])
        with torch.inference_mode():
            logits = student(input_ids=torch.cat([row, ids], 1), use_cache=False).logits[0, 49:-1]
        scores.append(float(logits.log_softmax(-1).gather(1, ids.T).sum()))
    assert found == sum(score >= scores[0] for score in scores)


# Needles


def test_a_needle_inside_the_window_is_flagged(student, tiny, config, documents):
    """The planted cheat: with a window as long as the tail, the needle at the very end is seen exactly."""
    using = yardstick(tiny.tokenizer, config, documents)
    grid = MEASUREMENTS.get("niah")(student, tiny.tokenizer, config, using)["niah_grid"]
    by_depth = {cell["depth"]: cell for cell in grid["cells"]}
    assert by_depth[100]["proves_nothing"] is True
    assert "window" in by_depth[100]["why"]
    assert "off" not in by_depth[100]
    assert by_depth[50]["proves_nothing"] is False
    assert len(by_depth[50]["off"]["hits"]) == 1
    mean = grid["means"][0]
    assert (mean["cells"], mean["of"]) == (2, 3)
    assert mean["episodes"] == 2
    assert mean["all"]["episodes"] == 3


def test_nothing_counts_where_a_layer_keeps_full_attention(tiny, config, documents):
    using = yardstick(tiny.tokenizer, config, documents)
    grid = MEASUREMENTS.get("niah")(tiny.model, tiny.tokenizer, config, using)["niah_grid"]
    assert all(cell["proves_nothing"] for cell in grid["cells"])
    assert grid["means"][0]["exact"] is None
    assert "full attention" in grid["means"][0]["why"]


def test_flagged_cells_stay_out_of_the_means():
    def cell(depth: float, hit: int, flagged: bool) -> dict:
        return {
            "form": "sentence", "length": 64, "depth": depth, "exact": float(hit), "hits": [hit],
            "ranks": [1 if hit else 7], "proves_nothing": flagged, "why": "w",
        }  # fmt: skip

    (mean,) = niah_means([cell(0, 0, False), cell(100, 1, True)])
    assert mean["exact"] == 0.0
    assert mean["all"]["exact"] == 0.5


def test_sinks_prove_nothing_either():
    reach = Reach(limit=None, replaced=(OPTIONS,))
    assert reach.proves_nothing(slice(1, 9), 400) == "the needle lies among the sinks"
    assert reach.proves_nothing(slice(2, 9), 400) is None
    start = reach.exact_from(399)
    assert reach.proves_nothing(slice(start - 8, start), 400) is None
    assert reach.proves_nothing(slice(start - 8, start + 1), 400) == "the needle lies inside the exact window"


# Pass keys, cost, and all of them in a phase


def test_passkeys_go_beyond_the_positions_at_constant_bytes(student, tiny, config, documents):
    using = yardstick(tiny.tokenizer, config, documents)
    found = MEASUREMENTS.get("passkey")(student, tiny.tokenizer, config, using)["passkey_long"]
    assert [mean["length"] for mean in found["means"]] == [300, 5000]
    assert len({cell["bytes"] for cell in found["cells"]}) == 1
    assert all(len(cell["hits"]) == 1 for cell in found["cells"])
    assert all(len(cell["off"]["hits"]) == 1 for cell in found["cells"])
    teacher = MEASUREMENTS.get("passkey")(tiny.model, tiny.tokenizer, config, using)["passkey_long"]
    assert teacher["means"][0]["exact"] in (0.0, 1.0)
    assert teacher["means"][1]["exact"] is None
    assert "4096 positions" in teacher["means"][1]["why"]


def test_the_cost_of_a_context(student, tiny, config):
    rows = {}
    for name, model in (("student", student), ("teacher", tiny.model)):
        cost = MEASUREMENTS.get("speed")(model, tiny.tokenizer, config, None)["cost"]
        rows[name] = {row["length"]: row for row in cost["rows"]}
    assert rows["student"][40]["bytes"] == rows["student"][5000]["bytes"]
    assert rows["teacher"][5000]["bytes"] == 125 * rows["teacher"][40]["bytes"]
    assert rows["teacher"][5000]["first_token_seconds"] is None
    for row in (*rows["student"].values(), rows["teacher"][40]):
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_tokens_per_second"] > 0
        assert row["peak_bytes"] > row["bytes"]


def test_the_peak_is_what_is_held_at_once():
    kept = torch.zeros(1000)

    def work() -> None:
        first = kept + 1  # 4,000 bytes
        second = first.view(10, 100) + 1  # a view costs nothing
        del first
        second = second * 2  # the old one lives until the new one is there
        kept.add_(second.sum())

    assert 8000 <= peak_bytes(torch.device("cpu"), work) < 8200
    with torch.inference_mode():
        assert 8000 <= peak_bytes(torch.device("cpu"), work) < 8200


def test_a_phase_has_what_its_set_names(student, tiny, config, documents):
    chosen = copy.deepcopy(config)
    chosen.eval.more = ["niah", "speed"]
    chosen.eval.speed_lengths = [40]
    using = yardstick(tiny.tokenizer, chosen, documents)
    found = measure(student, tiny.tokenizer, chosen, phase="stage1", final=True, using=using)
    assert {"niah_grid", "cost", "seconds"} <= set(found)
    assert "perplexity" not in found


# Configuration


@pytest.mark.parametrize(
    ("name", "more"),
    [("streaming", ["streaming"]), ("passkey", ["passkey"]), ("niah", ["niah"]), ("speed", ["speed"])],
)
def test_each_is_a_set_of_its_own(name, more):
    chosen = compose([f"eval={name}"]).eval
    assert (chosen.base, chosen.more) == ("none", more)
    check_eval(chosen, Config().attention)


def test_full_has_all_of_them():
    assert {"streaming", "passkey", "niah", "speed"} <= set(compose(["eval=full"]).eval.more)
    assert compose(["eval=standard"]).eval.base == "quick"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.niah_depths=[0,150]", ["eval.niah_depths=150", "0 (the start of the text) to 100"]),
        ("eval.niah_depths=[-1]", ["eval.niah_depths=-1"]),
        ("eval.niah_lengths=[32]", ["eval.niah_lengths=32", "sentence"]),
        ("eval.niah_lengths=[]", ["eval.niah_lengths=[]"]),
        ("eval.niah_forms=[haiku]", ["eval.niah_forms='haiku'", "multikey_3"]),
        ("eval.niah_episodes=0", ["eval.niah_episodes=0"]),
        ("eval.passkey_lengths=[128]", ["eval.passkey_lengths=128", "attention.window"]),
        ("eval.passkey_lengths=[512,512]", ["eval.passkey_lengths=[512, 512]"]),
        ("eval.stream_tokens=1", ["eval.stream_tokens=1", "2 tokens or more"]),
        ("eval.speed_lengths=[0]", ["eval.speed_lengths=0"]),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(override, words):
    config = compose(["eval=passkey", override])
    with pytest.raises(UserError) as refused:
        check_eval(config.eval, config.attention)
    said = str(refused.value)
    assert all(word in said for word in words), said
    assert said.count(". ") == 0


def test_lengths_of_what_is_not_asked_for_are_not_looked_at():
    config = compose(["eval=niah", "eval.passkey_lengths=[128]"])
    check_eval(config.eval, config.attention)


def test_a_prompt_is_read_up_to_the_answer(student, tiny, config, documents):
    using = yardstick(tiny.tokenizer, config, documents)
    from eval.niah import Cell

    episode = using.make(Cell(300, 0.5, "passkey", "train", "filler"), random.Random(1))
    stream, logits = read_prompt(student, episode, reach_of(student))
    assert stream.tokens == episode.answer.start
    with torch.inference_mode():
        whole = student(input_ids=episode.input_ids[None], use_cache=False).logits
    torch.testing.assert_close(logits, whole[0, episode.answer.start - 1], atol=2e-4, rtol=1e-4)
