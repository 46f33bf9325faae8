import os
import signal
import threading

import numpy as np
import pytest

from moestro.core.errors import InputError
from moestro.engine.generate import StopText
from moestro.engine.sample import SamplingParams

PROMPT = [int(t) for t in np.random.default_rng(3).integers(4, 98, 12)]
LONG = SamplingParams(max_tokens=60, temperature=1.5, seed=4, ignore_eos=True)


@pytest.mark.parametrize("pieces", [["abcSTOPdef"], list("abcSTOPdef"), ["ab", "cS", "TO", "Pd", "ef"], ["abcST", "OPdef"]])
def test_a_stop_string_is_found_across_pieces_and_never_shown(pieces):
    stop = StopText(["STOP", "never"])
    shown = ""
    for piece in pieces:
        shown += stop.feed(piece)
        assert not set("STOP") & set(shown)
        if stop.stopped:
            break
    assert stop.stopped and shown == "abc" and stop.flush() == ""


def test_what_only_looks_like_a_stop_string_comes_out_whole():
    stop = StopText(["aab", "xyz"])
    shown = [stop.feed(c) for c in "aaacxyaa"]
    assert shown[:4] == ["", "", "a", "aac"]
    assert "".join(shown) + stop.flush() == "aaacxyaa" and not stop.stopped


def test_the_earliest_of_several_stop_strings_counts():
    stop = StopText(["cd", "bcd"])
    assert stop.feed("abcd") == "a"


def test_events_join_to_the_result_and_decode_to_its_text(tiny, engine):
    made = engine(tiny("mixtral")[0])
    generation = made.generate([PROMPT, PROMPT[:4]], LONG)
    texts, tokens = ["", ""], [[], []]
    for event in generation:
        texts[event.sequence] += event.text
        tokens[event.sequence] += event.tokens
    assert [r.text for r in generation.results] == texts
    assert [r.tokens for r in generation.results] == tokens
    assert [r.finish for r in generation.results] == ["length", "length"]
    assert texts[0] == made.tokenizer.decode(tokens[0])


def test_stop_text_ends_the_answer(tiny, engine):
    made = engine(tiny("mixtral")[0])
    whole = made.generate(PROMPT, LONG).run()[0].text
    stop = whole[20:23]
    at = whole.find(stop)
    result = made.generate(PROMPT, SamplingParams(max_tokens=60, temperature=1.5, seed=4, ignore_eos=True, stop=(stop,))).run()[0]
    assert result.finish == "stop" and result.text == whole[:at] and len(result.tokens) < 60


def test_an_end_token_ends_the_answer_and_is_not_shown(tiny, engine):
    made = engine(tiny("mixtral")[0])
    free = made.generate(PROMPT, LONG).run()[0]
    end = free.tokens[9]
    made.tokenizer.eos_ids = (end,)
    result = made.generate(PROMPT, SamplingParams(max_tokens=60, temperature=1.5, seed=4)).run()[0]
    first = free.tokens.index(end)
    assert result.finish == "eos" and result.tokens == free.tokens[: first + 1]
    assert result.text == made.tokenizer.decode(free.tokens[:first])


def test_text_and_chat_prompts(tiny, engine):
    made = engine(tiny("mixtral")[0])
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    ids = made.tokenizer.encode("hello there")
    assert made.generate("hello there", params).run()[0].tokens == made.generate(ids, params).run()[0].tokens
    chat = [{"role": "user", "content": "hi"}]
    assert made.generate(chat, params).run()[0].prompt_tokens == len(made.tokenizer.chat(chat))
    assert len(made.generate(["one", "two"], params).run()) == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), (list(range(3, 120)) * 3, "351 tokens"), ([5, 4000], "outside"), ([[5], []], "prompt 1 is empty")],
)
def test_impossible_prompts_are_refused_before_any_work(prompt, message, tiny, engine):
    made = engine(tiny("mixtral")[0])
    with pytest.raises(InputError, match=message):
        made.generate(prompt)
    assert made.cache.table.counts().demands == 0


def test_the_context_ends_the_answer(tiny, engine):
    made = engine(tiny("mixtral")[0], context=20)
    result = made.generate(PROMPT, LONG).run()[0]
    assert result.finish == "context" and len(result.tokens) + len(PROMPT) == 20
    with pytest.raises(InputError, match="--context"):
        made.generate(PROMPT * 2)


@pytest.mark.parametrize("after", [0, 5])
def test_ctrl_c_returns_what_there_is_and_the_engine_goes_on(after, tiny, engine):
    made = engine(tiny("mixtral")[0], "minimal", trace=True)
    expected = made.generate(PROMPT, LONG).run()[0]
    before = signal.getsignal(signal.SIGINT)
    generation = made.generate([PROMPT, PROMPT], LONG)
    calls = []
    run = made.dispatch.run

    def interrupting(*args):
        calls.append(args)
        if len(calls) == 1 + after * 3 + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return run(*args)

    made.dispatch.run = interrupting
    events = list(generation)
    made.dispatch.run = run
    assert signal.getsignal(signal.SIGINT) is before
    assert generation.interrupted and [r.finish for r in generation.results] == ["interrupted", "interrupted"]
    assert generation.results[0].tokens == expected.tokens[:after]
    assert "".join(e.text for e in events if e.sequence == 0) == generation.results[0].text
    assert generation.statistics is not None and generation.statistics.generated_tokens == after
    assert made.generate(PROMPT, LONG).run()[0].tokens == expected.tokens
    trace = made.trace()  # whole passes only
    assert (trace.experts_LTK >= 0).all() and trace.tokens == 2 * (12 + 59) + (12 + max(0, after - 1) if after else 0)


def test_a_generation_may_run_outside_the_main_thread(tiny, engine):
    made = engine(tiny("mixtral")[0])
    expected, found = made.generate(PROMPT, LONG).run()[0].tokens, []
    thread = threading.Thread(target=lambda: found.extend(made.generate(PROMPT, LONG).run()[0].tokens))
    thread.start()
    thread.join()
    assert found == expected


def test_an_abandoned_generation_leaves_the_engine_usable(tiny, engine):
    made = engine(tiny("mixtral")[0])
    expected = made.generate(PROMPT, LONG).run()[0].tokens
    for number, _ in enumerate(made.generate(PROMPT, LONG)):
        if number == 3:
            break
    assert made.generate(PROMPT, LONG).run()[0].tokens == expected


def test_statistics(tiny, engine):
    made = engine(tiny("mixtral")[0], "minimal", batch=2)
    generation = made.generate([PROMPT, PROMPT[:5]], SamplingParams(max_tokens=10, ignore_eos=True))
    generation.run()
    said = generation.statistics
    assert (said.prompt_tokens, said.generated_tokens, said.decode_tokens) == (17, 20, 18)
    assert said.prefill_seconds > 0 and said.decode_rate > 0 and 0 <= said.decode_hit_rate < 1
    assert said.bytes_per_token * 18 == pytest.approx(said.decode_bytes)
    assert said.peak_memory > 50 << 20
    assert said.exact and "EXACT" in said.summary()
    assert said.to_json()["decode_rate"] == said.decode_rate
    narrow = engine(tiny("mixtral")[0], dtype="bfloat16").generate(PROMPT, SamplingParams(max_tokens=2))
    narrow.run()
    assert not narrow.statistics.exact and "rounded to bfloat16" in narrow.statistics.summary()


def test_tokens_alone_need_no_tokenizer(tmp_path, tiny, engine):
    folder, _ = tiny("mixtral")
    expected = engine(folder).generate(PROMPT, SamplingParams(max_tokens=8)).run()[0].tokens
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    made = engine(tmp_path)
    result = made.generate(PROMPT, SamplingParams(max_tokens=8), text=False).run()[0]
    assert result.tokens == expected and result.text == ""
    assert made.eos_ids == {2}
    with pytest.raises(InputError, match="stop strings"):
        made.generate(PROMPT, SamplingParams(stop=("x",)), text=False)
