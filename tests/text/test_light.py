"""The text layer is cheap to import: no torch, no transformers, and the libraries it needs only on use."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import octavo.text


def test_imports() -> None:
    modules = [f"octavo.text.{module.name}" for module in pkgutil.iter_modules(octavo.text.__path__)]
    assert "octavo.text.chat" in modules
    # The environment is a set of Jinja classes; only a chat template that is used imports it.
    light = [name for name in modules if name != "octavo.text.template_environment"]
    script = (
        f"import sys, {', '.join(light)}\n"
        "print(sorted(sys.modules.keys() & {'torch', 'transformers', 'tokenizers', 'jinja2', 'numpy'}))\n"
        "import octavo.text.template_environment\n"
        "print(sorted(sys.modules.keys() & {'torch', 'transformers', 'numpy'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
