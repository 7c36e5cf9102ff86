"""`python -m experiments.bench.gpu`: the same as `lpsim bench gpu`, with nothing installed but torch."""

import argparse
import sys

from experiments.bench import gpu

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="lpsim bench gpu", description=gpu.__doc__)
    gpu.add_arguments(parser)
    sys.exit(gpu.run(parser.parse_args()))
