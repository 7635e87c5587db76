"""Generate the Python code of every .proto, beside it. `--check` fails when the committed code differs."""

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent / "protos"


def generate(out: Path) -> None:
    """Write the generated files of all protos below `out`."""
    well_known = Path(protoc.__file__).parent / "_proto"
    protos = sorted(str(path) for path in ROOT.rglob("*.proto"))
    # The plugins stand beside the interpreter, which need not be on PATH.
    plugins = [f"--plugin={path}" for path in Path(sys.executable).parent.glob("protoc-gen-*")]
    outputs = [f"--{plugin}_out={out}" for plugin in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *plugins, *outputs, *protos]):
        sys.exit("protoc failed")


def main() -> None:
    if "--check" not in sys.argv:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        changed = [
            str(made.relative_to(folder))
            for made in Path(folder).rglob("*_pb2*")
            if not (committed := ROOT / made.relative_to(folder)).exists()
            or committed.read_bytes() != made.read_bytes()
        ]
    if changed:
        sys.exit(f"generated code differs from its .proto, run `make protos`: {', '.join(sorted(changed))}")


if __name__ == "__main__":
    main()
