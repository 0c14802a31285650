"""`python -m mtllama` is the `mtllama` command."""

from mtllama.cli import main

if __name__ == "__main__":
    main()
