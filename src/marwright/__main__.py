"""`python -m marwright` is the command `marwright`."""

from __future__ import annotations

from marwright.cli.main import main

if __name__ == "__main__":
    main()
