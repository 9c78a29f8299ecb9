"""`python -m octavo` is the `octavo` command."""

from octavo.cli.main import run

if __name__ == "__main__":
    run()
