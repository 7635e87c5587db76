"""A kind of adapters is one file: everything that has to do with kinds finds it by its FORMAT."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from softprompt.peft_folder import make_config
from softprompt_api.composition import role_of
from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import AdapterVerifier, ModelShape, Role, Rows, kinds, parse_config, read_adapter

NEW_KINDS = Path(__file__).with_name("new_kinds")
ROOT = Path(__file__).parents[3]
CONFIG: Mapping[str, object] = {
    "peft_type": "FACTORED_PROMPT",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 5,
    "token_dim": 8,
    "r": 2,
}


@pytest.fixture
def new_kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more file among the kinds."""
    loaded = set(sys.modules)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(NEW_KINDS)])
    monkeypatch.setattr(kinds, "FORMATS", kinds.find_formats())
    yield
    for name in set(sys.modules) - loaded:
        if name.startswith(kinds.__name__):
            del sys.modules[name]
            delattr(kinds, name.rpartition(".")[2])


def matrices() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "left": random.normal(size=(5, 2)).astype(np.float32),
        "right": random.normal(size=(2, 8)).astype(np.float32),
    }


@pytest.mark.usefixtures("new_kind")
def test_one_file_is_a_kind_from_its_config_to_what_is_served():
    spec = parse_config(json.dumps(CONFIG))
    data = save(matrices())
    verifier = AdapterVerifier(spec, size_bytes=len(data), model=ModelShape(hidden_size=8, dtype="float16"))
    verifier.feed(data)
    assert verifier.finish().tensor_dtype == "F32"
    rows = read_adapter(spec, data, dtype="float16")
    assert isinstance(rows, Rows)
    assert rows.data == (matrices()["left"] @ matrices()["right"]).tobytes()
    assert (rows.num_virtual_tokens, rows.row_size) == (5, 8)
    assert role_of(spec.kind) is Role.EMBEDDINGS
    # What `softprompt adapter verify` gives to PEFT.
    assert parse_config(json.dumps(make_config(spec, data))) == spec


@pytest.mark.usefixtures("new_kind")
@pytest.mark.parametrize(
    ("changes", "field"),
    [({"r": 0}, "config.r"), ({"scale": 2}, "config.scale"), ({"r": 3}, "tensors.left")],
)
def test_it_is_refused_as_others_are(changes: dict[str, object], field: str):
    data = save(matrices())
    with pytest.raises(AdapterInvalid) as refused:
        AdapterVerifier(parse_config(json.dumps({**CONFIG, **changes})), size_bytes=len(data)).feed(data)
    assert refused.value.field == field


@pytest.mark.usefixtures("new_kind")
def test_it_is_told_among_the_kinds_that_are_supported():
    with pytest.raises(AdapterInvalid, match="CPT, FACTORED_PROMPT, LORA"):
        parse_config('{"peft_type": "IA3"}')


def test_it_is_unknown_without_its_file():
    with pytest.raises(AdapterInvalid, match="'FACTORED_PROMPT'; supported"):
        parse_config(json.dumps(CONFIG))


def test_the_documentation_shows_that_file():
    assert (NEW_KINDS / "factored_prompt.py").read_text() in (ROOT / "docs" / "adapters.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "docs/adapters.md"])
@pytest.mark.parametrize("kind", kinds.FORMATS)
def test_every_kind_is_in_the_documentation(kind: str, document: str):
    assert f"`{kind}`" in (ROOT / document).read_text(), f"{document} does not tell of {kind}"
