"""A process that says which grammars can be followed: what a stranger's one takes, it takes here.

`python -m softprompt_inference.grammar.checker FOLDER VOCAB_SIZE MAX_CPU_S`: in comes a line of JSON for each one,
[kind, text], and out goes another, [reason, message] where it is refused, and otherwise how many seconds of a
processor it took. What takes too much ends the process.
"""

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
    compiler.prepare()
    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_time(int(max_cpu_s))
        answer = _answer(compiler, *json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(compiler: GrammarCompiler, kind: str, text: str) -> Sequence[str] | float:
    began_s = time.process_time()
    try:
        compiler.check(kind, text)
    except SoftpromptError as error:
        return error.reason, error.message
    return time.process_time() - began_s


def _limit_memory() -> None:
    """Where it is known how much there is by now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return
    most = pages * resource.getpagesize() + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(max_cpu_s: int) -> None:
    """Of the grammar that comes next; the system counts whole seconds of all that the process has computed."""
    most = int(time.process_time()) + 1 + max_cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(*sys.argv[1:])
