"""
The Modelfile: one template -> directives -> the text that people read and the layers Ollama loads.

A template (modelfiles/*.Modelfile.j2) is a Modelfile with jinja2 in it. Its first line is
`# version: N`, which a change of a prompt raises. `render` fills it in, `parse` reads the result,
`Modelfile.text` writes it for people and `Modelfile.layers` for Ollama, so that the two cannot say
different things. FROM, num_ctx and the options of the runner come from params.yaml and are refused
in a template.

`parse` reads what Ollama's own parser reads (parser/parser.go of 0.33), and refuses what that
parser would pass over in silence: a directive stated twice (the last wins), letters that it drops
(all but printable ones, even inside quotes: a no-break space, a zero-width joiner of an emoji), and
deprecated parameters (no effect).

    command   letters of any case at the start of a line, then one space or tab
    value     the rest of the line without spaces around; or a text in " or \"\"\", which ends at
              the first end of a line that closes it: neither can be escaped
    #         a comment, at the start of a line only

A value of `{{ }}` is put in after the text has been read: a licence of somebody else's cannot add a
directive, whatever quotes it holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, TypeAlias, cast

from pipelines import hashing
from pipelines.errors import ParamsError, Problem
from pipelines.marked_yaml import failure, shown_name
from pipelines.wording import did_you_mean, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

Value: TypeAlias = int | float | bool | tuple[str, ...]
Role: TypeAlias = Literal["system", "user", "assistant"]

MEDIA_TYPE: Final = "application/vnd.ollama.image."

# Every option and its type: api.Options and api.Runner of 0.33.
OPTIONS: Final[Mapping[str, type]] = MappingProxyType({
    "num_ctx": int, "num_batch": int, "num_gpu": int, "main_gpu": int, "use_mmap": bool,
    "num_thread": int, "draft_num_predict": int, "num_keep": int, "seed": int, "num_predict": int,
    "top_k": int, "top_p": float, "min_p": float, "typical_p": float, "repeat_last_n": int,
    "temperature": float, "repeat_penalty": float, "presence_penalty": float,
    "frequency_penalty": float, "stop": tuple,
})  # fmt: skip
# Options with another owner.
_DECLARED_ELSEWHERE: Final = {
    "num_gpu": "`serving.gpu_layers` of params.yaml",
    "num_thread": "`benchmark.threads` of params.yaml",
    "use_mmap": "the engine",
}
# parser.go: read, warned about, dropped.
_DEPRECATED: Final = frozenset({
    "penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "mirostat",
    "mirostat_tau", "mirostat_eta",
})  # fmt: skip
_COMMANDS: Final = (
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter",
    "message", "requires",
)  # fmt: skip
# What Ollama has and a model of the fleet has not.
_NOT_SERVED: Final = {
    "adapter": "an adapter is part of no GGUF that was measured",
    "draft": "a draft model is part of no GGUF that was measured",
    "renderer": "prompts are rendered by the GGUF's own chat template",
    "parser": "answers are read by the GGUF's own chat template",
    "requires": "the engine is declared in params.yaml",
}
_ROLES: Final = ("system", "user", "assistant")
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False"})

_VERSION: Final = re.compile(r"# version: ([1-9][0-9]{0,5})")
# Marks of our own inside a rendered text: a value to be put in, and the line of the template.
# Private-use letters, which no Modelfile may hold.
_HOLE: Final = re.compile("\ue000([0-9]+)\ue001")
_LINE: Final = re.compile("\ue002([0-9]+)\ue003")
_MARKS: Final = re.compile("[\ue000-\ue003]")
_MAX_BYTES: Final = 4 << 20
_HINT: Final = "modelfiles/README.md describes what a template may hold."


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn that is put before every conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One small file of a model: its media type and its bytes."""

    media_type: str
    data: bytes

    @property
    def sha256(self) -> str:
        """Its name, in lower-case hex."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Modelfile:
    """
    What a model is served with, beside its GGUF.

    Attributes:
        version: Of the template, raised when a prompt changes.
        parameters: Options by Ollama's names, each of the type in `OPTIONS`.
        system: System text for conversations without one of their own; never empty.
        template: A Go template that replaces the GGUF's own; None keeps that.
        licenses: Texts.
        messages: Turns before every conversation.
    """

    version: int
    parameters: Mapping[str, Value] = field(default_factory=dict)
    system: str | None = None
    template: str | None = None
    licenses: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()

    def with_parameters(self, added: Mapping[str, Value]) -> Modelfile:
        """
        Add options that others than the template own.

        Raises:
            ParamsError: One is stated already, with another value; or is none of Ollama's.
        """
        for name, value in added.items():
            if OPTIONS.get(name) is not type(value):
                raise ParamsError(f"{name} = {value!r} is no option of Ollama.")
            if self.parameters.get(name, value) != value:
                raise ParamsError(
                    f"{name} is {self.parameters[name]} in the Modelfile and {value} elsewhere.",
                    hint="Remove it from the template.",
                )
        return replace(self, parameters={**self.parameters, **added})

    def text(self, from_: str) -> str:
        """
        Write the Modelfile as people read it and as `ollama create` would.

        Args:
            from_: What FROM names: a file or a model.

        Raises:
            ParamsError: A text cannot be written: the grammar has no escape for \"\"\" at the end
                of a line, nor for letters that are not printable.
        """
        lines = [f"# version: {self.version}", f"FROM {from_}"]
        for name, value in sorted(self.parameters.items()):
            each = value if isinstance(value, tuple) else (_spelled(value),)
            lines += [_written(f"PARAMETER {name}", item) for item in each]
        if self.system is not None:
            lines.append(_written("SYSTEM", self.system))
        if self.template is not None:
            lines.append(_written("TEMPLATE", self.template))
        lines += [_written(f"MESSAGE {each.role}", each.content) for each in self.messages]
        lines += [_written("LICENSE", each) for each in self.licenses]
        return "\n".join(lines) + "\n"

    def layers(self) -> tuple[Layer, ...]:
        """
        Make the layers that Ollama loads, in a fixed order and with fixed bytes.

        Absent directives have no layer: in particular there is no template layer unless a TEMPLATE
        is declared, so that Ollama uses the GGUF's own (server/images.go, GetModel).
        """
        found = [("template", self.template), ("system", self.system)]
        found += [("license", each) for each in self.licenses]
        if self.parameters:
            found.append(("params", _json(dict(self.parameters))))
        if self.messages:
            turns = [{"content": each.content, "role": each.role} for each in self.messages]
            found.append(("messages", _json(turns)))
        return tuple(
            Layer(media_type=MEDIA_TYPE + kind, data=text.encode())
            for kind, text in found
            if text is not None
        )

    def digest(self) -> str:
        """The sha256 of all directives but FROM, in lower-case hex; the version is none."""
        return hashing.sha256_text(
            _json({
                "licenses": self.licenses,
                "messages": [[each.role, each.content] for each in self.messages],
                "parameters": dict(self.parameters),
                "system": self.system,
                "template": self.template,
            })
        )  # fmt: skip


def from_layers(layers: tuple[Layer, ...], *, version: int) -> Modelfile:
    """
    Read layers back: what Ollama would make of them.

    Raises:
        ParamsError: A layer is no JSON, not UTF-8, of another kind, or holds another option.
    """
    texts: dict[str, list[str]] = {}
    for layer in layers:
        kind = layer.media_type.removeprefix(MEDIA_TYPE)
        try:
            texts.setdefault(kind, []).append(layer.data.decode())
        except UnicodeDecodeError as error:
            raise ParamsError(f"The {kind} layer is not UTF-8.") from error
    unknown = set(texts) - {"template", "system", "license", "params", "messages"}
    if unknown:
        raise ParamsError(f"{', '.join(sorted(unknown))}: no layer of a Modelfile.")
    try:
        params = json.loads(texts.get("params", ["{}"])[-1])
        turns = json.loads(texts.get("messages", ["[]"])[-1])
        parameters = {
            name: tuple(value) if OPTIONS[name] is tuple else OPTIONS[name](value)
            for name, value in params.items()
        }
        messages = tuple(Message(role=turn["role"], content=turn["content"]) for turn in turns)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParamsError(f"A layer does not hold what its media type says: {error!r}.") from error
    return Modelfile(
        version=version,
        parameters=parameters,
        system=texts.get("system", [None])[-1],
        template=texts.get("template", [None])[-1],
        licenses=tuple(texts.get("license", ())),
        messages=messages,
    )


# --- from a template --------------------------------------------------------------------------


def render(path: Path, *, context_tokens: int, **values: str | float) -> Modelfile:
    """
    Fill in a template and read it.

    Args:
        path: The template.
        context_tokens: Declared context; it becomes num_ctx.
        **values: Further variables: `model`, the name, and `license`, the text of the licence or
            nothing. Texts are taken as a Modelfile can hold them (`plain`).

    Raises:
        ParamsError: The template cannot be read, is no jinja2, uses a variable that it is not
            given, does not begin with its version, states what params.yaml states, or is no
            Modelfile; the message has file, line and cause.
    """
    name = shown_name(path)
    source = _read(path, name)
    known = {"context_tokens": context_tokens, **values}
    text, holes = _filled_in(source, name, known)
    version, directives = _directives(text, name, holes)
    problems = [
        *(
            Problem(name, each.line, 1, "FROM is the GGUF that was measured: leave it out")
            for each in directives
            if each.command == "from"
        ),
        *(
            Problem(name, each.line, 1, f"{each.word} is set by {_DECLARED_ELSEWHERE[each.word]}")
            for each in directives
            if each.command == "parameter" and each.word in _DECLARED_ELSEWHERE
        ),
        *(
            Problem(
                name,
                each.line,
                1,
                f"num_ctx is {each.value}, but `context_tokens` of the model is {context_tokens}",
            )
            for each in directives
            if each.word == "num_ctx" and each.value != str(context_tokens)
        ),
    ]
    if problems:
        raise failure(problems, hint=_HINT)
    built = _built(version, directives, name).with_parameters({"num_ctx": context_tokens})
    try:
        built.text(name)
    except ParamsError as error:  # what people cannot be shown is not served either
        raise ParamsError(f"{name}: {error.message}", hint=_HINT) from error
    return built


def plain(text: str) -> str:
    """
    A text of somebody else's as a Modelfile can hold it.

    Line ends become those of Unix and every space an ordinary one; form feeds, zero-width and
    other letters that are not printable go, and so do empty lines around it.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = [
        letter if letter in "\n\t" or letter.isprintable() else " " if letter.isspace() else ""
        for letter in _MARKS.sub("", text).replace("\f", "")
    ]
    return "".join(kept).strip()


def _read(path: Path, name: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ParamsError(
            f"{name} cannot be read: {error.strerror}.",
            hint="Set `modelfile` of the model in params.yaml to a template that is there.",
        ) from error
    if len(data) > _MAX_BYTES:
        raise ParamsError(f"{name} has {len(data):,} bytes; {_MAX_BYTES:,} are allowed.")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise failure([Problem(name, line, 1, "this line is not UTF-8")], hint=_HINT) from error
    marked = _MARKS.search(text)
    if marked is not None:
        _fail(name, text[: marked.start()].count("\n") + 1, _dropped(marked[0]))
    return text


def _filled_in(source: str, name: str, values: Mapping[str, str | float]) -> tuple[str, list[str]]:
    """Render with a hole for each value and, at the start of each line, the template's line."""
    from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError  # noqa: PLC0415
    from jinja2.exceptions import TemplateError  # noqa: PLC0415 - 0.05 s
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    holes: list[str] = []

    def hole(value: Any) -> str:  # noqa: ANN401 - whatever an expression yields
        if isinstance(value, StrictUndefined):
            str(value)  # raises
        holes.append(str(value))
        return f"\ue000{len(holes) - 1}\ue001"

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        finalize=hole,
        keep_trailing_newline=True,
        autoescape=False,  # a Modelfile is no HTML; `hole` keeps values apart
    )
    given = {
        key: plain(value) if isinstance(value, str) else value for key, value in values.items()
    }
    try:
        marked = "".join(_with_lines(environment.lex(source)))
        return "\ue0021\ue003" + environment.from_string(marked).render(given), holes
    except TemplateSyntaxError as error:
        _fail(name, error.lineno, f"this is no jinja2: {error.message}")
    except UndefinedError as error:
        _fail(
            name,
            _line_of(error),
            f"{error.message}; a template is given {', '.join(sorted(values))}",
        )
    except (
        *(TemplateError, ArithmeticError, LookupError, TypeError, ValueError),
        *(RecursionError, MemoryError),
    ) as error:
        _fail(name, _line_of(error), f"this cannot be filled in: {str(error) or 'MemoryError'}")


def _with_lines(tokens: Iterator[tuple[int, str, str]]) -> Iterator[str]:
    """Put the number of its line behind each line end that the template itself writes."""
    for line, kind, text in tokens:
        if kind != "data":
            yield text
            continue
        first, *others = text.split("\n")
        yield first
        for number, other in enumerate(others, line + 1):
            yield f"\n\ue002{number}\ue003{other}"


def _line_of(error: BaseException) -> int:
    """The line of the template at which jinja2 stopped."""
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


# --- the grammar ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Directive:
    """One command: `word` is the option or the role where the command has one."""

    command: str
    word: str
    value: str
    line: int


def parse(text: str, name: str = "Modelfile") -> Modelfile:
    """
    Read the text of a Modelfile; FROM is allowed and left out.

    Args:
        text: The text, its version in the first line.
        name: What errors call it.

    Raises:
        ParamsError: It is none, or holds what a model of the fleet has not; every message has the
            line and the cause.
    """
    version, directives = _directives(text, name, [])
    return _built(version, directives, name)


def _directives(text: str, name: str, holes: list[str]) -> tuple[int, list[_Directive]]:
    lines = _numbered(text)
    returned = next((number for number, line in lines if "\r" in line), None)
    if returned is not None:
        _fail(name, returned, "this line holds a carriage return; end lines as Unix does")
    first = _VERSION.fullmatch(lines[0][1].rstrip())
    if first is None:
        _fail(name, 1, "the first line is not `# version: N`, with a number that a change raises")
    found = []
    rest = iter(lines)
    for number, line in rest:
        line = line.lstrip(" \t")  # noqa: PLW2901 - the same line, as the grammar sees it
        if line and not line.startswith("#"):
            found.append(_directive(number, line, rest, name, holes))
    return int(first[1]), found


def _numbered(text: str) -> list[tuple[int, str]]:
    """The lines with their numbers: those of the template where they carry a mark."""
    numbered = []
    for count, line in enumerate(text.split("\n"), 1):
        mark = _LINE.match(line)
        numbered.append((int(mark[1]), line[mark.end() :]) if mark else (count, line))
    return numbered


def _directive(
    number: int, line: str, rest: Iterator[tuple[int, str]], name: str, holes: list[str]
) -> _Directive:
    """Read the directive that begins in `line`, taking further lines while a quote is open."""
    word, tail = _cut(line, r"[A-Za-z]*")
    command = word.lower()
    if command not in _COMMANDS:
        shown = re.split(r"[\s\ue000-\ue003]", line, maxsplit=1)[0]
        close = did_you_mean(shown, [each.upper() for each in _COMMANDS])
        _fail(name, number, f"{quoted(shown)} is no command of a Modelfile{close}")
    if tail is None:
        _fail(name, number, f"{word} is not followed by a space and a value")
    argument = ""
    if command in {"parameter", "message"}:
        what = "an option" if command == "parameter" else "a role"
        argument, after = _cut(tail, r"[A-Za-z0-9_]*" if command == "parameter" else r"[A-Za-z]*")
        if not argument or after is None:
            _fail(name, number, f"{word} wants {what} after one space, then its value")
        if command == "message" and argument not in _ROLES:
            _fail(name, number, f"{quoted(argument)} is none of {', '.join(_ROLES)}")
        tail = after
    value = _unquote(tail.strip())
    while value is None:
        more = next(rest, None)
        if more is None:
            _fail(name, number, f"the quote of {word} is never closed at the end of a line")
        tail += "\n" + more[1]
        value = _unquote(tail.strip())
    bad = next((each for each in value if not _is_kept(each)), None)
    if bad is not None:
        _fail(name, number, f"{word} holds {_dropped(bad)}")
    return _Directive(
        command=command, word=argument, value=_put_in(value, holes), line=number
    )  # fmt: skip


def _cut(text: str, pattern: str) -> tuple[str, str | None]:
    """Cut a word off, and the one space or tab that must follow; None if it does not."""
    found = re.match(pattern, text)
    end = found.end() if found else 0
    return text[:end], text[end + 1 :] if text[end : end + 1] in {" ", "\t"} else None


def _unquote(text: str) -> str | None:
    """The text without its quotes; None while they are open (parser.go, unquote)."""
    for quote in ('"""', '"'):
        if text.startswith(quote):
            closes = len(text) >= 2 * len(quote) and text.endswith(quote)
            return text[len(quote) : -len(quote)] if closes else None
    return text


def _written(head: str, text: str) -> str:
    """
    One directive, its text in quotes if it would be read otherwise without them.

    Raises:
        ParamsError: The text would be read otherwise with them, too.
    """
    bad = next((each for each in text if each in "\ue000\ue001" or not _is_kept(each)), None)
    if bad is not None:
        raise ParamsError(f"{head} holds {_dropped(bad)}.", hint=_HINT)
    if text and text == text.strip() and "\n" not in text and not text.startswith('"'):
        return f"{head} {text}"
    quote = '"""'
    *inner, _ = f"{quote}{text}{quote}".split("\n")
    for number, line in enumerate(inner, 1):
        closes = line.rstrip().endswith(quote)
        if closes and (number > 1 or len(line.strip()) >= 2 * len(quote)):
            raise ParamsError(
                f"Line {number} of the text of {head} ends in {quote}: a Modelfile cannot hold it, "
                "the text would end there and what follows would be read as directives.",
                hint=_HINT,
            )
    return f"{head} {quote}{text}{quote}"


def _is_kept(letter: str) -> bool:
    """Tell whether Ollama keeps a letter: strconv.IsPrint of Go, line ends and tabs."""
    return letter in "\n\t\ue000\ue001" or letter.isprintable()


def _dropped(letter: str) -> str:
    return f"U+{ord(letter):04X}, which Ollama drops from a Modelfile"


def _put_in(value: str, holes: list[str]) -> str:
    """Fill the holes; what a macro or a block made has holes of its own."""
    if not holes:
        return value
    whole = _HOLE.sub(lambda found: _put_in(holes[int(found[1])], holes), value)
    return _LINE.sub("", whole)


# --- the directives ---------------------------------------------------------------------------


def _built(version: int, directives: list[_Directive], name: str) -> Modelfile:
    """Make a Modelfile of directives, or say everything that is wrong with them."""
    problems: list[Problem] = []
    parameters: dict[str, Value] = {}
    once: dict[str, _Directive] = {}
    for each in directives:
        cause = _cause(each, once)
        if each.command == "parameter" and not cause:
            value = _typed(each.word, each.value)
            if isinstance(value, str):
                cause = value
            elif isinstance(value, tuple):
                parameters[each.word] = (*cast("tuple[str, ...]", parameters.get(each.word, ())),
                                         *value)  # fmt: skip
            else:
                parameters[each.word] = value
        if cause:
            problems.append(Problem(name, each.line, 1, cause))
    if problems:
        raise failure(problems, hint=_HINT)
    return Modelfile(
        version=version,
        parameters=parameters,
        # Ollama makes no layer of an empty text.
        system=once["SYSTEM"].value or None if "SYSTEM" in once else None,
        template=once["TEMPLATE"].value or None if "TEMPLATE" in once else None,
        licenses=tuple(
            each.value for each in directives if each.command == "license" and each.value
        ),
        messages=tuple(
            Message(role=cast("Role", each.word), content=each.value)
            for each in directives
            if each.command == "message"
        ),
    )


def _cause(each: _Directive, once: dict[str, _Directive]) -> str:
    """What is wrong with a directive but its value; remembers it in `once`."""
    if each.command in _NOT_SERVED:
        return f"{each.command.upper()} is not served: {_NOT_SERVED[each.command]}"
    if each.command == "template" and "{%" in each.value:
        return "TEMPLATE is a Go template in Ollama; this one is Jinja, at which the model vanishes"
    if each.command == "parameter" and each.word not in OPTIONS:
        return _no_option(each.word)
    if each.command in {"license", "message"} or each.word == "stop":
        return ""
    key = each.word or each.command.upper()
    first = once.setdefault(key, each)
    if first is not each:
        return f"{key} is stated in line {first.line} already; Ollama would take the last one"
    return ""


def _no_option(word: str) -> str:
    if word in _DEPRECATED:
        return f"{word} has no effect: Ollama only warns that it is deprecated"
    return f"{quoted(word)} is no option of Ollama{did_you_mean(word, OPTIONS)}"


def _typed(option: str, text: str) -> Value | str:
    """The value of an option as its type, or what is wrong with it."""
    kind = OPTIONS[option]
    if kind is tuple:
        return (text,) if text else f"{option} is empty"
    if kind is bool:
        known = text in _TRUE | _FALSE
        return text in _TRUE if known else f"{option} is {quoted(text)}, neither true nor false"
    if kind is float:
        number = _number(text)
        return f"{option} is {quoted(text)}, no number" if number is None else number
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", text):
        return f"{option} is {quoted(text)}, no whole number"
    if option == "num_predict" and int(text) == 0:
        return "num_predict is 0, at which Ollama generates without end"
    return int(text)


def _number(text: str) -> float | None:
    """A finite decimal number; Ollama would also take an infinity, and generate nonsense."""
    try:
        number = float(text) if re.fullmatch(r"[0-9+.eE-]{1,40}", text) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _spelled(value: float | bool) -> str:  # noqa: FBT001 - a value, not a switch
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _fail(name: str, line: int, cause: str) -> NoReturn:
    raise failure([Problem(name, line, 1, cause)], hint=_HINT)
