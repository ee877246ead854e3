"""``python -m evolver``: the command line, also where no script is on the path."""

from evolver.commands.cli import main

if __name__ == "__main__":
    main()
