"""`softprompt complete` and `softprompt chat`: a running system from the terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from softprompt.cli.connections import gateway_client
from softprompt.cli.problems import WrongUsage
from softprompt.gateway import DEFAULT_URL

Url = Annotated[str, typer.Option("--url", envvar="SOFTPROMPT_URL", help="the gateway")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="SOFTPROMPT_API_KEY", help="where the gateway asks for one")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="an adapter's name; the base model when not given")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="most tokens of an answer")]
Temperature = Annotated[float, typer.Option("--temperature", min=0, max=2, help="0 is greedy")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="text that ends the answer; may be repeated")]


def complete(
    prompt: Annotated[str | None, typer.Argument(help="the text; standard input when not given")] = None,
    model: Model = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    stop: Stop = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Print a completion as it is generated."""
    with _utf8():
        text = sys.stdin.read() if prompt is None else prompt
        text.encode()
    if not text:
        raise WrongUsage("there is no prompt: give one as an argument or on standard input")
    with gateway_client(url, api_key) as gateway:
        name = model or gateway.base_model()
        limits = {"max_tokens": max_tokens, "temperature": temperature, "stop": stop or []}
        for piece in gateway.complete(text, model=name, **limits):
            typer.echo(piece, nl=False)
    typer.echo()


def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option("--system", help="instructions for the assistant")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Answer each line of standard input, remembering the conversation; end with Ctrl-D."""
    messages = [{"role": "system", "content": system}] if system else []
    with gateway_client(url, api_key) as gateway:
        name = model or gateway.base_model()
        while (line := _next_line(name)) is not None:
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            answer = ""
            for piece in gateway.chat(messages, model=name, max_tokens=max_tokens, temperature=temperature):
                typer.echo(piece, nl=False)
                answer += piece
            typer.echo()
            messages.append({"role": "assistant", "content": answer})


def _next_line(name: str) -> str | None:
    """The user's next line, stripped; None at the end of the input."""
    if sys.stdin.isatty():
        typer.echo(f"{name}> ", nl=False, err=True)
    with _utf8():
        line = sys.stdin.readline()
        line.encode()
    return line.strip() if line else None


@contextmanager
def _utf8() -> Iterator[None]:
    """WrongUsage for bytes that are no text; where they come from, Python may have let them pass as surrogates."""
    try:
        yield
    except UnicodeError:
        raise WrongUsage("the text is not UTF-8") from None
