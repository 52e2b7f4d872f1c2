"""`python -m bench`."""

from bench.measure import main
from common.errors import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        main()
