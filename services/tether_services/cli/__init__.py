"""The `tether` command: argument parsing, and one module per family of subcommands."""
