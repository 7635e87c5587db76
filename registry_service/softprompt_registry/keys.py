"""Every key in the store, in one place.

    sp:id                            counter of global ids
    sp:names                         sorted set of names, for listing; those of other tenants behind "~"
    sp:events                        stream of changes
    sp:base                          hash: base model id → fingerprint
    sp:base:announced                sorted set: base model id by the Unix time of its last announcement
    sp:{n:<name>}                    hash: next version number, revision, sha256 of what points; outlives the name
    sp:{n:<name>}:a                  hash: alias → version id; `latest` only where it is not the highest version
    sp:{n:<name>}:v                  sorted set: version id by version number
    sp:{v:<id>}                      hash: one version
    sp:{d:<digest>}                  sorted set: ids of the versions with this digest, by id
    sp:{blob:<sha256>}:m             hash: sizes, digests of the chunks, number of versions that use the blob
    sp:{blob:<sha256>}:c:<i>         chunk of a blob
    sp:{blob:<sha256>}:u:<upload>:<i>   chunk of an upload that is not published; expires
    sp:{i:<sha256 of key>}           idempotency key → what it made; expires
    sp:k:<sha256 of key>             hash: one API key
    sp:keys                          sorted set of the API keys' sha256, for listing
    sp:keys:made                     how many API keys were ever made
    sp:leases                        which registry gives leases
    sp:probe:<random>                what a registry that starts writes and reads back; expires

Hash tags keep what belongs together in one slot of a cluster. No key holds a client's text but checked names.
"""

import hashlib

IDS = "sp:id"
NAMES = "sp:names"
EVENTS = "sp:events"
BASE_MODELS = "sp:base"
ANNOUNCED = "sp:base:announced"
API_KEYS = "sp:keys"
LEASES = "sp:leases"
NUM_KEYS_MADE = "sp:keys:made"


def name(adapter: str) -> str:
    """Counters of a name: its next version's number, and its revision."""
    return f"sp:{{n:{adapter}}}"


def aliases(adapter: str) -> str:
    """What a name's aliases point to."""
    return f"sp:{{n:{adapter}}}:a"


def versions(adapter: str) -> str:
    """A name's live versions."""
    return f"sp:{{n:{adapter}}}:v"


def version(version_id: int | str) -> str:
    """One version."""
    return f"sp:{{v:{version_id}}}"


def digest(adapter_digest: str) -> str:
    """Versions that share a digest."""
    return f"sp:{{d:{adapter_digest.removeprefix('sha256:')}}}"


def blob(sha256: str) -> str:
    """A blob's facts."""
    return f"sp:{{blob:{sha256}}}:m"


def chunk(sha256: str, index: int | str) -> str:
    """A published chunk."""
    return f"sp:{{blob:{sha256}}}:c:{index}"


def staged(sha256: str, upload: str, index: int) -> str:
    """A chunk of an upload under way."""
    return f"sp:{{blob:{sha256}}}:u:{upload}:{index}"


def idempotency(key: str) -> str:
    """What an idempotency key made."""
    return f"sp:{{i:{hashlib.sha256(key.encode()).hexdigest()}}}"


def api_key(sha256: str) -> str:
    """One API key."""
    return f"sp:k:{sha256}"


def probe(random: str) -> str:
    """What one start of a registry writes."""
    return f"sp:probe:{random}"


def listed(full_name: str) -> str:
    """A name, or the beginning of one, as it is sorted: the default tenant's first, then those of each other."""
    return f"~{full_name}" if "/" in full_name else full_name


def unlisted(member: str) -> str:
    """The name that stands in the sorted set like this."""
    return member.removeprefix("~")
