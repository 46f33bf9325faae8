"""run: prompts from everywhere, answers on stdout, statistics on stderr, plans, stores, traces and chats."""

from __future__ import annotations

import pytest

from moestro.cli.prompts import model_and_prompt
from moestro.core.errors import InputError
from moestro.core.trace import Trace


@pytest.fixture
def run(moestro, tiny, plan):
    """moestro run TINY ... --plan PLAN, eight tokens if nothing else is said."""

    def call(*arguments, stdin=b""):
        tokens = () if "-n" in arguments else ("-n", 8)
        return moestro("run", tiny, *arguments, "--plan", plan, "--ignore-eos", *tokens, stdin=stdin)

    return call


def dense_answer(tiny, prompt: str, tokens: int) -> list[int]:
    """What transformers itself generates greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    from moestro.models.tokenizer import Tokenizer

    ids = Tokenizer.open(tiny).encode(prompt)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-tokens:]


def test_the_answer_is_transformers_own(run, tiny):
    done = run("--raw", "-p", "Once upon a time", "--json")
    assert done.code == 0
    answer = done.json["answers"][0]
    assert answer["tokens"] == dense_answer(tiny, "Once upon a time", 8)
    assert answer["prompt"] == "Once upon a time" and answer["finish"] == "length"
    statistics = done.json["statistics"]
    assert statistics["exact"] is True and statistics["changes"] == [] and statistics["generated_tokens"] == 8
    assert 0 < statistics["decode_hit_rate"] < 1 and statistics["decode_bytes"] > 0
    assert done.json["plan"]["slots"] == [7]


def test_the_answer_goes_to_stdout_and_the_account_to_stderr(run):
    done = run("Hello")
    whole = run("Hello", "--json").json
    assert done.code == 0 and done.out.rstrip("\n") == whole["answers"][0]["text"].rstrip("\n")
    for words in ("tokens at", "in memory", "read per token", "peak memory", "EXACT"):
        assert words in done.err
    quiet = run("Hello", "--quiet")
    assert quiet.out == done.out and quiet.err == ""


def test_prompts_from_everywhere_are_the_same(run):
    wanted = run("Hello").out
    assert run("-p", "Hello").out == wanted
    assert run("-", stdin=b"Hello\n").out == wanted
    assert run(stdin=b"Hello\n").out == wanted
    assert run("-p", "-", stdin=b"Hello").out == wanted
    assert run("--raw", "Hello").out != wanted, "the chat template changes the prompt"
    assert run("Hello", "--system", "Be brief").out != wanted


def test_equal_seeds_give_equal_answers(run):
    flags = (
        "--raw",
        "Hello",
        "--temperature",
        1.5,
        "--top-p",
        0.95,
        "--top-k",
        50,
        "--min-p",
        0.01,
        "--repetition-penalty",
        1.1,
        "-n",
        16,
    )
    first = run(*flags, "--seed", 3).out
    assert run(*flags, "--seed", 3).out == first
    assert run(*flags, "--seed", 4).out != first


def test_stop_strings_end_the_answer(run):
    text = run("Hello", "-n", 12, "--json").json["answers"][0]["text"]
    stop = text[4:6]
    done = run("Hello", "-n", 12, "--stop", stop, "--json").json["answers"][0]
    assert done["finish"] == "stop" and done["text"] == text[: text.index(stop)]


def test_batch_answers_every_line(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hello\n\nOnce upon a time\n")
    done = run("--batch", tmp_path / "prompts.txt", "--json").json
    assert [a["prompt"] for a in done["answers"]] == ["Hello", "Once upon a time"]
    alone = run("Hello", "--json").json
    assert done["answers"][0]["tokens"] == alone["answers"][0]["tokens"]
    text = run("--batch", tmp_path / "prompts.txt").out
    assert text.startswith("[1] Hello\n") and "\n[2] Once upon a time\n" in text


def test_trace_is_recorded_shown_and_replayed(run, moestro, tiny, tmp_path):
    path = tmp_path / "talk.trace"
    done = run("Hello", "--trace", path, "--json").json
    trace = Trace.open(path)
    assert trace.model == done["fingerprint"] and trace.tokens == done["statistics"]["prompt_tokens"] + 7
    assert moestro("show", path).code == 0
    report = moestro(
        "replay", path, tiny, "--policies", "lru", "--no-null", "--budgets", str(7 / sum(trace.num_experts)), "--json"
    ).json
    counted = next(r for r in report["reports"] if r["eviction"] == "engine.evict.lru")
    assert counted["slots"] == [7]
    assert counted["decode"]["hit_rate"] == done["statistics"]["decode_hit_rate"], "replay agrees with the live run"


def test_a_packed_store(run, moestro, tiny, plan, tmp_path):
    done = moestro("apply", plan, "-o", tmp_path / "store", "--json")
    assert done.code == 0 and done.json["codec"] == "stored" and done.json["experts"] == 12
    assert done.json["bytes"] == sum(f.stat().st_size for f in (tmp_path / "store").iterdir())
    assert run("Hello", "--store", tmp_path / "store").out == run("Hello").out
    assert moestro("apply", plan, "-o", tmp_path / "half", "--codec", "f16").code == 0
    refused = run("Hello", "--store", tmp_path / "half")
    assert refused.code == 2 and "codec" in refused.err, "that is not the store of this plan"
    done = moestro("run", tiny, "Hello", "--store", tmp_path / "half", "-m", "16GiB", "-n", 4)
    assert done.code == 0 and "SHRUNK" in done.err and "f16" in done.err


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (("-",), b"", "empty"),
        (("",), b"", "empty"),
        (("Hello", "--temperature", -1), b"", "temperature"),
        (("Hello", "--top-p", 2), b"", "top_p"),
        (("Hello", "-n", 0), b"", "max_tokens"),
        (("Hello", "--memory", "1GiB"), b"", "plan"),
        (("Hello", "--memory", "lots"), b"", "lots"),
        (("Hello", "--batch", "prompts.txt"), b"", "--batch"),
        (("Hello", "again"), b"", "quotes"),
    ],
)
def test_options_and_prompts_that_cannot_be_used(run, arguments, stdin, said):
    done = run(*arguments, stdin=stdin)
    assert done.code == 2 and done.out == "" and said in done.err and "Traceback" not in done.err


def test_which_word_is_the_model(tmp_path):
    assert model_and_prompt([], None) == (None, None)
    assert model_and_prompt(["Why is the sky blue?"], None) == (None, "Why is the sky blue?")
    assert model_and_prompt(["hello"], None) == (None, "hello")
    assert model_and_prompt(["-"], None) == (None, "-")
    assert model_and_prompt(["and/or what?"], None) == (None, "and/or what?")
    assert model_and_prompt(["org/name"], None) == ("org/name", None)
    assert model_and_prompt(["org/name@main"], None) == ("org/name@main", None)
    assert model_and_prompt([str(tmp_path)], None) == (str(tmp_path), None)
    assert model_and_prompt(["./not-there"], None) == ("./not-there", None)
    assert model_and_prompt(["not-there.gguf"], None) == ("not-there.gguf", None)
    assert model_and_prompt(["what is in a model.gguf"], None) == (None, "what is in a model.gguf")
    assert model_and_prompt(["anything", "hello"], None) == ("anything", "hello")
    assert model_and_prompt(["anything"], "hello") == ("anything", "hello")
    with pytest.raises(InputError):
        model_and_prompt(["a", "b", "c"], None)


def test_a_closed_pipe_ends_the_run_quietly(process):
    with process("Hello", "-n", 100, "--temperature", 1) as running:
        running.stdout.read(1)
        running.stdout.close()
        err = running.stderr.read()
    assert running.returncode != 0 and b"Traceback" not in err


def test_chat(chat):
    code, out, err = chat("Hello\n", "\n", "/help\n", "And then?\n", "/clear\n", "Hello\n", "/exit\n", "never\n")
    answers = out.rstrip("\n")
    assert code == 0 and err.count(" tokens at ") == 5 and "/exit" in err, "a line after each answer and two of the account"
    first = chat("Hello\n").out.rstrip("\n")
    assert answers.startswith(first) and answers.endswith(first), "the first and the third answer are to the same conversation"
    assert "answer 18 tokens at" in err, "the account is of all three answers"
    for words in ("in memory", "read per token", "peak memory", "EXACT"):
        assert words in err[err.index("answer 18") :]


def test_json_and_raw_need_a_prompt(chat):
    for flag in ("--json", "--raw"):
        done = chat(flags=(flag,))
        assert done.code == 2 and "no prompt" in done.err


def test_without_a_model_the_embedded_one_runs_in_half_of_its_size_or_the_least_that_works(moestro, monkeypatch, tiny):
    monkeypatch.setattr("moestro.build.upcycle.default.ensure_default_model", lambda progress=None: tiny)
    done = moestro("run", "Hello there", "-n", 4, "--ctx-size", 100, "--json")
    assert done.code == 0 and done.json["model"] == str(tiny) and done.json["answers"][0]["prompt"] == "Hello there"
    assert "half of the model is not enough here" in done.err, "torch alone takes more than half of a tiny model"
    assert done.json["plan"]["memory"]["budget"] < 8 * 2**30
