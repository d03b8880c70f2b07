"""The command line: `python -m core analyze …`, `accuracy …` and `heal …`."""

from __future__ import annotations

import argparse
import sys

from core.cache import default_notice
from core.commands import accuracy, analyze, heal
from core.errors import LayerShapError, advice


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status, 2 after an error that the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m core", description="LayerShap, no screen")
    commands = parser.add_subparsers(required=True)
    for command in (analyze, accuracy, heal):
        command.add(commands)
    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except LayerShapError as error:
        print(f"layershap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "" if default_notice() else "; what was measured is kept"
        print(f"layershap: stopped{kept}", file=sys.stderr)
        return 130
    except Exception as error:
        if (sentence := advice(error)) is None:
            raise
        print(f"layershap: {sentence}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
