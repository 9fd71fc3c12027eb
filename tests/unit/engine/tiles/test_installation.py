"""What has to be installed for tile lists: nothing but what the package requires."""

import re
from importlib import metadata


def needed(package, extra=""):
    """The packages that a package requires on Linux, by name."""
    lines = metadata.requires(package) or []
    plain = [line for line in lines if "extra ==" not in line or f'extra == "{extra}"' in line]
    return {re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0].lower() for line in plain}


def test_the_frontend_brings_the_kernels_and_their_compiler():
    from cudnn_flex_compile.engine.tiles.frontend import kernels_missing

    assert "nvidia-cudnn-frontend" in needed("cudnn_flex_compile")
    assert {"nvidia-cutlass-dsl", "apache-tvm-ffi"} <= needed("nvidia-cudnn-frontend")
    assert kernels_missing() is None
