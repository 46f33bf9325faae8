"""How `moestro show` draws a profile: the atlas as a page, one figure as a picture, the cache curves behind both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.cli.output import emit, progress, say, size

if TYPE_CHECKING:
    from moestro.profile.profile import Profile

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
POLICIES = ("lru", "lfu")


def write_atlas(file: Path, html: Path, model: str | None, cache_tokens: int, quiet: bool, as_json: bool) -> None:
    """Draw all of a profile in one page."""
    from moestro.profile.atlas.contents import contents
    from moestro.profile.atlas.page import write
    from moestro.profile.profile import Profile

    made = Profile.open(file)
    text = _text(made, model, quiet)
    curves = cache_curves(made, cache_tokens, quiet or as_json)
    data = contents(made, name=_name(made, model), text=text, curves=curves)
    nbytes = write(data, html)
    if as_json:
        emit({"output": str(html), "bytes": nbytes, "warnings": data["warnings"], "missing": data["missing"]})
        return
    if not quiet:
        say(*data["warnings"])
        if lacking := dict.fromkeys(row["probe"] for row in data["missing"] if row["probe"]):
            say("parts of the atlas are empty; they need the probes " + "; ".join(lacking))
    print(f"{html}: {size(nbytes)}")


def draw_figure(file: Path, figure: str, output: Path, cache_tokens: int, quiet: bool, as_json: bool) -> None:
    """Draw one figure into a picture."""
    from moestro.cli.arguments import method_choice
    from moestro.profile.atlas.pictures import draw
    from moestro.profile.profile import Profile

    made = Profile.open(file)
    name, options = method_choice(figure)
    curves = cache_curves(made, cache_tokens, quiet or as_json) if name == "cache" else None
    draw(made, name, output, options, curves)
    if as_json:
        emit({"output": str(output), "figure": name, "options": options})
    else:
        print(output)


def cache_curves(made: Profile, tokens: int, quiet: bool) -> dict[str, Any] | None:
    """Hit rates by policy and cache size when so many of the trace's tokens are decoded one by one; None without trace or tokens."""
    from moestro.core.method import card_of, load
    from moestro.engine.replay import BELADY, sweep
    from moestro.profile.atlas.sample import as_decoded

    if made.trace is None or not made.trace.tokens or not tokens:
        return None
    trace = as_decoded(made.trace, tokens)
    all_experts, most = int(made.experts_L.sum()), int(made.top_k_L.max())
    budgets = [share for share in SHARES if share * all_experts >= most]
    policies = [*(card_of(load(name, "eviction")).name for name in POLICIES), BELADY]
    with progress("replaying", "runs", quiet) as report:
        done = sweep(trace, None, budgets, policies, progress=report)
    slots = [slots for _, slots in done.budgets]
    lines = [
        {"policy": row["eviction"].rsplit(".", 1)[-1], "routing": row["routing"], "slots": slots, "hit_rate": row["hit_rate"]}
        for row in done.rows()
    ]
    return {"tokens": trace.tokens, "experts": done.experts, "lines": lines}


def _name(made: Profile, model: str | None) -> str:
    return Path(model or str(made.info.get("model_name", ""))).name


def _text(made: Profile, model: str | None, quiet: bool) -> Callable[[int], str] | None:
    """What a token id says, by the tokenizer of MODEL, or of the model as it was named to `moestro profile` if that is at hand."""
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe
    from moestro.models.hub import locate
    from moestro.models.tokenizer import Tokenizer

    folder = locate(model) if model is not None else _at_hand(str(made.info.get("model_name", "")))
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    fingerprint = describe(Checkpoint.open(folder)).facts.fingerprint
    if model is not None:
        made.check_model(fingerprint)
    elif fingerprint != made.model:
        if not quiet:
            say(f"{folder} is not the profiled model any more: tokens are shown as ids; name the model with --model")
        return None
    tokenizer = Tokenizer.open(folder)

    def text(token: int) -> str:
        # Some decoders drop the blank before the first token; after itself a token has it.
        once, twice = tokenizer.decode([token], skip_special=False), tokenizer.decode([token, token], skip_special=False)
        return twice[len(once) :] if twice.startswith(once) else once

    return text


def _at_hand(name: str) -> Path | None:
    """The folder of a model that needs no download, or None."""
    if not name:
        return None
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        found = try_to_load_from_cache(repository, "tokenizer.json", revision=revision or None)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
