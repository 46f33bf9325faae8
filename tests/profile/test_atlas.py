"""The atlas: its data against the profile's statistics, and the page in a browser."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest

from moestro.core.errors import InputError, ProfileError
from moestro.core.method import load
from moestro.profile.atlas.contents import contents, packed, top_ids
from moestro.profile.atlas.links import MOST, links
from moestro.profile.atlas.maps import KINDS, maps
from moestro.profile.atlas.page import page, write
from moestro.profile.atlas.pictures import FIGURES, draw
from moestro.profile.atlas.sample import as_decoded, sample
from moestro.profile.atlas.usage import usage
from tests.cli.conftest import moestro  # noqa: F401
from tests.profile import browser, make

CHEAP = ("counts", "gates", "coactivation", "transitions", "usage", "tokens", "sequences", "entropy")
EVIL = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>&amp;"
CURVES = {
    "tokens": 9,
    "experts": 28,
    "lines": [
        {"policy": "lru", "routing": "trace", "slots": [3, 14], "hit_rate": [0.25, 0.625]},
        {"policy": "belady", "routing": "uniform", "slots": [3, 14], "hit_rate": [0.375, 0.75]},
    ],
}


@pytest.fixture(scope="module")
def profiled(case):
    return case.profile(*CHEAP, "norms", "similarity", "maxima", trace_weights=True)


def words(token: int) -> str:
    return f" w{token}" + (EVIL if token % 5 == 0 else "")


@pytest.fixture(scope="module")
def told(profiled):
    return contents(profiled, name="planted", text=words, curves=CURVES)


@pytest.fixture(scope="module")
def shown(told, tmp_path_factory):
    path = tmp_path_factory.mktemp("atlas") / "atlas.html"
    write(told, path)
    return path


def unpack(data, name):
    array = data["arrays"][name]
    return np.frombuffer(base64.b64decode(array["base64"]), f"<{array['kind']}").reshape(array["shape"])


def test_maps_are_the_statistics(profiled):
    made = {m.name: m for m in maps(profiled)[0]}
    arrays, tokens_G = profiled.arrays, np.array(profiled.tokens_G)
    assert set(made) == {k.name for k in KINDS} - {"contribution", "fires"}
    share = made["share"]
    assert share.labels == ("", "a", "b", "c")
    assert np.array_equal(share.values_MLE[0], arrays["counts_LE"] / profiled.tokens)
    assert np.array_equal(share.values_MLE[1:], arrays["usage_GLE"] / tokens_G[:, None, None])
    assert np.allclose(np.nanmean(made["load"].values_MLE, axis=2), 1)
    seen = arrays["counts_LE"] > 0
    assert np.array_equal(np.isfinite(made["weight"].values_MLE[0]), seen)
    assert np.allclose((made["weight"].values_MLE[0] * arrays["counts_LE"])[seen], arrays["mass_LE"][seen])
    lift = made["lift"]
    assert lift.labels == ("a", "b", "c") and lift.diverging
    there = np.isfinite(lift.values_MLE)
    assert np.allclose((2**lift.values_MLE * share.values_MLE[:1])[there], share.values_MLE[1:][there])
    assert np.isnan(made["next"].values_MLE[0, -1]).all() and np.nanmax(made["next"].values_MLE) <= 1
    for layer, row in enumerate(arrays["together_LEE"]):
        for e in np.flatnonzero(seen[layer]):
            assert made["partner"].values_MLE[0, layer, e] == max(np.delete(row[e], e)) / arrays["counts_LE"][layer, e]


def test_layers_of_different_width_have_no_number_outside():
    counts_LE = np.array([[3, 1, 0, 0], [1, 1, 1, 1]])
    p = make.profile({"counts_LE": counts_LE}, layers=(make.layer(2), make.layer(4)), tokens_G=(4,))
    (share, load_), missing = maps(p)[0], maps(p)[1]
    assert np.isnan(share.values_MLE[0, 0, 2:]).all() and np.array_equal(load_.values_MLE[0, 0, :2], [1.5, 0.5])
    assert {k.name for k in missing} >= {"weight", "norm"}


def test_links_are_the_strongest_pairs(profiled):
    found = {li.name: li for li in links(profiled)}
    assert set(found) == {"together", "similar", "next", "before", "flow"}
    next_LEE = profiled.arrays["next_LEE"]
    for e in range(next_LEE.shape[1]):
        kept = found["next"].experts_LEN[0, e] >= 0
        named = found["next"].experts_LEN[0, e][kept]
        assert (
            list(found["next"].values_LEN[0, e][kept])
            == list(next_LEE[0, e][named])
            == sorted(next_LEE[0, e])[::-1][: len(named)]
        )
        assert len(named) == min(MOST, np.count_nonzero(next_LEE[0, e]))
        assert e not in found["together"].experts_LEN[0, e] and e not in found["similar"].experts_LEN[0, e]
    assert np.array_equal(found["before"].values_LEN[0, :, 0], next_LEE[0].max(0))


def test_intervals_are_the_measures(profiled):
    found = usage(profiled, draws=60)
    rows = load("profile.measures.label_usage", "measure")(profiled, draws=60).rows
    assert len(rows) == 18 and min(found.sequences_G) > 1
    for label, layer, expert, share, low, high, drawn_low, drawn_high, _ in rows:
        at = (profiled.labels.index(label), layer, expert)
        assert found.share_GLE[at] == share
        assert found.low_GLE[at] == pytest.approx(min(low, max(0, drawn_low)))
        assert found.high_GLE[at] == pytest.approx(max(high, min(1, drawn_high)))


def test_ids_of_an_expert(profiled):
    found = top_ids(profiled)
    by_token, ids = profiled.arrays["by_token_ILE"], profiled.arrays["token_ids_I"].tolist()
    for layer, expert in ((0, 0), (1, 5)):
        counts = by_token[:, layer, expert]
        often = found["ids.often.counts"][layer, expert]
        assert list(often) == sorted(counts)[::-1][: len(often)]
        for i, n in zip(found["ids.own.ids"][layer, expert], found["ids.own.counts"][layer, expert]):
            assert i < 0 or (counts[ids.index(i)] == n and profiled.arrays["token_counts_I"][ids.index(i)] >= 8)


def test_a_sample_has_every_label_and_every_expert_that_fits():
    experts_LTK = np.zeros((2, 600, 1), np.int64)
    experts_LTK[1, 290:] = 1
    experts_LTK[0, 590] = 3  # far behind the stretch of its sequence
    trace = make.trace(experts_LTK, 4, lengths=[300, 300], info={"data": "d", "labels": ["x", "y"], "label_of_sequence": [1, 0]})
    read = sample(trace)
    assert read.labels_X[:2] == ("y", "x") and len(read.rows_N) > 512
    assert 590 in read.rows_N and 3 in experts_LTK[0, read.rows_N]
    assert all(read.sequences_X[x] == (0 if read.rows_N[at] < 300 else 1) for x, at in enumerate(read.starts_X))
    few = sample(trace, 100)
    assert len(few.rows_N) <= 50


def test_a_decoded_trace_takes_one_token_a_pass_from_labels_in_turn():
    ids = np.arange(24).reshape(1, 24, 1) % 4
    trace = make.trace(ids, 4, lengths=[8, 8, 8], info={"labels": ["x", "y"], "label_of_sequence": [0, 0, 1]})
    got = as_decoded(trace, 12)
    assert got.sequences_T.tolist() == [0] * 8 + [2] * 4 and len(list(got.steps())) == 12
    assert not got.prefill_T.any() and np.array_equal(got.experts_LTK[0, 8:, 0], ids[0, 16:20, 0])


@pytest.mark.parametrize("values", [[0, 255], [-1, 300], [0, 70000], [-1, 40000], [0, 2**33], [0.1, float("nan")]])
def test_arrays_are_packed_without_loss(values):
    array = np.array(values)
    got = unpack({"arrays": {"x": packed(array)}}, "x")
    assert np.array_equal(got, array, equal_nan=array.dtype.kind == "f")


def test_what_a_profile_lacks_is_said():
    told = contents(make.profile({"counts_LE": np.array([[60, 40, 0, 0]])}))
    missing = {(row["what"], row["probe"]) for row in told["missing"]}
    assert {("comparison of labels", "usage"), ("map of output norm", "norms"), ("measure srp", "trace")} <= missing
    assert "2 of 4 experts never chosen:" in told["warnings"] and any("no trace" in line for line in told["warnings"])
    assert told["curves"] is None and "unfinished" not in " ".join(told["warnings"])


def test_super_experts_are_warned_of():
    most = np.ones((4, 80))
    most[1, 7] = 200
    arrays = {"counts_LE": np.full((4, 80), 100), "output_most_LE": most}
    told = contents(make.profile(arrays, layers=(make.layer(80),) * 4, tokens_G=(8000,)))
    assert [line for line in told["warnings"] if "super" in line] == [
        "layer 1, expert 7 is a super expert: its largest output, 200, is 200 times the median. Removing or crushing it may ruin the model."
    ]


def test_extreme_layers_without_a_super_expert_are_warned_of():
    """Five copies with the same extreme output hide one another from the measure's percentile."""
    most = np.ones((4, 80))
    most[1, :5] = 200
    arrays = {"counts_LE": np.full((4, 80), 100), "output_most_LE": most}
    told = contents(make.profile(arrays, layers=(make.layer(80),) * 4, tokens_G=(8000,)))
    (line,) = [line for line in told["warnings"] if "super" in line]
    assert line.startswith("layer 1 has outputs of up to 200, 200 times the median")
    even = contents(make.profile(arrays | {"output_most_LE": np.ones((4, 80))}, layers=(make.layer(80),) * 4, tokens_G=(8000,)))
    assert not any("outputs of up to" in line for line in even["warnings"])


def test_the_page_holds_nothing_but_itself(told, shown):
    text = shown.read_text("utf-8")
    assert (
        not re.search(r"""(src|href)=["'](?!#|data:,)""", text) and "default-src 'none'" in text and "http://www.w3.org" in text
    )
    assert set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}  # the name of SVG, which is no address
    assert text.count("</script>") == 2 and "onerror=window" in told["texts"]["0"]
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data == json.loads(json.dumps(told))
    assert page(told | {"name": "half a character \ud800"}).encode()


def test_a_large_model_stays_small(tmp_path):
    """64 experts, 16 layers, 8 slots, six labels, a full trace: under 5 MB."""
    rng, (layers, experts, slots, tokens, ids) = np.random.default_rng(0), (16, 64, 8, 4096, 256)
    chosen = rng.random((layers, tokens, experts)).argsort(2)[:, :, :slots]
    hot = np.zeros((layers, tokens, experts), np.float32)
    np.put_along_axis(hot, chosen, 1, 2)
    counts = hot.sum(1).astype(int)
    pairs = (hot[:-1].transpose(0, 2, 1) @ hot[1:]).astype(int)
    square = rng.random((layers, experts, experts))
    arrays = {
        "counts_LE": counts, "mass_LE": counts * 0.3, "usage_GLE": np.stack([counts // 6] * 6), "usage_mass_GLE": np.stack([counts / 20] * 6),
        "together_LEE": (hot.transpose(0, 2, 1) @ hot).astype(int), "next_LEE": pairs, "next_first_LEE": pairs,
        "by_token_ILE": rng.integers(0, 99, (ids, layers, experts)), "token_ids_I": np.arange(ids), "token_counts_I": np.full(ids, 99),
        "ranks_LKE": np.stack([counts] * slots, 1), "norm_LE": counts * 0.1, "gated_norm_LE": counts * 0.1, "worked_LE": counts,
        "output_most_LE": counts * 0.1, "contribution_LE": counts * 0.1, "hsic_LEE": square + square.transpose(0, 2, 1),
        "cosine_LEE": square, "compared_L": np.ones(layers, int),
    }  # fmt: skip
    trace = make.trace(
        np.tile(chosen, (1, 4, 1)), experts, lengths=[256] * 64, tokens_T=np.arange(4 * tokens, dtype=np.int32) % 3000
    )
    made = make.profile(
        arrays, layers=(make.layer(experts, slots),) * layers, labels=tuple("uvwxyz"), tokens_G=(tokens // 6,) * 6, trace=trace
    )
    assert write(contents(made, text=lambda i: f" token {i}"), tmp_path / "large.html") < 5_000_000


@pytest.mark.skipif(browser.BROWSER is None, reason=browser.REASON)
def test_in_a_browser(profiled, told, shown):
    """Every view draws without an error; cells, dots and links carry the profile's numbers; filters, keys and themes work."""
    out, errors = browser.play(
        shown,
        """
        for (const view of ["map", "expert/1/5", "flow/0", "text/0/1", "labels/1", "cache", "measures", "notes"]) await go(view);
        out.views = all("main > section").filter((s) => s.children.length).length;
        const cells = () => all("#view-map .cell").map((c) => [c.dataset.layer, c.dataset.expert, c.dataset.value, c.dataset.off].map(Number));
        await go("map/share/"); out.share = cells();
        await go("map/lift/b"); out.lift = all("#view-map .cell").map((c) => c.dataset.value);
        await go("map/share/"); await set(document.querySelector("#view-map input[type=number]"), 20);
        out.filtered = cells(); out.shown = document.getElementById("map-shown").textContent;
        await set(document.querySelector("#view-map input[type=number]"), 0); await set(document.querySelector("#view-map input[type=search]"), "W3");
        out.found = cells(); await set(document.querySelector("#view-map input[type=search]"), "");
        await set(all("#view-map select")[2], "value"); out.sorted = all("#view-map .row:first-child .cell").map((c) => Number(c.dataset.value));
        await set(all("#view-map select")[2], "number"); await set(all("#view-map select")[1], "c"); out.address = location.hash;
        const first = document.querySelector("#view-map .cell"); first.focus();
        for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        out.walked = [document.activeElement.dataset.layer, document.activeElement.dataset.expert, all("#view-map .cell[tabindex='0']").length];
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true })); out.opened = location.hash;
        await go("expert/1/5");
        out.numbers = Object.fromEntries(all("#view-expert [data-map]").map((s) => [s.dataset.map, s.dataset.value]));
        out.links = all("#view-expert [data-link]").map((s) => [s.dataset.link, Number(s.dataset.expert), Number(s.dataset.value)]);
        out.ids = all("#view-expert [data-id]").map((s) => [s.dataset.kind, Number(s.dataset.id), Number(s.dataset.count)]);
        out.contexts = all("#view-expert .context mark").map((m) => m.textContent);
        out.context_tokens = all("#view-expert .context").map((m) => Number(m.dataset.token));
        await go("labels/1"); out.dots = all("#view-labels [data-key]").map((g) => [g.dataset.key, Number(g.dataset.value), Number(g.dataset.low), Number(g.dataset.high)]);
        await set(document.querySelector("#view-labels input[type=checkbox]"), false); out.fewer = all("#view-labels [data-key]").length;
        await go("flow/0"); out.flow = all("#view-flow [data-from]").map((p) => [p.dataset.from, p.dataset.to, p.dataset.value].map(Number));
        await set(document.querySelector("#view-flow input[type=range]"), 0.5); out.strong = all("#view-flow [data-from]").length;
        await go("text/0/1"); out.text = all("#view-text [data-token]").map((s) => Number(s.dataset.heaviest));
        const third = all("#view-text [data-token]")[2]; third.focus();
        out.weights = all("#view-text .readout [data-weight]").map((s) => Number(s.dataset.weight));
        out.weighed = document.querySelector("#view-text .readout").textContent;
        await go("text/0/1/5"); out.chosen = all("#view-text [data-chosen='1']").map((s) => Number(s.dataset.token));
        await go("measures"); out.measured = all("#view-measures [data-measure]").map((d) => [d.dataset.measure, d.querySelectorAll("tbody tr").length]);
        out.objects = all("main > section").map((s) => s.textContent.match(/.{0,40}\\[object.{0,20}/)?.[0]).filter(Boolean);
        await go("cache"); out.hits = all("#view-cache [data-hit]").map((s) => Number(s.dataset.hit));
        out.curve = all("#view-cache [data-line]").map((s) => [s.dataset.line, Number(s.dataset.x), Number(s.dataset.y)]);
        await go("notes"); out.missing = document.getElementById("missing").textContent;
        const back = () => getComputedStyle(document.body).backgroundColor; out.light = back();
        document.getElementById("theme").click(); out.dark = back(); document.getElementById("theme").click(); out.again = back();
        await go("expert/99/x"); out.clamped = document.querySelector("#view-expert h2").textContent;
        dispatchEvent(new Event("beforeprint")); out.pwned = window.pwned === undefined ? 0 : 1; out.wide = document.documentElement.scrollWidth - innerWidth;
        """,
    )
    assert errors == [] and out["views"] == 8 and out["pwned"] == 0 and out["wide"] <= 0
    counts_LE, usage_GLE = profiled.arrays["counts_LE"], profiled.arrays["usage_GLE"]
    assert all(value == counts_LE[int(la), int(e)] / profiled.tokens for la, e, value, _ in out["share"])
    assert len(out["share"]) == counts_LE.size
    lift = next(m for m in maps(profiled)[0] if m.name == "lift").values_MLE[1]
    assert np.array_equal([float(v) if v else np.nan for v in out["lift"]], lift.reshape(-1), equal_nan=True)
    assert all(off == (counts_LE[int(la), int(e)] < 20) for la, e, _, off in out["filtered"])
    assert out["shown"].startswith(f"{(counts_LE >= 20).sum()} of ") and 0 < (counts_LE < 20).sum() < counts_LE.size
    having = unpack(told, "ids.often.ids"), unpack(told, "ids.own.ids")
    for la, e, _, off in out["found"]:
        near = {int(i) for ids in having for i in ids[int(la), int(e)] if i >= 0}
        assert off == (not any("w3" in words(i).lower() for i in near))
    assert out["sorted"] == sorted(out["sorted"], reverse=True) and out["address"] == "#map/share/c"
    assert out["walked"] == ["1", "2", 1] and out["opened"] == "#expert/1/2"
    for m in maps(profiled)[0]:
        if m.labels[0] == "":
            assert np.array_equal(float(out["numbers"][m.name]), m.values_MLE[0, 1, 5], equal_nan=True), m.name
    tables = {"together": profiled.arrays["together_LEE"][1, 5], "before": profiled.arrays["next_LEE"][0, :, 5]}
    for name, expert, value in out["links"]:
        assert name == "similar" or tables[name][expert] == value
    assert {"together", "before", "similar"} == {name for name, _, _ in out["links"]}
    ids = profiled.arrays["token_ids_I"].tolist()
    assert out["ids"] and all(profiled.arrays["by_token_ILE"][ids.index(i), 1, 5] == n for _, i, n in out["ids"])
    sampled = sample(profiled.trace)
    at_N = np.asarray(profiled.trace.experts_LTK)[1, sampled.rows_N]
    tokens_N = np.asarray(profiled.trace.tokens_T)[sampled.rows_N]
    assert out["contexts"] and all((at_N[n] == 5).any() for n in out["context_tokens"])
    assert out["contexts"] == [words(int(tokens_N[n])) for n in out["context_tokens"]]
    found = usage(profiled)
    assert len(out["dots"]) == usage_GLE[:, 1].size and out["fewer"] == usage_GLE[1:, 1].size
    for key, value, low, high in out["dots"]:
        at = tuple(map(int, key.split("/")))
        assert value == usage_GLE[at] / profiled.tokens_G[at[0]]
        assert (low, high) == pytest.approx((found.low_GLE[at], found.high_GLE[at]), abs=1e-7)
    first_EE = profiled.arrays["next_first_LEE"][0]
    assert out["flow"] and all(first_EE[i, j] == n and n >= 0.05 * first_EE[i].sum() for i, j, n in out["flow"])
    assert out["strong"] == (first_EE >= np.maximum(1, 0.5 * first_EE.sum(1, keepdims=True))).sum()
    end = sampled.starts_X[1]
    assert out["text"] == at_N[:end, 0].tolist() and out["chosen"] == np.flatnonzero((at_N[:end] == 5).any(1)).tolist()
    weights_K = np.asarray(profiled.trace.weights_LTK)[1, sampled.rows_N[2]].astype(float)
    assert (
        out["weights"] == np.rint(1000 * weights_K[at_N[2] >= 0]).tolist() and f"({round(weights_K[0], 3):g})" in out["weighed"]
    )
    assert out["measured"] == [[m["name"], len(m["rows"])] for m in told["measures"]] and out["objects"] == []
    assert sorted(out["hits"]) == [0.25, 0.375, 0.625, 0.75] and ["lru", 0.5, 0.625] in out["curve"]
    assert "contribution" in out["missing"] and "--probe neurons" in out["missing"]
    assert out["light"] == out["again"] != out["dark"] and out["clamped"] == "Expert 5 of layer 1"


@pytest.mark.skipif(browser.BROWSER is None, reason=browser.REASON)
def test_a_bare_profile_on_a_narrow_screen(tmp_path):
    """Nothing but counts: every view says what is missing, and nothing is wider than the screen."""
    write(contents(make.profile({"counts_LE": np.array([[60, 40, 0, 0]])})), tmp_path / "bare.html")
    out, errors = browser.play(
        tmp_path / "bare.html",
        """
        const seen = {};
        for (const view of ["map", "expert/0/2", "flow", "text", "labels", "cache", "measures", "notes"]) {
          await go(view); seen[view] = document.querySelector("main > section:not([hidden])").textContent;
          out.wide = Math.max(out.wide || 0, document.documentElement.scrollWidth - innerWidth); }
        out.seen = seen; out.none = all("#view-map .cell.none").length;
        """,
        width=500,
    )
    assert errors == [] and out["wide"] <= 0
    assert "--probe usage" in out["seen"]["labels"] and "--probe transitions" not in out["seen"]["flow"]  # one layer has no next
    assert "never chosen" in out["seen"]["expert/0/2"] and "no trace" in out["seen"]["text"] and "none" in out["seen"]["cache"]
    assert "2 of 4 experts never chosen" in out["seen"]["notes"]


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("ending", ["svg", "png"])
def test_pictures(profiled, tmp_path, figure, ending):
    path = tmp_path / f"{figure}.{ending}"
    draw(profiled, figure, path, curves=CURVES)
    assert path.read_bytes()[:5] == (b"<?xml" if ending == "svg" else b"\x89PNG\r")
    again = tmp_path / f"again.{ending}"
    draw(profiled, figure, again, curves=CURVES)
    assert path.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("figure", "options", "error", "message"),
    [
        ("none", {}, InputError, "no figure 'none'"),
        ("map", {"statistic": "x"}, InputError, "no map of 'x'"),
        ("map", {"statistic": "fires"}, ProfileError, "--probe neurons"),
        ("map", {"label": "z"}, InputError, "no label 'z'"),
        ("map", {"layer": 1}, InputError, "no option layer"),
        ("labels", {"layer": 2}, InputError, "0 to 1"),
        ("flow", {"layer": 1}, InputError, "0 to 0"),
        ("cache", {}, ProfileError, "no cache curves"),
    ],
)
def test_pictures_that_cannot_be(profiled, tmp_path, figure, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        draw(profiled, figure, tmp_path / "x.svg", options)
    assert not list(tmp_path.iterdir())


def test_the_command(case, tmp_path, moestro):  # noqa: F811
    words_of = [f"{d}{i % 16}" for d in "ab" for i in range(40)]
    (tmp_path / "a.txt").write_text(" ".join(words_of[:40]))
    (tmp_path / "b.txt").write_text(" ".join(words_of[40:]))
    file, html = tmp_path / "x.profile", tmp_path / "atlas.html"
    args = [
        "profile",
        case.planted.path,
        tmp_path / "a.txt",
        tmp_path / "b.txt",
        "-o",
        file,
        "--length",
        20,
        "--allow-unseen",
        "-q",
    ]
    assert moestro(*args).code == 0
    done = moestro("show", file, "--html", html, "--cache-tokens", 40, "--json")
    assert done.code == 0 and done.json["bytes"] == html.stat().st_size and done.json["missing"]
    data = json.loads(re.search(r'id="data">(.*?)</script>', html.read_text(), re.DOTALL)[1])
    assert "b3" in "".join(data["texts"].values()) and data["curves"]["tokens"] == 40  # the profiled model's own tokenizer
    by_policy = {(line["policy"], line["routing"]): line["hit_rate"] for line in data["curves"]["lines"]}
    assert all(b >= a for a, b in zip(by_policy["lru", "trace"], by_policy["belady", "trace"])) and len(by_policy) == 5
    assert moestro("show", file, "--html", html, "--cache-tokens", 0, "-q").code == 0
    assert '"curves":null' in html.read_text()
    assert moestro("show", file, "--figure", "map:statistic=load,label=b", "-o", tmp_path / "m.svg").code == 0
    assert moestro("show", file, "--figure", "cache", "-o", tmp_path / "c.png").code == 0
    for wrong, message in (
        (["--figure", "map"], "go together"),
        (["--html", html, "--measure", "balance"], "--measure and --html"),
        (["--model", case.planted.path], "is for the page"),
        (["--figure", "map", "-o", tmp_path / "m.txt"], "ends in .png, .svg, .pdf"),
        (["--html", tmp_path / "a.txt" / "x.html"], "cannot write the atlas"),
    ):
        done = moestro("show", file, *wrong)
        assert done.code == 2 and message in done.err, wrong


def test_another_models_tokenizer_is_refused(case, tmp_path, moestro):  # noqa: F811
    file = tmp_path / "x.profile"
    made = case.profile("counts")
    make.dataclasses.replace(made, model="f" * 64, trace=None).save(file)
    done = moestro("show", file, "--html", tmp_path / "a.html", "--model", case.planted.path)
    assert done.code == 2 and "made with the model ffffffffffff" in done.err
    assert moestro("show", file, "--html", tmp_path / "a.html").code == 0
