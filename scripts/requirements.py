"""Print the dependencies of the named extras of pyproject.toml, one a line: ``python scripts/requirements.py dev demo``."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
print("\n".join(sorted({name for extra in sys.argv[1:] for name in project["optional-dependencies"][extra]})))
