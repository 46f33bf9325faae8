"""Real text that every Python install has, by domain: for calibration and tests that must not download anything, and as a first training text.

Always there (from the standard library and the installed packages' own files):
  documentation   docstrings of standard-library modules, classes and functions, and pydoc's language reference where it is installed
  code            standard-library source without its docstrings and comments
  sessions        interactive examples (`>>> ...` and what they print) out of the same docstrings
  names           Unicode character names, thousands of short upper-case phrases
  licences        licence texts of the installed distributions
Only where message catalogues are found (gettext .mo files under the prefix or /usr/share, as desktop and server systems have, slim
images not): one domain per language, 'language.de' and so on. A bare Python carries no prose in any language but English.
The same install gives the same text every time.
"""

from __future__ import annotations

import ast
import doctest
import gettext
import importlib.metadata
import importlib.util
import struct
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import MappingProxyType

from moestro.core.errors import InputError

# Pure Python, old, with long docstrings or sources, in every 3.11 to 3.14; read as text, never imported.
MODULES = (
    "_collections_abc", "_pydecimal", "_pyio", "abc", "argparse", "ast", "base64", "bdb", "bisect", "calendar", "cmd", "codecs",
    "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "difflib", "dis", "doctest", "email.message", "enum",
    "filecmp", "fractions", "ftplib", "functools", "gettext", "heapq", "html.parser", "http.client", "http.cookiejar", "imaplib",
    "inspect", "ipaddress", "json.decoder", "locale", "logging", "mailbox", "mimetypes", "multiprocessing.pool", "numbers", "optparse",
    "pathlib", "pdb", "pickle", "pickletools", "platform", "plistlib", "poplib", "pprint", "pydoc", "queue", "random", "selectors",
    "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "traceback", "types", "typing", "unittest.case",
    "unittest.mock", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "xml.dom.minidom", "xmlrpc.client", "zipfile",
)  # fmt: skip
LANGUAGES = ("de", "fr", "es", "it", "pt_BR", "nl", "pl", "ru", "ja", "zh_CN")
ENOUGH = 20_000  # characters; a language with fewer is not offered


def domains() -> tuple[str, ...]:
    """The domains of this machine: the five that every install has, then the languages found."""
    return (*_DOMAINS, *(f"language.{code}" for code in LANGUAGES if size(f"language.{code}", at_most=ENOUGH) >= ENOUGH))


def text(domain: str, characters: int, *, skip: int = 0) -> str:
    """Exactly `characters` characters of a domain after the first `skip`. Use `skip` to hold text out.

    Raises InputError for an unknown domain or when the domain has less text than that.
    """
    found, have = [], 0
    for piece in _pieces(domain):
        found.append(piece)
        have += len(piece)
        if have >= skip + characters:
            return "".join(found)[skip : skip + characters]
    raise InputError(
        f"the domain {domain!r} has {have} characters on this machine", expected=f"{skip + characters} or more",
        fix=f"take fewer, or another domain: {', '.join(_DOMAINS)}",
    )  # fmt: skip


def whole(domain: str) -> str:
    """All text of a domain. Raises InputError for an unknown one."""
    return "".join(_pieces(domain))


def size(domain: str, *, at_most: int = 10_000_000) -> int:
    """Characters of a domain; counting stops at `at_most`."""
    have = 0
    for piece in _pieces(domain):
        have += len(piece)
        if have >= at_most:
            return at_most
    return have


def _pieces(domain: str) -> Iterable[str]:
    if domain in _DOMAINS:
        return _DOMAINS[domain]()
    kind, _, code = domain.partition(".")
    if kind == "language" and code in LANGUAGES:
        return _language(code)
    raise InputError(
        f"there is no text domain {domain!r}", expected=", ".join([*_DOMAINS, *(f"language.{code}" for code in LANGUAGES)])
    )


def _sources() -> Iterator[str]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        base = stdlib.joinpath(*name.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                yield path.read_text(encoding="utf-8")
                break


def _documents() -> Iterator[str]:
    """Every docstring of the modules, in order."""
    for source in _sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                doc := ast.get_docstring(node)
            ):
                yield doc


def _documentation() -> Iterator[str]:
    for doc in _documents():
        if ">>>" not in doc and len(doc) >= 80:  # examples are a domain of their own
            yield doc + "\n\n"
    spec = importlib.util.find_spec("pydoc_data")  # some distributions leave it out
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(place) / "topics.py").is_file():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            values = (node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
            for topics in values:
                yield from (ast.literal_eval(value) + "\n\n" for value in topics.values)


def _code() -> Iterator[str]:
    for source in _sources():
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and ast.get_docstring(node) is not None
            ):
                node.body = node.body[1:] or [ast.Pass()]
        yield ast.unparse(tree) + "\n\n"


def _sessions() -> Iterator[str]:
    parser = doctest.DocTestParser()
    for doc in _documents():
        try:
            examples = parser.get_examples(doc)
        except ValueError:  # a docstring that only looks like a session
            continue
        for example in examples:
            first, *more = example.source.splitlines()
            yield "\n".join([f">>> {first}", *(f"... {line}" for line in more), example.want])


def _names() -> Iterator[str]:
    for code in range(sys.maxunicode + 1):
        if (name := unicodedata.name(chr(code), "")) and not name.startswith(("CJK UNIFIED", "HANGUL SYLLABLE", "CJK COMPAT")):
            yield name + "\n"


def _licences() -> Iterator[str]:
    seen: set[str] = set()
    found = sorted(importlib.metadata.distributions(), key=lambda d: (str(d.name).lower(), d.version))
    for distribution in found:
        for file in sorted(distribution.files or (), key=str):
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")) and file.suffix in (
                "",
                ".txt",
                ".md",
                ".rst",
            ):
                try:
                    content = file.locate().read_text(encoding="utf-8")  # type: ignore[union-attr]
                except (OSError, UnicodeDecodeError):
                    continue
                if content not in seen:
                    seen.add(content)
                    yield content + "\n\n"


def _language(code: str) -> Iterator[str]:
    """Translated messages of every catalogue of a language, each message once."""
    roots = sorted({Path(sys.base_prefix) / "share" / "locale", Path("/usr/share/locale"), Path("/usr/local/share/locale")})
    files = [file for root in roots for file in sorted(root.glob(f"{code}/LC_MESSAGES/*.mo"))]
    files += sorted(Path("/usr/share").glob(f"vim/vim*/lang/{code}/LC_MESSAGES/*.mo"))
    seen: set[str] = set()
    for file in files:
        try:
            with open(file, "rb") as f:
                catalogue = gettext.GNUTranslations(f)
        except (OSError, ValueError, LookupError, struct.error):
            continue
        messages: dict[object, str] = getattr(catalogue, "_catalog", {})
        for key, message in messages.items():
            if key != "" and message != key and len(message) >= 20 and message not in seen:
                seen.add(message)
                yield message.strip() + "\n"


_DOMAINS: MappingProxyType[str, Callable[[], Iterator[str]]] = MappingProxyType(
    {"documentation": _documentation, "code": _code, "sessions": _sessions, "names": _names, "licences": _licences}
)
