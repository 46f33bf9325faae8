"""`python -m moestro` is the moestro command."""

from moestro.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
