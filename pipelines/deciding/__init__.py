"""From features to decisions: what a fitted adapter's answers are worth, and what to do next."""
