"""Is it still good, and what did it save?"""
