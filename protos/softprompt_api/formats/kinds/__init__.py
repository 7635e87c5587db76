"""The kinds of adapters: each is one module here, whose FORMAT says what the others must know of it."""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from softprompt_api.formats.spec import AdapterFormat


def find_formats() -> Mapping[str, AdapterFormat]:
    """The FORMAT of every module in this folder, by kind."""
    formats: dict[str, AdapterFormat] = {}
    for module in pkgutil.iter_modules(__path__):
        format_: AdapterFormat = import_module(f"{__name__}.{module.name}").FORMAT
        assert format_.kind not in formats
        formats[format_.kind] = format_
    return MappingProxyType(formats)


FORMATS = find_formats()
