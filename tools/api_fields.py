"""Write the table of all fields of requests that generate into docs/api.md, from the models that check them.

`--check` fails when the table in the page differs.
"""

import re
import sys
from pathlib import Path

from pydantic.fields import FieldInfo
from softprompt_gateway.openai.fields import GenerationFields
from softprompt_gateway.openai.routes import REQUEST_MODELS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
_BEGIN, _END = "<!-- all fields: begin -->\n", "<!-- all fields: end -->\n"
_ROUTE = re.compile(r"Body of `POST (?P<route>[^`]+)`")


def table() -> str:
    """The table: a row for each field, a column for each route."""
    models = [model for model in REQUEST_MODELS if issubclass(model, GenerationFields)]
    routes = [_route(model) for model in models]
    names = sorted({name for model in models for name in model.model_fields})
    rows = [["field", *(f"`{route}`" for route in routes)], ["---"] * (len(routes) + 1)]
    rows += [[f"`{name}`", *(_told(model.model_fields.get(name)) for model in models)] for name in names]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _route(model: type[GenerationFields]) -> str:
    match = _ROUTE.match(model.__doc__ or "")
    assert match is not None, f"{model.__name__} does not say whose body it is"
    return match["route"]


def _told(field: FieldInfo | None) -> str:
    """What becomes of a field, as the model describes it."""
    if field is None:
        return "unknown"
    description = field.description or ""
    if description.startswith("accepted, without effect"):
        return "no-op"
    if description.startswith("not supported"):
        return "refused"
    if description.startswith("only "):
        return description.partition(":")[0]
    return "required" if field.is_required() else "yes"


def main() -> None:
    """Write the page, or check it."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(_BEGIN)
    old, mark, after = rest.partition(_END)
    assert mark, f"{PAGE.name} has no place for the table"
    if "--check" not in sys.argv:
        PAGE.write_text(before + _BEGIN + table() + _END + after, encoding="utf-8")
    elif old != table():
        sys.exit(
            f"the table of fields in {PAGE.name} is not what the models say: run `python tools/api_fields.py`"
        )


if __name__ == "__main__":
    main()
