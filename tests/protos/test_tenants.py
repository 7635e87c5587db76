"""Names across all tenants."""

import pytest
from softprompt_api.errors import InvalidArgument
from softprompt_api.tenants import check_tenant, full_name, local_name, tenant_of


@pytest.mark.parametrize(
    ("tenant", "full"), [("default", "tweets"), ("acme", "acme/tweets"), ("a-1.b", "a-1.b/tweets")]
)
def test_a_full_name_tells_tenant_and_name(tenant, full):
    assert full_name(check_tenant(tenant), "tweets") == full
    assert (tenant_of(full), local_name(full)) == (tenant, "tweets")


@pytest.mark.parametrize("tenant", ["", "A", "a/b", "-a", "a b", "~a", "a\n", "é", "a" * 64])
def test_what_is_no_tenant_is_refused(tenant):
    with pytest.raises(InvalidArgument) as refused:
        check_tenant(tenant)
    assert refused.value.field == "tenant"
