"""Whose an adapter is: names of tenants, and the names that adapters have across all of them.

    full name = name | tenant "/" name

Each tenant has a namespace of its own. The default tenant's adapters are called by their bare names; another's
have its name before theirs, everywhere but towards the tenant itself, who only ever sees and says bare names.
"""

import re

from softprompt_api.errors import InvalidArgument

DEFAULT_TENANT = "default"
TENANT_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")


def check_tenant(tenant: str, *, field: str = "tenant") -> str:
    """Return `tenant` if one may be called so; raise InvalidArgument that says what is allowed."""
    if not TENANT_PATTERN.match(tenant):
        raise InvalidArgument(
            "a tenant's name has 1 to 63 lower-case letters, digits, '.', '_' or '-', beginning with a letter or "
            "digit",
            field=field,
        )
    return tenant


def full_name(tenant: str, name: str) -> str:
    """A tenant's adapter, as it is called across all tenants."""
    return name if tenant == DEFAULT_TENANT else f"{tenant}/{name}"


def tenant_of(full: str) -> str:
    """Whose adapter a full name, or what begins with one, stands for."""
    tenant, slash, _ = full.partition("/")
    return tenant if slash else DEFAULT_TENANT


def local_name(full: str) -> str:
    """What its tenant calls an adapter."""
    return full.rpartition("/")[2]
