"""One module a concept, each with a tuple `EXERCISES`. Adding an entry there is all a new exercise needs."""
