"""`python -m dpctl` is the command `dpctl`."""

from dpctl.cli import main

if __name__ == "__main__":
    main()
