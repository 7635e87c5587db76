#!/bin/sh
# Print a Python of a supported version, the version that the constraints were made with first.
for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
    # Asked, not only looked up: a version manager's stand-in may be on PATH for a version that is not installed.
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
        command -v "$name"
        exit 0
    fi
done
echo "no Python 3.11 to 3.14 with venv was found; install one, or name it: make PYTHON=/path/to/python3.11" >&2
exit 1
