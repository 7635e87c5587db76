"""The limit of open files, in a process of its own: it cannot be taken back."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
from softprompt_api.open_files import allow_many
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
allow_many()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "expected"), [(64, 512, "512 512"), (512, 512, "512 512")])
def test_as_many_as_the_system_allows_may_be_open(soft: int, hard: int, expected: str) -> None:
    script = SCRIPT.format(soft=soft, hard=hard)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == expected
