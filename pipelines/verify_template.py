"""
`template` and `generation`: a served conversation is what upstream would have made of it.

`template`: the chat templates in the GGUF are upstream's, character by character, and llama.cpp's
own engine makes of the golden conversations what transformers makes of them. Conversations with
tools or thoughts are compared as well; where these differ they are named and not judged, since
engines hand them over in ways of their own.

`generation`: what upstream's generation_config.json says of when and how to stop and to sample is
what llama.cpp does with this GGUF if nobody says otherwise.

transformers renders in a process of its own (`upstream_chat`), llama.cpp in a llama-server that has
nothing but vocabulary and template (`gguf_carrier`), on the CPU, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pipelines import gguf_carrier, gguf_header, prompts, upstream_chat
from pipelines.errors import FleetError, UpstreamError
from pipelines.verify_records import Check
from pipelines.verify_tokens import MAX_FINDINGS, USER_DEFINED, ask_gguf, skipped
from pipelines.wording import clause, counted, listed, quoted, sentence

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pipelines.gguf_header import Header
    from pipelines.prompts import Conversation, Prompts
    from pipelines.serving.server import Client
    from pipelines.upstream_chat import Reference, Rendered
    from pipelines.verify_subject import Subject
    from pipelines.verify_tokens import Tokenized

_KEY: Final = "tokenizer.chat_template"
_READY_WITHIN_S: Final = 120.0
# gguf-py/gguf/metadata.py: generation_config.json's word, general.sampling's.
_SAMPLING: Final = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
    "penalty_repeat": "penalty_repeat",
    "penalty_last_n": "penalty_last_n",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "sequence": "sequence",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}


def checks(subject: Subject) -> tuple[Check, ...]:
    """
    Compare template and generation defaults of a conversion with upstream's.

    Raises:
        ToolError: A process failed; nothing is proven.
        MachineError: A package or a port is missing.
    """
    known = ask_gguf(subject.f16, (), subject.tools, subject.scratch, subject.log)
    golden = prompts.load(subject.at.prompts)
    try:
        wanted = upstream_templates(subject.source)
    except UpstreamError as error:
        why = sentence(f"Not compared, since {clause(error.message)}")
        return skipped("template", why), generation(
            subject.source, subject.config, subject.header, known
        )
    written = written_templates(subject.header)
    reference: Reference | None = None
    check = _texts(wanted, written)
    if check is None and not wanted:
        check = skipped("template", "Upstream has no chat template, and neither has the GGUF.")
    if check is None:
        with upstream_chat.start(subject.source, golden, subject.log) as pending:
            check, reference = _rendered(subject, wanted, golden, pending)
    return check, generation(subject.source, subject.config, subject.header, known, reference)


# --- the texts --------------------------------------------------------------------------------


def upstream_templates(source: Path) -> dict[str, str]:
    """
    Return upstream's chat templates by name, `default` first, as transformers reads them.

    A chat_template.jinja beats what tokenizer_config.json holds.

    Raises:
        UpstreamError: One of the files cannot be read.
    """
    config = _json(source / "tokenizer_config.json")
    alone = source / "chat_template.jinja"
    try:
        if alone.is_file():
            found = {"default": alone.read_text(encoding="utf-8")}
            more = sorted((source / "additional_chat_templates").glob("*.jinja"))
            return found | {path.stem: path.read_text(encoding="utf-8") for path in more}
    except (OSError, UnicodeDecodeError) as error:
        raise UpstreamError(f"a chat template in {source} cannot be read: {error}.") from error
    told = config.get("chat_template")
    if told is None:
        told = _json(source / "chat_template.json").get("chat_template")
    if isinstance(told, str):
        return {"default": told}
    if isinstance(told, list):
        told = {each.get("name"): each.get("template") for each in told if isinstance(each, dict)}
    if not isinstance(told, dict):
        return {}
    return {str(name): text for name, text in told.items() if isinstance(text, str)}


def written_templates(header: Header) -> dict[str, str]:
    """Return the chat templates of a GGUF by name."""
    found = {}
    for key, value in header.metadata.items():
        if isinstance(value, str) and (key == _KEY or key.startswith(f"{_KEY}.")):
            found[key.removeprefix(_KEY).removeprefix(".") or "default"] = value
    return found


def _texts(wanted: Mapping[str, str], written: Mapping[str, str]) -> Check | None:
    """Return the FAIL if the templates are not upstream's, None if they are."""
    # gguf_writer.py: a name has letters and digits.
    by_name = {
        "".join(each if each.isascii() and each.isalnum() else "_" for each in name): text
        for name, text in wanted.items()
    }
    findings = [
        _difference(name, by_name.get(name), written.get(name))
        for name in dict.fromkeys((*by_name, *written))
        if by_name.get(name) != written.get(name)
    ]
    if not findings:
        return None
    return Check(
        layer="template",
        outcome="FAIL",
        examined_count=len(by_name),
        differing_count=len(findings),
        sentence=sentence(
            f"{counted(len(findings), 'difference')} from upstream's templates: {findings[0]}"
        ),
        findings=tuple(findings[:MAX_FINDINGS]),
    )


def _difference(name: str, wanted: str | None, got: str | None) -> str:
    """Say how one template differs, by its first differing line."""
    what = "the chat template" if name == "default" else f"the chat template {quoted(name)}"
    if got is None:
        return f"{what} is missing in the GGUF"
    if wanted is None:
        return f"{what} in the GGUF is none of upstream's"
    line, ours, theirs = _first_line(wanted, got)
    return f"{what} is not upstream's from line {line} on: {theirs}, upstream {ours}"


def _first_line(wanted: str, got: str) -> tuple[int, str, str]:
    """Return number and texts of the first line that differs, each from shortly before it does."""
    pairs = zip([*wanted.split("\n"), ""], [*got.split("\n"), ""], strict=False)
    for number, (ours, theirs) in enumerate(pairs, 1):
        if ours != theirs:
            at = _shared(ours, theirs)
            start = max(0, at - 20)
            return number, quoted(ours[start : at + 40]), quoted(theirs[start : at + 40])
    return 1, quoted(wanted[:60]), quoted(got[:60])


def _shared(one: str, other: str) -> int:
    """Return how many characters two lines share from their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


# --- what is made of them ---------------------------------------------------------------------


def _rendered(
    subject: Subject,
    wanted: Mapping[str, str],
    golden: Prompts,
    pending: upstream_chat.Pending,
) -> tuple[Check, Reference | None]:
    """Let both sides render the golden conversations and compare."""
    from pipelines.serving.server import ServerGone  # noqa: PLC0415 - only for a template

    text = "\0".join(wanted.values())
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    what = "The chat template is" if len(wanted) == 1 else f"{len(wanted)} chat templates are"
    same = f"{what} upstream's ({len(text):,} characters, sha256 {digest})"
    try:
        with _server(subject) as client:
            reference = pending.result()
            return _compared(same, reference, golden, client), reference
    except UpstreamError as error:
        said = f"{same}; not rendered, since {clause(error.message)}"
        return skipped("template", sentence(said)), None
    except ServerGone as error:
        # Its own last lines, not what we say of it: one that is only late proves nothing.
        if "template" not in error.message.partition("\n")[2]:
            raise
        said = f"{same}, but llama.cpp cannot use it: {error.message.splitlines()[-1]}"
        return Check(
            layer="template",
            outcome="FAIL",
            examined_count=1,
            differing_count=1,
            sentence=sentence(said),
        ), None


@contextmanager
def _server(subject: Subject) -> Iterator[Client]:
    """Run a llama-server that has the model's vocabulary and template, on the CPU."""
    from pipelines.serving import llama_server, sandbox, server  # noqa: PLC0415 - as above

    carrier = subject.scratch / "carrier.gguf"
    gguf_carrier.write(subject.header, carrier)
    program = subject.tools.tool(llama_server.PROGRAM)

    def argv(port: int) -> list[str]:
        return [
            str(program),
            *("--model", str(carrier.resolve()), "--host", sandbox.HOST, "--port", str(port)),
            *("-c", str(gguf_carrier.CONTEXT_TOKENS), "-np", "1", "-t", "1", "-ngl", "0"),
            *("--no-warmup", "--no-webui", "--offline", "--no-mmproj", "--jinja"),
            *("--fit", "off", "--log-colors", "off"),
        ]

    with sandbox.opened(subject.at) as place:
        environment = place.environment(subject.tools) | {"CUDA_VISIBLE_DEVICES": ""}
        with server.running(
            llama_server.PROGRAM,
            argv,
            env=lambda _: environment,
            cwd=place.temporary,
            log=subject.log,
            on_card=False,
            is_bind_failure=llama_server.is_bind_failure,
            ready=lambda running: server.wait_until(
                running,
                lambda: running.client.is_up("/health"),
                within_s=_READY_WITHIN_S,
                what=f"verify {subject.model}: load the chat template",
            ),
        ) as running:
            yield running.client


def _compared(same: str, reference: Reference, golden: Prompts, client: Client) -> Check:
    by_id = {each.id: each for each in reference.conversations}
    failed: list[str] = []
    unjudged: list[str] = []
    passed = 0
    for conversation in golden.conversations:
        rendered = by_id[conversation.id]
        if rendered.skipped or rendered.plain.refused is not None:
            why = rendered.skipped or "the upstream template refuses it"
            unjudged.append(f"{conversation.id} ({why})")
            continue
        found = _conversation(conversation, rendered, reference.bos_text, client)
        if found is None:
            passed += 1
        elif conversation.has("tools") or conversation.has("thinking"):
            unjudged.append(f"{conversation.id} (llama.cpp hands it to the template otherwise)")
        else:
            failed.append(f"{conversation.id}: {found}")
    made = f"prompts {golden.version}, {reference.sentence}"
    if failed:
        return Check(
            layer="template",
            outcome="FAIL",
            examined_count=passed + len(failed),
            differing_count=len(failed),
            sentence=sentence(
                f"{same}, but llama.cpp renders {counted(len(failed), 'conversation')} of "
                f"{passed + len(failed)} otherwise ({made}): {failed[0]}"
            ),
            findings=tuple(failed[:MAX_FINDINGS]),
        )
    said = f"{same}, and llama.cpp renders {counted(passed, 'conversation')} as upstream ({made})"
    if unjudged:
        said += f"; not judged: {listed(unjudged)}"
    if not passed:
        return skipped("template", sentence(said))
    return Check(
        layer="template",
        outcome="PASS",
        examined_count=passed,
        differing_count=0,
        sentence=sentence(said),
    )


def _conversation(
    conversation: Conversation, rendered: Rendered, bos: str, client: Client
) -> str | None:
    """Say how llama.cpp's prompt differs from upstream's, or None."""
    from pipelines.serving import llama_server  # noqa: PLC0415 - as above
    from pipelines.serving.server import ServingError  # noqa: PLC0415 - as above

    try:
        got = llama_server.render(
            client,
            rendered.messages,
            conversation.plain_tools(),
            think=conversation.has("thinking"),
        )
    except FleetError as error:
        # Those below it say what is wrong with the server, not with the request.
        if type(error) is not ServingError:
            raise
        return f"refused: {clause(error.message)}"
    # One BOS in front is left to the tokenizer by some engines; the layer `tokens` counts it.
    wanted, got = rendered.plain.text.removeprefix(bos), got.removeprefix(bos)
    if wanted == got:
        return None
    line, ours, theirs = _first_line(wanted, got)
    return f"line {line} is {theirs}, upstream {ours}"


# --- generation -------------------------------------------------------------------------------


def generation(
    source: Path,
    config: Mapping[str, Any],
    header: Header,
    known: Tokenized,
    reference: Reference | None = None,
) -> Check:
    """
    Compare generation_config.json with what llama.cpp does by itself.

    Args:
        source: Directory with upstream's files.
        config: Upstream's config.json, which says it where generation_config.json is silent.
        header: Of the GGUF.
        known: What llama.cpp knows of its vocabulary.
        reference: Rendered conversations, by which a token that ends a turn is recognized.
    """
    try:
        stated = _json(source / "generation_config.json")
        roles = _json(source / "tokenizer_config.json")
    except UpstreamError as error:
        return skipped("generation", sentence(f"Not compared, since {clause(error.message)}"))
    ends = _ids(stated, config, "eos")
    sampling = _stated_sampling(stated)
    written = {
        key.removeprefix("general.sampling."): value
        for key, value in header.metadata.items()
        if key.startswith("general.sampling.")
    }
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    texts = list(tokens.values()) if isinstance(tokens, gguf_header.Array) else []
    early = tuple(_ends_too_early(ends, known, header, texts))
    if not ends and not sampling and not written and not early:
        return skipped("generation", "Upstream states neither how to end nor how to sample.")
    missed, unheard = _missing_ends(ends, known, texts, reference)
    findings = [
        *missed,
        *early,
        *_wrong_roles(stated, config, roles, header, texts),
        *_wrong_sampling(sampling, written),
    ]
    examined = len(ends) + len(sampling)
    if findings:
        return Check(
            layer="generation",
            outcome="FAIL",
            examined_count=examined,
            differing_count=len(findings),
            sentence=sentence(
                f"{counted(len(findings), 'difference')} from upstream's defaults: {findings[0]}"
            ),
            findings=tuple(findings[:MAX_FINDINGS]),
        )
    heard = [_token(texts, id_) for id_ in ends if id_ in known.ends]
    said = [f"A generation ends at {listed(heard)}, as upstream's does"] if heard else []
    if sampling:
        said.append(
            f"{'s' if said else 'S'}ampling defaults are upstream's ({', '.join(sorted(sampling))})"
        )
    if unheard:
        said.append(
            f"upstream would also end at {listed(unheard)}, for which a GGUF has no key: name it "
            "as a stop in the Modelfile"
        )
    return Check(
        layer="generation",
        outcome="PASS",
        examined_count=examined,
        differing_count=0,
        sentence=sentence("; ".join(said)),
    )


def _missing_ends(
    ends: list[int], known: Tokenized, texts: list[Any], reference: Reference | None
) -> tuple[list[str], list[str]]:
    """
    Return (what makes a generation go on for ever, tokens at which only upstream ends).

    llama.cpp has one key for the end, and knows some more tokens by their names. A model that ends
    its turns with a token that is neither would never stop.
    """
    if known.died is not None:
        return [f"llama.cpp does not load the vocabulary: {known.died}"], []
    unheard = [id_ for id_ in ends if id_ not in known.ends]
    if ends and len(unheard) == len(ends):
        names = listed([_token(texts, id_) for id_ in ends])
        ours = listed([_token(texts, id_) for id_ in known.ends]) or "nothing"
        return [f"upstream ends a generation at {names}, llama.cpp at {ours}"], []
    missed = [
        f"upstream's template ends a turn with {_token(texts, id_)}, at which llama.cpp goes on"
        for id_ in unheard
        if 0 <= id_ < len(texts) and _ends_turns(str(texts[id_]), reference)
    ]
    return missed, [_token(texts, id_) for id_ in unheard]


def _ends_too_early(
    ends: list[int], known: Tokenized, header: Header, texts: list[Any]
) -> Iterator[str]:
    """
    Yield ordinary tokens at which llama.cpp ends a generation: every answer would break off there.

    It ends at more tokens than upstream names: all that are called like an end, those of a turn and
    of a file. They are special ones, or marked as text of its own. An ordinary one among them got
    there by a wrong id.
    """
    types = header.metadata.get("tokenizer.ggml.token_type")
    kinds = list(types.values()) if isinstance(types, gguf_header.Array) else []
    for id_ in sorted({*known.ends} - {*ends, known.special.get("eos", -1)} - known.controls):
        if id_ < len(kinds) and kinds[id_] != USER_DEFINED:
            yield f"llama.cpp ends a generation at {_token(texts, id_)}, which is an ordinary token"


def _ends_turns(text: str, reference: Reference | None) -> bool:
    """Tell whether the template puts a token behind what an assistant has said."""
    if reference is None or not text:
        return False
    for each in reference.conversations:
        for message in each.messages:
            said = message["content"].strip()
            if message["role"] == "assistant" and said:
                rest = each.plain.text.rpartition(said)[2]
                if rest.lstrip().startswith(text):
                    return True
    return False


def _wrong_roles(
    stated: Mapping[str, Any],
    config: Mapping[str, Any],
    roles: Mapping[str, Any],
    header: Header,
    texts: list[Any],
) -> Iterator[str]:
    """Yield bos and pad of the GGUF that no file of upstream knows."""
    for role, key in (("bos", "bos"), ("pad", "padding")):
        got = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        allowed = {*_ids(stated, {}, role), *_ids({}, config, role)}
        if not isinstance(got, int) or not allowed or got in allowed:
            continue
        named = roles.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        if not 0 <= got < len(texts) or texts[got] != named:
            words = listed([_token(texts, id_) for id_ in sorted(allowed)])
            yield f"{role} is {_token(texts, got)}, upstream it is {words}"


def _stated_sampling(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return what upstream says of sampling, in llama.cpp's words."""
    return {
        ours: stated[theirs]
        for theirs, ours in _SAMPLING.items()
        if isinstance(stated.get(theirs), int | float | str)
    }


def _wrong_sampling(wanted: Mapping[str, Any], written: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*wanted, *written}):
        ours, theirs = wanted.get(key), written.get(key)
        if theirs is None:
            yield f"sampling default {key} is not in the GGUF, upstream it is {quoted(str(ours))}"
        elif ours is None:
            yield f"sampling default {key} is {quoted(str(theirs))}, upstream states none"
        elif not _equal(ours, theirs):
            yield f"sampling default {key} is {theirs}, upstream it is {ours}"


def _equal(ours: Any, theirs: Any) -> bool:  # noqa: ANN401 - a value of JSON and one of GGUF
    """Compare numbers in the 32 bits that GGUF has for them."""
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-9)
    return bool(ours == theirs)


def _ids(stated: Mapping[str, Any], config: Mapping[str, Any], role: str) -> list[int]:
    """Return the ids of a role: generation_config.json's, else config.json's."""
    key = f"{role}_token_id"
    value = stated.get(key)
    if value is None:
        value = config.get(key)
    if value is None and isinstance(config.get("text_config"), dict):
        value = config["text_config"].get(key)
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, int) and not isinstance(each, bool)]


def _token(texts: list[Any], id_: int) -> str:
    """Name a token: `2 "</s>"`."""
    return f"{id_} {quoted(str(texts[id_]))}" if 0 <= id_ < len(texts) else f"{id_}"


def _json(path: Path) -> dict[str, Any]:
    """
    Read a JSON object; empty if there is no such file.

    Raises:
        UpstreamError: It is none.
    """
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UpstreamError(f"{path.name} cannot be read: {error}.") from error
    if not isinstance(told, dict):
        raise UpstreamError(f"{path.name} holds no JSON object.")
    return told
