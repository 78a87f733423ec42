"""`python -m controlplane.cli`: the same as `deepflow`."""

from controlplane.cli import main

main()
