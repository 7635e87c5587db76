"""docs/api.md tells every route, field, error code and setting that exists, and no other."""

import importlib.util
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import softprompt_gateway
from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings
from softprompt_gateway.adapters.loading import REQUEST_MODELS as LOADING_MODELS
from softprompt_gateway.adapters.schema import AliasRequest, ImportRequest, RegisterRequest, UpdateRequest
from softprompt_gateway.errors import ANSWERS, INVALID_REQUEST
from softprompt_gateway.openai.chat import ChatRequest, Message
from softprompt_gateway.openai.completions import CompletionRequest
from softprompt_gateway.openai.fields import GenerationFields, StreamOptions
from softprompt_gateway.openai.parts import SoftPromptPart, TextPart
from softprompt_gateway.openai.responses.items import FunctionCall, FunctionCallOutput, InputMessage
from softprompt_gateway.openai.responses.request import ResponsesRequest
from softprompt_gateway.openai.responses.tools import FunctionTool
from softprompt_gateway.openai.tokens import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from softprompt_gateway.openai.tools import Function, Tool

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
SHARED = "GenerationFields"
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")


def rows(table: str) -> list[list[str]]:
    """The cells of each row of the table under a mark, without its head."""
    marked = PAGE.read_text(encoding="utf-8").partition(f"<!-- {table} -->\n")[2]
    assert marked, f"no table is marked {table}"
    lines = takewhile(lambda line: line.startswith("|"), marked.splitlines())
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in list(lines)[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", cell)


def fields(model: str) -> dict[str, list[str]]:
    """The row of each field in a model's table."""
    named = [(name, row) for row in rows(f"fields: {model}") for name in quoted(row[0])]
    assert len(dict(named)) == len(named), "a field stands twice"
    return dict(named)


def documented(model: type[BaseModel]) -> dict[str, list[str]]:
    """The rows of a route's own table, and of the shared one where the route has its fields.

    A shared field that is another here has a row in both.
    """
    if not issubclass(model, GenerationFields):
        return fields(model.__name__)
    own, shared = fields(model.__name__), fields(SHARED)
    assert own.keys() & shared.keys() == GenerationFields.model_fields.keys() & model.__annotations__.keys()
    return shared | own


MODELS = pytest.mark.parametrize(
    "model",
    [
        CompletionRequest,
        ChatRequest,
        TokenizeCompletionRequest,
        TokenizeChatRequest,
        DetokenizeRequest,
        RegisterRequest,
        ImportRequest,
        UpdateRequest,
        AliasRequest,
        Message,
        TextPart,
        SoftPromptPart,
        StreamOptions,
        Tool,
        Function,
        *LOADING_MODELS,
        ResponsesRequest,
        InputMessage,
        FunctionCall,
        FunctionCallOutput,
        FunctionTool,
    ],
)


def spelled(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model as requests name them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


@MODELS
def test_a_table_has_the_fields_of_its_request_and_no_other(model: type[BaseModel]) -> None:
    assert documented(model).keys() == spelled(model).keys()


@MODELS
def test_a_table_says_which_fields_are_required(model: type[BaseModel]) -> None:
    required = {name for name, row in documented(model).items() if row[2] == "required"}
    assert required == {name for name, field in spelled(model).items() if field.is_required()}


@MODELS
def test_a_table_has_every_bound_that_is_checked(model: type[BaseModel]) -> None:
    table = documented(model)
    for name, schema in model.model_json_schema()["properties"].items():
        told = {int(number) for number in re.findall(r"-?\d+", table[name][3])}
        bounds = {part[key] for part in (schema, *schema.get("anyOf", ())) for key in BOUNDS if key in part}
        assert bounds <= told, f"{name}: {bounds - told} not told"


def test_the_table_of_all_fields_is_what_the_models_say() -> None:
    spec = importlib.util.spec_from_file_location("api_fields", PAGE.parents[1] / "tools" / "api_fields.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert f"<!-- all fields: begin -->\n{tool.table()}<!-- all fields: end -->" in PAGE.read_text(
        encoding="utf-8"
    )
    assert "| `suffix` | refused | unknown |" in tool.table()


def test_every_error_has_its_status_type_and_code_in_the_table() -> None:
    told = {(status, quoted(type_)[0], quoted(code)[0]) for status, type_, code, _ in rows("errors")}
    assert {(str(answer.status), answer.type, answer.code) for answer in ANSWERS.values()} <= told


def test_the_table_of_errors_has_the_codes_that_http_alone_refuses_with_and_no_other() -> None:
    told = {quoted(code)[0]: quoted(type_)[0] for _, type_, code, _ in rows("errors")}
    sources = Path(softprompt_gateway.__file__).parent.rglob("*.py")
    texts = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    used = re.findall(r'\bcode ?= ?"(\w+)"(?: if .* else "(\w+)")?', texts)
    assert told.keys() == {code for pair in used for code in pair if code}
    answered = {answer.code for answer in ANSWERS.values()}
    assert {type_ for code, type_ in told.items() if code not in answered} == {INVALID_REQUEST}


async def test_the_table_of_routes_has_every_route_and_no_other(stack: Any) -> None:
    document = (await stack.http.get("/openapi.json")).json()
    served = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert {quoted(row[0])[0] for row in rows("routes")} == served


async def test_every_header_and_query_parameter_is_told(stack: Any) -> None:
    document = (await stack.http.get("/openapi.json")).json()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    names = {
        parameter["name"]
        for operation in operations
        for parameter in operation.get("parameters", ())
        if parameter["in"] != "path"
    }
    assert names
    told = {name for line in PAGE.read_text(encoding="utf-8").splitlines() for name in quoted(line)}
    assert names <= told, f"not told: {names - told}"


def variable(settings: type[BaseSettings], name: str) -> str:
    """The environment variable of a setting."""
    alias = settings.model_fields[name].validation_alias
    if isinstance(alias, AliasChoices):
        return next(choice for choice in alias.choices if isinstance(choice, str) and choice.isupper())
    return f"{settings.model_config['env_prefix']}{name}".upper()


def shown_default(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


@pytest.mark.parametrize("package", ["softprompt_gateway", "softprompt_registry", "softprompt_inference"])
def test_a_table_has_the_settings_of_its_service_with_their_defaults(package: str) -> None:
    settings: type[BaseSettings] = importlib.import_module(f"{package}.settings").Settings
    told = {quoted(name)[0]: default for name, default, _ in rows(f"settings: {package}")}
    assert told == {
        variable(settings, name): shown_default(field.default) for name, field in settings.model_fields.items()
    }
