"""``python -m tokenmill`` is the command ``tokenmill``."""

from tokenmill.cli.main import main

if __name__ == "__main__":
    main()
