"""``python -m hpc_grawa`` is ``hpc-grawa``."""

from .cli.main import main

if __name__ == "__main__":
    main()
