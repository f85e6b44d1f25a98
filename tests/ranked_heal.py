"""The command line with blocks that count as large however small they are: each has a group of its own."""

from ffn_fusion import cli
from ffn_fusion.healing import sharded

if __name__ == "__main__":
    sharded.LARGE = 0
    cli.main()
