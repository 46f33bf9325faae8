"""Runners as lm-eval sees them: the numbers are those of lm-eval's own model and of stock transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.layer import Runner
from moestro.engine.engine import Engine
from moestro.evaluate.tasks import TaskModel
from moestro.models.open import open_model
from moestro.models.tokenizer import Tokenizer
from moestro.testing.tiny import save_tiny, write_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and packs my box with five dozen liquor jugs " * 3
CONTEXT = 96


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=a, task_name="t") for a in arguments]


def write_words(folder: Path, kind: str) -> None:
    """A trained tokenizer in place of the one of characters: 'bytes' as GPT-2's, 'pieces' as Llama's with a first token and byte fallback."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    write_tokenizer(folder, 400)
    if kind == "characters":
        return
    special = ["<pad>", "<s>", "</s>"]
    if kind == "bytes":
        made = Backend(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet))
    else:
        fallback = [f"<0x{b:02X}>" for b in range(256)]
        made = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.train_from_iterator(
            [WORDS], trainers.BpeTrainer(vocab_size=380, special_tokens=[*special, "<unk>", *fallback], max_token_length=9)
        )
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        plain = json.loads(made.to_str())
        plain["added_tokens"] = [t for t in plain["added_tokens"] if not t["content"].startswith("<0x")]
        made = Backend.from_str(json.dumps(plain))
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=["characters", "bytes", "pieces"])
def pair(request, tmp_path_factory) -> tuple[Any, Any, Path]:
    """(our view of a tiny model, lm-eval's own view of it, its folder)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny("mixtral", folder, vocab_size=400, max_position_embeddings=CONTEXT)
    write_words(folder, request.param)
    return TaskModel(open_model(folder), Tokenizer.open(folder)), stock(folder), folder


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own model and accelerate: not under test
        from lm_eval.models.huggingface import HFLM

        module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return HFLM(pretrained=module, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1, device="cpu")


REQUESTS = [
    ("the quick brown", " fox"),
    ("the quick brown", " fox jumps over"),
    ("the quick brown ", "dog"),  # the space goes to the continuation
    ("the quick brown", " five"),
    ("the lazy dog", "gy dozen"),
    ("", "with five"),
    ("<s>the quick", " box"),  # its first token is there already
    ("my box\n", "und über € 3"),
    (WORDS * 3, " and packs"),  # longer than the context
]


def test_likelihoods_are_those_of_lm_eval(pair):
    ours, theirs, _ = pair
    cut = ours.cut
    got, want = (model.loglikelihood(asked(*REQUESTS), disable_tqdm=True) for model in pair[:2])
    assert [a for a, _ in got] == pytest.approx([a for a, _ in want], abs=2e-4) and [g for _, g in got] == [g for _, g in want]
    assert [ours._encode_pair(c, k) if c else None for c, k in REQUESTS] == [
        theirs._encode_pair(c, k) if c else None for c, k in REQUESTS
    ]
    assert ours.cut == cut + 1, "one request lost its beginning"
    assert ours.loglikelihood([]) == []


def test_likelihoods_of_texts_are_those_of_lm_eval(pair):
    texts = [("the quick",), (WORDS,), ("über",), (WORDS * 2 + "fox",)]
    got, want = (model.loglikelihood_rolling(asked(*texts), disable_tqdm=True) for model in pair[:2])
    assert got == pytest.approx(want, abs=1e-3)


def test_answers_are_those_of_lm_eval(pair):
    ours, theirs, _ = pair
    first = ours.generate_until(asked(("the quick", {"until": [], "max_gen_toks": 12})), disable_tqdm=True)[0]
    assert len(first) > 3
    settings = [
        {"until": [first[2:4]], "max_gen_toks": 12},
        {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False, "temperature": 1.0},
        {"until": "fox", "max_new_tokens": 20},
    ]
    wanted = asked(*((text, s) for text in ("the quick", "the quick brown", WORDS) for s in settings))
    assert ours.generate_until(wanted, disable_tqdm=True) == theirs.generate_until(wanted, disable_tqdm=True)
    (stopped,) = ours.generate_until(asked(("the quick", settings[0])), disable_tqdm=True)
    assert first.startswith(stopped) and len(stopped) <= 2


def naive(module: Any, ids: list[int], count: int) -> tuple[float, bool]:
    """By one pass over everything."""
    with torch.no_grad():
        logits_TV = module(input_ids=torch.tensor([ids])).logits[0, -count - 1 : -1].double()
    wanted = torch.tensor(ids[-count:])
    taken = logits_TV.log_softmax(-1).gather(1, wanted[:, None])
    return float(taken.sum()), bool((logits_TV.argmax(-1) == wanted).all())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "lfm2_moe"])
def test_what_is_read_once_counts_as_if_it_were_read_again(family, tmp_path):
    """Both runners, with windows of attention and with recurrent states, against one pass of the module for each request."""
    torch.set_num_threads(1)
    changes = {"sliding_window": 32} if family == "mixtral" else {}
    module = save_tiny(family, tmp_path, **changes)
    text = Tokenizer.open(tmp_path)
    contexts = ("the quick brown fox", "the quick brown dog sat", WORDS[:70])
    wanted = [(c, k) for c in contexts for k in (" a", " b", " far beyond the last hill")]
    ids = [(text.encode(c + k), len(k)) for c, k in wanted]
    with Engine.open(tmp_path, context=128, threads=1) as engine:
        for runner in (open_model(tmp_path), engine):
            assert isinstance(runner, Runner)
            got = TaskModel(runner, text).loglikelihood(asked(*wanted), disable_tqdm=True)
            for (logp, greedy), row in zip(got, ids, strict=True):
                want, best = naive(module, *row)
                assert logp == pytest.approx(want, rel=2e-4) and greedy == best
            said = TaskModel(runner, text).generate_until(
                asked(*((c, {"until": [], "max_gen_toks": 3}) for c in contexts)), disable_tqdm=True
            )
            for context, answer in zip(contexts, said, strict=True):
                now = text.encode(context)
                for _ in range(3):
                    with torch.no_grad():
                        now.append(int(module(input_ids=torch.tensor([now])).logits[0, -1].argmax()))
                    if now[-1] in (*text.eos_ids, 2):
                        now.pop()
                        break
                before = text.encode(context)
                assert answer == text.decode(now[len(before) :])
                if written := now[len(before) :]:
                    assert TaskModel(runner, text)._loglikelihood_tokens([(None, before, written)], True)[0][1], "the likeliest"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"do_sample": True, "temperature": 0.7}, "temperature 0.7"),
        ({"temperature": 0.2}, "temperature 0.2"),
        ({"num_beams": 4}, "num_beams 4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty 1.2"),
        ({"max_gen_toks": CONTEXT}, "less than the context"),
    ],
)
def test_settings_are_obeyed_or_refused(pair, settings, said):
    with pytest.raises(InputError, match=said):
        pair[0].generate_until(asked(("the", {"until": [], **settings})), disable_tqdm=True)


def test_chats(pair):
    ours, theirs, folder = pair
    chat = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown "}]
    for going in (True, False):
        assert ours.apply_chat_template(chat[: 1 if going else 2], going) == theirs.apply_chat_template(
            chat[: 1 if going else 2], going
        )
    assert ours.chat_template(True) == theirs.chat_template(True) and ours.chat_template(False) is None
    assert folder.name in ours.tokenizer_name and "/" not in ours.tokenizer_name


def test_what_cannot_be_asked(pair):
    with pytest.raises(InputError, match="the likelihood of 0 tokens"):
        pair[0].loglikelihood(asked(("the", "")), disable_tqdm=True)
    with pytest.raises(InputError, match="the likelihood of"):
        pair[0].loglikelihood(asked(("the", WORDS * 4)), disable_tqdm=True)


def test_the_package_imports_without_lm_eval_and_torch():
    code = (
        "import sys\nsys.modules.update(dict.fromkeys(('lm_eval', 'datasets', 'torch', 'transformers')))\n"
        "import moestro.evaluate, moestro.evaluate.comparison, moestro.cli.eval, moestro.cli.harness, moestro.cli.main\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
