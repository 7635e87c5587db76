"""How many files and connections a process may have open: many systems begin with 1024, whatever they allow."""

import resource

# More than any of our processes has.
_WANTED = 65_536


def allow_many() -> None:
    """Let this process open as many as it may, up to what we need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
