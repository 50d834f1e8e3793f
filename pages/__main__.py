"""Static pages made from the command line: python -m pages rate ..."""
import sys

import config
from pages import rating


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] != ["rate"] and not {"--help", "-h"} & {*words}:
        raise ValueError("expected python -m pages rate --systems=NAME=FOLDER,...; --help lists its options")
    rating.main(words[words[:1] == ["rate"]:])


if __name__ == "__main__":
    config.command(main)
