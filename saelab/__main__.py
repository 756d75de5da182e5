"""``python -m saelab`` is the ``saelab`` command."""

from saelab.cli.main import run

if __name__ == "__main__":
    run()
