"""The command `softprompt`."""

import io
import sys
from collections.abc import Sequence

import typer
from softprompt_api.errors import SoftpromptError

from softprompt.cli import adapters, add_all, amend, bench, doctor, keys, quality, resident, run, serve, talk
from softprompt.cli.argv import repeat_flags
from softprompt.cli.connections import begin
from softprompt.cli.problems import Problem

__all__ = ["app", "main"]

app = typer.Typer(
    name="softprompt",
    help="Serve soft prompts over one base model, and manage them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.callback()(begin)
app.command("run", help="Start everything on this machine and serve MODEL.")(run.run)
app.command(
    "serve",
    help="Start one service, set through its environment: registry, inference or gateway.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(serve.serve)
for name, help_, command in (
    (
        "add-all",
        "Register every PEFT folder in FOLDER under its own name in small letters, unless that has it already.",
        add_all.add_all,
    ),
    (
        "alias",
        "Make NAME@ALIAS stand for a version of NAME, at once for everybody; or remove the alias.",
        amend.alias,
    ),
    ("rollback", "Make NAME stand for an older version again.", amend.rollback),
    ("pin", "Keep a version from deletion.", amend.pin),
    ("unpin", "Let a version be deleted again.", amend.unpin),
    ("label", "Set labels of a version as KEY=VALUE, or remove them.", amend.label),
    ("ps", "List the adapters in the inference service's memory.", resident.ps),
    ("preload", "Bring an adapter to the device before its first request.", resident.preload),
    ("evict", "Let an adapter that no request uses go from memory.", resident.evict),
    ("probe", "Measure what an adapter changes after a few prompts, and keep it with the version.", quality.probe),
    ("nearest", "List the tokens of the vocabulary that are nearest to each virtual token.", quality.nearest),
    (
        "verify",
        "Compare what is served with PEFT, replayed here in float32: exit 0 where they are equal, 1 otherwise.",
        quality.verify,
    ),
):
    adapters.app.command(name, help=help_)(command)
app.add_typer(adapters.app, name="adapter")
app.add_typer(keys.app, name="key")
app.command("complete", help="Complete a text with a running system.")(talk.complete)
app.command("chat", help="Chat with a running system.")(talk.chat)
app.command("bench", help="Measure a running OpenAI-compatible server under load.")(bench.bench)
app.command("doctor", help="Say what is installed, what is missing, and what is in the way.")(doctor.doctor)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 it could not be done, 2 wrong usage; one plain line says why."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows "?" for it; standard error escapes them by itself.
        sys.stdout.reconfigure(errors="replace")
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = app(repeat_flags(arguments), prog_name="softprompt", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message()
        if message.startswith("Usage: "):  # no command was given: this is the help
            print(message, file=sys.stderr)
            sys.exit(error.exit_code)
        _fail(" ".join(message.split()), error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Problem as problem:
        _fail(problem.message, problem.exit_code, detail=problem.detail)
    except SoftpromptError as error:
        hint = error.details.get("did_you_mean")
        _fail(error.message + (f" (did you mean {hint!r}?)" if hint and hint not in error.message else ""), 1)
    except UnicodeEncodeError:
        # Only paths may have bytes that are no text, which Python lets pass as surrogates.
        if all(map(_is_text, arguments)):
            raise
        _fail("an argument is not UTF-8", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _is_text(argument: str) -> bool:
    return argument.encode(errors="replace").decode() == argument


def _fail(message: str, code: int, *, detail: str = "") -> None:
    lines = [f"softprompt: {message or 'no command; see softprompt --help'}", *([detail] if detail else [])]
    print("\n".join(lines), file=sys.stderr)
    sys.exit(code)
