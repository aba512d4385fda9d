"""One file per subcommand of `megam3`: each has a `main(argv)`, which `megam3/cli.py` and the files of
`tools/` call."""
