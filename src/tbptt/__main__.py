"""`python -m tbptt` is the command `tbptt`."""

from tbptt.cli.main import main

if __name__ == "__main__":
    main()
