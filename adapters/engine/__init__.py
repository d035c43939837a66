"""What fits any method: search, training, programs, closed forms and scores."""
