"""`python -m new_llm` is `new-llm`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
