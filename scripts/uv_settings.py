"""Prints shell commands that give uv the settings that pip has: indexes, folders of wheels,
constraints, certificates. uv reads none of pip's files and variables. What is set for uv stays.

Usage: eval "$(python scripts/uv_settings.py)", with a Python that has pip.
"""

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping

UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
    "trusted-host": "UV_INSECURE_HOST",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
_SECTIONS = ("global", "install", ":env:")
"""Sections of pip's configuration that count for an installation, the strongest last."""


def uv_variables(pip_config: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set.

    Args:
        pip_config: lines of `pip config list`.
        environment: variables that are set already.
    """
    found: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for line in pip_config:
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in found and option in UV_NAMES:
            separator = "," if option == "find-links" else " "
            found[section][UV_NAMES[option]] = separator.join(str(ast.literal_eval(value)).split())
    # pip takes the best version of all indexes; uv by default the first index that has the package.
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for section in _SECTIONS:
        variables |= found[section]
    return {name: value for name, value in variables.items() if name not in environment}


if __name__ == "__main__":
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    for name, value in uv_variables(listed.splitlines(), os.environ).items():
        print(f"export {name}={shlex.quote(value)}")
