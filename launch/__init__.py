"""The command line, the recipe, and the programs that put library, data and evaluators together."""
