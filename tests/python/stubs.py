"""Python modules from the repository's .proto files.

They are made anew for each run and never committed, so that the client can only be tested against
the schema as it is.
"""

from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[2] / "proto"


def generate(folder: Path) -> None:
    """Writes the modules of package `waypost.v1` below `folder`."""
    sources = sorted(str(path) for path in (PROTO / "waypost" / "v1").glob("*.proto"))
    arguments = [
        "protoc",
        f"--proto_path={PROTO}",
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
        *sources,
    ]
    if not sources or protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc could not compile the files in {PROTO}/waypost/v1")
