"""Commands: one module per group of commands; what is heavy is imported when one runs."""
