"""`python -m ffn_fusion`."""

from ffn_fusion.cli import main

main()
