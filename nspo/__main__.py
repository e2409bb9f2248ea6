"""`python -m nspo` is the command `nspo`."""

import sys
from importlib.metadata import version


def main() -> int:
    """Run the command line; without the packages of the pipeline, say in a line how to install them."""
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"nspo {version('nspo')}\n")
        return 0
    try:
        from nspo.cli.main import main as command
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nspo"):
            raise
        sys.stderr.write(f"nspo: error: {error.name} is not installed: pip install 'nspo[pipeline]'\n")
        return 2
    return command()


if __name__ == "__main__":
    sys.exit(main())
