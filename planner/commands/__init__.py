"""One module a command of the command line; :mod:`planner.cli` lists them."""
