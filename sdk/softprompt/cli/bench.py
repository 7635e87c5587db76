"""`softprompt bench`: put load on a running OpenAI-compatible server, and say what it made of it."""

import asyncio
import contextlib
import difflib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from softprompt_api.errors import AdapterNotFound
from softprompt_api.open_files import allow_many

from softprompt.bench.load import run
from softprompt.bench.report import GOALS, Report, make_report
from softprompt.bench.server import Outcome, Server
from softprompt.bench.workload import LengthRange, RandomPrompts, Request, make_workload
from softprompt.cli.connections import client_tls
from softprompt.cli.problems import Problem, WrongUsage
from softprompt.gateway import DEFAULT_URL

# Plain words, each a token or two in any vocabulary.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service "
    "friend father power hour game line end member law car city community name president team minute idea kid "
    "body information back parent face others level office door health person art war history party result change"
)
# Beyond this share of a core, the client may be what is measured.
_BUSY_SHARE = 0.8


def bench(
    base_url: Annotated[
        str, typer.Option("--base-url", envvar="SOFTPROMPT_URL", help="the server, with or without /v1")
    ] = DEFAULT_URL,
    api_key: Annotated[
        str,
        typer.Option("--api-key", envvar=["SOFTPROMPT_API_KEY", "OPENAI_API_KEY"], help="where one is asked for"),
    ] = "",
    model: Annotated[
        str | None, typer.Option("--model", help="what requests ask for; default: the base model")
    ] = None,
    adapters: Annotated[
        str | None, typer.Option("--adapters", help="names joined by commas, or all; each request draws one")
    ] = None,
    zipf: Annotated[
        float, typer.Option("--zipf", min=0, help="popularity of the n-th name is n^-ZIPF; 0: all alike")
    ] = 0.0,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="how many requests")] = 100,
    request_rate: Annotated[
        str, typer.Option("--request-rate", help="requests per second, at random times; inf: all at once")
    ] = "inf",
    max_concurrency: Annotated[
        int | None, typer.Option("--max-concurrency", min=1, help="most requests at one time; the wait counts")
    ] = None,
    prompt_len: Annotated[
        str, typer.Option("--prompt-len", metavar="MIN[:MAX]", help="tokens of random prompts")
    ] = "32:128",
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help='prompts: JSON lines, each a string or {"prompt": …}')
    ] = None,
    output_len: Annotated[
        str, typer.Option("--output-len", metavar="MIN[:MAX]", help="tokens of each answer")
    ] = "64",
    seed: Annotated[int, typer.Option("--seed", help="of prompts, lengths, names and times")] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option("--goodput", metavar="NAME:MS", help="goals of a good request: ttft:200 tpot:50 e2el:5000"),
    ] = None,
    save_result: Annotated[
        Path | None, typer.Option("--save-result", help="write figures and settings to this file, as JSON")
    ] = None,
) -> int:
    """Measure from the client's side; times count from when a request was due. Exit 1 when all requests failed."""
    rate, goals = _rate(request_rate), _goals(goodput or ())
    prompt_lengths, output_lengths = _lengths("--prompt-len", prompt_len), _lengths("--output-len", output_len)
    texts = None if dataset is None else _read_prompts(dataset)
    _check_writable(save_result)

    async def measure() -> tuple[list[str], list[Outcome], float, float]:
        async with Server(base_url, api_key, tls=client_tls()) as server:
            models = await _models(server, model, adapters)
            requests = make_workload(
                num=num_prompts,
                models=models,
                alpha=zipf,
                prompts=texts or await _random_prompts(server, models[0], prompt_lengths),
                output_lengths=output_lengths,
                rate=rate,
                seed=seed,
            )
            with _progress(requests) as tell:
                busy_s = time.process_time()
                outcomes, duration_s = await run(server, requests, max_concurrency=max_concurrency, tell=tell)
                return models, outcomes, duration_s, time.process_time() - busy_s

    allow_many()  # each request on its way is a connection
    models, outcomes, duration_s, busy_s = asyncio.run(measure())
    report = make_report(outcomes, duration_s, goals)
    typer.echo(report.table())
    _remark(report, busy_s / duration_s)
    if save_result is not None:
        settings = {
            "base_url": base_url,
            "models": models,
            "zipf": zipf,
            "num_prompts": num_prompts,
            # JSON has no infinity.
            "request_rate": rate if math.isfinite(rate) else "inf",
            "max_concurrency": max_concurrency,
            "prompt_len": None if texts else prompt_len,
            "dataset": None if dataset is None else dataset.name,
            "output_len": output_len,
            "seed": seed,
            "goodput": goals,
        }
        _write(save_result, {"settings": settings, "figures": report.as_dict(), "client_cpu_s": busy_s})
    return 0 if report.successful_requests else 1


def _rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        rate = float(text)
        if rate > 0:
            return rate
    raise WrongUsage(f"--request-rate: {text!r} is neither a number above 0 nor inf")


def _goals(texts: Sequence[str]) -> dict[str, float]:
    goals: dict[str, float] = {}
    for text in " ".join(texts).replace(",", " ").split():
        name, _, most = text.partition(":")
        try:
            goals[name] = float(most)
        except ValueError:
            goals[name] = math.nan
        if name not in GOALS or not goals[name] > 0:
            raise WrongUsage(f"--goodput: {text!r} is not NAME:MILLISECONDS; names are {', '.join(GOALS)}")
    return goals


def _lengths(flag: str, text: str) -> LengthRange:
    try:
        return LengthRange.parse(text)
    except ValueError:
        raise WrongUsage(f"{flag}: {text!r} is neither a number of tokens above 0 nor MIN:MAX") from None


def _read_prompts(path: Path) -> list[str]:
    """The prompts of a file of JSON lines."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # U+2028 is no end of a line of JSON
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUsage(f"--dataset: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    prompts = [_prompt_of(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise WrongUsage(f"--dataset: {path} has no prompts")
    return prompts


def _prompt_of(line: str, path: Path, number: int) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    if not isinstance(prompt, str) or not prompt:
        raise WrongUsage(f'--dataset: line {number} of {path} is neither a string nor {{"prompt": "…"}}')
    return prompt


def _check_writable(path: Path | None) -> None:
    """A run of an hour must not end in a file that cannot be written."""
    if path is not None and not (path.absolute().parent.is_dir() and not path.is_dir()):
        raise WrongUsage(f"--save-result: {path} cannot be written: there is no such folder, or it is one")


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}") from None


async def _models(server: Server, model: str | None, adapters: str | None) -> list[str]:
    """What requests ask for, the most popular first; a Problem where the server does not have it."""
    cards = await server.models()
    listed = [str(card["id"]) for card in cards]
    bases = [str(card["id"]) for card in cards if not card.get("parent")]
    if adapters == "all":
        names = [str(card["id"]) for card in cards if card.get("parent")]
        if not names:
            raise Problem(f"--adapters all: the server at {server.url} lists no adapters")
    else:
        names = [name.strip() for name in (adapters or "").split(",") if name.strip()]
    names = [model, *names] if model else names or bases[:1]
    if not names:
        raise Problem(f"the server at {server.url} lists no models; give --model")
    for name in names:
        await _check_model(server, name, listed)
    return names


async def _check_model(server: Server, name: str, listed: Sequence[str]) -> None:
    if name in listed:
        return
    try:
        await server.check_model(name)
    except AdapterNotFound as error:
        near = difflib.get_close_matches(name, listed, 1) or listed[:1]
        raise Problem(
            f"{error.message}; it has {len(listed)}" + (f", such as {near[0]}" if near else "")
        ) from None


async def _random_prompts(server: Server, model: str, lengths: LengthRange) -> RandomPrompts:
    ids = sorted(set(await server.token_ids(_WORDS, model=model)))
    if not ids:
        typer.echo("the server has no /tokenize: prompts are texts of as many words as tokens wanted", err=True)
    return RandomPrompts(lengths=lengths, token_ids=ids, words=_WORDS.split())


@contextlib.contextmanager
def _progress(requests: Sequence[Request]) -> Iterator[Callable[[Outcome], None]]:
    """A bar on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("requests", total=len(requests))
        yield lambda _: bar.advance(task)


def _remark(report: Report, busy_share: float) -> None:
    if report.failed_requests:
        typer.echo(f"{report.failed_requests} requests failed, the first: {report.first_error}", err=True)
    if busy_share > _BUSY_SHARE:
        typer.echo(
            f"this client kept {busy_share:.0%} of a core busy: it may be what limits these figures", err=True
        )
