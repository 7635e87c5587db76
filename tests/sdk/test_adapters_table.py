"""The table of `softprompt adapter ls`: what tenants write in labels is text."""

from types import SimpleNamespace
from typing import Any

from rich.console import Console
from softprompt.cli.adapters import _table


def test_labels_are_shown_as_they_are() -> None:
    info: Any = SimpleNamespace(
        name="tweets",
        version=1,
        pinned=False,
        aliases=["latest"],
        kind="PROMPT_TUNING",
        num_virtual_tokens=3,
        dtype="float32",
        size_bytes=100,
        digest="sha256:0",
        created_at="now",
        labels={"a": "[/x]", "b": "[link=https://evil.example]y"},
    )
    console = Console(width=300)
    with console.capture() as shown:
        console.print(_table([info]))
    assert "a=[/x] b=[link=https://evil.example]y" in shown.get()
