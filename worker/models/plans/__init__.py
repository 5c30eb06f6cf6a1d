"""Where the tokens of each transformer class are: a plan per class, a few lines of data each."""
