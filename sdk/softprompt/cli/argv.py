"""Flags that take several values, as in vLLM and Aphrodite: `--prompt-adapters a=1 b=2`."""

from collections.abc import Sequence

# What tells a further value from another argument.
SEVERAL_VALUES = {"--prompt-adapters": "=", "--lora-modules": "=", "--goodput": ":"}


def repeat_flags(argv: Sequence[str]) -> list[str]:
    """Write `--flag a=1 b=2` as `--flag a=1 --flag b=2`; everything else stays as it is.

    Further values hold '=' (':' after --goodput) and do not begin with '-', so that MODEL may follow them.
    """
    repeated: list[str] = []
    flag, awaits_value = "", False
    for position, word in enumerate(argv):
        if word == "--":
            return repeated + list(argv[position:])
        name, has_value, _ = word.partition("=")
        if word.startswith("-"):
            flag = name if name in SEVERAL_VALUES else ""
            repeated.append(word)
            awaits_value = bool(flag) and not has_value
        elif flag and not awaits_value and SEVERAL_VALUES[flag] in word:
            repeated += [flag, word]
        else:
            repeated.append(word)
            flag, awaits_value = (flag if awaits_value else ""), False
    return repeated
