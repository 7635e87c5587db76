r"""`\d` and `\w` of expressions as ASCII's.

So they are in the patterns of JSON Schemas (ECMA-262), whereas llguidance's expressions are Rust's, in which `\d`
is also a digit of any other script: a telephone number could have these. `\p{Nd}` still says that.
"""

import re

_OUTSIDE = {"d": "[0-9]", "D": "[^0-9]", "w": "[0-9A-Za-z_]", "W": "[^0-9A-Za-z_]"}
_INSIDE = {"d": "[:digit:]", "D": "[:^digit:]", "w": "[:word:]", "W": "[:^word:]"}
# What is looked at as a whole: escapes; the beginning of a class, in which a first ] stands for itself; its end.
_PIECE = re.compile(r"\\(?P<escaped>.)|(?P<open>\[\^?\]?)|(?P<close>\])", re.DOTALL)


def ascii_classes(expression: str) -> str:
    """The same expression with the classes written out."""
    depth = 0

    def written_out(piece: re.Match[str]) -> str:
        nonlocal depth
        match piece.lastgroup:
            case "open":
                depth += 1
            case "close":
                depth = max(0, depth - 1)
            case _:
                return (_INSIDE if depth else _OUTSIDE).get(piece["escaped"], piece[0])
        return piece[0]

    return _PIECE.sub(written_out, expression)
