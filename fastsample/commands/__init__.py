"""The subcommands of `fastsample`, a module each: HELP, add_arguments(parser) and run(arguments).

Beside them:

console     an error of the user's is one line on stderr and exit status 2
sampling    the options that name a model and say how it is sampled; outputs, threads those of files and threads
about       what a model is; machine what it runs on
budget      repetitions while there is time for them
demo_rows, demo_loops    what the demo draws and compares
"""
