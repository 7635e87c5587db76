"""Tools of a chat request: the functions, which of them may or must be called, and the grammar of calls.

A call is written as `<tool_call>\n{"name": "f", "arguments": {…}}\n</tool_call>`; the inference service tells the
model so. Where a call must come, or must follow its schema, a grammar sees to it:

* a function that is required or named: calls and nothing else, each with the schema of its function;
* otherwise, where a function is strict or only one call may come: any text, in which calls of strict functions
  follow their schemas, and calls of others have an object as arguments.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from softprompt_api.errors import InvalidArgument
from softprompt_api.names import shown
from softprompt_api.structured import JSON_WHITESPACE, MAX_GRAMMAR_CHARACTERS, check_object

from softprompt_gateway.openai import schemas
from softprompt_gateway.openai.fields import refuse
from softprompt_gateway.validation import RequestModel, check_name

# Keywords of a schema by which an object may have, or need, properties that it does not list.
_MAY_ALLOW_MORE = frozenset(
    [
        *("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"),
        *("allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "$ref"),
    ]
)
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128
# For the compiler of the grammar, in the schema that it compiles.
_OPTIONS = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}


class Function(RequestModel):
    """A function that may be called."""

    name: str = Field(json_schema_extra=schemas.NAME)
    description: str | None = None
    parameters: Annotated[dict[str, Any], Field(json_schema_extra=schemas.PARAMETERS)] | None = Field(
        None, description="JSON Schema of its arguments; default: any object"
    )
    strict: bool | None = Field(None, description="a call follows the schema even where none must come")

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return check_name(value, what="a function", field="tools")

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            check_object(value, what="the parameters of a function", field="tools")
            if "x-guidance" in value:
                raise InvalidArgument("x-guidance in the parameters of a function is not supported", field="tools")
            if value.get("type", "object") != "object":
                raise InvalidArgument('the parameters of a function must have the type "object"', field="tools")
        return value

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """What a call must hold: an object.

        Where its schema lists parameters and leaves open whether there are more, there are none: a small model
        would go on with what the function does not take.
        """
        schema: dict[str, Any] = {"type": "object", **(self.parameters or {})}
        listed, required = schema.get("properties"), schema.get("required", [])
        if not isinstance(listed, dict) or not isinstance(required, list) or _MAY_ALLOW_MORE & schema.keys():
            return schema
        are_listed = all(isinstance(name, str) and name in listed for name in required)
        return {**schema, "additionalProperties": False} if are_listed else schema


class Tool(RequestModel):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(RequestModel):
    """The name of a function."""

    name: str


class NamedTool(RequestModel):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["auto", "none", "required"] | NamedTool
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def check_tools(tools: Sequence[Tool]) -> None:
    """Raise InvalidArgument where two functions have one name, or all of them are too large."""
    names = [tool.function.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgument(f"two tools have the name {name}", field="tools")
    if sum(map(len, map(tool_text, tools))) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidArgument(f"tools have more than {MAX_GRAMMAR_CHARACTERS} characters", field="tools")


def tool_text(tool: Tool) -> str:
    """The tool as JSON, as the model is told of it."""
    shape = tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})
    return json.dumps(shape, ensure_ascii=False)


def callable_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> Sequence[Tool]:
    """The tools that may be called; InvalidArgument where the choice does not go together with them.

    Args:
        tools: None where the request has none. Beside an empty list, which some clients always send, is `auto`.
    """
    if choice == "none" or (choice == "auto" and tools == []):
        return []
    tools = tools or []
    if isinstance(choice, NamedTool):
        name = choice.function.name
        found = [tool for tool in tools if tool.function.name == name]
        if not found:
            raise InvalidArgument(
                f"tool_choice names {shown(name)}, which is none of the tools", field="tool_choice"
            )
        return found
    if choice is not None and not tools:
        raise InvalidArgument(f"tool_choice {choice} needs tools", field="tool_choice")
    return tools


def wanted_with_calls(
    wanted: Mapping[str, dict[str, Any] | None],
    tools: Sequence[Tool],
    choice: ToolChoice | None,
    *,
    parallel: bool,
) -> dict[str, dict[str, Any] | None]:
    """What each field wants the output to be, calls included; see `form_of`.

    Args:
        wanted: by the other fields; Unsupported where one of them is set and calls may come.
        tools, parallel: as in `grammar_of`; a function that is named is called once.
    """
    if not tools:
        return dict(wanted)
    for name, value in wanted.items():
        refuse(name, value, because='together with tools is not supported, but with tool_choice "none"')
    grammar = grammar_of(tools, choice, parallel=parallel and not isinstance(choice, NamedTool))
    return {"tools": None if grammar is None else {"grammar": grammar}}


def grammar_of(tools: Sequence[Tool], choice: ToolChoice | None, *, parallel: bool) -> str | None:
    """Lark of what the output may be; None: anything.

    Args:
        tools: those that may be called.
        parallel: whether several calls may come.
    """
    if not tools:
        return None
    must_call = choice not in (None, "auto")
    functions = [tool.function for tool in tools]
    if must_call:
        start = f'start: "{CALL_START}" call' + (f' ("\\n{CALL_START}" call)*' if parallel else "")
        texts: list[str] = []
    elif any(function.strict for function in functions) or not parallel:
        start = "start: (head call)* tail" if parallel else "start: tail | head call"
        texts = [f'head[lazy]: TEXT "{CALL_START}"', "tail: TEXT", r"TEXT: /(.|\n)*/"]
    else:
        return None
    rules = [start, *texts]
    names = [f"call_{number}" for number in range(len(functions))]
    rules.append(f'call: "\\n" ({" | ".join(names)}) "\\n{CALL_END}"')
    for name, function in zip(names, functions, strict=True):
        schema = function.schema_of_arguments if must_call or function.strict else {"type": "object"}
        head = json.dumps(f'{{"name": "{function.name}", "arguments": ')
        rules.append(f'{name}: {head} %json {json.dumps({**_OPTIONS, **schema})} "}}"')
    return "\n".join(rules)
