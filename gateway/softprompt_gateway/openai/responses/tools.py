"""Tools of a response request, spelled with a level less than in chat, and which of them may be called."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from softprompt_api.errors import InvalidArgument, Unsupported
from softprompt_api.names import shown

from softprompt_gateway.openai.fields import refuse
from softprompt_gateway.openai.tools import (
    MAX_TOOLS,
    Function,
    NamedFunction,
    NamedTool,
    Tool,
    ToolChoice,
    callable_tools,
)
from softprompt_gateway.validation import RequestModel


class FunctionTool(Function):
    """A function that may be called."""

    type: Literal["function"]
    allowed_callers: Any = Field(None, description="not supported")
    defer_loading: Any = Field(None, description="not supported")
    output_schema: Any = Field(None, description="not supported")
    async_: Any = Field(None, description="not supported")
    is_async: Any = Field(None, alias="async", description="not supported")  # its name in JSON

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "FunctionTool":
        for name in ("allowed_callers", "defer_loading", "output_schema", "async_"):
            refuse(f"tools.{name}", getattr(self, name))
        refuse("tools.async", self.is_async)
        return self

    @property
    def tool(self) -> Tool:
        """As chat spells it."""
        function = Function(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return Tool(type="function", function=function)

    def told(self) -> dict[str, Any]:
        """As an answer repeats it."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": bool(self.strict),
        }


class NamedFunctionTool(RequestModel):
    """A function by its name."""

    type: Literal["function"]
    name: str


class AllowedTools(RequestModel):
    """Only some of the functions may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunctionTool], Field(min_length=1, max_length=MAX_TOOLS)]


def _only_functions(tool: object) -> object:
    return _only(tool, "tools", ("function",))


def _only_known(choice: object) -> object:
    return _only(choice, "tool_choice", ("function", "allowed_tools"))


def _only(value: object, field: str, kinds: Sequence[str]) -> object:
    """The value; Unsupported, by its name, for a built-in tool."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in kinds:
        raise Unsupported(
            f"{field} of type {shown(kind)} is not supported; only {' and '.join(map(repr, kinds))}", field=field
        )
    return value


FunctionTools = Annotated[
    list[Annotated[FunctionTool, BeforeValidator(_only_functions)]], Field(max_length=MAX_TOOLS)
]
FunctionChoice = Annotated[
    Literal["auto", "none", "required"] | NamedFunctionTool | AllowedTools, BeforeValidator(_only_known)
]


def as_in_chat(choice: FunctionChoice | None) -> ToolChoice | None:
    """The choice as chat spells it."""
    if isinstance(choice, NamedFunctionTool):
        return NamedTool(type="function", function=NamedFunction(name=choice.name))
    return choice.mode if isinstance(choice, AllowedTools) else choice


def callable_functions(tools: Sequence[Tool] | None, choice: FunctionChoice | None) -> Sequence[Tool]:
    """The tools that may be called, as in `callable_tools`."""
    if isinstance(choice, AllowedTools):
        tools = tools or []
        names = {tool.function.name for tool in tools}
        allowed = {tool.name for tool in choice.tools}
        for name in sorted(allowed - names):
            raise InvalidArgument(
                f"tool_choice names {shown(name)}, which is none of the tools", field="tool_choice"
            )
        tools = [tool for tool in tools if tool.function.name in allowed]
    return callable_tools(tools, as_in_chat(choice))
