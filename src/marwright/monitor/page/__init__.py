"""The page of `marwright dashboard`: what is served, how it does, and what it sees."""
