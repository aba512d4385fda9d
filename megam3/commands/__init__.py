"""One file per subcommand of `megam3` that is no part of a run: each has a `main(argv)`, which `megam3/cli.py` and `tools/` call."""
