"""Chat templates: a conversation as the text a model was trained on.

Source: `transformers` 5 `utils/chat_template_utils.py`; the same sandbox, filters and functions, so the same text comes out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from moestro.core.errors import CheckpointError, InputError
from moestro.models.checkpoint import read_json

_REASONING = ("reasoning_content", "thinking", "reasoning")


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A model's chat templates by name, 'default' being the usual one. config: its tokenizer_config.json. Raises CheckpointError."""
    found: dict[str, str] = {}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = _text(folder / "chat_template.jinja")
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        found[file.stem] = _text(file)
    if found:
        return found
    stored = config.get("chat_template")
    if stored is None and (folder / "chat_template.json").is_file():
        stored = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(stored, str):
        return {"default": stored}
    try:
        return {str(row["name"]): str(row["template"]) for row in stored or ()}
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"the chat_template in {folder / 'tokenizer_config.json'} is a {type(stored).__name__}",
            expected="a template, or a list of names and templates",
        ) from error


def choose(templates: Mapping[str, str], name: str | None, tools: bool) -> str:
    """The template to use: by name, else 'tool_use' with tools, else 'default'. Raises InputError when there is none."""
    if not templates:
        raise InputError(
            "this model has no chat template",
            expected="a model tuned for chat",
            fix="give a plain prompt instead of messages, put a chat_template.jinja into its folder, or use its -Instruct version",
        )
    wanted = name or ("tool_use" if tools and "tool_use" in templates else "default")
    if wanted not in templates:
        raise InputError(f"this model has no chat template named {wanted!r}", expected=f"one of {', '.join(sorted(templates))}")
    return templates[wanted]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The conversation as text. variables: special tokens and whatever else the template reads.

    Raises InputError when the template refuses the messages, CheckpointError when the template itself is broken.
    """
    import jinja2

    if not messages or not all(isinstance(m, Mapping) for m in messages):
        raise InputError("a chat needs a list of one or more messages", expected="objects with `role` and `content`")
    try:
        compiled = _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"the model's chat template cannot be read: {error} (line {error.lineno})", fix="use another revision of the model"
        ) from error
    rows = [_aliased({k: v for k, v in m.items() if v is not None}) for m in _plain(list(messages))]
    plain = {name: _plain(value) for name, value in {"tools": tools, "documents": documents, **variables}.items()}
    try:
        return compiled.render(messages=rows, add_generation_prompt=add_generation_prompt, **plain)
    except Exception as error:  # a template can fail in any way that an expression can
        raise InputError(
            f"the model's chat template refuses these messages: {error}",
            expected="roles and contents that the model knows, usually user and assistant in turn",
        ) from error


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here it only lets them through."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Refuses names that start with an underscore: untrusted templates must not reach Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
            self, *rest = args
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"the template sets {name!r} on a namespace")

    class Dict:
        """`dict` for templates, without the type's own attributes."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = Dict()
    environment.globals["namespace"] = Namespace
    return environment


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning goes by several names; templates read `reasoning_content` or, GPT-OSS's, `thinking`."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Plain data only: objects with methods have no place in a sandbox. Raises InputError."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else [_plain(i) for i in value]
    raise InputError(f"a chat cannot hold a {type(value).__name__}", expected="text, numbers, lists and objects, as in JSON")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", fix="download the model's files again") from error
