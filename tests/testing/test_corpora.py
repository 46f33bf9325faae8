"""Text of several domains on this machine: enough of it, the same each time, and unlike the other domains'."""

from __future__ import annotations

import ast
import itertools
from collections import Counter

import pytest

from moestro.core.errors import InputError
from moestro.testing import corpora

ALWAYS = ("documentation", "code", "sessions", "names", "licences")


def test_five_domains_are_everywhere_and_large_enough() -> None:
    assert corpora.domains()[:5] == ALWAYS
    for domain, least in zip(ALWAYS, (300_000, 500_000, 30_000, 300_000, 40_000), strict=True):
        assert corpora.size(domain, at_most=least) == least


@pytest.mark.parametrize("domain", ALWAYS)
def test_text_is_exact_repeatable_and_can_be_held_out(domain: str) -> None:
    whole = corpora.text(domain, 6000)
    assert len(whole) == 6000 and whole == corpora.text(domain, 6000)
    assert corpora.text(domain, 2000, skip=4000) == whole[4000:]
    assert sum(not c.isspace() for c in whole) > 3000


def test_domains_are_what_they_say() -> None:
    prose, code, sessions = (corpora.text(domain, 20_000) for domain in ALWAYS[:3])
    assert prose.count(" the ") > 100 > code.count(" the ")
    assert code.count("return ") > 50 and '"""' not in code
    assert sessions.count(">>> ") > 100 and ">>> " not in prose
    names = corpora.text("names", 20_000)
    assert names.upper() == names and "LATIN SMALL LETTER A\n" in names
    assert "copyright" in corpora.text("licences", 20_000).lower()


def test_code_is_code() -> None:
    first = corpora.text("code", 3000).split("\n\nclass ")[0]
    assert ast.parse(first).body


def test_letters_tell_the_domains_apart() -> None:
    """Calibration by domain means nothing if the domains are alike: half of a domain is nearest to its other half."""

    def profile(text: str) -> Counter[str]:
        return Counter(map("".join, itertools.pairwise(text)))

    def distance(a: Counter[str], b: Counter[str]) -> float:
        return sum(abs(a[key] - b[key]) for key in a | b)

    names = [d for d in corpora.domains() if d in (*ALWAYS, "language.de", "language.fr")]
    first = {d: profile(corpora.text(d, 10_000)) for d in names}
    for d in names:
        second = profile(corpora.text(d, 10_000, skip=10_000))
        assert min(names, key=lambda other: distance(first[other], second)) == d


def test_languages_are_offered_only_where_they_are() -> None:
    for domain in corpora.domains()[5:]:
        assert domain.startswith("language.") and len(corpora.text(domain, corpora.ENOUGH)) == corpora.ENOUGH


def test_errors_say_what_there_is() -> None:
    with pytest.raises(InputError, match="documentation, code"):
        corpora.text("poems", 10)
    with pytest.raises(InputError, match="characters on this machine"):
        corpora.text("sessions", 10**9)
    with pytest.raises(InputError):
        corpora.text("language.klingon", 10)
