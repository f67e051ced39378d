"""Parts of the commands, a table of results each."""
