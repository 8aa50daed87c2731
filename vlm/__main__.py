"""The `vlm` command: finds the programs (data, eval, launch) wherever they were installed, and runs one."""

import sys
from importlib import import_module
from pathlib import Path


def programs_folder() -> Path:
    """The folder that holds the data, eval and launch packages: below `vlm` in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    bundled = package / "_programs"
    return bundled if bundled.is_dir() else package.parent


def main() -> None:
    """Run the command line. The programs go first on the path: a user's own `data/` or `eval/` must not shadow them."""
    folder = str(programs_folder())
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
    import_module("launch.main").run()


if __name__ == "__main__":
    main()
