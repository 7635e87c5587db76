"""A process that says which grammars can be followed: what a stranger's one takes, it takes here.

`python -m softprompt_inference.grammar.checker FOLDER VOCAB_SIZE MAX_CPU_S`: out goes an empty line once it is
ready. Then in comes a line of JSON for each grammar, [kind, text], and out goes another, [reason, message] where
it is refused, and otherwise what a matcher took, as a share of what one may. What takes too much ends the process.
"""

import contextlib
import ctypes
import json
import resource
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from softprompt_api.errors import SoftpromptError

from softprompt_inference.grammar.compiler import GrammarCompiler
from softprompt_inference.parent import end_with_parent
from softprompt_inference.text.definition import read_definition

MAX_MEMORY_BYTES = 2**29


def main(folder: str, vocab_size: str, max_cpu_s: str) -> None:
    """Answer until there is nothing more to answer."""
    end_with_parent()
    compiler = GrammarCompiler(partial(read_definition, Path(folder)), vocab_size=int(vocab_size))
    with contextlib.suppress(SoftpromptError):  # it is told of each grammar
        compiler.prepare()
    _limit_memory()
    _say("")
    for line in sys.stdin.buffer:
        _limit_time(int(max_cpu_s))
        _say(json.dumps(_answer(compiler, *json.loads(line), max_cpu_s=int(max_cpu_s))))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _answer(compiler: GrammarCompiler, kind: str, text: str, *, max_cpu_s: int) -> Sequence[str] | float:
    began_s, began_bytes = time.process_time(), _allocated_bytes()
    try:
        kept = compiler.check(kind, text)
    except SoftpromptError as error:
        return error.reason, error.message
    num_bytes = _allocated_bytes() - began_bytes
    del kept  # not before: its memory is what an output holds to its end
    return max((time.process_time() - began_s) / max_cpu_s, num_bytes / MAX_MEMORY_BYTES)


class _Mallinfo2(ctypes.Structure):
    """The C library's `struct mallinfo2`."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def _allocated_bytes() -> int:
    """What is allocated now; 0 where the C library does not say."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = _Mallinfo2
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _limit_memory() -> None:
    """Where it is known how much there is by now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MAX_MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)


def _limit_time(max_cpu_s: int) -> None:
    """Of the grammar that comes next; the system counts whole seconds of all that the process has computed."""
    _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + max_cpu_s)


def _limit(kind: int, most: int) -> None:
    """Whoever started the service may have set a limit that cannot be raised."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main(*sys.argv[1:])
