"""The subcommands of `fastsample`, a module each: HELP, add_arguments(parser) and run(arguments).

console holds what they share: an error of the user's is one line on stderr and exit status 2.
"""
