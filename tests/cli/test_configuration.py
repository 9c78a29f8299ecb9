"""Which layer wins, what each refuses, and that a new field needs no code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from platformdirs import user_config_path

from octavo.cli.configuration import Configuration, read_configuration
from octavo.cli.fields import flag_name, said_fields, variable_name
from octavo.cli.layers import File, Said, read_environment, read_file
from octavo.cli.options import accepts
from octavo.errors import InvalidParameterError, ModelNotFoundError, NotEnoughMemoryError, UsageError
from octavo.settings import SamplingParams, Settings

FIELDS = [field for cls in (Settings, SamplingParams) for field in said_fields(cls)]


@pytest.fixture(autouse=True)
def _in_the_empty_home(cli):
    """`cli` sets the folder, the home and the environment."""


def user_file(text: str) -> None:
    path = user_config_path("octavo", appauthor=False) / "octavo.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")


def working_file(text: str) -> None:
    Path("octavo.toml").write_text(text, encoding="utf-8")


# --- which layer wins --------------------------------------------------------------------------------


def test_the_order_of_layers(monkeypatch):
    user_file("threads = 1")
    assert read_configuration({}).resolve().settings.threads == 1
    working_file("threads = 2\n[models.small]\nmodel = 'org/small'\nthreads = 3")
    assert read_configuration({}).resolve().settings.threads == 2
    assert read_configuration({"model": "small"}).resolve().settings.threads == 3
    monkeypatch.setenv("OCTAVO_THREADS", "4")
    assert read_configuration({"model": "small"}).resolve().settings.threads == 4
    resolved = read_configuration({"model": "small", "threads": 5}).resolve()
    assert (resolved.settings.threads, resolved.settings.model) == (5, "org/small")
    assert resolved.origins == {"threads": "flag", "model": "[models.small] in octavo.toml"}


LAYER = st.dictionaries(st.sampled_from(["threads", "context", "seed", "top_k"]), st.integers(1, 9))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LAYER, min_size=4, max_size=4))
def test_the_first_layer_that_speaks_wins(layers: list[dict[str, int]]):
    said = [{k: Said(v, str(i)) for k, v in layer.items()} for i, layer in enumerate(layers)]
    configuration = Configuration(said[0], said[1], (File(said[2], {}), File(said[3], {})), ())
    resolved = configuration.resolve()
    for name in ("threads", "context", "seed", "top_k"):
        where = next((i for i, layer in enumerate(layers) if name in layer), None)
        values = resolved.settings if hasattr(resolved.settings, name) else resolved.sampling
        assert getattr(values, name) == (None if where is None else layers[where][name])
        assert resolved.origins.get(name) == (None if where is None else str(where))


def test_nothing_said_is_the_defaults():
    resolved = read_configuration({}).resolve()
    assert (resolved.settings, resolved.sampling, resolved.origins) == (Settings(), SamplingParams(), {})


# --- octavo.toml ---------------------------------------------------------------------------------------


def test_every_kind_of_value_in_a_file():
    working_file("""
        model = "a"
        offline = true
        cache = false
        cache_dir = "~/weights"
        [sampling]
        temperature = 1
        stop = ["x", "y"]
        logit_bias = { 3 = -1.5 }
    """)
    resolved = read_configuration({}).resolve()
    assert resolved.settings == Settings(
        model="a", offline=True, cache=False, cache_dir=Path.home() / "weights"
    )
    assert resolved.sampling == SamplingParams(temperature=1.0, stop=("x", "y"), logit_bias={3: -1.5})


@pytest.mark.parametrize(
    ("text", "error", "said", "remedy"),
    [
        ("threads = ?", UsageError, "line 1", "octavo.toml"),
        ("qaunt = 'int8'", UsageError, "qaunt", "Did you mean quant?"),
        ("[samplin]\na = 1", UsageError, "samplin", "Did you mean [sampling]?"),
        ("temperature = 1", UsageError, "temperature", "[sampling]"),
        (
            "[models.a]\ntemprature = 1",
            UsageError,
            "[models.a]",
            "temperature belongs in [models.a.sampling]",
        ),
        ("[models.a.sampling]\nquant = 1", UsageError, "[models.a.sampling]", "Known keys: max_new_tokens"),
        ("[models.a]\nfalback = 'b'", UsageError, "falback", "fallback"),
        ("[server]\nport = 1", UsageError, "[server] is not a known table", "[serve]"),
        ("zzz = 1", UsageError, "zzz", "Known keys: model"),
        ("quant = 'int9'", InvalidParameterError, 'quant is "int9": should be', "octavo.toml"),
        ("threads = '4'", InvalidParameterError, 'threads is "4"', "octavo.toml"),
        ("threads = true", InvalidParameterError, "threads is true", "octavo.toml"),
        ("threads = 2000-01-01", InvalidParameterError, 'threads is "2000-01-01"', "octavo.toml"),
        ("cache = 1", InvalidParameterError, "cache is 1", "octavo.toml"),
        ("[sampling]\nstop = 5", InvalidParameterError, "stop in [sampling]", "octavo.toml"),
        ("[sampling]\nstop = [5]", InvalidParameterError, "[sampling.stop]", "octavo.toml"),
        ("[sampling]\nnum_beams = 4", UsageError, "num_beams in [sampling]", "no beam search"),
        ("[sampling]\nlogits_processors = []", UsageError, "logits_processors", "Known keys"),
        ("models = 1", InvalidParameterError, "models is 1", "octavo.toml"),
        ("[models.a]\nfallback = 'b'\n[models.b]\nfallback = 'a'", UsageError, "leads back", "->"),
        ("[models.a]\nfallback = 'a'", UsageError, "leads back to a", "a -> a"),
    ],
)
def test_what_a_file_may_not_say(text, error, said, remedy):
    working_file(text)
    with pytest.raises(error) as caught:
        read_configuration({})
    assert said in caught.value.message
    assert remedy in caught.value.remedy


def test_a_file_that_is_not_text():
    Path("octavo.toml").write_bytes(b"model = '\xff'")
    with pytest.raises(UsageError, match=r"octavo\.toml"):
        read_configuration({})


# --- variables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("OCTAVO_MODEL", "{a}", "model", "{a}"),
        ("OCTAVO_THREADS", "4", "threads", 4),
        ("OCTAVO_OFFLINE", "yes", "offline", True),
        ("OCTAVO_NO_CACHE", "1", "cache", False),
        ("OCTAVO_NO_CACHE", "0", "cache", True),
        ("OCTAVO_CACHE", "/tmp/x", "cache_dir", Path("/tmp/x")),
        ("OCTAVO_TEMPERATURE", "0.5", "temperature", 0.5),
        ("OCTAVO_STOP", "END, or [not]", "stop", ("END, or [not]",)),
        ("OCTAVO_STOP", '["a", "b"]', "stop", ("a", "b")),
        ("OCTAVO_STOP_TOKEN_IDS", "2", "stop_token_ids", (2,)),
        ("OCTAVO_STOP_TOKEN_IDS", "[2, 3]", "stop_token_ids", (2, 3)),
        ("OCTAVO_LOGIT_BIAS", '{"3": 1}', "logit_bias", {3: 1.0}),
    ],
)
def test_every_kind_of_variable(monkeypatch, variable, text, field, value):
    monkeypatch.setenv(variable, text)
    resolved = read_configuration({}).resolve()
    values = resolved.settings if hasattr(resolved.settings, field) else resolved.sampling
    assert getattr(values, field) == value
    assert resolved.origins == {field: variable}


def test_an_empty_variable_says_nothing(monkeypatch):
    monkeypatch.setenv("OCTAVO_THREADS", "")
    assert read_configuration({}).resolve().settings.threads is None


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("OCTAVO_THREADS", "many"),
        ("OCTAVO_QUANT", "int9"),
        ("OCTAVO_NO_CACHE", "perhaps"),
        ("OCTAVO_STOP", '["a'),
        ("OCTAVO_STOP_TOKEN_IDS", '["a"]'),
        ("OCTAVO_LOGIT_BIAS", "4"),
    ],
)
def test_a_variable_of_the_wrong_type_is_named(monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    with pytest.raises(InvalidParameterError, match=variable) as caught:
        read_configuration({})
    assert caught.value.parameter in {field.name for field in FIELDS}


def test_a_variable_that_is_no_setting_is_a_notice(monkeypatch, cli):
    monkeypatch.setenv("OCTAVO_QAUNT", "int8")
    monkeypatch.setenv("OCTAVO_TEST_MODEL", "x")
    monkeypatch.setenv("OCTAVO_DEPLOYMENT_COLOR", "x")
    done = cli("generate", "hello")
    assert done.code == 0
    assert done.err_lines[0] == "OCTAVO_QAUNT is not a setting, and was ignored: did you mean OCTAVO_QUANT?"
    assert done.err_lines[1] == "OCTAVO_DEPLOYMENT_COLOR is not a setting, and was ignored"
    assert len(done.err_lines) == 3


# --- aliases and fallbacks -------------------------------------------------------------------------------


FALLBACKS = """
    [models.big]
    model = "org/big"
    quant = "int8"
    fallback = "small"
    [models.small]
    model = "org/small"
    sampling.temperature = 0.25
    fallback = "org/last"
"""


@pytest.mark.parametrize(
    "error",
    [
        ModelNotFoundError("org/big is not on the hub", remedy="no"),
        NotEnoughMemoryError("org/big is not on the hub", remedy="no", needed_bytes=2, available_bytes=1),
    ],
)
def test_a_fallback_is_announced_and_has_its_own_settings(cli, error):
    working_file(FALLBACKS)
    cli.llm.load_errors.append(error)
    done = cli("generate", "hello", "-m", "big", "--threads", "2")
    assert done.code == 0
    assert done.err_lines[0] == "org/big is not on the hub: taking the fallback small"
    assert cli.llm.loads == [
        Settings(model="org/big", quant="int8", threads=2),
        Settings(model="org/small", threads=2),
    ]
    assert cli.llm.asked[0][2].temperature == 0.25


def test_where_the_last_fallback_fails_its_error_is_the_error(cli):
    working_file(FALLBACKS)
    cli.llm.load_errors += [ModelNotFoundError(f"no {name}", remedy="r") for name in ("big", "small", "last")]
    done = cli("generate", "hello", "-m", "big")
    assert done.code == 3
    assert done.err_lines[-2:] == ["error: no last", "  fix: r"]
    assert [load.model for load in cli.llm.loads] == ["org/big", "org/small", "org/last"]


def test_other_errors_take_no_fallback(cli):
    working_file(FALLBACKS)
    cli.llm.load_errors.append(UsageError("bad", remedy="r"))
    assert cli("generate", "hello", "-m", "big").code == 2
    assert len(cli.llm.loads) == 1


def test_a_misspelled_alias_gets_the_close_name(cli):
    working_file(FALLBACKS)
    cli.llm.load_errors += [ModelNotFoundError("no", remedy="Check it.") for _ in range(2)]
    assert cli("generate", "hello", "-m", "smal").err_lines[-1] == "  fix: Did you mean small? Check it."
    assert cli("generate", "hello", "-m", "org/name").err_lines[-1] == "  fix: Check it."


@pytest.mark.parametrize("command", [["generate", "hello"], ["config"], ["plan"]])
@pytest.mark.parametrize("origin", ["octavo.toml", "OCTAVO_CONTEXT"])
def test_a_value_out_of_range_names_where_it_was_said(cli, monkeypatch, command, origin):
    if origin == "OCTAVO_CONTEXT":
        monkeypatch.setenv(origin, "-5")
    else:
        working_file("context = -5")
    done = cli(*command)
    assert (done.code, done.out) == (2, "")
    assert done.err_lines[0].startswith("error: context is -5; it must be")
    assert origin in done.err_lines[1]
    assert not cli.llm.loads


def test_settings_of_a_model_by_its_own_name():
    working_file("[models.'org/name']\ncontext = 512")
    assert read_configuration({"model": "org/name"}).resolve().settings == Settings(
        model="org/name", context=512
    )


# --- one place -----------------------------------------------------------------------------------------


def test_names_never_clash():
    names = [field.name for field in FIELDS]
    assert len(set(names)) == len(names)
    variables = [variable_name(field) for field in FIELDS]
    assert len(set(variables)) == len(variables)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extended(Settings):
    """A field as any of ours, that no code knows."""

    color: Literal["red", "green"] | None = dataclasses.field(default=None, metadata={"help": "Its color."})
    sizes: tuple[int, ...] = dataclasses.field(default=(), metadata={"help": "Its sizes."})


def test_a_new_field_is_a_flag_a_variable_and_a_key(monkeypatch):
    seen: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @accepts(Extended)
    def command(*, said: Mapping[str, Any]) -> None:
        seen.update(said)

    app(["--color", "red", "--sizes", "1", "--sizes", "2"], standalone_mode=False)
    assert seen == {"color": "red", "sizes": (1, 2)}

    monkeypatch.setenv("OCTAVO_COLOR", "green")
    monkeypatch.setenv("OCTAVO_SIZES", "[3]")
    layer, _ = read_environment(Extended, SamplingParams)
    assert layer == {"color": Said("green", "OCTAVO_COLOR"), "sizes": Said((3,), "OCTAVO_SIZES")}

    working_file("color = 'red'\nsizes = [4]\n[models.a]\nsizes = [5]")
    file = read_file(Path("octavo.toml"), Extended, SamplingParams)
    assert file.layer == {"color": Said("red", "octavo.toml"), "sizes": Said((4,), "octavo.toml")}
    assert file.aliases["a"].layer["sizes"].value == (5,)


def test_one_stop_string_may_stand_alone_in_a_file():
    working_file("[sampling]\nstop = 'END'\n[models.a.sampling]\nstop = 'x'")
    assert read_configuration({}).resolve().sampling.stop == ("END",)
    assert read_configuration({"model": "a"}).resolve().sampling.stop == ("x",)


def test_a_schema_in_a_file_is_text_or_a_table(monkeypatch):
    working_file("""
        [sampling]
        json_schema = { type = "object", required = ["a"] }
        [models.a.sampling]
        json_schema = '{"type": "integer"}'
    """)
    assert read_configuration({}).resolve().sampling.json_schema == {"type": "object", "required": ["a"]}
    assert read_configuration({"model": "a"}).resolve().sampling.json_schema == '{"type": "integer"}'
    monkeypatch.setenv("OCTAVO_JSON_SCHEMA", '{"type": "null"}')
    assert read_configuration({}).resolve().sampling.json_schema == '{"type": "null"}'


@pytest.mark.parametrize("command", ["generate", "chat", "config"])
def test_every_field_has_its_flag_in_the_help(cli, command):
    text = cli(command, "--help").out
    for field in FIELDS:
        flag = re.escape(flag_name(field))
        assert bool(re.search(rf"{flag}[ /]", text)) == field.metadata.get("cli", True), field.name
