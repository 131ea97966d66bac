from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field, SecretStr, model_validator

from fourbit.errors import InputError
from fourbit.settings import (
    Option,
    Resolved,
    Settings,
    dump_settings,
    load_settings,
    options,
    redact,
)


class Lora(Settings):
    r: int = Field(default=16, ge=1, le=256, description="rank of the adapters")
    lora_alpha: int = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False


class Optim(Settings):
    lr: float = Field(default=2e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    paged: bool | Literal["auto"] = "auto"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    warmup_steps: int | None = None

    @model_validator(mode="after")
    def one_warmup(self) -> Optim:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("warmup_ratio and warmup_steps exclude each other")
        return self


class Extra(Settings):
    folder: Path | None = None
    names: list[str] = []
    sizes: list[int] = []


class Train(Settings):
    model: str = Field(description="alias or folder")
    lora: Lora = Lora(r=8)
    optim: Optim = Optim()
    extra: Extra | None = None
    schedule: Literal["cosine", "linear", "off", "none"] = "cosine"
    max_steps: int | Literal["auto"] = "auto"
    model_options: dict[str, Any] = {}
    hub_token: SecretStr | None = None
    note: str | None = None

    @model_validator(mode="after")
    def small(self) -> Train:
        if self.model == "huge":
            raise ValueError("a huge model does not fit")
        return self


def load(tmp_path, text, *overrides, model: type[Any] = Train, **short_forms):
    path = tmp_path / "cfg.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(model, path=path, overrides=overrides, short_forms=short_forms)


def line_of(tmp_path, text, *overrides, **short_forms):
    with pytest.raises(InputError) as caught:
        load(tmp_path, text, *overrides, **short_forms)
    return caught.value.line().replace(str(tmp_path) + "/", "")


def test_values_and_origins_of_file_command_line_and_defaults(tmp_path):
    resolved = load(
        tmp_path,
        "# a comment\nmodel: smollm2\nlora:\n  lora_alpha: 64\n  r: 4\noptim: {lr: 1e-4}\n",
        ("lora.r", "8"),
        ("lora.r", "16"),
        ("lr", "3e-4"),
        lr="optim.lr",
    )
    value, origins = resolved.value, resolved.origins
    assert (value.model, value.lora.r, value.lora.lora_alpha, value.optim.lr) == (
        "smollm2", 16, 64, 3e-4,
    )  # fmt: skip
    assert origins["model"] == "cfg.yaml:2"
    assert origins["lora.lora_alpha"] == "cfg.yaml:4"
    assert origins["lora.r"] == origins["optim.lr"] == "command line"
    assert origins["lora.lora_dropout"] == origins["extra"] == "default"


def test_every_leaf_has_an_origin(tmp_path):
    resolved = load(tmp_path, "model: m\nextra: {names: [a]}\n")
    keys = {option.key for option in options(Train)}
    assert set(resolved.origins) == keys


def test_a_partly_given_section_keeps_what_the_default_instance_sets(tmp_path):
    assert load(tmp_path, "model: m\n").value.lora.r == 8
    assert load(tmp_path, "model: m\nlora: {lora_alpha: 1}\n").value.lora.r == 8
    assert load(tmp_path, "model: m\nlora:\n").value.lora.r == 8


def test_unknown_key_in_a_file_and_on_the_command_line(tmp_path):
    assert line_of(tmp_path, "model: m\nlora:\n\n  rr: 3\n") == (
        "error[unknown-key] cfg.yaml:4: unknown key 'lora.rr'; fix: did you mean 'lora.r'?"
    )
    assert line_of(tmp_path, "model: m\n", ("lora.rr", "3")) == (
        "error[unknown-key] --lora.rr: unknown key 'lora.rr'; fix: did you mean 'lora.r'?"
    )
    assert "did you mean 'lora'?" in line_of(tmp_path, "model: m\nlroa: {r: 1}\n")
    assert "unknown key 'lora.r.x'" in line_of(tmp_path, "model: m\n", ("lora.r.x", "3"))


def test_duplicate_key_names_both_lines(tmp_path):
    assert line_of(tmp_path, "model: m\nlora:\n  r: 1\n  use_rslora: true\n  r: 2\n") == (
        "error[duplicate-key] cfg.yaml:5: key 'lora.r' is given twice, first at cfg.yaml:3; "
        "fix: keep one of them"
    )


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("optim: {lr: 1e-4}", "lr", 1e-4),
        ("optim: {lr: '1e-4'}", "lr", 1e-4),
        ("optim: {lr: 1}", "lr", 1.0),
        ("optim: {lr: 1_0.5}", "lr", 10.5),
        ("optim: {paged: yes}", "paged", True),
        ("optim: {paged: auto}", "paged", "auto"),
        ("optim: {warmup_ratio: null}", "warmup_ratio", None),
        ("optim: {warmup_ratio: none}", "warmup_ratio", None),
        ("optim: {warmup_steps: 1e3}", "warmup_steps", 1000),
        ("optim: {warmup_steps: 010}", "warmup_steps", 10),
        ("optim: {warmup_steps: 0x10}", "warmup_steps", 16),
        ("optim: {betas: [0.5, 9e-1]}", "betas", (0.5, 0.9)),
    ],
)
def test_the_schema_decides_what_a_text_is(tmp_path, text, key, expected):
    value = getattr(load(tmp_path, f"model: m\n{text}\n").value.optim, key)
    assert value == expected
    assert type(value) is type(expected)


def test_choices_win_over_what_yaml_makes_of_their_words(tmp_path):
    assert load(tmp_path, "model: m\nschedule: off\n").value.schedule == "off"
    assert load(tmp_path, "model: m\nschedule: none\n").value.schedule == "none"
    assert load(tmp_path, "model: m\n", ("schedule", "none")).value.schedule == "none"


@pytest.mark.parametrize(("word", "kind"), [("no", "true or false"), ("yes", "true or false"),
                                            ("12", "a number"), ("1.5", "a number")])  # fmt: skip
def test_a_word_that_yaml_takes_for_something_else_must_be_quoted(tmp_path, word, kind):
    assert line_of(tmp_path, f"model: {word}\n") == (
        f"error[needs-quotes] cfg.yaml:1: model = {word} is {kind} in YAML, and a text is wanted; "
        f'fix: quote it: "{word}"'
    )
    assert load(tmp_path, f'model: "{word}"\n').value.model == word
    assert load(tmp_path, "", ("model", word)).value.model == word


@pytest.mark.parametrize(
    ("text", "where", "what", "fix"),
    [
        ("lora: {r: 0}", "cfg.yaml:2", "lora.r = '0'",
         "give a whole number, at least 1 and at most 256"),
        ("lora: {r: yes}", "cfg.yaml:2", "lora.r = 'yes'", "give a whole number, at least 1"),
        ("lora: {r: 2.5}", "cfg.yaml:2", "lora.r = '2.5'", "give a whole number"),
        ("lora: {r: 1:30}", "cfg.yaml:2", "lora.r = '1:30'", "give a whole number"),
        ("lora: {r: }", "cfg.yaml:2", "lora.r = nothing", "give a whole number"),
        ("lora: {r: [1]}", "cfg.yaml:2", "lora.r = a list", "give a whole number"),
        ("lora: 5", "cfg.yaml:2", "lora = '5'", "give 'key: value' lines"),
        ("lora: {lora_dropout: 1}", "cfg.yaml:2", "lora.lora_dropout = '1'",
         "give a finite number, at least 0 and less than 1"),
        ("optim: {lr: .nan}", "cfg.yaml:2", "optim.lr = '.nan'", "a finite number, more than 0"),
        ("optim: {lr: inf}", "cfg.yaml:2", "optim.lr = 'inf'", "a finite number, more than 0"),
        ("optim: {lr: -.inf}", "cfg.yaml:2", "optim.lr = '-.inf'", "a finite number"),
        ("optim: {lr: yes}", "cfg.yaml:2", "optim.lr = 'yes'", "a finite number"),
        ("optim: {warmup_ratio: 2}", "cfg.yaml:2", "optim.warmup_ratio = '2'",
         "a finite number, at least 0 and at most 1, or none"),
        ("optim:\n  betas:\n    - 0.9\n    - x", "cfg.yaml:5", "optim.betas[1] = 'x'",
         "a finite number"),
        ("schedule: cosin", "cfg.yaml:2", "schedule = 'cosin'",
         "one of: cosine, linear, off, none"),
        ("max_steps: many", "cfg.yaml:2", "max_steps = 'many'", "a whole number, or one of: auto"),
        ("model_options: {a: {b: .inf}}", "cfg.yaml:2", "model_options.a.b = '.inf'", "finite"),
        ("model_options: 3", "cfg.yaml:2", "model_options = '3'", "'key: value' lines"),
    ],
)  # fmt: skip
def test_a_wrong_value_says_where_what_and_the_allowed_range(tmp_path, text, where, what, fix):
    line = line_of(tmp_path, f"model: m\n{text}\n")
    assert line.startswith(f"error[bad-value] {where}: {what} is not allowed; fix: ")
    assert fix in line


def test_a_wrong_value_on_the_command_line_names_the_flag(tmp_path):
    assert line_of(tmp_path, "model: m\n", ("lr", "0"), lr="optim.lr") == (
        "error[bad-value] --lr: optim.lr = '0' is not allowed; "
        "fix: give a finite number, more than 0"
    )
    assert line_of(tmp_path, "model: m\n", ("o", "nan"), o="optim.lr").startswith(
        "error[bad-value] -o: optim.lr = 'nan'"
    )


def test_a_missing_key_and_checks_of_sections(tmp_path):
    assert line_of(tmp_path, "lora: {r: 1}\n") == (
        "error[missing-key] cfg.yaml: 'model' is required; fix: add 'model:' to the file or --model"
    )
    text = "model: m\noptim:\n  warmup_ratio: 0.1\n  warmup_steps: 3\n"
    assert line_of(tmp_path, text) == (
        "error[bad-value] cfg.yaml:2: optim: warmup_ratio and warmup_steps exclude each other"
    )
    assert line_of(tmp_path, "model: huge\n") == (
        "error[bad-value] cfg.yaml: a huge model does not fit"
    )


def test_all_mistakes_are_in_one_line_in_reading_order(tmp_path):
    text = "lora:\n  r: 0\n  r: 1\n  rr: 1\noptim: {lr: x}\n"
    assert line_of(tmp_path, text, ("zzzzzz", "1")) == (
        "error[bad-value] cfg.yaml:2: lora.r = '0' is not allowed; "
        "fix: give a whole number, at least 1 and at most 256 (+5 more: "
        "cfg.yaml:3: key 'lora.r' is given twice, first at cfg.yaml:2; "
        "cfg.yaml:4: unknown key 'lora.rr'; cfg.yaml:5: optim.lr = 'x' is not allowed; "
        "cfg.yaml: 'model' is required; --zzzzzz: unknown key 'zzzzzz')"
    )


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("true", "lora.use_rslora", True),
        ("Off", "lora.use_rslora", False),
        ("none", "optim.warmup_steps", None),
        ("null", "extra.folder", None),
        ("out dir", "extra.folder", Path("out dir")),
        ("a, b", "extra.names", ["a", "b"]),
        ("a", "extra.names", ["a"]),
        ("[a, 'b, c', \"12\"]", "extra.names", ["a", "b, c", "12"]),
        ("[]", "extra.names", []),
        ("1,2", "extra.sizes", [1, 2]),
        ("0.5,0.9", "optim.betas", (0.5, 0.9)),
        ("q_proj,v_proj", "lora.target_modules", ["q_proj", "v_proj"]),
        ("all-linear", "lora.target_modules", "all-linear"),
        (r"layers\.(1|2){1,3}\.q", "lora.target_modules", r"layers\.(1|2){1,3}\.q"),
        ("{a: 1e-3, b: [yes, no, x, 010]}", "model_options",
         {"a": 1e-3, "b": [True, False, "x", 10]}),
    ],
)  # fmt: skip
def test_command_line_texts(tmp_path, text, key, expected):
    at: Any = load(tmp_path, "model: m\n", (key, text)).value
    for name in key.split("."):
        at = getattr(at, name)
    assert at == expected


def test_command_line_wins_inside_sections_and_over_nothing(tmp_path):
    resolved = load(tmp_path, "model: m\nextra: null\n", ("extra.names", "a"))
    assert resolved.value.extra is not None
    assert resolved.value.extra.names == ["a"]
    assert load(tmp_path, "model: m\nextra: {names: [a]}\n", ("extra", "none")).value.extra is None
    resolved = load(tmp_path, "model: m\n", ("lora", "{r: 3}"))
    assert (resolved.value.lora.r, resolved.origins["lora.r"]) == (3, "command line")
    assert "--lora" in line_of(tmp_path, "model: m\n", ("lora", "{r: [}"))
    assert load_settings(Train, path=None, overrides=[("model", "x")]).value.model == "x"


def test_an_alias_is_read_and_an_override_does_not_leak_through_it(tmp_path):
    class Two(Settings):
        a: Lora = Lora()
        b: Lora = Lora()

    value = load(tmp_path, "a: &x {r: 3}\nb: *x\n", ("b.r", "5"), model=Two).value
    assert (value.a.r, value.b.r) == (3, 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m\nlora:\n\tr: 1\n", "cfg.yaml:3: the line is indented with a tab"),
        ("model: !!python/object/apply:os.system ['x']\n",
         "cfg.yaml:1: the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allow"),
        ("model: !!str 5\n", "cfg.yaml:1: the YAML tag"),
        ("- a\n- b\n", "cfg.yaml:1: the file holds a list, not 'key: value' lines"),
        ("hello\n", "cfg.yaml:1: the file holds a single value"),
        ("a: 1\n---\nb: 2\n", "cfg.yaml:2: the file holds more than one YAML document"),
        ("a: {b: 1\n", "cfg.yaml:2: while parsing a flow mapping"),
        ("a: [\n", "error[bad-yaml] cfg.yaml:2"),
        ("a: 'x\n", "error[bad-yaml] cfg.yaml:2"),
        ("? [a]\n: b\n", "cfg.yaml:1: a key must be plain text"),
        ("x: &x {r: 1}\nlora: {<<: *x}\n", "cfg.yaml:2: merge keys '<<' are not read"),
        ("a: *b\n", "cfg.yaml:1: alias '*b' names nothing above it"),
        ("a: &b [*b]\n", "cfg.yaml:1: alias '*b' names nothing above it"),
        ("a: " + "[" * 10_000, "nested deeper than 32 levels"),
        ("\n".join("  " * n + "a:" for n in range(60)), "nested deeper than 32 levels"),
        ("a: [" + "1," * 20_000 + "]", "more than 10000 values"),
        ("a: x\nb: \x00\n", "cfg.yaml:2: the character U+0000 is not allowed"),
        (b"a: 1\nb: \xff\n", "cfg.yaml:2: byte 8 (0xff) is not UTF-8"),
        ("a: 1\n".encode("utf-16"), "cfg.yaml:1: byte 0 (0xff) is not UTF-8"),
        ("#" * (1 << 20) + "\n", "cfg.yaml: is larger than 1048576 bytes"),
    ],
)  # fmt: skip
def test_what_is_not_a_settings_file_is_one_line(tmp_path, text, expected):
    start = time.perf_counter()
    assert expected in line_of(tmp_path, text)
    assert time.perf_counter() - start < 3


def test_an_alias_bomb_is_stopped_before_it_is_expanded(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40)
    )
    start = time.perf_counter()
    assert "more than 10000 values, aliases expanded" in line_of(tmp_path, bomb)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "\ufeffmodel: n\n"])
def test_an_empty_file_has_no_keys(tmp_path, text):
    assert load(tmp_path, text, ("model", "m")).value.model == "m"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "config.yaml").write_text("model: m\n")

    def line(path):
        with pytest.raises(InputError) as caught:
            load_settings(Train, path=path)
        return caught.value.line()

    assert "no such file; fix: did you mean 'config.yaml'?" in line(tmp_path / "confg.yaml")
    assert "is a directory" in line(tmp_path)
    assert "not a regular file" in line(Path("/dev/zero"))
    assert "error[unreadable-file]" in line(tmp_path / "a\0b")
    assert "error[unreadable-file]" in line(tmp_path / ("a" * 5000))
    assert "Not a directory" in line(tmp_path / "config.yaml" / "x.yaml")
    assert "\n" not in line(tmp_path / "a\nb.yaml")


def test_options_are_flat_and_complete():
    found = {option.key: option for option in options(Train)}
    assert found["lora.r"] == Option("lora.r", "int", "8", "rank of the adapters")
    assert found["model"] == Option("model", "text", "required", "alias or folder")
    assert found["optim.paged"].type_text == "auto|true|false"
    assert found["optim.warmup_ratio"].type_text == "float|none"
    assert found["optim.warmup_ratio"].default_text == "none"
    assert found["lora.target_modules"].type_text == "text|list of text"
    assert found["optim.betas"].default_text == "[0.9, 0.999]"
    assert found["model_options"].type_text == "mapping"
    assert found["extra.names"].type_text == "list of text"
    assert [key for key in found if key.startswith("extra")] == [
        "extra.folder", "extra.names", "extra.sizes",
    ]  # fmt: skip


_TEXTS = ["no", "yes", "null", "none", "~", "", " ", "1e-4", "12", "0x1", "nan", ".inf", "a: b",
          "# no", "'", '"', "\\", "\t", "\n", "\x7f", "\x85", "\u2028", "\U0001f600", "{", "[a",
          "- a", "*a", "&a", "!a", "%a", "@a", "`a", "|", ">", "a #b", "\ufeff", "é", "2024-01-01",
          "=", "<<", "on", "y", "1:30", "1_0", "a,b", "\ud800", "x" * 3000]  # fmt: skip


def _random_settings(rng: random.Random) -> Train:
    def text() -> str:
        return rng.choice(_TEXTS) + rng.choice(["", "", rng.choice(_TEXTS)])

    def number() -> float:
        return rng.choice([rng.random(), 1.0, 1e-300, 1e22, 5e-324, 0.1, 123456789.125])

    options = {text() or "k": rng.choice([text(), number(), None, True, 7, [text()], {"a": text()}])
               for _ in range(rng.randrange(4))}  # fmt: skip
    return Train(
        model=text(),
        lora=Lora(
            r=rng.randint(1, 256),
            lora_dropout=rng.random(),
            target_modules=rng.choice([text(), [text(), text()]]),
            use_rslora=rng.random() < 0.5,
        ),
        optim=Optim(lr=number(), paged=rng.choice([True, False, "auto"])),
        extra=rng.choice([None, Extra(folder=Path("a b/" + "c"), names=[text()], sizes=[1, -2])]),
        schedule=rng.choice(["off", "none", "linear"]),
        max_steps=rng.choice([5, "auto"]),
        model_options=options,
        note=rng.choice([None, text()]),
    )


def test_a_dump_loads_back_equal(tmp_path):
    rng = random.Random(0)
    for _ in range(150):
        value = _random_settings(rng)
        dumped = dump_settings(Resolved(value=value, origins={}))
        assert load(tmp_path, dumped.encode()).value == value


def test_a_dump_shows_every_key_with_its_origin_and_no_secret(tmp_path):
    secret = "hf_" + "A" * 34
    resolved = load(
        tmp_path,
        f"model: http://me:pass@host/m\nhub_token: {secret}\nmodel_options: {{api_key: abc}}\n",
        ("lora.r", "3"),
    )
    text = dump_settings(resolved)
    assert "  r: 3  # command line\n" in text
    assert "  lora_alpha: 32  # default\n" in text
    assert 'model: "http://***@host/m"  # cfg.yaml:1\n' in text
    assert secret not in text
    assert "abc" not in text
    assert "pass@" not in text
    plain = yaml.safe_load(text)
    assert set(plain) == set(Train.model_fields)
    assert set(plain["optim"]) == set(Optim.model_fields)


@pytest.mark.parametrize(
    "text",
    [
        "login hf_abcdefghijklmnopqrstuvwxyzABCDEFGH now",
        "key sk-proj-abcdefghijklmnop1234",
        "HF_TOKEN=abcdefgh1 train",
        '{"api_key": "abcdefgh1"}',
        "password=abcdefgh1&user=me",
        "Authorization: Bearer abcdefgh1",
        "authorization: abcdefgh1",
        "curl -H 'Bearer abcdefgh1abc'",
        "https://me:abcdefgh1@host/x",
        "https://abcdefgh1@host/x",
        "WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567",
        "wandb login 0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_redact_hides_secrets(text):
    hidden = redact(text)
    assert "***" in hidden
    assert "abcdefgh" not in hidden
    assert "0123456789abcdef" not in hidden


@pytest.mark.parametrize(
    "text",
    [
        "pad_token=<|endoftext|> eos_token='</s>'",
        "revision 0123456789abcdef0123456789abcdef01234567",
        "tokens: 123456789012, tokens_per_second=4",
        "hf_cache and sk-1 and https://host/path@2",
        "max_new_tokens=64",
    ],
)
def test_redact_leaves_ordinary_text(text):
    assert redact(text) == text


def test_redact_is_linear():
    start = time.perf_counter()
    for piece in ("a_", "a-", "://", "token", "wandb ", "Bearer ", "a.b:"):
        redact(piece * 20_000)
    assert time.perf_counter() - start < 5


def test_a_secret_is_not_shown_by_an_error(tmp_path):
    secret = "hf_" + "A" * 34
    assert secret not in line_of(tmp_path, f"model: m\nlora: {{r: {secret}}}\n")
    assert secret not in line_of(tmp_path, "model: m\n", (f"token={secret}", "1"))


def test_settings_are_frozen_and_finite():
    with pytest.raises(ValueError, match="frozen"):
        Lora().r = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="finite"):
        Optim(lr=math.inf)
