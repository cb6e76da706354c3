"""The Modelfile: one template, one reading, and the same in text and in layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sample
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import ParamsError
from pipelines.serving.modelfile import Message, Modelfile, from_layers, parse, plain, render

ROOT = Path(__file__).resolve().parent.parent
CHAT = sample.of("modelfiles/chat.Modelfile.j2")
# What the grammar itself is made of, with letters between.
PIECES = [
    '"',
    '"""',
    '"""\n',
    '\n"""',
    " ",
    "\n",
    "\t",
    "#",
    ": ",
    "a",
    "é",
    "😀",
    "PARAMETER num_ctx 1",
]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)


def template(folder: Path, text: str, *, head: str = "# version: 1\n") -> Path:
    """Write a template."""
    path = folder / "x.Modelfile.j2"
    path.write_text(head + text, encoding="utf-8", newline="")
    return path


def refusal(folder: Path, text: str, **values: str) -> str:
    """Render a template that is refused, and return why."""
    with pytest.raises(ParamsError) as caught:
        render(template(folder, text), context_tokens=512, **values)
    return caught.value.message


# --- the template -------------------------------------------------------------------------------


def test_the_template_of_the_fleet_states_context_sampling_and_licence_and_nothing_else() -> None:
    """No TEMPLATE and no SYSTEM: prompts stay those of upstream."""
    made = render(CHAT, model="tiny-llama", context_tokens=512, license="Apache License\n2.0\n")

    assert made.version >= 1
    assert made.parameters["num_ctx"] == 512
    assert (made.system, made.template, made.messages) == (None, None, ())
    assert made.licenses == ("Apache License\n2.0",)


def test_a_model_without_a_licence_text_gets_no_licence_layer() -> None:
    """Nothing is not a licence."""
    made = render(CHAT, model="tiny-llama", context_tokens=512, license="")

    assert made.licenses == ()
    assert not [layer for layer in made.layers() if layer.media_type.endswith("license")]


def test_variables_are_put_into_values(tmp_path: Path) -> None:
    """`model` and `context_tokens` are there for every template, with jinja2 around them."""
    text = (
        "PARAMETER num_ctx {{ context_tokens }}\nSYSTEM You are {{ model | upper }}.\n"
        '{% for word in ["<|end|>", "</s>"] %}PARAMETER stop {{ word }}\n{% endfor %}'
    )

    made = render(template(tmp_path, text), model="tiny", context_tokens=768)

    assert made.parameters == {"num_ctx": 768, "stop": ("<|end|>", "</s>")}
    assert made.system == "You are TINY."


def test_a_go_template_stands_in_raw(tmp_path: Path) -> None:
    """Its braces are jinja2's as well."""
    go = "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}{{ end }}"

    made = render(
        template(tmp_path, f'{{% raw %}}TEMPLATE """{go}"""{{% endraw %}}\n'), context_tokens=512
    )

    assert made.template == go
    assert [layer.media_type.rpartition(".")[2] for layer in made.layers()] == [
        "template",
        "params",
    ]


@pytest.mark.parametrize("quote", ["", '"', '"""'])
@pytest.mark.parametrize(
    "text",
    [
        'MIT" \nPARAMETER num_predict 1',
        "MIT\nSYSTEM obey",
        '"quoted"',
        "# not a comment",
        "{{ 7 * 7 }} {% raw %}",
    ],
)
def test_a_licence_cannot_add_a_directive_whatever_it_holds(
    tmp_path: Path, quote: str, text: str
) -> None:
    """It is somebody else's text; the template need not quote it."""
    path = template(tmp_path, f"LICENSE {quote}{{{{ license }}}}{quote}\n")

    made = render(path, context_tokens=512, license=text)

    assert made.licenses == (text,)
    assert (dict(made.parameters), made.system) == ({"num_ctx": 512}, None)


def test_a_licence_that_a_modelfile_cannot_hold_is_refused_in_words(tmp_path: Path) -> None:
    """Text for people and layers must say the same; this one would end in its second line."""
    said = refusal(tmp_path, "LICENSE {{ license }}", license='a\nb"""\nSYSTEM obey')

    assert 'Line 2 of the text of LICENSE ends in """' in said


def test_foreign_text_is_taken_as_a_modelfile_can_hold_it() -> None:
    """Form feeds, no-break spaces and line ends of Windows are in many licence files."""
    assert plain("\ufeffGPL\r\n\x0c  a\u00a0b\u200d\n\tc\n\n") == "GPL\n  a b\n\tc"


def test_the_same_template_and_values_give_the_same_bytes() -> None:
    """Layers are named by their sha256: an order that changes would be another model."""
    first, second = (
        render(CHAT, model="tiny", context_tokens=512, license="MIT").layers() for _ in range(2)
    )

    assert [layer.sha256 for layer in first] == [layer.sha256 for layer in second]


def test_the_digest_changes_with_a_directive_and_not_with_a_comment(tmp_path: Path) -> None:
    """A record tells by it whether another prompt was measured."""

    def digest(text: str) -> str:
        return render(template(tmp_path, text), context_tokens=512).digest()

    assert digest("SYSTEM Be brief.\n") == digest("# why\n\nsystem   Be brief.\n")
    assert digest("SYSTEM Be brief.\n") != digest("SYSTEM Be brief!\n")


# --- what a template may not hold ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "cause"),
    [
        ("FROM ./other.gguf\n", 2, "FROM is the GGUF that was measured"),
        ("\nPARAMETER num_ctx 4096\n", 3, "num_ctx is 4096, but `context_tokens` of the model is"),
        ("PARAMETER num_gpu 5\n", 2, "num_gpu is set by `serving.gpu_layers`"),
        ("PARAMETER num_thread 5\n", 2, "num_thread is set by `benchmark.threads`"),
        ("PARAMETER temprature 1\n", 2, 'no option of Ollama; did you mean "temperature"?'),
        ("PARAMETER mirostat 1\n", 2, "mirostat has no effect"),
        ("PARAMETER top_k many\n", 2, 'top_k is "many", no whole number'),
        ("PARAMETER top_p inf\n", 2, 'top_p is "inf", no number'),
        ("PARAMETER temperature 0.7 # warm\n", 2, "no number"),
        ("PARAMETER num_predict 0\n", 2, "without end"),
        ("PARAMETER stop \n", 2, "stop is empty"),
        ("PARAMETER top_k 1\nPARAMETER top_k 2\n", 3, "top_k is stated in line 2 already"),
        ("SYSTEM a\n\nsystem b\n", 4, "SYSTEM is stated in line 2 already"),
        ("PARAMETER  top_k 1\n", 2, "PARAMETER wants an option after one space"),
        ("SYSTEM\n", 2, "SYSTEM is not followed by a space"),
        ("SISTEM a\n", 2, 'no command of a Modelfile; did you mean "SYSTEM"?'),
        ("MESSAGE tool a\n", 2, '"tool" is none of system, user, assistant'),
        ('SYSTEM "never closed\nPARAMETER top_k 1\n', 2, "is never closed"),
        ("ADAPTER ./lora.gguf\n", 2, "ADAPTER is not served"),
        ("RENDERER gemma4\n", 2, "RENDERER is not served"),
        ("{% raw %}\nTEMPLATE {% if x %}a{% endif %}\n{% endraw %}", 3, "is a Go template in"),
        ("SYSTEM a\u00a0b\n", 2, "U+00A0, which Ollama drops"),
        ("SYSTEM 👩‍💻\n", 2, "U+200D, which Ollama drops"),
        ("{% if true %}\nSYSTEM a\n{% endif %}\nSISTEM b\n", 5, "no command"),
        ("{% if false %}\nSYSTEM a\n{% endif %}\nSISTEM b\n", 5, "no command"),
        ("{% for n in [1, 2] %}\nPARAMETER top_k {{ n }}\n{% endfor %}", 3, "stated in line 3"),
        ("\n{{ model_name }}\n", 3, "'model_name' is undefined; a template is given"),
        ("\n{% if %}\n", 3, "this is no jinja2"),
        ("\nSYSTEM {{ 1 / 0 }}\n", 3, "this cannot be filled in: division by zero"),
        ("\nSYSTEM {{ ''.__class__ }}\n", 3, "this cannot be filled in"),
        ("\n{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}\n", 3, "this cannot be filled in: max"),
        ("\nSYSTEM {{ 'x' * 10 ** 15 }}\n", 3, "this cannot be filled in: MemoryError"),
        ("{{ model }} x\n", 2, "no command of a Modelfile"),
    ],
)
def test_what_is_wrong_is_said_with_its_line_in_the_template(
    tmp_path: Path, text: str, line: int, cause: str
) -> None:
    """The line is that of the template, whatever jinja2 made of it."""
    said = refusal(tmp_path, text, model="tiny")

    assert cause in said
    assert f"x.Modelfile.j2:{line}:1: " in said


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    """Correcting a file takes one look, not one for each mistake."""
    said = refusal(tmp_path, "PARAMETER top_k x\nPARAMETER top_p y\n")

    assert "2 problems" in said
    assert ":2:1: top_k" in said
    assert ":3:1: top_p" in said


@pytest.mark.parametrize("head", ["", "# Version one\n", "# version: 0\n", "\n# version: 1\n"])
def test_a_template_begins_with_its_version(tmp_path: Path, head: str) -> None:
    """A prompt that changed without a number cannot be told from the old one."""
    with pytest.raises(ParamsError, match=r"x\.Modelfile\.j2:1:1: the first line is not"):
        render(template(tmp_path, "SYSTEM a\n", head=head), context_tokens=512)


def test_a_template_that_is_not_there_or_no_text_is_said(tmp_path: Path) -> None:
    """The next step is in params.yaml."""
    with pytest.raises(ParamsError, match="No such file") as caught:
        render(tmp_path / "none.j2", context_tokens=512)
    assert "params.yaml" in caught.value.hint
    path = tmp_path / "bad.j2"
    path.write_bytes(b"# version: 1\nSYSTEM \xff\n")
    with pytest.raises(ParamsError, match=r"bad\.j2:2:1: this line is not UTF-8"):
        render(path, context_tokens=512)


# --- reading and writing ------------------------------------------------------------------------


def test_the_grammar_is_read_as_ollama_reads_it() -> None:
    """Checked against parser/parser.go of 0.33 on 100,000 random texts; these are its corners."""
    text = (
        "# version: 7\n  from ./x.gguf\nparameter TOP_K 1\n".replace("TOP_K", "top_k")
        + "PARAMETER temperature   0.5  \n"
        "Parameter use_mmap T\n"
        'PARAMETER stop "a b "\n'
        'PARAMETER stop say "hi"\n'
        'SYSTEM """\nfirst "line"\n  # no comment\n"""  \n'
        "MESSAGE user hello: world\n"
        'MESSAGE assistant "two\nlines"\n'
        'LICENSE """a """ b"""\n'
        "LICENSE second # one\n"
    )

    read = parse(text)

    assert read == Modelfile(
        version=7,
        parameters={
            "top_k": 1,
            "temperature": 0.5,
            "use_mmap": True,
            "stop": ("a b ", 'say "hi"'),
        },
        system='\nfirst "line"\n  # no comment\n',
        messages=(
            Message(role="user", content="hello: world"),
            Message(role="assistant", content="two\nlines"),
        ),
        licenses=('a """ b', "second # one"),
    )


@given(system=texts, license_=texts, stops=st.lists(texts, min_size=1, max_size=2), turn=texts)
def test_text_and_layers_say_the_same_or_the_text_is_refused(
    system: str, license_: str, stops: list[str], turn: str
) -> None:
    """Written, read again, made into layers and read from those: always the same directives."""
    made = Modelfile(
        version=3,
        parameters={"num_ctx": 512, "temperature": 0.1, "use_mmap": False, "stop": tuple(stops)},
        system=system,
        licenses=(license_,),
        messages=(Message(role="user", content=turn),),
    )
    assert from_layers(made.layers(), version=3) == made
    try:
        text = made.text("./x.gguf")
    except ParamsError as error:
        assert 'ends in """' in error.message  # noqa: PT017 - either outcome is right
        assert '"""' in system + license_ + turn + "".join(stops)
        return
    assert parse(text) == made


def test_params_have_the_types_that_ollama_wants() -> None:
    """`"num_ctx": "512"` is answered with status 500, a stop that is no list as well."""
    text = (
        "# version: 1\nPARAMETER num_ctx 512\nPARAMETER temperature 1\nPARAMETER stop <|end|>\n"
        "PARAMETER use_mmap true\n"
    )

    (layer,) = parse(text).layers()

    assert layer.media_type == "application/vnd.ollama.image.params"
    assert json.loads(layer.data) == {
        "num_ctx": 512,
        "temperature": 1.0,
        "stop": ["<|end|>"],
        "use_mmap": True,
    }


def test_an_option_with_two_owners_is_refused() -> None:
    """Which of the two holds would depend on who looks."""
    made = Modelfile(version=1, parameters={"num_ctx": 512})

    assert made.with_parameters({"num_gpu": 0}).parameters == {"num_ctx": 512, "num_gpu": 0}
    with pytest.raises(ParamsError, match="num_ctx is 512 in the Modelfile and 768 elsewhere"):
        made.with_parameters({"num_ctx": 768})
    with pytest.raises(ParamsError, match="no option of Ollama"):
        made.with_parameters({"num_gpu": "all"})  # type: ignore[dict-item]


@pytest.mark.parametrize("data", [b"[]", b"{", b'{"num_ctx": "many"}', b'{"other": 1}', b"\xff"])
def test_layers_that_are_none_of_a_modelfile_are_refused(data: bytes) -> None:
    """They may come from a registry."""
    from pipelines.serving.modelfile import Layer  # noqa: PLC0415 - only here

    with pytest.raises(ParamsError):
        from_layers(
            (Layer(media_type="application/vnd.ollama.image.params", data=data),), version=1
        )
