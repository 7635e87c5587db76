"""`softprompt adapter` `probe`, `nearest`, `verify`: what an adapter does, and whether it is PEFT's."""

import importlib.util
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from softprompt_api.errors import DataCorrupted
from softprompt_api.formats import AdapterVerifier, parse_config
from softprompt_api.names import choose_task, parse_requested, with_task
from softprompt_api.registry.v1 import registry_pb2

from softprompt.cli.adapters import AsJson, Inference, Registry, console, print_json
from softprompt.cli.connections import inference_client, registry_client
from softprompt.cli.problems import Problem, WrongUsage
from softprompt.inference import DEFAULT_ADDRESS as INFERENCE_ADDRESS
from softprompt.inference import VirtualToken
from softprompt.peft_folder import write_folder
from softprompt.registry import DEFAULT_ADDRESS as REGISTRY_ADDRESS
from softprompt.verify import PROMPTS, TOLERANCES, Comparison, Replay, Served, compare, serve

Adapter = Annotated[str, typer.Argument(help="NAME, NAME@VERSION, NAME@ALIAS or sha256:DIGEST")]
Task = Annotated[str, typer.Argument(help="NAME, NAME@VERSION, NAME@ALIAS or sha256:DIGEST; :TASK behind it")]


def probe(adapter: Adapter, inference: Inference = INFERENCE_ADDRESS, as_json: AsJson = False) -> None:
    """Measure an adapter's effect, and keep it with the version."""
    with inference_client(inference) as client:
        info = client.probe(adapter)
    if as_json:
        print_json(info.as_dict())
        return
    assert info.probe is not None
    for effect in info.probe.effects:
        task = "" if effect.task is None else f":{effect.task}"
        typer.echo(f"{info.name}@{info.version}{task}: {effect}")
    for warning in info.warnings:
        typer.echo(f"warning: {warning}", err=True)


def nearest(
    adapter: Task,
    top_k: Annotated[int, typer.Option(min=1, max=20, help="tokens for each virtual token")] = 5,
    inference: Inference = INFERENCE_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """List the tokens that are nearest to each virtual token."""
    with inference_client(inference) as client:
        virtual_tokens = client.nearest(adapter, top_k=top_k)
    if as_json:
        print_json([asdict(virtual) for virtual in virtual_tokens])
    else:
        console().print(_nearest_table(virtual_tokens), markup=False)


def _nearest_table(virtual_tokens: Sequence[VirtualToken]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("VIRTUAL TOKEN", "NORM", "NEAREST TOKENS, WITH THE COSINE"):
        table.add_column(column, no_wrap=True)
    for index, virtual in enumerate(virtual_tokens):
        tokens = "  ".join(f"{near.token!a} {near.cosine:.2f}" for near in virtual.nearest)
        table.add_row(str(index), f"{virtual.norm:.3g}", tokens)
    return table


def verify(
    adapter: Task,
    prompt: Annotated[
        list[str] | None, typer.Option(help="a prompt to compare; can be repeated; default: four fixed ones")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=1024, help="tokens to compare for each prompt")] = 16,
    model: Annotated[
        str | None,
        typer.Option(help="the base model on this machine: folder, .gguf file or hub id; default: what is served"),
    ] = None,
    registry: Registry = REGISTRY_ADDRESS,
    inference: Inference = INFERENCE_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Compare what is served with PEFT's own forward in float32; exit 0 where they are equal, 1 otherwise."""
    if prompt and not all(prompt):
        raise WrongUsage("--prompt: a prompt must not be empty")
    _check_installed()
    with registry_client(registry) as to_registry, inference_client(inference) as to_inference:
        ref = parse_requested(adapter)
        version = to_registry.version(str(ref.whole))
        task = choose_task(ref, version.num_tasks)
        served_model = to_inference.model().base_model
        digest = with_task(version.digest, task)
        tensors = b"".join(to_registry.read(version.digest))
        served = serve(to_inference, digest, prompt or PROMPTS, max_tokens=max_tokens)
    with tempfile.TemporaryDirectory(prefix="softprompt-verify-") as folder:
        _write_checked(version, tensors, Path(folder))
        comparisons = _replay(served, _find_model(model, served_model.id), Path(folder), task, served_model.dtype)
    are_equal = all(comparison.is_equal for comparison in comparisons)
    spelling = with_task(f"{version.name}@{version.version}", task)
    if as_json:
        print_json(
            {
                "adapter": spelling,
                "digest": digest,
                "dtype": served_model.dtype,
                "equal": are_equal,
                "prompts": [{**asdict(one), "equal": one.is_equal} for one in comparisons],
            }
        )
    else:
        _report(console(), spelling, served_model.dtype, comparisons)
    raise typer.Exit(0 if are_equal else 1)


def _write_checked(version: registry_pb2.AdapterVersion, tensors: bytes, folder: Path) -> None:
    """Write what was downloaded for PEFT, after every check of ours; the config is made anew."""
    spec = parse_config(version.config_json)
    verifier = AdapterVerifier(spec, size_bytes=version.size_bytes, sha256=version.tensors_sha256)
    verifier.feed(tensors)
    if verifier.finish().digest != version.digest:
        raise DataCorrupted("the adapter's digest is not that of its config and bytes")
    write_folder(folder, spec, tensors)


def _find_model(model: str | None, served_id: str) -> Path:
    from softprompt_inference.model.source import resolve_model

    try:
        return resolve_model(model or served_id)
    except (ValueError, OSError) as error:
        hint = "" if model else "; say with --model where the base model is on this machine"
        raise Problem(f"{str(error).rstrip('.')}{hint}") from error


def _replay(
    served: Sequence[Served], model: Path, adapter: Path, task: int | None, dtype: str
) -> list[Comparison]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers warn of each other
        replay = Replay(model, adapter, task=task)
        return [compare(one, replay.run(one), tolerance=TOLERANCES[dtype]) for one in served]


def _check_installed() -> None:
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            raise Problem(
                f"verify replays PEFT on this machine, and {name} is not installed: "
                "pip install 'softprompt[inference,train]'"
            )


def _report(out: Console, spelling: str, dtype: str, comparisons: Sequence[Comparison]) -> None:
    tolerance = comparisons[0].tolerance
    out.print(f"{spelling}, as it is served in {dtype}, beside PEFT in float32", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("PROMPT", "TOKENS", "FIRST DIFFERENCE", "TIES", "LARGEST |Δ LOGPROB|"):
        table.add_column(column, no_wrap=True)
    for one in comparisons:
        prompt = one.prompt if len(one.prompt) <= 40 else one.prompt[:39] + "…"
        first = "none" if one.first_difference is None else f"token {one.first_difference}"
        table.add_row(f"{prompt!r}", str(one.num_tokens), first, str(one.num_ties), f"{one.largest_delta:.2g}")
    out.print(table, markup=False, highlight=False)
    out.print(_verdict(dtype, tolerance, comparisons), markup=False, highlight=False)


def _verdict(dtype: str, tolerance: float, comparisons: Sequence[Comparison]) -> str:
    words = "equal" if all(one.is_equal for one in comparisons) else "NOT EQUAL"
    rule = (
        f"log-probabilities within {tolerance:g}, and the same tokens where PEFT finds them further apart than "
        f"{2 * tolerance:g}"
    )
    if dtype == "float32":
        return f"{words}: {rule}"
    return (
        f"{words}: {rule}. {dtype} rounds the whole model, so smaller errors are not told from rounding; "
        "serve with --dtype float32 to compare exactly"
    )
