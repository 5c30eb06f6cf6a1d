"""Work over ranks: groups, tokens, stages, weights."""
